"""Score matching without noise targets, for study: explicit (the score is known) and implicit (Hyvarinen 2005).

    ESM = E|s - grad log p|^2,    ISM = E[tr(grad s) + |s|^2/2] = ESM/2 - E|grad log p|^2/2
Sliced (Song et al. 2019): tr(grad s) = E[v . grad(v . s)] for random v of unit covariance. All are per dimension.
May import: the table's layout, engine.train_ops, base.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdiff.compiler import layout as at
from fastdiff.engine import train_ops
from fastdiff.errors import unknown_name
from fastdiff.models.denoiser import Condition
from fastdiff.process import schedules
from fastdiff.process.schedules import Schedule

from . import times
from .base import Draw, Loss, Network, Objective

TRACES = ("sliced", "exact")


def explicit_score_matching(score: Tensor, truth: Tensor) -> Tensor:
    """|s - grad log p|^2 of each sample per dimension, [B]: where the score is known, mixtures say."""
    return (score - truth).square().flatten(1).mean(1)


@dataclass(frozen=True)
class Implicit(Objective):
    """Implicit score matching of the data blurred at the drawn level: needs no target, but the network's derivative.

    trace: "sliced", one random direction, two passes; "exact", one pass per dimension, for a few dimensions.
    The network must be twice differentiable. A level of noise is needed where the data lie on a surface.
    """

    schedule: Schedule = field(default_factory=schedules.edm)
    prediction: str = "score"
    times: times.Times = field(default_factory=lambda: times.Discrete((0.1,)))
    trace: str = "sliced"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trace not in TRACES:
            raise unknown_name("trace", self.trace, TRACES)
        if self.prediction != "score":
            raise ValueError(f"{self.name} learns a score; got prediction {self.prediction!r}")

    def evaluate(
        self, network: Network, x0: Tensor, cond: Condition, draw: Draw, *, dtype: torch.dtype = torch.float32
    ) -> Loss:
        noisy = train_ops.noised(x0, draw.table, draw.key, dtype).requires_grad_()
        score = network(noisy, draw.model_time, self.condition(cond, draw.dropped))
        if self.trace == "sliced":
            only_y = torch.zeros_like(draw.table)
            only_y[:, at.INPUT_Y] = 1.0
            direction = train_ops.noised(noisy.detach(), only_y, draw.key).to(score.dtype)
            trace = (_slope(score, noisy, direction) * direction).flatten(1).sum(1)
        else:
            flat = score.flatten(1)
            trace = torch.zeros(len(x0), dtype=score.dtype, device=score.device)
            for i in range(flat.shape[1]):
                trace = trace + _slope(flat[:, i], noisy, torch.ones_like(flat[:, i])).flatten(1)[:, i]
        each = (trace + 0.5 * score.flatten(1).square().sum(1)).float() / x0[0].numel()
        return Loss((draw.weight * each).mean(), each.detach(), draw.model_time, draw.weight, draw)


def _slope(of: Tensor, at_input: Tensor, direction: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(of, at_input, direction, create_graph=True)
    return slope
