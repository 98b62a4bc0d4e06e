"""The line on the terminal and the table in README of a UNet's forward pass."""

from __future__ import annotations

from collections.abc import Sequence

from bench.tables.cells import Line, checked, markdown, number, share, spread

ABOUT = (
    "One forward pass of a UNet: `python bench/run.py unet`. Median ms, all contenders in turn, the same random "
    "weights; *last*: channels_last; *fast*: `net.fast()` with the times of a plan prepared. *× diffusers*: against "
    "its faster eager form. *of F0*: the network's operations at the rate of a large matrix product, over 100 % where "
    "Winograd's convolutions need fewer; *of F2*: each of the fast form's kernels at its own limit, without gaps. "
    "*error*: against float64 / twice diffusers' own."
)


def show(line: Line | None) -> str:
    """One line on the terminal; None gives the header."""
    if line is None:
        return (
            f"{'network':<14}{'batch':>5} {'dtype':<9}{'contender':<26}{'ms [p20-p80]':>24}{'x diffusers':>12}"
            f"{'of F0':>8}{'of F2':>8}{'compiled in s':>14}{'error':>10}{'allowed':>10}"
        )
    case = f"{line['network']:<14}{line['batch']:>5} {line['model_dtype']:<9}{line['executor']:<26}"
    gate = f"{line['error']:>10.1e}{line['tolerance']:>10.1e}"
    if line["gate"] == "red":
        return f"{case}WRONG: no figure {gate}"
    return (
        f"{case}{spread(line, 'us', 1e-3):>24}{line['ratio_diffusers']:>12.2f}{share(line, 'f0_fraction'):>8}"
        f"{share(line, 'f2_fraction'):>8}{number(line, 'took', 1):>14}{gate}"
    )


def table(lines: Sequence[Line]) -> str:
    """The table in README."""
    head = ["network", "dtype", "contender", "batch", "ms", "× diffusers", "of F0", "of F2", "compiled in s"]
    head += ["error / allowed"]
    body = [
        [
            line["network"],
            line["model_dtype"],
            line["executor"],
            str(line["batch"]),
            spread(line, "us", 1e-3),
            number(line, "ratio_diffusers", 2),
            share(line, "f0_fraction"),
            share(line, "f2_fraction"),
            number(line, "took", 0),
            checked(line),
        ]
        for line in lines
    ]
    return markdown(head, body, 3)
