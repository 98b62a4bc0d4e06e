"""Writes the table of pipelines in docs/diffusers.md: each one, tiny random components, before and after accelerate.

python docs/pipelines_table.py            # works or why not, and the largest difference
python docs/pipelines_table.py --speed    # times too, and fills the last two columns; wants a quiet machine
python docs/pipelines_table.py --print    # only shown
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import pipelines, tiny_pipelines
from fastdiff.integrations.diffusers import accelerate

TARGET = Path(__file__).with_name("diffusers.md")
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


def line(kind: str, name: str, config: dict[str, Any], timed: bool) -> str:
    """One row of the table."""
    import diffusers

    scheduler = getattr(diffusers, name)(**config)
    try:
        level, latent = difference(kind, scheduler)
    except (TypeError, ValueError, RuntimeError) as refused:
        return f"| {kind} | {name} | refused: {' '.join(str(refused).split())} | | | | |"
    speed = whole = "not measured"
    if timed:
        found = pipelines.case(kind, scheduler, torch.device("cpu"), pipelines.SECONDS)
        before, after = found["diffusers_us"], found["us"]
        speed = f"{before / after:.1f} ({before:.0f} / {after:.0f} µs)"
        before, after = (found[key] * 1e3 for key in ("diffusers_seconds", "seconds"))
        whole = f"{before / after:.2f} ({before:.1f} / {after:.1f} ms)"
    shown = "–" if latent != latent else f"{latent:.0e}"
    return f"| {kind} | {name} | yes | {level:.4f} | {shown} | {speed} | {whole} |"


def table(timed: bool) -> str:
    """The table."""
    import diffusers

    head = [
        f"diffusers {diffusers.__version__}, float32, over two calls with other prompts, sizes, steps and guidance. "
        "Pictures: largest difference in 8-bit levels. Latents: largest difference, of their largest element. Outside: "
        "µs of a step in the loop that are not the network's, before / after; the whole call likewise"
        + (f", {torch.get_num_threads()} threads." if timed else "; filled by `--speed`."),
        "",
        "| Pipeline | Scheduler | Works | Pictures | Latents | Outside | Whole call |",
        "|---|---|---|---|---|---|---|",
    ]
    cases = [(kind, name, config) for kind, found in pipelines.CASES.items() for name, config in found.items()]
    return "\n".join([*head, *(line(*case, timed) for case in cases)])


def main() -> None:
    """Write or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true", help="time every pipeline too")
    parser.add_argument("--print", action="store_true", help="print instead of writing docs/diffusers.md")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    made = table(given.speed)
    if given.print:
        print(made)
        return
    page = TARGET.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    temporary = TARGET.with_name(TARGET.name + ".part")
    temporary.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}")
    os.replace(temporary, TARGET)


if __name__ == "__main__":
    main()
