"""Samples to files, none left half-written: pixels, grids, folders, arrays; and pictures from files.

May import: files.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from torch import Tensor

from fastdiff.files import check_place, check_writable_file, write_atomically


def to_pixels(x: Tensor) -> NDArray[np.uint8]:
    """[B, C, H, W] in [-1, 1] to uint8 [B, H, W, C], values outside clipped."""
    scaled = ((x.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round()
    return np.ascontiguousarray(scaled.byte().permute(0, 2, 3, 1).cpu().numpy())


def to_8_bit(picture: Image.Image, mode: str) -> Image.Image:
    """A picture of 8 bits in mode "L", "RGB" or "RGBA"; grey of 16 bits (modes I;16 and I) becomes v / 257, rounded.

    Transparency that `mode` has no channel for is left out: the colours are as stored, over no background. Raises
    ValueError for floats (mode F) and for integers outside 0 .. 65535, whose black and white no file says.
    """
    if picture.mode == "F":
        raise ValueError("a picture of floats (mode F) does not say which are black and white: save it as 8 or 16 bit")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        grey = np.asarray(picture).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(
                f"a grey picture of 32-bit integers must hold 0 .. 65535, got {grey.min()} .. {grey.max()}: save it as "
                "8 or 16 bit"
            )
        picture = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    return picture.convert(mode)


def read(path: Path, shape: Sequence[int]) -> Tensor:
    """The picture in a file as fp32 [C, H, W] in [-1, 1], as `to_8_bit` reads it.

    Raises ValueError where it is not a picture or not of this shape.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        raise ValueError(f"{path}: pictures have 1 or 3 channels, and the model's samples {channels}")
    if path.is_dir():
        raise ValueError(f"expected a picture file (PNG, JPEG ...) to read, got a folder: {path}")
    try:
        with Image.open(path) as picture:
            pixels = np.array(to_8_bit(picture, "L" if channels == 1 else "RGB"), np.float32)
    except UnidentifiedImageError:
        raise ValueError(f"expected a picture file (PNG, JPEG ...) to read, got {path}, which is none") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if pixels.shape[:2] != (height, width):
        got = "x".join(map(str, pixels.shape[:2]))
        raise ValueError(f"{path} is {got}, and the model draws {height}x{width}: crop, scale or pad it to that first")
    return torch.from_numpy(pixels / 127.5 - 1.0).reshape(height, width, channels).permute(2, 0, 1)


def check_writable(out: Path) -> None:
    """Raise OSError now if `out` could not be written later."""
    if out.suffix in (".png", ".npy"):
        check_writable_file(out)
        return
    check_place(out)
    if out.suffix and not out.is_dir():
        raise ValueError(
            f"cannot write {out}: pictures go to a .png grid, a .npy array or a folder, got {out.suffix!r}"
        )
    if out.is_file():
        raise FileExistsError(
            f"cannot write pictures into {out}: it is a file; choose a folder, or a name ending in .png or .npy"
        )


def save(out: Path, pixels: NDArray[np.uint8], labels: Sequence[str], columns: int) -> None:
    """Write a .png grid, a .npy array uint8 [B, H, W, C], or (any other name) a folder of one PNG per sample."""
    if out.suffix == ".png":
        picture = grid(pixels, labels, columns)
        write_atomically(out, lambda temporary: picture.save(temporary, format="PNG"))
    elif out.suffix == ".npy":
        save_array(out, pixels)
    else:
        _save_folder(out, pixels, labels)


def save_array(out: Path, array: NDArray[Any]) -> None:
    """Write an .npy whole, or not at all."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, array)

    write_atomically(out, write)


def grid(pixels: NDArray[np.uint8], labels: Sequence[str], columns: int, zoom: int = 2, gap: int = 2) -> Image.Image:
    """Rows of `columns` samples, each row named on its left by the label of its first sample."""
    count, height, width = len(pixels), pixels.shape[1] * zoom, pixels.shape[2] * zoom
    rows = -(-count // columns)
    font = ImageFont.load_default(size=14)
    margin = max((int(font.getlength(label)) + 12 for label in labels if label), default=0)
    canvas = Image.new("RGB", (margin + columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for i in range(count):
        row, column = divmod(i, columns)
        top = gap + row * (height + gap)
        tile = _picture(pixels[i]).convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(tile, (margin + gap + column * (width + gap), top))
        if column == 0 and labels:
            draw.text((6, top + height // 2), labels[i], fill="black", font=font, anchor="lm")
    return canvas


def _save_folder(out: Path, pixels: NDArray[np.uint8], labels: Sequence[str]) -> None:
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.resolve().parent))
    try:
        names = []
        for i, image in enumerate(pixels):
            label = labels[i].lower().replace("/", "-").replace(" ", "_") if labels else ""
            names.append(f"{i:05d}{'_' + label if label else ''}.png")
            _picture(image).save(staging / names[-1])
        out.mkdir(exist_ok=True)
        for name in names:
            os.replace(staging / name, out / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _picture(image: NDArray[np.uint8]) -> Image.Image:
    if image.shape[2] not in (1, 3):
        raise ValueError(f"pictures have 1 or 3 channels, got {image.shape[2]}; write a .npy file instead")
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
