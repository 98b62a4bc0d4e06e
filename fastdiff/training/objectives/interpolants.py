"""Flows along other paths: a narrow end, a variance-preserving curve, and noise of its own on the way.

    x = A(t) x0 + S(t) z + g(t) y,    F* = dx/dt = A' x0 + S' z + g' y,    t = 0 is data and t = 1 is noise
E[F*|x] is the velocity of an ODE that has the law of x at every t (Albergo & Vanden-Eijnden 2023; Albergo et al. 2023,
Stochastic Interpolants). g' y must not be left out: E[A' x0 + S' z|x] alone ends in another law wherever g is not 0.
May import: process, the table's layout, regression.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from fastdiff.compiler import layout as at
from fastdiff.errors import unknown_name
from fastdiff.process import schedules
from fastdiff.process.schedules import Schedule

from .base import Array
from .regression import SquaredError

PATHS = ("linear", "trigonometric")
ANSWERS = ("velocity", "drift", "noise")


@dataclass(frozen=True)
class Interpolant(SquaredError):
    """The velocity along a path. The network is sampled as a "flow" on schedules.rectified_flow(), by ODE solvers.

    path: "linear": A = 1 - t, S = sigma_min + (1 - sigma_min) t (Lipman et al. 2023, eq. 20; it ends in the data
    blurred by sigma_min). "trigonometric": A = cos(pi t/2), S = sin(pi t/2), which preserves variance.
    gamma: g = gamma sqrt(t (1 - t)). With it the target is infinite at both ends: keep `times` inside.
    answer: "velocity" F*; or its finite parts, for velocity = drift + g' noise of two networks: "drift" A' x0 + S' z,
    "noise" y.
    """

    schedule: Schedule = field(default_factory=schedules.rectified_flow)
    prediction: str = "flow"
    path: str = "linear"
    sigma_min: float = 0.0
    gamma: float = 0.0
    answer: str = "velocity"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path not in PATHS:
            raise unknown_name("path", self.path, PATHS)
        if self.answer not in ANSWERS:
            raise unknown_name("answer", self.answer, ANSWERS)
        if self.schedule != schedules.rectified_flow() or self.prediction != "flow":
            raise ValueError(
                f"{self.name} runs on rectified_flow() and predicts 'flow'; leave schedule and prediction out"
            )
        if not (0 <= self.sigma_min < 1 and self.gamma >= 0) or (self.sigma_min and self.path != "linear"):
            raise ValueError(
                f"{self.name}: sigma_min must be within [0, 1) and of the linear path, gamma 0 or more; got sigma_min "
                f"{self.sigma_min!r}, path {self.path!r}, gamma {self.gamma!r}"
            )
        if self.gamma == 0 and self.answer == "noise":
            raise ValueError(f"{self.name}: answer 'noise' needs gamma above 0")

    def columns(self, time: Array) -> tuple[Array, Array, Array]:
        if self.path == "linear":
            places = 1 - time, self.sigma_min + (1 - self.sigma_min) * time
            slopes = -np.ones_like(time), np.full_like(time, 1 - self.sigma_min)
        else:
            angle = 0.5 * math.pi * time
            places = np.cos(angle), np.sin(angle)
            slopes = -0.5 * math.pi * places[1], 0.5 * math.pi * places[0]
        table = np.zeros((len(time), at.TRAIN_COLUMNS))
        table[:, at.INPUT_X0], table[:, at.INPUT_Z] = places
        spread = np.sqrt(time * (1 - time))
        table[:, at.INPUT_Y] = self.gamma * spread
        if self.answer == "noise":
            table[:, at.TARGET_Y] = 1.0
            return table, time, np.ones_like(time)
        table[:, at.TARGET_X0], table[:, at.TARGET_Z] = slopes
        if self.gamma and self.answer == "velocity":
            if not (spread > 0).all():
                raise ValueError(f"{self.name}: with gamma the velocity is infinite at t = 0 and 1; keep times inside")
            table[:, at.TARGET_Y] = self.gamma * (1 - 2 * time) / (2 * spread)
        return table, time, np.ones_like(time)
