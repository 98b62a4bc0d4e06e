"""Grids: the descending times at which the network is evaluated.

A grid is a float64 array of times on the schedule's clock, without the final clean level, which the planner appends.
With steps = 1 every grid is the schedule's noisiest level.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import unknown_name
from .clocks import RHO_SLACK, Array, Schedule
from .gits import gits
from .grid_rules import (
    ays,
    beta,
    beta_sigma,
    ddim_uniform,
    flow_shift,
    kl_optimal,
    laplace,
    linear_quadratic,
    normal,
    polyexponential,
    quadratic,
    sgm_uniform,
    simple,
    vp,
)
from .spacing import RHO_CAP, RHO_FLOOR, clock, spaced

__all__ = ["RHO_CAP", "RHO_FLOOR", "check", "custom", "exponential", "get", "karras", "make", "names"]


def leading(schedule: Schedule, steps: int, *, steps_offset: float = 0) -> Array:
    """Multiples of T // steps from 0 up, plus steps_offset; the noisiest are left out (Lin et al. 2023, Table 2).

    On a continuous clock: low + i (high - low)/steps for i = steps - 1 .. 0, steps_offset in units of the clock.
    low is the clock's start, or where rho = RHO_FLOOR if sigma is 0 there.
    """
    low, high = clock(schedule)
    if steps == 1:
        return np.array([high])
    if schedule.steps is None:
        return low + np.arange(steps - 1, -1, -1, dtype=np.float64) * ((high - low) / steps) + steps_offset
    return np.arange(steps - 1, -1, -1, dtype=np.float64) * (schedule.steps // steps) + steps_offset


def trailing(schedule: Schedule, steps: int) -> Array:
    """round(T - i T/steps) - 1 for i = 0 .. steps - 1: from the noisiest level down (Lin et al. 2023, Table 2).

    On a continuous clock: high - i (high - low)/steps, so that the clean level closes a uniform grid.
    """
    if schedule.steps is None:
        low, high = schedule.time_range
        return high - np.arange(steps, dtype=np.float64) * ((high - low) / steps)
    # arange as diffusers calls it, so that ties round alike; it may give one index too many, -1
    return np.rint(np.arange(schedule.steps, 0, -schedule.steps / steps, dtype=np.float64)[:steps]) - 1


def linspace(schedule: Schedule, steps: int) -> Array:
    """Uniform from the last time to the first, both included, rounded to indices (Lin et al. 2023, Table 2).

    On a continuous clock: not rounded, and down to where rho = RHO_FLOOR if sigma is 0 at its start.
    """
    low, high = clock(schedule)
    times = np.linspace(low, high, steps)[::-1] if steps > 1 else np.array([high])
    return times if schedule.steps is None else np.rint(times)


def karras(
    schedule: Schedule,
    steps: int,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
) -> Array:
    """Uniform in (sigma/alpha)^(1/rho) (Karras et al. 2022, eq. 5).

    sigma_min, sigma_max: ends of sigma/alpha, by default the schedule's own: RHO_FLOOR where it reaches sigma = 0;
    where it reaches alpha = 0 the first level is that end, and RHO_CAP takes its place in the spacing.
    """
    if not (math.isfinite(rho) and rho > 0):
        raise ValueError(f"rho must be finite and above 0, got {rho!r}. Karras et al. use 7.")
    return spaced(schedule, steps, sigma_min, sigma_max, lambda s: s ** (1 / rho), lambda u: u**rho)


def exponential(
    schedule: Schedule, steps: int, *, sigma_min: float | None = None, sigma_max: float | None = None
) -> Array:
    """Geometric in sigma/alpha: log(sigma/alpha) uniform, as in k-diffusion. sigma_min, sigma_max: as in karras.

    Libraries that space log(sigma) of a flow, with sigma = t, mean other levels: those are custom(levels=...).
    """
    return spaced(schedule, steps, sigma_min, sigma_max, np.log, np.exp)


def logsnr(schedule: Schedule, steps: int, *, sigma_min: float | None = None, sigma_max: float | None = None) -> Array:
    """Uniform in lam = log(alpha/sigma) (Lu et al. 2022, section 3.3).

    lam = -log(sigma/alpha), so these are the levels of exponential on every schedule; the two names are the
    literature's, for the noise-to-signal ratio of k-diffusion and the half log signal-to-noise ratio of DPM-Solver.
    """
    return exponential(schedule, steps, sigma_min=sigma_min, sigma_max=sigma_max)


def custom(schedule: Schedule, steps: int | None = None, *, levels: ArrayLike, unit: str = "time") -> Array:
    """The levels as given, descending.

    levels: [steps] times on the schedule's clock (unit "time") or sigma/alpha (unit "rho"), which are the sigmas of
    k-diffusion and of fd.trace; a last level that is clean (rho = 0) is dropped, since the planner appends it.
    steps: only checked; None takes any number.
    """
    values = np.array(levels, dtype=np.float64)
    if unit not in ("time", "rho"):
        raise ValueError(f"unit of a custom grid must be 'time' or 'rho', got {unit!r}.")
    if values.ndim != 1 or not len(values):
        raise ValueError(f"A custom grid must be a list of at least one level, got shape {values.shape}.")
    _check_descending(values)
    clean = 0.0 if unit == "rho" else schedule.time_range[0] if schedule.rho_min == 0 else math.nan
    if len(values) > 1 and values[-1] == clean:
        values = values[:-1]
    if steps is not None and steps != len(values):
        raise ValueError(
            f"steps is {steps}, but the custom grid has {len(values)} levels before the clean one. Leave steps out."
        )
    if unit == "time":
        low, high = schedule.time_range
        as_rho = " Levels that are sigmas, sigma/alpha as fd.trace takes them, need unit='rho' in grid_options."
        _check_inside(values, low, high, schedule, hint=as_rho)
        return values
    low, high = schedule.rho_min * (1 - RHO_SLACK), schedule.rho_max * (1 + RHO_SLACK)
    _check_inside(values, low, high, schedule, "sigma/alpha")
    return schedule.time_from_rho(values)


_GRIDS: dict[str, Callable[..., Array]] = {
    grid.__name__: grid
    for grid in (
        leading,
        trailing,
        linspace,
        karras,
        exponential,
        logsnr,
        quadratic,
        polyexponential,
        vp,
        beta,
        beta_sigma,
        laplace,
        linear_quadratic,
        kl_optimal,
        simple,
        normal,
        sgm_uniform,
        ddim_uniform,
        ays,
        flow_shift,
        gits,
        custom,
    )
}
_ON_INDICES = (leading, trailing, linspace, simple, ddim_uniform)


def names() -> list[str]:
    """Names that `get` and `make` know."""
    return list(_GRIDS)


def get(name: str) -> Callable[..., Array]:
    """The grid function (schedule, steps, **options) -> times of this name. Raises ValueError for an unknown name."""
    grid = _GRIDS.get(name) if isinstance(name, str) else None
    if grid is None:
        raise unknown_name("grid", name, names())
    return grid


def make(name: str, schedule: Schedule, steps: int | None, **options: Any) -> Array:
    """The checked grid of this name: descending times, [steps] float64, without the clean level.

    Raises ValueError for an unknown name or option, for steps that are not an integer of at least 1 (of a discrete
    schedule's uniform grids: at most T), for a schedule on which the grid has no levels, and for a grid that `check`
    refuses.
    """
    grid = get(name)
    try:
        inspect.signature(grid).bind(schedule, steps, **options)
    except TypeError as error:
        known = [key for key in inspect.signature(grid).parameters if key not in ("schedule", "steps")]
        raise ValueError(f"Grid {name}: {error}. Its options: {', '.join(known) or 'none'}.") from None
    if grid is not custom or steps is not None:
        steps = _check_steps(steps)
        if steps > 1 and schedule.time_range[0] == schedule.time_range[1]:
            raise ValueError(f"{schedule!r} has one level only, so its grids have one step, got {steps}. Use steps=1.")
        if grid in _ON_INDICES and schedule.steps is not None and steps > schedule.steps:
            raise ValueError(
                f"Grid {name} takes at most {schedule.steps} steps, one for each training step of {schedule!r}, "
                f"got {steps}. Use fewer steps, or karras, exponential, logsnr or custom."
            )
    return check(grid(schedule, steps, **options), schedule)


def check(times: ArrayLike, schedule: Schedule) -> Array:
    """`times` as float64 if they are a grid of this schedule: finite, strictly descending, inside it, sigma > 0.

    Raises ValueError naming the position and the values.
    """
    array = np.array(times, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"A grid must be a list of at least one time, got shape {array.shape}.")
    _check_descending(array)
    _check_inside(array, *schedule.time_range, schedule)
    if float(schedule.rho(array[-1])) == 0:
        raise ValueError(
            f"Level {len(array) - 1} of the grid (time {array[-1]:.6g}) is clean, so there is nothing to predict. "
            "Leave it out: the clean level is appended by the planner."
        )
    return array


def _check_steps(steps: object) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        own = hasattr(steps, "__len__") and not isinstance(steps, str)
        hint = " Levels of your own are grid=[...], descending times on the schedule's clock." * own
        raise ValueError(
            f"steps must be an integer of at least 1, the number of levels of the grid, got {steps!r}.{hint}"
        )
    return int(steps)


def _check_descending(values: Array) -> None:
    finite = np.isfinite(values)
    finite[0] |= values[0] == math.inf  # rho = inf is the top of a schedule that reaches alpha = 0
    if not finite.all():
        at = int(np.argmin(finite))
        raise ValueError(f"Level {at} of the grid is {values[at]}, which is not finite. Give finite levels.")
    falls = np.diff(values) < 0
    if not falls.all():
        at = int(np.argmin(falls))
        raise ValueError(
            f"Levels {at} and {at + 1} of the grid are {values[at]:.9g} and {values[at + 1]:.9g}: a grid must strictly "
            "descend, from noise to data. Sort it and remove repeated levels."
        )


def _check_inside(
    values: Array, low: float, high: float, schedule: Schedule, unit: str = "clock", hint: str = ""
) -> None:
    inside = (values >= low) & (values <= high)
    if not inside.all():
        at = int(np.argmin(inside))
        raise ValueError(
            f"Level {at} of the grid is {values[at]:.9g}, outside {schedule!r}, whose {unit} goes from {low:.6g} to "
            f"{high:.6g}. Choose levels inside it, without the final clean one, which is added.{hint}"
        )
