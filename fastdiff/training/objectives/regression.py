"""Objectives that regress on a combination of image and noise: most of them.

    loss = w |F(c_in (alpha x0 + sigma z), time) - (a x0 + b z)|^2, mean over elements and batch
eps (Ho et al. 2020), x0, v (Salimans & Ho 2022), score matching by denoising (Vincent 2011; Song & Ermon 2019), EDM
(Karras et al. 2022) and rectified flow (Liu et al. 2023; Lipman et al. 2023) differ in the numbers only.
May import: the table's layout, engine.train_ops, base.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastdiff.compiler import layout as at
from fastdiff.engine import train_ops
from fastdiff.models.denoiser import Condition

from . import pairing, weightings
from .base import Array, Draw, Loss, Network, Objective


@dataclass(frozen=True)
class SquaredError(Objective):
    """The network's answer to a noised image, squared error.

    log_variance: the network returns (F, u [B]); the loss is w |F - F*|^2 exp(-u) + u, whose best u is the log of the
    error at a level (Karras et al. 2024, eq. 14). `objectives.WithLogVariance(net)` is such a network.
    pairing: "independent", or "transport": the batch's noises are dealt to its images so that the sum of squared
    distances is least (Pooladian et al. 2023; Tong et al. 2024). Then a sample depends on what its process computes
    at once: its share of the batch, or `micro_batch` of it.
    """

    log_variance: bool = False
    pairing: str = "independent"

    def __post_init__(self) -> None:
        super().__post_init__()
        pairing.check(self.pairing)

    @property
    def capturable(self) -> bool:
        return self.pairing == "independent"

    def evaluate(
        self, network: Network, x0: Tensor, cond: Condition, draw: Draw, *, dtype: torch.dtype = torch.float32
    ) -> Loss:
        if self.pairing == "transport":
            draw = replace(draw, key=draw.key[pairing.transport(x0, draw.table, draw.key)])
        cond = self.condition(cond, draw.dropped)
        # no name holds the input: unless autograd keeps it, it is freed when the network returns, and the allocator
        # gives its memory to the gradient that the loss writes
        output = network(train_ops.noised(x0, draw.table, draw.key, dtype), draw.model_time, cond)
        if not self.log_variance:
            mean, error = train_ops.squared_error(output, draw.weight, x0, draw.table, draw.key)
            return Loss(mean, error, draw.model_time, draw.weight, draw)
        output, u = self._split(output)
        weight = draw.weight * torch.exp(-u.float())
        mean, error = train_ops.squared_error(output, weight, x0, draw.table, draw.key)
        return Loss(mean + u.float().mean(), error, draw.model_time, draw.weight, draw)

    def _split(self, output: Any) -> tuple[Tensor, Tensor]:
        if isinstance(output, tuple) and len(output) == 2:
            return output
        raise TypeError(
            f"{self.name} with log_variance: the network must return (F, u [B]), got {type(output).__name__}; "
            "wrap it in objectives.WithLogVariance"
        )


@dataclass(frozen=True)
class Regression(SquaredError):
    """What the prediction says, weighted.

    weighting: a name, or objectives.weightings. perturbation: gamma of Ning et al. 2023 (Input Perturbation Reduces
    Exposure Bias), theirs is 0.1: the input is noised by z + gamma y with y another unit normal, and the target is not.
    """

    weighting: weightings.Weighting = field(default_factory=weightings.Weighting)
    perturbation: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "weighting", weightings.get(self.weighting))
        if not self.perturbation >= 0:
            raise ValueError(f"{self.name}: perturbation must be 0 or more, got {self.perturbation!r}")

    def columns(self, time: Array) -> tuple[Array, Array, Array]:
        table, shown, _ = super().columns(time)
        if self.perturbation:
            table[:, at.INPUT_Y] = self.perturbation * table[:, at.INPUT_Z]
        return table, shown, self.weighting.at(self.schedule, time, self.prediction, self.sigma_data)
