"""Results on disk and in README: one CSV line per case, and the tables generated from it.

The tables stand between two markers; what is around them is left alone. The same CSV gives the same text.
"""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.tables import brownian, loop, norm, ops, pipelines, stream, train, train_ops, unet
from bench.tables.cells import Line
from fastdiff.files import write_atomically

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

# The spread of a time stands in columns of its own.
_TIMES = (
    *("us", "emit_us", "cold_us", "copy_us", "copy_near_us", "diffusers_us", "compiled_us", "compiled_graph_us"),
    *("noise_us", "k_diffusion_us", "k_diffusion_noise_us"),
    "torch_us",
)
COLUMNS = [
    *("run", "commit", "device", "machine", "threads", "load", "python", "torch", "diffusers", "triton", "numpy"),
    *("k-diffusion", "torchsde"),
    *("driver", "sm_mhz", "memory_mhz", "watts", "watts_limit", "celsius", "throttle"),
    *("bench", "solver", "network", "steps", "batch", "shape", "elements", "model_dtype", "executor"),
    *("gate", "error", "tolerance", "diffusers_error", "diffusers_tolerance"),
    *(f"{time}{spread}" for time in _TIMES for spread in ("", "_p10", "_p20", "_p80")),
    *("bytes_per_element", "gbs", "copy_gbs", "copy_fraction", "copy_near_fraction"),
    *("ratio_diffusers", "ratio_compiled", "diffusers_page_faults"),
    *("ratio_k_diffusion", "ratio_noise", "variance", "path_correlation"),
    *("ratio_torch", "f0_fraction", "f2_fraction"),
    *(f"{k}{s}" for k in ("seconds", "diffusers_seconds") for s in ("", "_p20", "_p80", "_outside")),
    *(f"{k}_seconds{s}" for k in ("stream", "batched", "alone") for s in ("", "_p20", "_p80")),
    *(f"{k}_latency{s}" for k in ("stream", "batched", "alone") for s in ("", "_p95")),
    *("repetitions", "others", "took"),
]


_BENCHES: dict[str, Any] = {
    "ops": ops,
    "brownian": brownian,
    "loop": loop,
    "pipelines": pipelines,
    "stream": stream,
    "train": train,
    "train-ops": train_ops,
    "norm": norm,
    "unet": unet,
}
LINES: dict[str, Callable[[Line | None], str]] = {name: tables.show for name, tables in _BENCHES.items()}


def append(path: Path, lines: Sequence[Line]) -> None:
    """Add lines to the results, whose file gets the columns it lacks. Raises ValueError when it has others."""
    known = path.exists() and path.stat().st_size > 0
    if known and not set(_header(path)) <= set(COLUMNS):
        raise ValueError(f"{path} has other columns than this version writes; move it away and run again")
    if known and _header(path) != COLUMNS:
        with path.open(newline="") as file:
            before = list(csv.DictReader(file))
        write_atomically(path, lambda to: to.write_text(_as_csv(before), newline=""))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if not known:
            writer.writeheader()
        writer.writerows({key: _plain(value) for key, value in line.items()} for line in lines)


def _as_csv(lines: Sequence[Line]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def update(results: Path, readme: Path) -> int:
    """Write the tables into `readme`; 0, or 1 with the reason on stderr and the file untouched."""
    if not results.exists():
        return _fail(f"{results} is not there; run: python bench/run.py ops")
    with results.open(newline="") as file:
        text = render(list(csv.DictReader(file)))
    page = readme.read_text() if readme.exists() else ""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        print(text)
        return _fail(f"{readme} has no lines {BEGIN} and {END}; put them where the tables belong")
    temporary = readme.with_name(readme.name + ".part")
    temporary.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")
    os.replace(temporary, readme)
    print(f"{readme}: tables of {len(text.splitlines())} lines")
    return 0


def render(lines: Iterable[Line]) -> str:
    """The tables as Markdown: the latest run of each benchmark on each machine, CPUs first."""
    groups: dict[tuple[str, str, str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line["bench"], line["device"], line["machine"], line["threads"]), []).append(line)
    parts = []
    for bench, tables in _BENCHES.items():
        found = sorted(key for key in groups if key[0] == bench)
        parts += [tables.ABOUT] if found else []
        for key in found:
            latest = max(line["run"] for line in groups[key])
            chosen = [line for line in groups[key] if line["run"] == latest]
            parts += [heading(chosen[0]), tables.table(chosen)]
    return "\n\n".join(parts)


def heading(facts: Line) -> str:
    """Where and with what a run was made, in one line."""
    where = f"{facts['machine']}, {facts['threads']} threads" if facts["device"] == "cpu" else facts["machine"]
    driver = f", driver {facts['driver']}" if facts.get("driver") else ""
    peer = facts["diffusers"] or "not installed"
    return (
        f"**{where}**: torch {facts['torch']}, diffusers {peer}{driver}, commit {facts['commit']}, "
        f"load {facts['load']}, {str(facts['run'])[:10]}"
    )


def _plain(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _header(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return next(csv.reader(file), [])


def _fail(why: str) -> int:
    print(why, file=sys.stderr)
    return 1
