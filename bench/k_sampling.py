"""Time outside the network: k-diffusion's functions and ours, microseconds a model call.

    python bench/k_sampling.py                 # k-diffusion must be installed: pip install --no-deps k-diffusion
    python bench/k_sampling.py --batch 16 --threads 2 --device cuda

The network is a lookup of a ready tensor. "draws" is what the noise alone costs, drawn by torch. Ours has the same
numbers, which the extension draws sooner on an x86 CPU; with seed= they are made in the row.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.measure import Task, interleave  # noqa: E402
from fastdiff.integrations import k_diffusion as ours  # noqa: E402

STEPS = 20
CASES = (  # function, options, whether it draws
    ("sample_euler_ancestral", {}, "white"),
    ("sample_dpmpp_2m", {}, ""),
    ("sample_dpmpp_2m_sde", {}, "brownian"),
    ("sample_dpmpp_2m_sde", {"noise_sampler": True}, "white"),
    ("sample_heun", {}, "white"),
    ("sample_lms", {}, ""),
)
TOLERANCE = 1e-5


def main() -> int:
    """Print one line for each function; 1 where the two gave different samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=64, help="of a latent of 4 channels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for each line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    theirs = k_diffusion_sampling()
    shape = (options.batch, 4, options.size, options.size)
    x = 14.6 * torch.randn(shape, device=device)
    sigmas = theirs.get_sigmas_karras(STEPS, 0.03, 14.6, device=str(device))
    print(
        f"{torch.__version__}, {device}, {options.threads} threads, {shape}, {STEPS} steps; µs a model call, without it"
    )
    print(f"{'function':34}{'k-diffusion':>12}{'ours':>8}{'ratio':>8}{'draws':>8}{'rest':>8}{'seed=':>8}{'ratio':>8}")
    red = 0
    for name, chosen, draws in CASES:
        red += not line(name, chosen, draws, theirs, x, sigmas, device, options.budget)
    return int(red > 0)


def line(
    name: str, chosen: dict[str, Any], draws: str, theirs: Any, x: Tensor, sigmas: Tensor, device: Any, budget: float
) -> bool:
    """Check, time and print one function."""
    ready = torch.tanh(x)
    calls = (2 if name == "sample_heun" else 1) * STEPS
    network: Callable[..., Tensor] = lambda x, sigma: ready  # noqa: E731
    more = {"noise_sampler": lambda *_: torch.randn_like(x)} if chosen else {}

    def run(library: Any, **options: Any) -> Tensor:
        return getattr(library, name)(network, x, sigmas, disable=True, **options)

    ends = []
    for library in (theirs, ours):
        torch.manual_seed(0)
        ends.append(run(library, **more))
    error = float((ends[1] - ends[0]).abs().max() / ends[0].abs().max())
    if error > TOLERANCE:
        print(f"{name:34} wrong: {error:.1e} apart")
        return False
    tasks = {"theirs": Task(lambda: run(theirs, **more), calls), "ours": Task(lambda: run(ours, **more), calls)}
    tasks["seed"] = Task(lambda: run(ours, seed=0), calls)
    if draws:
        path = (lambda: theirs.BrownianTreeNoiseSampler(x, sigmas[-2], sigmas[0])) if draws == "brownian" else None
        tasks["draws"] = Task(lambda: only_draws(path, x, sigmas), calls)
    took = {key: timing.median for key, timing in interleave(tasks, device, budget).items()}
    noise = took.get("draws", 0.0)
    rest = took["ours"] - noise
    label = name + (" + sampler" if chosen else "")
    print(
        f"{label:34}{took['theirs']:12.1f}{took['ours']:8.1f}{took['theirs'] / took['ours']:7.1f}x{noise:8.1f}"
        f"{rest:8.1f}{took['seed']:8.1f}{took['theirs'] / took['seed']:7.1f}x"
    )
    return True


def only_draws(path: Callable[[], Any] | None, x: Tensor, sigmas: Tensor) -> None:
    """The noise of one run and nothing else."""
    noise = path() if path is not None else None
    for sigma, following in itertools.pairwise(sigmas[:-1]):
        if noise is None:
            torch.randn_like(x)
        else:
            noise(sigma, following)


def k_diffusion_sampling() -> Any:
    """k_diffusion.sampling, without the package's own imports, which are for training."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("k-diffusion is not installed: pip install --no-deps k-diffusion torchsde scipy")
    package, utils = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
    package.__path__ = list(found.submodule_search_locations)
    utils.append_dims = lambda x, count: x.reshape(*x.shape, *(1 for _ in range(count - x.ndim)))  # type: ignore[attr-defined]
    package.utils = utils  # type: ignore[attr-defined]
    if importlib.util.find_spec("torchdiffeq") is None:
        sys.modules["torchdiffeq"] = types.ModuleType("torchdiffeq")
        sys.modules["torchdiffeq"].odeint = None  # type: ignore[attr-defined]
    sys.modules |= {"k_diffusion": package, "k_diffusion.utils": utils}
    return importlib.import_module("k_diffusion.sampling")


if __name__ == "__main__":
    raise SystemExit(main())
