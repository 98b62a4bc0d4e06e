"""The variational bound: bits per dimension of a network, and the hybrid objective that learns its variance.

-log p(x0) <= KL(q(x_T|x0) | N(0, 1)) + sum_t KL(q(x_{t-1}|x_t, x0) | p(x_{t-1}|x_t)) - log p(x0|x_0)
(Sohl-Dickstein et al. 2015; Ho et al. 2020, eq. 5; Nichol & Dhariwal 2021, section 3.1).
May import: process, the table's layout, engine.train_ops, base, regression, reverse.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.compiler import layout as at
from fastdiff.engine import train_ops
from fastdiff.models.denoiser import Condition
from fastdiff.process import predictions
from fastdiff.process.schedules import Schedule

from . import counters, reverse
from .base import Draw, Loss, Network, Objective
from .regression import Regression


@dataclass(frozen=True)
class Bound:
    """Nats per dimension of every sample: prior [B], terms [B, T], the first of them -log p(x0|x_0); total [B]."""

    prior: Tensor
    terms: Tensor

    @property
    def total(self) -> Tensor:
        return self.prior + self.terms.sum(1)

    @property
    def bits_per_dim(self) -> Tensor:
        """[B]; of images of 8 bits."""
        return self.total / float(np.log(2))


def bound(
    objective: Objective,
    network: Network,
    x0: Tensor,
    cond: Condition,
    seeds: Tensor,
    *,
    variance: str = "beta",
    clip: bool = True,
    progress: Callable[[int], Any] | None = None,
) -> Bound:
    """The bound of each image, every step evaluated once: T calls of the network.

    objective: of a discrete schedule; says what the network predicts. x0: uint8 images, of which p(x0|x_0) is the mass
    of their pixels; or floating ones, of which it is the density. seeds: int64 [B]; the noise of step t is draw t.
    variance: "beta", "posterior" or, of a network that returns [B, 2C, ...], "learned". clip: D to [-1, 1].
    """
    if variance not in (*reverse.VARIANCES, "learned"):
        raise ValueError(f"bound: variance must be 'beta', 'posterior' or 'learned', got {variance!r}")
    total = len(reverse.betas(objective.schedule))
    terms = torch.zeros(len(x0), total, dtype=torch.float64)
    for index in reversed(range(total)):
        time = np.full(len(x0), float(index))
        draw = objective.at(time, torch.from_numpy(counters.keys(seeds.numpy(), index))).to(x0.device)
        draw.table[:, at.INPUT_Y] = 0.0  # a perturbed input is for training alone
        with torch.no_grad():
            noisy = train_ops.noised(x0, draw.table, draw.key)
            output = network(noisy, draw.model_time, cond)
            answer, said = split(output, x0) if variance == "learned" else (output, None)
            spread = "beta" if variance == "learned" else variance
            terms[:, index] = term(objective, x0, draw, noisy, answer, said, spread, clip).double().cpu()
        if progress is not None:
            progress(total - index)
    bar = float(objective.schedule.alpha_bar(float(total - 1)))
    image = train_ops.noised(x0, only_image(draw.table), draw.key).double()
    zero, at_end = torch.zeros(()).double(), torch.tensor(1 - bar).double().log()
    prior = reverse.gaussian_kl(at_end, zero, bar**0.5 * image).flatten(1).mean(1).cpu()
    return Bound(prior, terms)


def only_image(table: Tensor) -> Tensor:
    """The table that gives the image itself, mirrored where it is."""
    kept = torch.zeros_like(table)
    kept[:, at.INPUT_X0], kept[:, at.FLIP] = 1.0, table[:, at.FLIP]
    return kept


def split(output: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of the channels: what the network predicts, and what it says of the variance."""
    if not isinstance(output, Tensor) or output.dim() < 2 or output.shape[1] != 2 * x0.shape[1]:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"a learned variance needs a network that returns [{len(x0)}, {2 * x0.shape[1]}, ...], got {got}; "
            "double its output channels"
        )
    answer, said = output.chunk(2, dim=1)
    return answer, said


