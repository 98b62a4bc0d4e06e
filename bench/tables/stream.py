"""The line on the terminal and the table in README of streams."""

from __future__ import annotations

from collections.abc import Sequence

from bench.tables.cells import Line, markdown, short, spread

ABOUT = (
    "Requests of many plans (5 to 30 steps, four samplers), all there at the start: `python bench/run.py stream`. In "
    "one running batch (*stream*), in batches of equal plans in the order they came (*batched*), one by one (*alone*). "
    "ms per image, and seconds until a request's own sample is there: median / 95 %. All three draw the same samples."
)
_WAYS = ("stream", "batched", "alone")


def show(line: Line | None) -> str:
    """One line on the terminal; None gives the header."""
    if line is None:
        head = f"{'network':<14}{'slots':>6}"
        head += "".join(f"{f'{way} ms/image [p20-p80]':>34}{'latency s':>11}{'p95':>8}" for way in _WAYS)
        return head + f"{'error':>10}{'allowed':>10}"
    case = f"{line['network']:<14}{line['batch']:>6}"
    gate = f"{line['error']:>10.1e}{line['tolerance']:>10.1e}"
    if line["gate"] == "red":
        return f"{case}WRONG: no figure {gate}"
    for way in _WAYS:
        latency, late = (float(line[f"{way}_latency{suffix}"]) for suffix in ("", "_p95"))
        case += f"{spread(line, f'{way}_seconds', 1e3):>34}{latency:>11.3f}{late:>8.3f}"
    return case + gate


def table(lines: Sequence[Line]) -> str:
    """The table in README."""
    head = ["network", "slots"]
    head += [f"{way} {what}" for way in _WAYS for what in ("ms/image", "latency")]
    body = []
    for line in lines:
        cells = [line["network"], str(line["batch"])]
        for way in _WAYS:
            latency, late = (float(line[f"{way}_latency{suffix}"]) for suffix in ("", "_p95"))
            cells += [spread(line, f"{way}_seconds", 1e3), f"{short(latency)} / {short(late)}"]
        body.append(cells)
    return markdown(head, body, 1)
