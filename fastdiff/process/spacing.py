"""What grids share: the ends of a spacing, and levels uniform after a change of variable."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from .clocks import Array, Schedule

RHO_FLOOR = 0.01  # last rho on a schedule that reaches sigma = 0: the first level of linear()
RHO_CAP = 160.0  # stands for rho = inf in the spacing: linear() ends at 157


def clock(schedule: Schedule) -> tuple[float, float]:
    """The schedule's clock, from its first time with noise on."""
    low, high = schedule.time_range
    return (low if schedule.rho_min > 0 else float(schedule.time_from_rho(RHO_FLOOR))), high


def ends(
    schedule: Schedule, steps: int, sigma_min: float | None, sigma_max: float | None
) -> tuple[float, float, float]:
    """(low, high, top): last and first rho of a spacing, and the first level itself, inf where high cannot be.

    sigma_min, sigma_max: by default the schedule's own ends, RHO_FLOOR where it reaches sigma = 0, and RHO_CAP in place
    of rho = inf. Raises ValueError unless 0 < sigma_min < sigma_max.
    """
    low = sigma_min if sigma_min is not None else schedule.rho_min or RHO_FLOOR
    top = sigma_max if sigma_max is not None else schedule.rho_max
    high = top if math.isfinite(top) else RHO_CAP
    if not (0 < low < math.inf and high > 0) or (low >= high and steps > 1):
        raise ValueError(f"sigma_min and sigma_max must be 0 < sigma_min < sigma_max, got {low} and {top}.")
    return low, high, top


def spaced(
    schedule: Schedule,
    steps: int,
    sigma_min: float | None,
    sigma_max: float | None,
    warp: Callable[[float], float],
    unwarp: Callable[[Array], Array],
) -> Array:
    """Times at `steps` values of rho, uniform after `warp`, between the two ends."""
    low, high, top = ends(schedule, steps, sigma_min, sigma_max)
    return at_rhos(schedule, unwarp(np.linspace(warp(high), warp(low), steps)), low, top)


def at_rhos(schedule: Schedule, rhos: Array, low: float, top: float) -> Array:
    """The times of these rho, the two ends set exactly."""
    rhos = np.array(rhos, dtype=np.float64)
    rhos[-1] = low
    rhos[0] = top
    return schedule.time_from_rho(rhos)
