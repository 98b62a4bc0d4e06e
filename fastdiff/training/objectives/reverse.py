"""The reverse steps of a discrete schedule as a latent-variable model: variances, KL terms, likelihood of pixels.

q(x_{t-1}|x_t, x0) = N(A x_t + B x0, b~_t), p(x_{t-1}|x_t) = N(A x_t + B D, s_t^2), both with
    B = sqrt(ab_{t-1}) beta_t / (1 - ab_t),  b~_t = beta_t (1 - ab_{t-1}) / (1 - ab_t)      (Ho et al. 2020, eq. 7)
A schedule's index t counts from 0 here, so that x_{-1} is the image.
May import: process.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.process.clocks import DiscreteSchedule
from fastdiff.process.schedules import Schedule

Array = NDArray[np.float64]
VARIANCES = ("beta", "posterior")
_PIXEL = 1 / 255  # half the distance of two pixel values in [-1, 1]


def betas(schedule: Schedule) -> Array:
    """beta_t, [T]. Raises ValueError for a schedule that has no steps."""
    if not isinstance(schedule, DiscreteSchedule):
        raise ValueError(f"the variational bound of {schedule!r} needs the steps of a discrete schedule, linear() say")
    return schedule.betas


def log_variance(schedule: Schedule, variance: str) -> Array:
    """log s_t^2, [T]: log beta_t, or log b~_t with its first, which is -inf, taken from the second (Ho et al.)."""
    beta = betas(schedule)
    if variance == "beta":
        return np.log(beta)
    if len(beta) < 2:
        raise ValueError(f"{schedule!r} has one step, whose posterior variance is 0; use variance 'beta'")
    bar = schedule.alpha_bar(np.arange(len(beta)))
    below = np.concatenate([[1.0], bar[:-1]])
    exact = beta * (1 - below) / (1 - bar)
    return np.log(np.concatenate([exact[1:2], exact[1:]]))


def image_factor(schedule: Schedule) -> Array:
    """B of the posterior's mean, [T]; at index 0 it is 1 and A is 0."""
    beta = betas(schedule)
    bar = schedule.alpha_bar(np.arange(len(beta)))
    return np.sqrt(np.concatenate([[1.0], bar[:-1]])) * beta / (1 - bar)


def gaussian_kl(log_variance_q: Tensor, log_variance_p: Tensor, apart: Tensor) -> Tensor:
    """KL(q | p) of Gaussians whose means are `apart`, per element: (log ratio + v_q/v_p + apart^2/v_p - 1) / 2."""
    ratio = log_variance_q - log_variance_p
    return 0.5 * (torch.exp(ratio) + apart.square() * torch.exp(-log_variance_p) - 1 - ratio)


def gaussian_nll(apart: Tensor, log_variance: Tensor) -> Tensor:
    """-log N(apart; 0, variance), per element."""
    return 0.5 * (math.log(2 * math.pi) + log_variance + apart.square() * torch.exp(-log_variance))


def pixel_nll(image: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log of the mass N(mean, variance) gives to each pixel's interval; the ends' are open (Ho et al. 2020, eq. 13).

    image: pixels of 8 bits as -1 .. 1. All are granted a mass of 1e-12: a hopeless pixel costs much, but not inf.
    """
    scale = torch.exp(-0.5 * log_variance)
    above = torch.special.ndtr((image + _PIXEL - mean) * scale)
    below = torch.special.ndtr((image - _PIXEL - mean) * scale)
    above = torch.where(image > 1 - _PIXEL, torch.ones_like(above), above)
    below = torch.where(image < -1 + _PIXEL, torch.zeros_like(below), below)
    return -torch.log((above - below).clamp(min=1e-12))
