"""The line on the terminal and the table in README of the step alone."""

from __future__ import annotations

from collections.abc import Sequence

from bench.tables.cells import Line, checked, gates, markdown, number, short, spread

ABOUT = (
    "The step alone, network excluded: `python bench/run.py ops`. Median µs of one step [20 % to 80 % quantile] over "
    "rows 6 to 15 of a 20-step run, all contenders in turn in one process with the same threads.\n\n"
    "- *compiled*: the same row under `torch.compile`, in place, with its own noise (on a GPU under a CUDA graph where "
    "that is faster).\n"
    "- *of copy*: bytes read plus bytes written in a second, over those of torch's `copy_`. On a CPU two copies are "
    "timed in the same turn: one that moves as many bytes / one that takes as much memory. A step works in place, so "
    "it may fit a cache that the first copy does not. On a GPU the copy is of 2 GiB.\n"
    "- With noise, while the tensors fit in cache, the limit is the arithmetic of the normals.\n"
    "- Eager code on a CPU touches fresh pages for large temporaries in every step, which can take most of its time "
    "(`diffusers_page_faults` in `bench/results.csv`); the largest ratios are that.\n"
    "- *error*: largest difference from float64 / what is allowed; a wrong result prints no figure. 16 steps of each "
    "sampler are also held against diffusers' own states (`diffusers_error`)."
)


def show(line: Line | None) -> str:
    """One line on the terminal; None gives the header."""
    if line is None:
        return (
            f"{'sampler':<16}{'shape':<16}{'dtype':<9}{'executor':<10}{'us [p20-p80]':<22}{'+input':>8}"
            f"{'diffusers us':>30}{'compiled us':>30}{'x diff':>8}{'x comp':>8}{'B/el':>5}{'GB/s':>8}{'of copy':>12}"
            f"{'error':>10}{'allowed':>10}{'vs diff.':>10}{'allowed':>10}"
        )
    case = f"{line['solver']:<16}{line['shape']:<16}{line['model_dtype']:<9}{line['executor']:<10}"
    if line["gate"] == "red":
        return f"{case}WRONG: no figure {gates(line)}"
    return (
        f"{case}{spread(line, 'us'):<22}{short(line['emit_us']):>8}{spread(line, 'diffusers_us'):>30}"
        f"{spread(line, _compiled(line)):>30}{number(line, 'ratio_diffusers', 1):>8}{line['ratio_compiled']:>8.2f}"
        f"{line['bytes_per_element']:>5}{line['gbs']:>8.1f}{_of_copy(line):>12}{gates(line)}"
    )


def table(lines: Sequence[Line]) -> str:
    """The table in README."""
    gpu = lines[0]["device"] == "cuda"
    kind = ["network output", "kernel"] if gpu else []
    cold = ["µs, cold cache"] if gpu else []
    head = ["sampler", "shape", *kind, "fastdiff µs", *cold, "diffusers µs", "compiled µs", "× diffusers", "× compiled"]
    head += ["B/element", "GB/s", "of copy", "with next input, µs", "error / allowed"]
    body = []
    for line in lines:
        body.append(
            [
                line["solver"],
                line["shape"].replace("x", "×"),
                *([line["model_dtype"], line["executor"]] if gpu else []),
                spread(line, "us"),
                *([short(float(line["cold_us"]))] if gpu else []),
                spread(line, "diffusers_us"),
                spread(line, _compiled(line)),
                number(line, "ratio_diffusers", 1),
                number(line, "ratio_compiled", 2),
                str(line["bytes_per_element"]),
                short(float(line["gbs"])),
                _of_copy(line),
                short(float(line["emit_us"])),
                checked(line),
            ]
        )
    return markdown(head, body, 4 if gpu else 2)


def _of_copy(line: Line) -> str:
    both = (line.get(key, "") for key in ("copy_fraction", "copy_near_fraction"))
    return " / ".join(f"{float(value):.0%}" for value in both if value != "")


def _compiled(line: Line) -> str:
    """The column of the compiled formula's better way of being launched."""
    graph = line.get("compiled_graph_us", "")
    return "compiled_graph_us" if graph != "" and float(graph) < float(line["compiled_us"]) else "compiled_us"
