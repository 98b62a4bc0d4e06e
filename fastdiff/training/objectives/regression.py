"""Objectives that regress on a combination of image and noise: most of them.

    loss = w |F(c_in (alpha x0 + sigma z), time) - (a x0 + b z)|^2, mean over elements and batch
eps (Ho et al. 2020), x0, v (Salimans & Ho 2022), score matching by denoising (Vincent 2011; Song & Ermon 2019), EDM
(Karras et al. 2022) and rectified flow (Liu et al. 2023; Lipman et al. 2023) differ in the numbers only.
May import: process, the table's layout, engine.train_ops, base.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.compiler import layout as at
from fastdiff.engine import train_ops
from fastdiff.models.denoiser import Condition
from fastdiff.process import predictions

from . import weightings
from .base import Draw, Loss, Network, Objective

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Regression(Objective):
    """The network's answer to a noised image, squared error.

    weighting: a name, or objectives.weightings. perturbation: gamma of Ning et al. 2023 (Input Perturbation Reduces
    Exposure Bias), theirs is 0.1: the input is noised by z + gamma y with y another unit normal, and the target is not.
    log_variance: the network returns (F, u [B]); the loss is w |F - F*|^2 exp(-u) + u, whose best u is the log of the
    error at a level (Karras et al. 2024, eq. 14). `objectives.WithLogVariance(net)` is such a network.
    """

    weighting: weightings.Weighting = field(default_factory=weightings.Weighting)
    perturbation: float = 0.0
    log_variance: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "weighting", weightings.get(self.weighting))
        if not self.perturbation >= 0:
            raise ValueError(f"{self.name}: perturbation must be 0 or more, got {self.perturbation!r}")

    def at(self, time: Array, key: Tensor, mirrored: NDArray[np.bool_] | None = None) -> Draw:
        schedule = self.schedule
        alpha, sigma = (np.asarray(scale(time), dtype=np.float64) for scale in (schedule.alpha, schedule.sigma))
        a, b = predictions.targets(self.prediction, alpha, sigma, self.sigma_data)
        if self.prediction == "edm":
            spread = predictions.SIGMA_DATA if self.sigma_data is None else self.sigma_data
            c_in, shown = 1 / np.hypot(sigma, spread * alpha), np.log(sigma / alpha) / 4
        else:
            c_in, shown = np.ones_like(time), schedule.model_time(time)
        table = np.zeros((len(time), at.TRAIN_COLUMNS))
        table[:, at.INPUT_X0], table[:, at.INPUT_Z] = c_in * alpha, c_in * sigma
        table[:, at.INPUT_Y] = self.perturbation * c_in * sigma
        table[:, at.TARGET_X0], table[:, at.TARGET_Z] = a, b
        table[:, at.FLIP] = 0.0 if mirrored is None else mirrored
        weight = self.weighting.at(schedule, time, self.prediction, self.sigma_data)
        return Draw(
            key=key,
            time=torch.from_numpy(time),
            model_time=torch.from_numpy(np.asarray(shown, dtype=np.float32)),
            table=torch.from_numpy(table.astype(np.float32)),
            weight=torch.from_numpy(weight.astype(np.float32)),
            dropped=torch.zeros(len(time), dtype=torch.bool),
        )

    def evaluate(
        self, network: Network, x0: Tensor, cond: Condition, draw: Draw, *, dtype: torch.dtype = torch.float32
    ) -> Loss:
        noisy = train_ops.noised(x0, draw.table, draw.key, dtype)
        output = network(noisy, draw.model_time, self.condition(cond, draw.dropped))
        if not self.log_variance:
            mean, error = train_ops.squared_error(output, draw.weight, x0, draw.table, draw.key)
            return Loss(mean, error, draw.model_time, draw.weight, draw)
        if not (isinstance(output, tuple) and len(output) == 2):
            raise TypeError(
                f"{self.name} with log_variance: the network must return (F, u [B]), got {type(output).__name__}; "
                "wrap it in objectives.WithLogVariance"
            )
        output, u = output
        weight = draw.weight * torch.exp(-u.float())
        mean, error = train_ops.squared_error(output, weight, x0, draw.table, draw.key)
        return Loss(mean + u.float().mean(), error, draw.model_time, draw.weight, draw)
