"""Writes the table in docs/k_diffusion.md: every function beside k-diffusion's own, on the same random state.

python docs/k_diffusion_table.py            # measure and write
python docs/k_diffusion_table.py --print    # measure and print
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from bench.k_sampling import k_diffusion_sampling
from fastdiff.integrations import k_diffusion as ours
from fastdiff.integrations.k_diffusion import tables

STEPS = (5, 10, 20, 50)
LOW, HIGH = 0.0292, 14.6146  # Stable Diffusion's range
TARGET = Path(__file__).with_name("k_diffusion.md")
BEGIN, END = "<!-- table:begin -->\n", "<!-- table:end -->\n"
HEAD = f"""Made by `python docs/k_diffusion_table.py`: the largest difference from k-diffusion over the largest value,
fp32, Karras' grid with {", ".join(map(str, STEPS))} steps; and where torch's random generator is after the call.

| Function | Difference | Generator | Noise, where `noise_sampler` is not given |
|---|---|---|---|
"""


def model(x: Tensor, sigma: Tensor) -> Tensor:
    """A smooth denoiser of two modes."""
    s = sigma.view(-1, 1, 1, 1)
    return x / (1.0 + s * s) + 0.3 * torch.sin(x + s)


def line(name: str, theirs: Any) -> str:
    """One row of the table."""
    if not hasattr(ours, name):
        return f"| `{name}` | not there | | |"
    kind = name.removeprefix("sample_")
    if kind == "dpm_adaptive":
        return f"| `{name}` | k-diffusion's own function, where it is installed | | |"
    worst, same = 0.0, True
    for steps in STEPS:
        levels = (LOW, HIGH, steps) if kind == "dpm_fast" else (theirs.get_sigmas_karras(steps, LOW, HIGH),)
        ends, states = [], []
        for library in (theirs, ours):
            torch.manual_seed(steps)
            x = HIGH * torch.randn(2, 4, 16, 16)
            ends.append(getattr(library, name)(model, x, *levels, disable=True))
            states.append(torch.get_rng_state())
        worst = max(worst, float((ends[1] - ends[0]).abs().max() / ends[0].abs().max()))
        same = same and torch.equal(*states)
    noise = "none"
    if kind in tables.CHURNED:
        noise = "`torch.randn_like` for every step, used where `s_churn` is"
    elif kind in tables.ANCESTRAL:
        noise = "`torch.randn_like`"
    elif kind in tables.BROWNIAN:
        noise = "a Brownian tree (torchsde)"
    return f"| `{name}` | {worst:.0e} | {'the same' if same else 'elsewhere'} | {noise} |"


def table() -> str:
    """All functions of k-diffusion's sampling module."""
    theirs = k_diffusion_sampling()
    return HEAD + "".join(line(name, theirs) + "\n" for name in dir(theirs) if name.startswith("sample_"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", dest="show", help="print the table instead of writing it")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    made = table()
    if arguments.show:
        print(made)
        return
    before, _, rest = TARGET.read_text().partition(BEGIN)
    TARGET.write_text(before + BEGIN + made + END + rest.partition(END)[2])
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
