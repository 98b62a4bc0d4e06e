"""A network with labels for the tests of guidance, and a float64 loop around any way to combine its branches.

The loop takes the sampler from the plan's table, which other tests hold against other libraries, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.verify import execute
from fastdiff.engine import noise
from fastdiff.process import predictions
from fastdiff.process.predictions import Prediction
from fastdiff.process.schedules import Level

BACKENDS = [name for name in ("reference", "cpp") if fd.backends()[name].ok]
SHAPE = (3, 2, 5, 7)  # not a multiple of four
LABELS = {"cond": 1.0, "uncond": -0.4, "perturbed_cond": 0.3}
CLOSE = 1e-5


def labelled(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """Treats each element alone, not linear, bounded, depends on time and label; in the dtype of x."""
    side, time = (v.to(x.dtype).view(-1, *[1] * (x.dim() - 1)) for v in (label, t))
    return torch.tanh(x) + 0.3 * side * torch.cos(0.5 * x + 1) * (1 + 0.1 * torch.cos(0.01 * time))


def label(name: str, batch: int = SHAPE[0]) -> Tensor:
    """The branch's labels, another for each sample."""
    return LABELS[name] + 0.2 * torch.arange(batch)


def conditions(*names: str, batch: int = SHAPE[0]) -> dict[str, Any]:
    """The arguments cond=, uncond=, perturbed_cond= of `sample`."""
    return {name: {"label": label(name, batch)} for name in names}


GUIDED = conditions("cond", "uncond")
ALL = conditions("cond", "uncond", "perturbed_cond")


def wrapped(schedule: str, prediction: str, **options: Any) -> fd.Denoiser:
    return fd.Denoiser(labelled, schedule, prediction, **options)


@dataclass(frozen=True)
class Asked:
    """One evaluation in float64: its number, x, D = P x + Q F, and the raw outputs Fc, Fu, Fp."""

    number: int
    x: Tensor
    fold: Prediction
    cond: Tensor
    uncond: Tensor
    perturbed: Tensor

    def denoised(self, raw: Tensor) -> Tensor:
        return self.fold.P * self.x + self.fold.Q * raw


Combine = Callable[[Asked], Tensor]


def ask(model: fd.Denoiser, number: int, x: Tensor, level: Level) -> Asked:
    """Every branch of the network at x, float64, in the plan's coordinates."""
    fold = predictions.coefficients(model.prediction, level, model.schedule, model.sigma_data)
    time = torch.full((len(x),), fold.time, dtype=torch.float64)
    raw = [model.net(fold.c_in * x, time, label(name, len(x)).double()) for name in LABELS]
    return Asked(number, x, fold, *raw)


def latents(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The unit normals that samples with these seeds start from, float64."""
    size = int(np.prod(shape))
    return torch.stack([torch.from_numpy(noise.normal(s, size, 0, 0)).double().view(*shape) for s in seeds])


def start_of(plan: Plan) -> Tensor:
    """The first state of samples with seeds 0, 1, ..., float64."""
    scale = plan.levels[0].sigma if plan.latent_scale is None else plan.latent_scale
    return scale * latents(range(SHAPE[0]), SHAPE[1:])


def in_double(
    plan: Plan, model: fd.Denoiser, combine: Combine, draws: Tensor | None = None, init: Tensor | None = None
) -> Tensor:
    """The sample of a plan with D = combine(branches); draws: its unit normals, [draws, *SHAPE]; init: its start."""
    count = 0

    def denoise(x: np.ndarray, level: Level) -> np.ndarray:
        nonlocal count
        count += 1
        return combine(ask(model, count - 1, torch.from_numpy(x), level)).numpy()

    start = start_of(plan) if init is None else init.double()
    normal = None if draws is None else lambda i, _: draws[i].double().numpy()
    end = execute(plan, denoise, start.numpy(), normal, dict.fromkeys(plan.given, 0.0))
    assert count == plan.nfe
    return torch.from_numpy(end)


def weights(values: Sequence[float] | float) -> Tensor:
    """A number, or one per sample, to multiply images with."""
    return torch.as_tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


def error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest element."""
    return float((ours.double() - theirs).abs().max() / theirs.abs().max())
