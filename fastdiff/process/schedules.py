"""Noise schedules by name: the constructors, and `get`.

x = alpha x0 + sigma n, with alpha and sigma functions of a time on the schedule's own clock, t = 0 towards the data.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import unknown_name
from . import elsewhere
from .clocks import (
    CLEAN,
    Array,
    DiscreteSchedule,
    EDMSchedule,
    FlowSchedule,
    Level,
    Schedule,
    VESchedule,
)
from .vp_clocks import SubVPSchedule, VPSchedule

__all__ = [
    "CLEAN",
    "Level",
    "Schedule",
    "cosine",
    "edm",
    "from_alpha_bar",
    "from_betas",
    "get",
    "linear",
    "names",
    "ou",
    "quadratic",
    "rectified_flow",
    "rescale_zero_terminal_snr",
    "scaled_linear",
    "sub_vp",
    "time_shared",
    "ve",
    "vp",
]


def linear(steps: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02) -> DiscreteSchedule:
    """beta linear in the index from beta_min to beta_max (Ho et al. 2020, section 4)."""
    return _polynomial("linear", 1, steps, beta_min, beta_max)


def quadratic(steps: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02) -> DiscreteSchedule:
    """sqrt(beta) linear in the index from sqrt(beta_min) to sqrt(beta_max) (the code of Ho et al. 2020)."""
    return _polynomial("quadratic", 2, steps, beta_min, beta_max)


def scaled_linear(steps: int = 1000, beta_min: float = 0.00085, beta_max: float = 0.012) -> DiscreteSchedule:
    """quadratic with the ends of Stable Diffusion (Rombach et al. 2022)."""
    return _polynomial("scaled_linear", 2, steps, beta_min, beta_max)


def cosine(steps: int = 1000, s: float = 0.008, clip: float = 0.999) -> DiscreteSchedule:
    """alpha_bar = f(t)/f(0), f(t) = cos^2((t/T + s)/(1 + s) pi/2), beta <= clip (Nichol and Dhariwal 2021, eq. 17)."""
    steps = _count("steps", steps)
    s, clip = _positive("s", s, zero=True), _positive("clip", clip)
    f = np.cos((np.arange(steps + 1) / steps + s) / (1 + s) * (np.pi / 2)) ** 2
    betas = np.minimum(1 - f[1:] / f[:-1], clip)
    return DiscreteSchedule("cosine", _pack(steps=steps, s=s, clip=clip), _log_alpha_bar(betas))


def from_betas(betas: ArrayLike) -> DiscreteSchedule:
    """The discrete schedule with these betas: alpha_bar[t] = prod over s <= t of (1 - beta[s]).

    betas: [T], each within (0, 1); the last may be 1.
    """
    values = np.asarray(betas, dtype=np.float64)
    return DiscreteSchedule("from_betas", _pack(betas=_to_tuple(values)), _log_alpha_bar(values))


def from_alpha_bar(alpha_bar: ArrayLike) -> DiscreteSchedule:
    """The discrete schedule with these alpha_bar: [T], strictly descending within [0, 1)."""
    values = np.asarray(alpha_bar, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return DiscreteSchedule("from_alpha_bar", _pack(alpha_bar=_to_tuple(values)), np.log(values))


def rescale_zero_terminal_snr(schedule: Schedule) -> DiscreteSchedule:
    """The discrete schedule shifted and scaled in sqrt(alpha_bar) so that its last level is pure noise.

    Lin et al. 2023, Algorithm 1: a' = (a - a[T-1]) a[0] / (a[0] - a[T-1]) with a = sqrt(alpha_bar).
    """
    if not isinstance(schedule, DiscreteSchedule) or schedule.steps < 2:
        raise ValueError(
            f"rescale_zero_terminal_snr needs a discrete schedule of at least 2 steps, got {schedule!r}. "
            "Use linear(), scaled_linear(), cosine(), from_betas() ..."
        )
    a = np.exp(0.5 * schedule.log_alpha_bar)
    scaled = (a - a[-1]) * (a[0] / (a[0] - a[-1]))
    with np.errstate(divide="ignore"):
        log_alpha_bar = 2 * np.log(scaled)
    log_alpha_bar[0] = schedule.log_alpha_bar[0]
    options = _pack(schedule=schedule)
    return DiscreteSchedule("rescale_zero_terminal_snr", options, log_alpha_bar, shared=schedule.shared)


def time_shared(schedule: Schedule, below: float = 100, parts: int = 5) -> Schedule:
    """The same schedule with a network that is shown one time for all of an interval near the data (E-TSDM).

    f(t) = max {t_i : t_i <= t} for t < below, with t_i = low + i (below - low)/parts for i = 0 .. parts - 1 and low the
    start of the clock; f(t) = t elsewhere (Yang et al. 2024, Lipschitz Singularities in Diffusion Models, section 4).
    Only `model_time` changes: no level, and no grid. For networks that were trained with it.

    below: on the schedule's clock; theirs is 100 of 1000 steps. parts: theirs is 5.
    Raises ValueError for a `below` outside the clock, parts below 1, and a schedule that shares already.
    """
    if isinstance(schedule, str):
        schedule = get(schedule)
    if not isinstance(schedule, Schedule):
        raise ValueError(f"time_shared needs a schedule, got {schedule!r}. Use time_shared(linear()), for example.")
    if schedule.shared is not None:
        raise ValueError(f"{schedule!r} is shared already. Give time_shared the schedule without.")
    low, high = schedule.time_range
    below, parts = _positive("below", below), _count("parts", parts)
    if not low < below <= high:
        raise ValueError(
            f"below must be a time of {schedule!r} above {low:.6g} and at most {high:.6g}, got {below:.6g}. "
            "A tenth of the clock is usual."
        )
    options = _pack(schedule=schedule, below=below, parts=parts)
    return replace(schedule, name="time_shared", options=options, shared=(below, parts))


def ou(t_max: float = 5.0) -> VPSchedule:
    """alpha = exp(-t), sigma^2 = 1 - exp(-2t), t in [0, t_max]: dx = -x dt + sqrt(2) dW, which is vp with beta = 2."""
    t_max = _positive("t_max", t_max)
    return VPSchedule("ou", _pack(t_max=t_max), 2.0, 0.0, t_max)


def vp(beta_min: float = 0.1, beta_d: float = 19.9) -> VPSchedule:
    """sigma/alpha = sqrt(exp(beta_d t^2/2 + beta_min t) - 1), t in [0, 1] (Song et al. 2021, eq. 33)."""
    beta_min = _positive("beta_min", beta_min)
    beta_d = _positive("beta_d", beta_d, zero=True)
    return VPSchedule("vp", _pack(beta_min=beta_min, beta_d=beta_d), beta_min, beta_d, 1.0)


def sub_vp(beta_min: float = 0.1, beta_d: float = 19.9) -> SubVPSchedule:
    """alpha of `vp`, sigma = 1 - alpha^2, t in [0, 1]: less noise than vp at every time (Song et al. 2021, eq. 29)."""
    beta_min = _positive("beta_min", beta_min)
    beta_d = _positive("beta_d", beta_d, zero=True)
    return SubVPSchedule("sub_vp", _pack(beta_min=beta_min, beta_d=beta_d), beta_min, beta_d, 1.0)


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> VESchedule:
    """alpha = 1, sigma geometric in t in [0, 1] (Song et al. 2021, eq. 9; EDM's ends for it are 0.02 and 100)."""
    sigma_min, sigma_max = _ordered(sigma_min, sigma_max)
    return VESchedule("ve", _pack(sigma_min=sigma_min, sigma_max=sigma_max), sigma_min, sigma_max)


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> EDMSchedule:
    """alpha = 1, clock = sigma from sigma_min to sigma_max (Karras et al. 2022)."""
    sigma_min, sigma_max = _ordered(sigma_min, sigma_max)
    return EDMSchedule("edm", _pack(sigma_min=sigma_min, sigma_max=sigma_max), sigma_min, sigma_max)


def rectified_flow() -> FlowSchedule:
    """alpha = 1 - t, sigma = t, t in [0, 1]; at t = 1 alpha = 0."""
    return FlowSchedule("rectified_flow", ())


_CONSTRUCTORS: dict[str, Callable[..., Schedule]] = {
    make.__name__: make
    for make in (
        linear,
        scaled_linear,
        quadratic,
        cosine,
        ou,
        vp,
        sub_vp,
        ve,
        edm,
        rectified_flow,
        from_betas,
        from_alpha_bar,
        rescale_zero_terminal_snr,
        time_shared,
    )
}


def names() -> list[str]:
    """Names that `get` knows."""
    return list(_CONSTRUCTORS)


def get(name: str, /, **options: Any) -> Schedule:
    """The schedule of this name. Raises ValueError for an unknown name or option."""
    make = _CONSTRUCTORS.get(name) if isinstance(name, str) else None
    if make is None:
        raise unknown_name("schedule", name, names(), elsewhere.schedule(name))
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        known = ", ".join(inspect.signature(make).parameters) or "none"
        hint = f" Make it with schedules.{name}(...) and give that instead of the name." if not options else ""
        raise ValueError(f"Schedule {name}: {error}. Its options: {known}.{hint}") from None
    return make(**options)


def _polynomial(name: str, power: int, steps: int, beta_min: float, beta_max: float) -> DiscreteSchedule:
    steps = _count("steps", steps)
    beta_min, beta_max = _positive("beta_min", beta_min), _positive("beta_max", beta_max)
    betas = np.linspace(beta_min ** (1 / power), beta_max ** (1 / power), steps) ** power
    return DiscreteSchedule(name, _pack(steps=steps, beta_min=beta_min, beta_max=beta_max), _log_alpha_bar(betas))


def _log_alpha_bar(betas: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log1p(-betas)
    return np.cumsum(logs) if betas.ndim == 1 else logs  # the schedule refuses other shapes


def _pack(**options: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(options.items())


def _to_tuple(values: Array) -> tuple[float, ...]:
    return tuple(values.ravel().tolist())


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
    return int(value)


def _positive(name: str, value: float, *, zero: bool = False) -> float:
    number = float(value) if isinstance(value, int | float | np.number) else math.nan
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise ValueError(f"{name} must be finite and {'at least' if zero else 'above'} 0, got {value!r}.")
    return number


def _ordered(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    low, high = _positive("sigma_min", sigma_min), _positive("sigma_max", sigma_max)
    if low >= high:
        raise ValueError(f"sigma_min must be below sigma_max, got {low} and {high}.")
    return low, high
