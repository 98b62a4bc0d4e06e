"""Writes the table of pipelines in docs/diffusers.md: each one, tiny random components, before and after accelerate.

python docs/pipelines_table.py            # works or why not, and the largest difference
python docs/pipelines_table.py --print    # only shown

The times are those of bench/results.csv, which `python bench/run.py pipelines` measures on a quiet machine.
"""

from __future__ import annotations

import argparse
import csv
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import pipelines, table, tiny_pipelines
from bench.tables.cells import Line
from fastdiff.files import write_atomically
from fastdiff.integrations.diffusers import accelerate

TARGET = Path(__file__).with_name("diffusers.md")
RESULTS = Path(pipelines.__file__).with_name("results.csv")
BEGIN, END = "<!-- pipelines:begin -->", "<!-- pipelines:end -->"
CALLS: tuple[dict[str, Any], ...] = (
    {"seed": 1, "steps": 20, "guidance": 5.0},
    {"seed": 2, "steps": 12, "guidance": 2.0, "batch": 2, "size": (24, 16)},
)


def difference(kind: str, scheduler: Any) -> tuple[float, float]:
    """(largest difference of the pictures, in 8-bit levels; of the latents, relative) over two calls."""
    pipe = tiny_pipelines.make(kind, scheduler)
    forms = ["np", "latent"] if hasattr(pipe, "vae") and kind != "DiTPipeline" else ["np"]

    def run() -> list[torch.Tensor]:
        calls = [tiny_pipelines.arguments(kind, **call) | {"output_type": form} for form in forms for call in CALLS]
        return [torch.as_tensor(pipe(**call).images) for call in calls]

    before = run()
    accelerate(pipe)
    both = list(zip(run(), before, strict=True))
    pictures, latents = both[: len(CALLS)], both[len(CALLS) :]
    level = max(float((a - b).abs().max()) * 255 for a, b in pictures)
    return level, max((float((a - b).abs().max() / b.abs().max()) for a, b in latents), default=float("nan"))


def measured(results: Path) -> dict[tuple[str, str], Line]:
    """The line of each pipeline and scheduler, of the latest run on a CPU."""
    with results.open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if (line["bench"], line["device"]) == ("pipelines", "cpu")]
    latest = max((line["run"] for line in lines), default="")
    return {(line["network"], line["solver"]): line for line in lines if line["run"] == latest}


def row(kind: str, name: str, config: dict[str, Any], times: Line | None) -> str:
    """One row of the table."""
    import diffusers

    scheduler = getattr(diffusers, name)(**config)
    try:
        level, latent = difference(kind, scheduler)
    except (TypeError, ValueError, RuntimeError) as refused:
        return f"| {kind} | {name} | refused: {' '.join(str(refused).split())} | | | | |"
    speed = whole = "not measured"
    if times is not None and times["gate"] == "green":
        before, after = float(times["diffusers_us"]), float(times["us"])
        speed = f"{before / after:.1f} ({before:.0f} / {after:.0f} µs)"
        before, after = (float(times[key]) * 1e3 for key in ("diffusers_seconds", "seconds"))
        whole = f"{before / after:.2f} ({before:.1f} / {after:.1f} ms)"
    shown = "–" if latent != latent else f"{latent:.0e}"
    return f"| {kind} | {name} | yes | {level:.4f} | {shown} | {speed} | {whole} |"


def page(times: dict[tuple[str, str], Line]) -> str:
    """The table with what stands above it."""
    import diffusers

    where = table.heading(next(iter(times.values()))) if times else "not measured"
    head = [
        f"diffusers {diffusers.__version__}, float32, over two calls with other prompts, sizes, steps and guidance. "
        "Pictures: largest difference in 8-bit levels. Latents: largest difference, of their largest element. Outside: "
        "µs of a step in the loop that are not the network's, before / after; the whole call likewise; medians of "
        f"`python bench/run.py pipelines` ({where}).",
        "",
        "| Pipeline | Scheduler | Works | Pictures | Latents | Outside | Whole call |",
        "|---|---|---|---|---|---|---|",
    ]
    cases = [(kind, name, config) for kind, found in pipelines.CASES.items() for name, config in found.items()]
    return "\n".join([*head, *(row(*case, times.get(case[:2])) for case in cases)])


def main() -> None:
    """Write or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print instead of writing docs/diffusers.md")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    made = page(measured(RESULTS))
    if given.print:
        print(made)
        return
    before, _, rest = TARGET.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    write_atomically(TARGET, lambda to: to.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}"))


if __name__ == "__main__":
    main()
