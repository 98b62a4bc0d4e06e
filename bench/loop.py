"""Whole runs: our Sampler against the same network driven by a diffusers scheduler in the usual eager loop.

Another claim than the step alone, and a smaller one: where the network takes most of the time, only the rest can be
saved, and that share is printed. Both sides start from the same state; a pipeline's set_timesteps is inside its time,
as packing and uploading the table is inside ours.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fastdiff as fd
from bench import measure, peers
from bench.measure import Task, Timing

SOLVERS = ("dpmpp_2m", "ddim", "euler_ancestral")
BATCHES = (1, 16)
TOLERANCE = 1e-3  # of the largest pixel, after 20 steps that each round in fp32


class TinyNet(nn.Module):
    """Three 3x3 convolutions, 16 channels, SiLU, and a shift by the time: about the least a network can be."""

    def __init__(self, channels: int = 3, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        self.time = nn.Linear(1, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: [B, channels, H, W]; t: [B] or scalar, 0 to 1000. Returns a tensor like x."""
        shift = self.time(t.reshape(-1, 1).to(x.dtype) / 1000.0)[:, :, None, None]
        hidden = torch.nn.functional.silu(self.first(x) + shift)
        return self.last(torch.nn.functional.silu(self.middle(hidden)))


class Clocked(nn.Module):
    """A network that adds up the seconds spent in it, on the CPU."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.seconds = net, 0.0

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Any:
        """As the network itself."""
        started = time.perf_counter()
        output = self.net(x, t, **cond)
        self.seconds += time.perf_counter() - started
        return output


def networks(quick: bool) -> Iterator[tuple[str, nn.Module, tuple[int, ...], dict[str, int]]]:
    """(name, network, shape of a sample, conditions): the tiny one, and the shipped UNet where its weights are.

    Both are treated as if they predicted eps: the work is the same, and the pictures are not looked at.
    """
    yield "tiny", TinyNet(), (3, 32, 32), {}
    if quick:
        return
    try:
        net = fd.load("fashion").net
    except (FileNotFoundError, ValueError) as missing:
        print(f"the shipped UNet is left out: {missing}")
        return
    assert isinstance(net, fd.models.UNet)
    yield "shipped UNet", net, (net.config.in_channels, 32, 32), {"class_labels": 0}


def run(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Measure every network, solver and batch, one line at a time."""
    warnings.filterwarnings("ignore", module="diffusers")
    if not peers.has_diffusers():
        print("diffusers is not installed and there is nothing to compare with: pip install diffusers")
        return
    torch.manual_seed(0)
    with torch.no_grad():
        for name, net, sample, cond in networks(quick):
            for batch in BATCHES[:1] if quick else BATCHES:
                for solver in SOLVERS[:1] if quick else SOLVERS:
                    yield _case(name, net.eval().to(device), (batch, *sample), cond, solver, device, quick)


def _case(
    name: str,
    net: nn.Module,
    shape: tuple[int, ...],
    cond: dict[str, int],
    solver: str,
    device: torch.device,
    quick: bool,
) -> dict[str, Any]:
    watch = measure.Watch()
    clocked = Clocked(net)
    labels = {key: torch.full((shape[0],), value, device=device) for key, value in cond.items()}
    schedule = fd.schedules.linear(peers.TRAINED, *peers.BETAS)
    plan = fd.plan(solver, schedule, peers.STEPS, "trailing")
    sampler = fd.Sampler(plan, fd.Denoiser(clocked, schedule, "eps", device=device))
    start = torch.randn(shape, device=device)

    def ours(**options: Any) -> Tensor:
        return sampler.sample(shape, seed=0, init=start, cond=labels or None, **options)

    def theirs() -> Tensor:
        return _eager(solver, clocked, labels, start, plan.levels[0].alpha, generator)

    generator = torch.Generator(device).manual_seed(0)
    error, scale = _gate(plan, solver, ours, theirs, shape, device)
    line: dict[str, Any] = {
        "bench": "loop",
        "network": name,
        "solver": solver,
        "steps": peers.STEPS,
        "batch": shape[0],
        "shape": "x".join(map(str, shape)),
        "executor": sampler.backend,
        "gate": "green" if error <= TOLERANCE * scale else "red",
        "error": error,
        "tolerance": TOLERANCE * scale,
    }
    if line["gate"] == "red":
        return line
    inside: dict[str, list[float]] = {"seconds": [], "diffusers_seconds": []}

    def task(key: str, sample: Callable[[], Tensor]) -> Task:
        def timed() -> None:
            before = clocked.seconds
            sample()
            inside[key].append((clocked.seconds - before) * 1e6)

        return Task(timed, 1)

    tasks = {"seconds": task("seconds", ours), "diffusers_seconds": task("diffusers_seconds", theirs)}
    timings = measure.interleave(tasks, device, 0.3 if quick else 6.0, least=3, most=200, warm_up=1)
    for key, timing in timings.items():
        line |= {key: timing.median / 1e6 / shape[0]}
        line |= {f"{key}_p20": timing.p20 / 1e6 / shape[0], f"{key}_p80": timing.p80 / 1e6 / shape[0]}
        if device.type == "cpu":
            network = Timing.of(inside[key][-timing.repetitions :]).median
            line[f"{key}_outside"] = max(0.0, 1.0 - network / timing.median)
    line["ratio_diffusers"] = timings["diffusers_seconds"].median / timings["seconds"].median
    line["repetitions"] = timings["seconds"].repetitions
    others = watch.others()
    return line | ({} if others is None else {"others": round(others, 3)})


def _eager(
    solver: str, net: nn.Module, cond: dict[str, Tensor], start: Tensor, alpha: float, generator: torch.Generator
) -> Tensor:
    """A pipeline's loop; `start` is the state alpha x0 + sigma n at the first level."""
    scheduler = peers.scheduler_of(solver)
    extra = {"generator": generator} if solver in peers.NOISY else {}
    x = start / alpha if solver == "euler_ancestral" else start
    for t in scheduler.timesteps:
        output = net(scheduler.scale_model_input(x, t), t.to(x.device), **cond)
        x = scheduler.step(output, t, x, return_dict=False, **extra)[0]
    return x


def _gate(
    plan: fd.Plan,
    solver: str,
    ours: Callable[..., Tensor],
    theirs: Callable[[], Tensor],
    shape: tuple[int, ...],
    device: torch.device,
) -> tuple[float, float]:
    """(max |ours - theirs|, max |theirs|) with the same noise given to both."""
    draws = torch.randn(plan.draws, *shape, device=device)
    mine = ours(noise=draws) if plan.draws else ours()
    pending = iter(draws)
    module = sys.modules[type(peers.scheduler_of(solver)).__module__]
    named = hasattr(module, "randn_tensor")
    spare = torch.zeros(shape, device=device)  # diffusers also draws in the last step, times zero
    with mock.patch.object(module, "randn_tensor", lambda *_, **__: next(pending, spare), create=not named):
        reference = theirs()
    return float((mine - reference).abs().max()), float(reference.abs().max())
