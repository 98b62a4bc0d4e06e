"""The line on the terminal and the table in README of diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Sequence

from bench.tables.cells import Line, checked, markdown, number, spread

ABOUT = (
    "diffusers' pipelines with tiny random components, 20 steps, before and after `accelerate(pipe)`: `python "
    "bench/run.py pipelines`. *outside*: median µs of a step that are not the network's, from the beginning of the "
    "denoising loop to its end, drawing included. *call*: the whole call in ms, with all that comes before and after "
    "the loop, the picture's decoding left out. *error*: largest difference of the pictures / what is allowed."
)


def show(line: Line | None) -> str:
    """One line on the terminal; None gives the header."""
    if line is None:
        return (
            f"{'pipeline':<34}{'scheduler':<34}{'outside, us/step [p20-p80]':>30}{'before':>30}{'x':>7}"
            f"{'call ms [p20-p80]':>26}{'before':>26}{'x':>7}{'error':>10}{'allowed':>10}"
        )
    case = f"{line['network']:<34}{line['solver']:<34}"
    gate = f"{line['error']:>10.1e}{line['tolerance']:>10.1e}"
    if line["gate"] == "red":
        return f"{case}WRONG: no figure {gate}"
    return (
        f"{case}{spread(line, 'us'):>30}{spread(line, 'diffusers_us'):>30}{number(line, 'ratio_diffusers', 1):>7}"
        f"{spread(line, 'seconds', 1e3):>26}{spread(line, 'diffusers_seconds', 1e3):>26}{_whole(line):>7}{gate}"
    )


def table(lines: Sequence[Line]) -> str:
    """The table in README."""
    head = ["pipeline", "scheduler", "outside", "outside, before", "ratio", "call", "call, before", "ratio"]
    head += ["error / allowed"]
    body = [
        [
            line["network"],
            line["solver"],
            spread(line, "us"),
            spread(line, "diffusers_us"),
            number(line, "ratio_diffusers", 1),
            spread(line, "seconds", 1e3),
            spread(line, "diffusers_seconds", 1e3),
            _whole(line),
            checked(line),
        ]
        for line in lines
    ]
    return markdown(head, body, 2)


def _whole(line: Line) -> str:
    """Of a whole call: the time before over the time now."""
    return f"{float(line['diffusers_seconds']) / float(line['seconds']):.2f}"
