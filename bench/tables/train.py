"""The line on the terminal and the table in README of training steps."""

from __future__ import annotations

from collections.abc import Sequence

from bench.tables.cells import Line, checked, markdown, number, spread

ABOUT = (
    "Whole training steps, network included: `python bench/run.py train`. Median ms per image of the trainer's step "
    "and of diffusers' unconditional training example's, same network, weights and precision, with AdamW and an "
    "average; then the optimizer and the average alone. *MB/image*: what the forward pass keeps for the backward "
    "pass. *error*: of the gradient, of its largest entry / what is allowed."
)


def show(line: Line | None) -> str:
    """One line on the terminal; None gives the header."""
    if line is None:
        return (
            f"{'network':<14}{'part':<18}{'batch':>5}{'ms/image [p20-p80]':>28}{'diffusers':>28}{'ratio':>7}"
            f"{'images/s':>10}{'MB/image':>10}{'error':>10}{'allowed':>10}"
        )
    case = f"{line['network']:<14}{line['solver']:<18}{line['batch']:>5}"
    gate = f"{line['error']:>10.1e}{line['tolerance']:>10.1e}"
    if line["gate"] == "red":
        return f"{case}WRONG: no figure {gate}"
    return (
        f"{case}{spread(line, 'seconds', 1e3):>28}{spread(line, 'diffusers_seconds', 1e3):>28}"
        f"{line['ratio_diffusers']:>7.2f}{_rate(line):>10}{_megabytes(line):>10}{gate}"
    )


def table(lines: Sequence[Line]) -> str:
    """The table in README."""
    head = ["network", "part", "batch", "fastdiff", "diffusers", "ratio", "images/s", "MB/image", "error / allowed"]
    body = [
        [
            line["network"],
            line["solver"],
            str(line["batch"]),
            spread(line, "seconds", 1e3),
            spread(line, "diffusers_seconds", 1e3),
            number(line, "ratio_diffusers", 2),
            _rate(line),
            _megabytes(line),
            checked(line),
        ]
        for line in lines
        if line["gate"] != "red"
    ]
    return markdown(head, body, 2)


def _rate(line: Line) -> str:
    return f"{1 / float(line['seconds']):,.1f}" if line["solver"] == "step" else "–"


def _megabytes(line: Line) -> str:
    if line["solver"] != "step":
        return "–"
    return f"{float(line['bytes_per_element']) * float(line['elements']) / float(line['batch']) / 1e6:.1f}"
