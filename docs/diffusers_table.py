"""Writes the table of docs/diffusers.md: every scheduler class of the installed diffusers against its fast class.

python docs/diffusers_table.py                        # numbers: works or why not, and the largest difference
python docs/diffusers_table.py --speed                # times too, and fills the speed column; wants a quiet machine
python docs/diffusers_table.py --speed --print DDIM UniPCMultistep   # only these, only shown
"""

from __future__ import annotations

import argparse
import inspect
import math
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from capture_table import CASES, DEFAULT, Case, classes
from torch import Tensor

from fastdiff.integrations.diffusers import fast

STEPS = 20
SHAPE = (2, 3, 8, 8)
TIMED = (1, 4, 64, 64)
ROUNDS = 40
TARGET = Path(__file__).with_name("diffusers.md")
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
LISTS_THE_END = ("SCMScheduler", "DDPMWuerstchenScheduler")


def network(x: Tensor, t: Tensor) -> Tensor:
    """Nonlinear, mixes channels, depends on the time."""
    clock = torch.sin(t.to(x.dtype) / 300).view(-1, *[1] * (x.ndim - 1))
    return torch.tanh(0.7 * x + 0.2 * x.roll(1, dims=1)) + 0.3 * clock


def run(scheduler: Any, options: dict[str, Any]) -> list[Any]:
    """Every output of diffusers' own loop, in float32."""
    known = inspect.signature(scheduler.step).parameters
    extra = {"generator": torch.Generator().manual_seed(5)} if "generator" in known else {}
    torch.manual_seed(9)
    x = torch.randn(SHAPE) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    times = list(scheduler.timesteps)[: -1 if type(scheduler).__name__ in LISTS_THE_END else None]
    outputs = []
    for i, t in enumerate(times):
        if "prev_timestep" in known:
            extra["prev_timestep"] = times[i + 1] if i + 1 < len(times) else None
        each = t.expand(len(x))
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        at = each if type(scheduler).__name__ == "DDPMWuerstchenScheduler" else t
        outputs.append(scheduler.step(network(scaled, each), at, x, **options, **extra))
        x = outputs[-1].prev_sample
    return outputs


def difference(ours: list[Any], theirs: list[Any]) -> float:
    """The largest over all steps and fields, relative to the field's largest element."""
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        for name, value in other.items():
            if isinstance(value, Tensor):
                worst = max(worst, float((one[name] - value).abs().max() / value.abs().max().clamp_min(1e-6)))
    return worst


def microseconds(scheduler: Any, timesteps: dict[str, Any], options: dict[str, Any]) -> tuple[float, list[float]]:
    """The time of `set_timesteps`, and of each step of one run but its first and last quarter, on the same tensors."""
    begin = time.perf_counter()
    set_timesteps(scheduler, timesteps)
    setting = (time.perf_counter() - begin) * 1e6
    known = inspect.signature(scheduler.step).parameters
    times = list(scheduler.timesteps)[: -1 if type(scheduler).__name__ in LISTS_THE_END else None]
    x, raw = torch.randn(TIMED), torch.randn(TIMED)
    taken = []
    for i, t in enumerate(times):
        extra = {"prev_timestep": times[i + 1] if i + 1 < len(times) else None} if "prev_timestep" in known else {}
        at = t.expand(1) if type(scheduler).__name__ == "DDPMWuerstchenScheduler" else t
        begin = time.perf_counter()
        scheduler.step(raw, at, x, return_dict=False, **options, **extra)
        taken.append((time.perf_counter() - begin) * 1e6)
    return setting, taken[len(taken) // 4 : 3 * len(taken) // 4] or taken


def set_timesteps(scheduler: Any, timesteps: dict[str, Any]) -> None:
    """With the arguments of a case of docs/capture_table.py."""
    given = {"num_inference_steps": STEPS, **timesteps}
    given["num_inference_steps"] = given.pop("steps", given["num_inference_steps"])
    scheduler.set_timesteps(**given)


def line(name: str, kind: Any, case: Case, timed: bool) -> str:
    """One row of the table."""
    config, timesteps, options = case
    shown = ", ".join(f"{key}={value}" for key, value in {**config, **timesteps, **options}.items()) or "default"
    try:
        twin, original = fast(kind)(**config), kind(**config)
        set_timesteps(twin, timesteps)
        ours = run(twin, options)
    except (TypeError, ValueError, RuntimeError) as refused:
        reason = " ".join(str(refused).split()).replace("|", "\\|")
        for prefix in (f"fast: {name} ", f"{name}.", f"{name}, ", f"{name} "):
            reason = reason.removeprefix(prefix)
        return f"| {name} | {shown} | refused: {reason} | | |"
    set_timesteps(original, timesteps)
    off = difference(ours, run(original, options))
    speed = "not measured"
    if timed:
        both: tuple[list[float], list[float]] = ([], [])
        settings: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for taken, set_up, scheduler in zip(both, settings, (original, twin), strict=True):
                setting, steps = microseconds(scheduler, timesteps, options)
                set_up.append(setting)
                taken += steps
        (theirs_us, ours_us), (before, after) = map(statistics.median, both), map(statistics.median, settings)
        repaid = max(0, math.ceil((after - before) / (theirs_us - ours_us))) if ours_us < theirs_us else "never"
        speed = f"{theirs_us / ours_us:.1f} ({theirs_us:.1f} / {ours_us:.1f} µs), {repaid}"
    return f"| {name} | {shown} | yes | {off:.0e} | {speed} |"


def table(only: list[str], timed: bool) -> str:
    """The table, for classes whose names hold one of `only`."""
    import diffusers

    head = [
        f"diffusers {diffusers.__version__}, {STEPS} steps, float32. Largest difference: over all steps and fields of "
        f"the output, relative. Speed: `step` at {'×'.join(map(str, TIMED))}, original / fast, medians of runs in turn"
        ", and after how many steps a repeated `set_timesteps`, which looks the table up, is repaid"
        + (f"; {torch.get_num_threads()} threads." if timed else "; filled by `--speed`."),
        "",
        "| Scheduler | Configuration | Works | Largest difference | Speed |",
        "|---|---|---|---|---|",
    ]
    chosen = {name: kind for name, kind in classes().items() if not only or f"{name}".removesuffix("Scheduler") in only}
    rows = [line(name, kind, case, timed) for name, kind in chosen.items() for case in CASES.get(name, [DEFAULT])]
    return "\n".join([*head, *rows])


def main() -> None:
    """Write or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="classes, without 'Scheduler'; all when none is given")
    parser.add_argument("--speed", action="store_true", help="time every step too")
    parser.add_argument("--print", action="store_true", help="print instead of writing docs/diffusers.md")
    given = parser.parse_args()
    if given.only and not given.print:
        parser.error("a table of some classes is only shown: give --print")
    warnings.simplefilter("ignore")
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    made = table(given.only, given.speed)
    if given.print:
        print(made)
        return
    page = TARGET.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    TARGET.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}")


if __name__ == "__main__":
    main()
