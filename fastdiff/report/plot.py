"""A log-log plot in panels, drawn with Pillow. May import: nothing of the package."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SCALE = 2  # drawn at twice the size and reduced: Pillow's lines are not smooth
WIDTH, HEIGHT = 300, 300  # of the axes of one panel, in pixels of the result
LEFT, TOP, LEGEND, COLUMNS, MARGIN = 62, 34, 150, 3, 24
X_RANGE, Y_RANGE = (4.0, 600.0), (1e-7, 1e2)
X_TICKS = (5, 10, 20, 50, 100, 200, 500)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a4a1e", "#000000", "#8a2be2", "#7f9a00")
GREY, FAINT = "#9a9a9a", "#e4e4e4"


@dataclass(frozen=True)
class Curve:
    """A named line: (evaluations, error) at growing numbers of evaluations; what lies outside the axes is not drawn."""

    name: str
    points: Sequence[tuple[int, float]]


def draw(title: str, panels: Mapping[str, Sequence[Curve]]) -> Image.Image:
    """Panels of curves, `COLUMNS` in a row, on the same axes, each with its legend below; deterministic."""
    cell = LEFT + WIDTH + MARGIN, TOP + HEIGHT + LEGEND
    rows = -(-len(panels) // COLUMNS)
    size = (COLUMNS * cell[0], MARGIN + TOP + rows * cell[1])
    canvas = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((LEFT * SCALE, MARGIN * SCALE), title, fill="black", font=_font(16), anchor="lm")
    for i, (name, curves) in enumerate(panels.items()):
        row, column = divmod(i, COLUMNS)
        corner = (column * cell[0] + LEFT) * SCALE, (MARGIN + TOP + row * cell[1] + TOP) * SCALE
        _Panel(pen, *corner).draw(name, curves)
    return canvas.resize(size, Image.Resampling.LANCZOS).quantize(
        256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
    )


class _Panel:
    """One pair of axes whose upper left corner is at (left, top) of the large canvas."""

    def __init__(self, pen: ImageDraw.ImageDraw, left: int, top: int) -> None:
        self.pen, self.left, self.top = pen, left, top
        self.width, self.height = WIDTH * SCALE, HEIGHT * SCALE

    def draw(self, title: str, curves: Sequence[Curve]) -> None:
        self._axes(title)
        for i, curve in enumerate(curves):
            # lines that coincide stay visible: the first ones are wider
            self._line(curve.points, COLOURS[i % len(COLOURS)], SCALE * (1.4 + 0.5 * (len(curves) - 1 - i)))
        for i, curve in enumerate(curves):
            self._legend(i, curve.name, COLOURS[i % len(COLOURS)])

    def _place(self, x: float, y: float) -> tuple[float, float]:
        across = math.log(x / X_RANGE[0]) / math.log(X_RANGE[1] / X_RANGE[0])
        up = math.log(y / Y_RANGE[0]) / math.log(Y_RANGE[1] / Y_RANGE[0])
        return self.left + across * self.width, self.top + (1.0 - up) * self.height

    def _axes(self, title: str) -> None:
        small, right, bottom = _font(11), self.left + self.width, self.top + self.height
        for tick in X_TICKS:
            x = self._place(tick, 1.0)[0]
            self.pen.line((x, self.top, x, bottom), fill=FAINT, width=SCALE)
            self.pen.text((x, bottom + 5 * SCALE), str(tick), fill="black", font=small, anchor="ma")
        for power in range(round(math.log10(Y_RANGE[0])), round(math.log10(Y_RANGE[1])) + 1):
            y = self._place(10.0, 10.0**power)[1]
            self.pen.line((self.left, y, right, y), fill=FAINT, width=SCALE)
            self.pen.text((self.left - 5 * SCALE, y), f"1e{power}", fill="black", font=small, anchor="rm")
        for order in (1, 2, 3):
            self._guide(order)
        self.pen.rectangle((self.left, self.top, right, bottom), outline="black", width=SCALE)
        self.pen.text((self.left, self.top - 8 * SCALE), title, fill="black", font=_font(14), anchor="ls")
        self.pen.text((right, bottom + 20 * SCALE), "model evaluations (NFE)", fill="black", font=small, anchor="ra")
        self._upward("|error|", self.left - 42 * SCALE, (self.top + bottom) // 2)

    def _upward(self, label: str, x: int, y: int) -> None:
        """Text that reads upwards, centred on (x, y)."""
        width, height = round(_font(11).getlength(label)), 16 * SCALE
        mask = Image.new("L", (width, height))
        ImageDraw.Draw(mask).text((0, height // 2), label, fill=255, font=_font(11), anchor="lm")
        self.pen.bitmap((x - height // 2, y - width // 2), mask.rotate(90, expand=True), fill="black")

    def _guide(self, order: int) -> None:
        """A dashed line of slope -order from error 1 at 5 evaluations."""
        end = min(X_RANGE[1], 5.0 * Y_RANGE[0] ** (-1.0 / order))
        points = [5.0 * (end / 5.0) ** (i / 60) for i in range(61)]
        for a, b in zip(points[::2], points[1::2], strict=False):
            ends = self._place(a, (5.0 / a) ** order), self._place(b, (5.0 / b) ** order)
            self.pen.line(ends, fill=GREY, width=SCALE)
        x, y = self._place(400.0, (5.0 / 400.0) ** order)
        self.pen.rectangle(self.pen.textbbox((x, y), f"order {order}", font=_font(10), anchor="mm"), fill="white")
        self.pen.text((x, y), f"order {order}", fill="#606060", font=_font(10), anchor="mm")

    def _line(self, points: Sequence[tuple[int, float]], colour: str, width: float) -> None:
        seen = [self._place(x, y) for x, y in points if _within(x, X_RANGE) and _within(y, Y_RANGE)]
        if len(seen) > 1:
            self.pen.line(seen, fill=colour, width=round(width), joint="curve")
        radius = width / 2 + SCALE
        for x, y in seen:
            self.pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def _legend(self, index: int, name: str, colour: str) -> None:
        row, column = divmod(index, 2)
        x = self.left + column * self.width // 2
        y = self.top + self.height + (48 + 16 * row) * SCALE
        self.pen.line((x, y, x + 14 * SCALE, y), fill=colour, width=3 * SCALE)
        self.pen.text((x + 19 * SCALE, y), name, fill="black", font=_font(11), anchor="lm")


def _within(value: float, ends: tuple[float, float]) -> bool:
    return ends[0] <= value <= ends[1]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size * SCALE)
