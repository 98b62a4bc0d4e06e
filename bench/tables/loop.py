"""The line on the terminal and the table in README of whole runs."""

from __future__ import annotations

from collections.abc import Sequence

from bench.tables.cells import Line, markdown, share, spread

ABOUT = (
    "Whole runs of 20 steps, network included: `python bench/run.py loop`. Median ms per image. *outside*: share of "
    "the time not spent in the network; the rest is the network's, and no sampler makes that faster. *tiny*: three "
    "3x3 convolutions of 16 channels."
)


def show(line: Line | None) -> str:
    """One line on the terminal; None gives the header."""
    if line is None:
        return (
            f"{'network':<14}{'sampler':<16}{'batch':>5}{'ms/image [p20-p80]':>28}{'diffusers':>28}{'ratio':>7}"
            f"{'outside net':>12}{'diffusers':>11}{'error':>10}{'allowed':>10}"
        )
    case = f"{line['network']:<14}{line['solver']:<16}{line['batch']:>5}"
    gate = f"{line['error']:>10.1e}{line['tolerance']:>10.1e}"
    if line["gate"] == "red":
        return f"{case}WRONG: no figure {gate}"
    return (
        f"{case}{spread(line, 'seconds', 1e3):>28}{spread(line, 'diffusers_seconds', 1e3):>28}"
        f"{line['ratio_diffusers']:>7.2f}{share(line, 'seconds_outside'):>12}"
        f"{share(line, 'diffusers_seconds_outside'):>11}{gate}"
    )


def table(lines: Sequence[Line]) -> str:
    """The table in README."""
    head = ["network", "sampler", "batch", "fastdiff", "diffusers", "ratio", "outside", "outside, diffusers", ""]
    body = []
    for line in lines:
        outside = line["diffusers_seconds_outside"]
        small = outside != "" and float(outside) < 0.1
        body.append(
            [
                line["network"],
                line["solver"],
                str(line["batch"]),
                spread(line, "seconds", 1e3),
                spread(line, "diffusers_seconds", 1e3),
                f"{float(line['ratio_diffusers']):.2f}",
                share(line, "seconds_outside"),
                share(line, "diffusers_seconds_outside"),
                "the network dominates" if small else "",
            ]
        )
    return markdown(head, body, 2)
