"""The line on the terminal and the table in README of group normalisation."""

from __future__ import annotations

from collections.abc import Sequence

from bench.tables.cells import Line, checked, markdown, number, share, short, spread

ABOUT = (
    "Group normalisation with SiLU, channels_last, on every shape of the UNets: `python bench/run.py norm`. Median µs, "
    "all contenders in turn. *of copy*: one read and one write of the image in a second, over torch's `copy_`. "
    "*error*: largest difference from float64 / twice torch's own."
)


def show(line: Line | None) -> str:
    """One line on the terminal; None gives the header."""
    if line is None:
        return (
            f"{'network':<14}{'shape':<18}{'dtype':<9}{'executor':<10}{'us [p20-p80]':>24}{'torch us':>26}"
            f"{'compiled us':>26}{'x torch':>8}{'x comp':>8}{'GB/s':>8}{'of copy':>8}{'error':>10}{'allowed':>10}"
        )
    case = f"{line['network']:<14}{line['shape']:<18}{line['model_dtype']:<9}{line['executor']:<10}"
    gate = f"{line['error']:>10.1e}{line['tolerance']:>10.1e}"
    if line["gate"] == "red":
        return f"{case}WRONG: no figure {gate}"
    return (
        f"{case}{spread(line, 'us'):>24}{spread(line, 'torch_us'):>26}{spread(line, 'compiled_us'):>26}"
        f"{line['ratio_torch']:>8.2f}{number(line, 'ratio_compiled', 2):>8}{line['gbs']:>8.0f}"
        f"{share(line, 'copy_fraction'):>8}{gate}"
    )


def table(lines: Sequence[Line]) -> str:
    """The table in README."""
    head = ["network", "shape", "network output", "kernel", "fastdiff µs", "torch µs", "compiled µs", "× torch"]
    head += ["GB/s", "of copy", "error / allowed"]
    body = [
        [
            line["network"],
            line["shape"].replace("x", "×"),
            line["model_dtype"],
            line["executor"],
            *(spread(line, key) for key in ("us", "torch_us", "compiled_us")),
            number(line, "ratio_torch", 2),
            short(float(line["gbs"])),
            f"{float(line['copy_fraction']):.0%}",
            checked(line),
        ]
        for line in lines
    ]
    return markdown(head, body, 4)
