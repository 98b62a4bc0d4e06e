"""How a figure stands in a line or in a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]


def markdown(head: Sequence[str], body: Sequence[Sequence[str]], words: int) -> str:
    """Rows as a Markdown table, the first `words` columns aligned left."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *body])


def number(line: Line, key: str, digits: int) -> str:
    """A figure, or a dash where there is none."""
    value = line.get(key, "")
    return "–" if value == "" else f"{float(value):.{digits}f}"


def spread(line: Line, key: str, scale: float = 1.0) -> str:
    """The median and its spread, or a dash where there is none."""
    if line.get(key, "") == "":
        return "–"
    median, low, high = (float(line[k]) * scale for k in (key, f"{key}_p20", f"{key}_p80"))
    return f"{short(median)} [{short(low)}–{short(high)}]"


def share(line: Line, key: str) -> str:
    """A share in percent, or nothing where there is none."""
    value = line.get(key, "")
    return "" if value == "" else f"{float(value):.1%}"


def checked(line: Line) -> str:
    """The difference found / what is allowed."""
    return f"{float(line['error']):.0e} / {float(line['tolerance']):.0e}"


def gates(line: Line) -> str:
    """On the terminal: the difference found and allowed, from float64 and from diffusers."""
    return "".join(f"{line[key]:>10.1e}" for key in ("error", "tolerance", "diffusers_error", "diffusers_tolerance"))


def short(value: float) -> str:
    """Three significant digits, no exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
