"""Closed forms for data N(0, v): what the tests of the objectives hold them against."""

from __future__ import annotations

import numpy as np
import torch

from fastdiff.training import objectives
from fastdiff.training.objectives import Objective

VARIANCE = 0.25


def drawn(objective: Objective, time: np.ndarray) -> objectives.Draw:
    """A draw at these times, whatever the objective's own are."""
    return objective.at(time, torch.arange(len(time)))


def best(draw: objectives.Draw, variance: float = VARIANCE) -> tuple[np.ndarray, np.ndarray]:
    """k and the least loss of each sample's level, before its weight.

    With x = p x0 + q z + r y and F* = a x0 + b z + c y the best F is k x, k = Cov(F*, x) / Var(x), and what is left of
    the loss is the variance of F* less k^2 that of x.
    """
    p, q, r, a, b, c = draw.table.double().numpy().T[:6]
    spread = p**2 * variance + q**2 + r**2
    k = (a * p * variance + b * q + c * r) / spread
    return k, a**2 * variance + b**2 + c**2 - k**2 * spread
