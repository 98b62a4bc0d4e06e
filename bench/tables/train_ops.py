"""The line on the terminal and the table in README of noising and loss."""

from __future__ import annotations

from collections.abc import Sequence

from bench.tables.cells import Line, checked, gates, markdown, number, spread

ABOUT = (
    "Noising and loss of a training step, forward and backward, network excluded: `python bench/run.py train-ops`. "
    "Median µs of the DDPM objective as the trainer calls it, and of its two kernels alone, against the four lines of "
    "diffusers' training example (`randn_like`, `randint`, `add_noise`, `mse_loss`) and the same formulas under "
    "`torch.compile`. *B/element*: what our kernels / the operators of the four lines read and write. *error*: of "
    "input, loss and gradient from float64 / what is allowed."
)


def show(line: Line | None) -> str:
    """One line on the terminal; None gives the header."""
    if line is None:
        return (
            f"{'shape':<16}{'executor':<10}{'us [p20-p80]':>24}{'kernels us':>24}{'diffusers us':>28}"
            f"{'compiled us':>28}{'x diff':>8}{'x comp':>8}{'B/el':>10}"
            f"{'error':>10}{'allowed':>10}{'vs diff.':>10}{'allowed':>10}"
        )
    case = f"{line['shape']:<16}{line['executor']:<10}"
    if line["gate"] == "red":
        return f"{case}WRONG: no figure {gates(line)}"
    return (
        f"{case}{spread(line, 'us'):>24}{spread(line, 'emit_us'):>24}{spread(line, 'diffusers_us'):>28}"
        f"{spread(line, 'compiled_us'):>28}{number(line, 'ratio_diffusers', 1):>8}"
        f"{number(line, 'ratio_compiled', 2):>8}{line['bytes_per_element']:>10}{gates(line)}"
    )


def table(lines: Sequence[Line]) -> str:
    """The table in README."""
    head = ["shape", "kernel", "fastdiff µs", "kernels µs", "diffusers µs", "compiled µs", "× diffusers", "× compiled"]
    head += ["B/element", "error / allowed"]
    body = [
        [
            line["shape"].replace("x", "×"),
            line["executor"],
            *(spread(line, key) for key in ("us", "emit_us", "diffusers_us", "compiled_us")),
            number(line, "ratio_diffusers", 1),
            number(line, "ratio_compiled", 2),
            str(line["bytes_per_element"]),
            checked(line),
        ]
        for line in lines
    ]
    return markdown(head, body, 2)