def term(
    objective: Objective,
    x0: Tensor,
    draw: Draw,
    noisy: Tensor,
    answer: Tensor,
    said: Tensor | None,
    variance: str,
    clip: bool,
) -> Tensor:
    """The bound's term at each sample's index, nats per dimension, [B]; a gradient flows into `said` alone.

    noisy: the network's input in fp32. answer: its prediction. said: V of a learned variance, log s^2 = v log beta +
    (1 - v) log b~ with v = (V + 1)/2 (Nichol & Dhariwal 2021, eq. 15), or None.
    """
    rows = _steps(objective.schedule, objective.prediction, x0.device)[draw.time.long()]
    p, q, large, small, factor = (rows[:, i].reshape(-1, *(1 for _ in x0.shape[1:])) for i in range(5))
    denoised = p * noisy + q * answer.detach().float()
    denoised = denoised.clamp(-1, 1) if clip else denoised
    image = train_ops.noised(x0, only_image(draw.table), draw.key)
    if said is None:
        spread = (large if variance == "beta" else small).expand_as(image)
    else:
        share = (said.float() + 1) / 2
        spread = share * large + (1 - share) * small
    apart = image - denoised
    kl = reverse.gaussian_kl(small, spread, factor * apart)
    if x0.dtype == torch.uint8:
        first = reverse.pixel_nll(image, denoised, spread)
    else:
        first = reverse.gaussian_nll(apart, spread)
    is_first = (draw.time == 0).reshape(-1, *(1 for _ in x0.shape[1:]))
    return torch.where(is_first, first, kl).flatten(1).mean(1)


@functools.lru_cache(maxsize=8)
def _steps(schedule: Schedule, prediction: str, device: torch.device) -> Tensor:
    """fp32 [T, 5]: P and Q of D = P x + Q F, log beta, log b~ and B of every step."""
    index = np.arange(len(reverse.betas(schedule)))
    alpha, sigma = schedule.alpha(index), schedule.sigma(index)
    a, b = predictions.targets(prediction, alpha, sigma)
    determinant = alpha * b - sigma * a
    spreads = (reverse.log_variance(schedule, name) for name in reverse.VARIANCES)
    columns = [b / determinant, -sigma / determinant, *spreads, reverse.image_factor(schedule)]
    return torch.from_numpy(np.stack(columns, axis=1)).float().to(device)


@dataclass(frozen=True)
class Hybrid(Regression):
    """L_simple + share T L_t, the second term for the variance alone (Nichol & Dhariwal 2021, eq. 16: share 0.001).

    The network returns [B, 2C, ...]; in nats per dimension.
    """

    share: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.log_variance or self.perturbation or self.prediction in ("edm", "flow"):
            raise ValueError(
                f"{self.name} learns the variance of DDPM's steps: leave out log_variance and perturbation, predict "
                f"'eps', 'x0', 'v' or 'score'; got {self.prediction!r}"
            )
        reverse.log_variance(self.schedule, "posterior")

    @property
    def learned_variance(self) -> bool:
        return True

    def evaluate(
        self, network: Network, x0: Tensor, cond: Condition, draw: Draw, *, dtype: torch.dtype = torch.float32
    ) -> Loss:
        outputs: list[tuple[Tensor, Tensor]] = []

        def answer(noisy: Tensor, time: Tensor, condition: Condition) -> Tensor:
            outputs.append((noisy, network(noisy, time, condition)))
            return split(outputs[0][1], x0)[0]

        simple = super().evaluate(answer, x0, cond, draw, dtype=dtype)
        noisy, output = outputs[0]
        if noisy.dtype != torch.float32:
            noisy = train_ops.noised(x0, simple.draw.table, simple.draw.key)
        steps = len(reverse.betas(self.schedule))
        first, said = split(output, x0)
        of_variance = term(self, x0, simple.draw, noisy, first, said, "beta", True)
        return replace(simple, mean=simple.mean + self.share * steps * (draw.importance * of_variance).mean())
