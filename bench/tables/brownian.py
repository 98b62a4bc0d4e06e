"""The line on the terminal and the table in README of Brownian noise."""

from __future__ import annotations

from collections.abc import Sequence

from bench.tables.cells import Line, checked, markdown, spread

ABOUT = (
    "Brownian noise: `python bench/run.py brownian`. Median µs of a whole step of `dpmpp_2m_sde`, network excluded, "
    "against k-diffusion's function with its Brownian tree, and of the noise alone. Both draw each increment for the "
    "first time. *error*: largest relative difference of the states when both are given the same normals / what is "
    "allowed. *variance*: of our increments and their sums, the furthest from 1, over 262,144 numbers. *one path*: "
    "correlation of a seed's whole path in 10 and in 40 steps."
)


def show(line: Line | None) -> str:
    """One line on the terminal; None gives the header."""
    if line is None:
        return (
            f"{'sampler':<16}{'shape':<16}{'executor':<10}{'us [p20-p80]':>24}{'k-diffusion us':>34}{'x':>8}"
            f"{'noise us':>24}{'k-diffusion us':>34}{'x':>8}{'error':>10}{'allowed':>10}"
            f"{'variance':>10}{'one path':>10}"
        )
    case = f"{line['solver']:<16}{line['shape']:<16}{line['executor']:<10}"
    gate = f"{line['error']:>10.1e}{line['tolerance']:>10.1e}{line['variance']:>10.4f}{line['path_correlation']:>10.4f}"
    if line["gate"] == "red":
        return f"{case}WRONG: no figure {gate}"
    return (
        f"{case}{spread(line, 'us'):>24}{spread(line, 'k_diffusion_us'):>34}{line['ratio_k_diffusion']:>8.1f}"
        f"{spread(line, 'noise_us'):>24}{spread(line, 'k_diffusion_noise_us'):>34}{line['ratio_noise']:>8.1f}{gate}"
    )


def table(lines: Sequence[Line]) -> str:
    """The table in README."""
    head = ["sampler", "shape", "kernel", "fastdiff µs", "k-diffusion µs", "× k-diffusion", "noise alone µs"]
    head += ["k-diffusion's µs", "× k-diffusion", "error / allowed", "variance", "one path"]
    body = [
        [
            line["solver"],
            line["shape"].replace("x", "×"),
            line["executor"],
            spread(line, "us"),
            spread(line, "k_diffusion_us"),
            f"{float(line['ratio_k_diffusion']):.1f}",
            spread(line, "noise_us"),
            spread(line, "k_diffusion_noise_us"),
            f"{float(line['ratio_noise']):.1f}",
            checked(line),
            f"{float(line['variance']):.4f}",
            f"{float(line['path_correlation']):.4f}",
        ]
        for line in lines
    ]
    return markdown(head, body, 3)
