"""Levels and the classes of schedules: a clock (time <-> rho = sigma/alpha) and a kind.

The kind says how alpha and sigma follow from rho: "vp" alpha^2 + sigma^2 = 1, "ve" alpha = 1, "flow" alpha + sigma = 1,
"sub_vp" alpha^2 + sigma = 1. On every clock time grows with the noise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Kind = Literal["vp", "ve", "flow", "sub_vp"]

RHO_SLACK = 1e-6  # a rho this close (relative) to an end of the range is that end: fp32 levels round past it


@dataclass(frozen=True)
class Level:
    """One noise level: x = alpha x0 + sigma n.

    alpha, sigma: marginal scales. time: on the schedule's clock, nan if the level has none.
    """

    alpha: float
    sigma: float
    time: float = math.nan

    @property
    def rho(self) -> float:
        """Noise-to-signal ratio sigma/alpha; inf where alpha = 0."""
        return self.sigma / self.alpha if self.alpha != 0 else math.inf

    @property
    def lam(self) -> float:
        """Half log signal-to-noise ratio, log(alpha/sigma); -inf where alpha = 0, inf where sigma = 0."""
        if self.alpha == 0:
            return -math.inf
        return math.log(self.alpha / self.sigma) if self.sigma != 0 else math.inf


CLEAN = Level(alpha=1.0, sigma=0.0, time=0.0)


@dataclass(frozen=True, repr=False)
class Schedule(ABC):
    """A noise schedule; equal and hashed by `name` and `options`, which rebuild it through `get`.

    Methods take times of any shape on the schedule's clock and return float64 of that shape; a time outside
    `time_range` raises ValueError.
    shared: (below, parts), times below `below` that the network is shown as the start of one of `parts` intervals
    (`schedules.time_shared`); None: it is shown every time as it is.
    """

    name: str
    options: tuple[tuple[str, Any], ...]
    shared: tuple[float, int] | None = field(default=None, kw_only=True)

    kind: ClassVar[Kind]
    open_top: ClassVar[bool] = (
        False  # a level above the clock, where churn leads, has a time that a network understands
    )

    @property
    @abstractmethod
    def time_range(self) -> tuple[float, float]:
        """The clock's first and last time: least and most noise."""

    @property
    def steps(self) -> int | None:
        """Number of training steps T of a discrete schedule, None for a continuous one."""
        return None

    @cached_property
    def rho_min(self) -> float:
        """rho at the clean end; 0 where the schedule reaches sigma = 0."""
        return float(self.rho(self.time_range[0]))

    @cached_property
    def rho_max(self) -> float:
        """rho at the noisy end; inf where the schedule reaches alpha = 0."""
        return float(self.rho(self.time_range[1]))

    @abstractmethod
    def _rho(self, time: Array) -> Array: ...

    @abstractmethod
    def _time(self, rho: Array) -> Array: ...

    def scales_at(self, time: ArrayLike) -> tuple[Array, Array]:
        """(alpha, sigma) at `time`: what `alpha` and `sigma` say, found together."""
        return self.scales(self.rho(time))

    def rho(self, time: ArrayLike) -> Array:
        """sigma/alpha at `time`."""
        return self._rho(self._checked(time))

    def alpha(self, time: ArrayLike) -> Array:
        """Signal scale at `time`."""
        return self.scales_at(time)[0]

    def sigma(self, time: ArrayLike) -> Array:
        """Noise scale at `time`."""
        return self.scales_at(time)[1]

    def lam(self, time: ArrayLike) -> Array:
        """log(alpha/sigma) at `time`."""
        with np.errstate(divide="ignore"):
            return np.asarray(-np.log(self.rho(time)), dtype=np.float64)[()]

    def alpha_bar(self, time: ArrayLike) -> Array:
        """alpha^2 at `time`: DDPM's product of (1 - beta). Raises ValueError unless the kind is "vp"."""
        if self.kind != "vp":
            raise ValueError(f"{self!r} has no alpha_bar: its kind is {self.kind!r}, not 'vp'. Use alpha and sigma.")
        return np.square(self.alpha(time))

    def drift(self, time: ArrayLike) -> Array:
        """f = d log(alpha)/dt of the forward SDE dx = f x dt + g dW (Song et al. 2021, eq. 5)."""
        raise ValueError(f"{self!r} is discrete and has no SDE. Use vp() or ou(), or a solver of levels.")

    def diffusion(self, time: ArrayLike) -> Array:
        """g = sigma sqrt(2 d log(rho)/dt) of the forward SDE dx = f x dt + g dW (Song et al. 2021, eq. 5)."""
        raise ValueError(f"{self!r} is discrete and has no SDE. Use vp() or ou(), or a solver of levels.")

    def model_time(self, time: ArrayLike) -> Array:
        """What a network trained on this schedule is shown: the clock itself (for a discrete one, the index).

        Below a shared part of the clock: the largest interval start that is not above the time.
        """
        times = self._checked(time)
        if self.shared is None:
            return times
        below, parts = self.shared
        low = self.time_range[0]
        starts = low + (below - low) * np.arange(parts) / parts
        return np.where(times < below, starts[np.searchsorted(starts, times, side="right") - 1], times)[()]

    def scales(self, rho: ArrayLike) -> tuple[Array, Array]:
        """(alpha, sigma) of the level with this rho in the coordinates of this kind; rho may be 0 or inf."""
        rho = np.asarray(rho, dtype=np.float64)
        if self.kind == "ve":
            return np.ones_like(rho)[()], rho[()]
        total = np.hypot(1.0, rho) if self.kind == "vp" else 1.0 + rho
        finite = np.isfinite(rho)
        sigma = np.divide(rho, total, out=np.ones_like(rho), where=finite)
        return 1.0 / total, sigma[()]

    def time_from_rho(self, rho: ArrayLike, *, clip: bool = False) -> Array:
        """The time at which sigma/alpha equals `rho`.

        rho: any shape; 0 and inf only where the schedule has those ends. clip: give the nearest end instead of
        raising, for levels that churn has pushed past it. Raises ValueError outside [rho_min, rho_max].
        """
        rho = np.asarray(rho, dtype=np.float64)
        low, high = self.rho_min, self.rho_max
        outside = np.isnan(rho)
        if not clip:
            outside = outside | (rho < low * (1 - RHO_SLACK)) | (rho > high * (1 + RHO_SLACK))
        if outside.any():
            raise ValueError(
                f"rho = sigma/alpha is {rho[outside].flat[0]:.6g}, outside {self!r}, which goes from {low:.6g} to "
                f"{high:.6g}. Choose levels inside, or a schedule that reaches them."
            )
        first, last = self.time_range
        time = np.clip(self._time(np.clip(rho, low, high)), first, last)
        return np.where(rho >= high, last, np.where(rho <= low, first, time))[()]

    def level(self, time: float) -> Level:
        """The level at `time`."""
        alpha, sigma = self.scales_at(time)
        return Level(float(alpha), float(sigma), float(time))

    def level_from_rho(self, rho: float, *, clip: bool = False) -> Level:
        """The level with this rho; rho = 0 is CLEAN on every schedule. clip: see time_from_rho (of the time only)."""
        if rho == 0:
            return CLEAN
        time = self.time_from_rho(rho, clip=clip)
        alpha, sigma = self.scales(rho)
        return Level(float(alpha), float(sigma), float(time))

    def to_dict(self) -> dict[str, Any]:
        """The schedule as JSON values, for from_dict."""
        return {"name": self.name, "options": {key: _to_json(value) for key, value in self.options}}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Schedule:
        """The schedule that to_dict wrote. Raises ValueError on anything else."""
        fits = isinstance(data, Mapping) and set(data) == {"name", "options"} and isinstance(data["options"], Mapping)
        if not fits:
            raise ValueError(
                f"A schedule's JSON must be {{'name': ..., 'options': {{...}}}}, got {repr(data)[:200]}. "
                "Write it with to_dict()."
            )
        from .schedules import get

        options = {
            key: Schedule.from_dict(value) if isinstance(value, Mapping) else value
            for key, value in data["options"].items()
        }
        return get(data["name"], **options)

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={_short(value)}" for key, value in self.options)
        return f"{self.name}({options})"

    def _checked(self, time: ArrayLike) -> Array:
        times = np.asarray(time, dtype=np.float64)
        low, high = self.time_range
        inside = (times >= low) & (times <= high)
        if not inside.all():
            raise ValueError(
                f"Time {times[~inside].flat[0]:.6g} is outside {self!r}, whose clock goes from {low:.6g} to "
                f"{high:.6g}. Choose times inside."
            )
        return times[()]


@dataclass(frozen=True, repr=False)
class DiscreteSchedule(Schedule):
    """A schedule given at the indices 0 .. T-1; alpha_bar[t] is the level after t + 1 steps of noise.

    Between indices log rho is linear in the index. Where the last level has alpha = 0, 1/rho is linear between
    the last two instead.
    """

    log_alpha_bar: Array = field(compare=False)

    kind: ClassVar[Kind] = "vp"

    def __post_init__(self) -> None:
        self.log_alpha_bar.setflags(write=False)
        if self.log_alpha_bar.ndim != 1 or not self.steps:
            raise ValueError(f"{self.name} needs a list of at least one value, got shape {self.log_alpha_bar.shape}.")
        with np.errstate(invalid="ignore"):
            good = np.diff(self._rhos, prepend=0.0) > 0
        if not good.all():
            raise ValueError(
                f"{self!r} is not a schedule: at position {int(np.argmin(good))} alpha_bar does not descend within "
                "[0, 1). Every beta must be within (0, 1); the last may be 1."
            )

    @property
    def steps(self) -> int:
        return len(self.log_alpha_bar)

    @property
    def time_range(self) -> tuple[float, float]:
        return 0.0, float(self.steps - 1)

    @cached_property
    def betas(self) -> Array:
        """beta[t] = 1 - alpha_bar[t] / alpha_bar[t - 1]: the variance added by step t. [T]"""
        return -np.expm1(np.diff(self.log_alpha_bar, prepend=0.0))

    @cached_property
    def _rhos(self) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.sqrt(np.expm1(-self.log_alpha_bar))

    def _rho(self, time: Array) -> Array:
        if self.steps == 1:
            return np.full_like(time, self._rhos[0])[()]
        index = time.astype(np.int64)
        if (index == time).all():
            return self._rhos[index]
        left = np.minimum(np.floor(time), self.steps - 2).astype(np.int64)
        weight = time - left
        low, high = self._rhos[left], self._rhos[left + 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            between = np.exp((1 - weight) * np.log(low) + weight * np.log(high))
            between = np.where(np.isinf(high), low / (1 - weight), between)
        return np.where(weight == 0, low, np.where(weight == 1, high, between))[()]

    def _time(self, rho: Array) -> Array:
        finite = self._rhos[np.isfinite(self._rhos)]
        if not len(finite):
            return np.zeros_like(rho)
        time = np.interp(np.log(rho), np.log(finite), np.arange(len(finite), dtype=np.float64))
        return np.where(rho > finite[-1], len(finite) - finite[-1] / rho, time)


@dataclass(frozen=True, repr=False)
class VESchedule(Schedule):
    """sigma = sigma_min (sigma_max/sigma_min)^t, t in [0, 1] (Song et al. 2021, eq. 9)."""

    sigma_min: float
    sigma_max: float

    kind: ClassVar[Kind] = "ve"

    @property
    def time_range(self) -> tuple[float, float]:
        return 0.0, 1.0

    def _rho(self, time: Array) -> Array:
        return self.sigma_min ** (1 - time) * self.sigma_max**time

    def _time(self, rho: Array) -> Array:
        return np.log(rho / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)

    def drift(self, time: ArrayLike) -> Array:
        return np.zeros_like(self._checked(time))

    def diffusion(self, time: ArrayLike) -> Array:
        return self.sigma(time) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))


@dataclass(frozen=True, repr=False)
class EDMSchedule(Schedule):
    """alpha = 1 and the clock is sigma itself (Karras et al. 2022, Table 1)."""

    sigma_min: float
    sigma_max: float

    kind: ClassVar[Kind] = "ve"
    open_top: ClassVar[bool] = True

    @property
    def time_range(self) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max

    def level_from_rho(self, rho: float, *, clip: bool = False) -> Level:
        level = super().level_from_rho(rho, clip=clip)
        return Level(1.0, level.sigma, level.sigma) if rho > self.sigma_max else level

    def _rho(self, time: Array) -> Array:
        return time

    def _time(self, rho: Array) -> Array:
        return rho

    def drift(self, time: ArrayLike) -> Array:
        return np.zeros_like(self._checked(time))

    def diffusion(self, time: ArrayLike) -> Array:
        return np.sqrt(2 * self._checked(time))


@dataclass(frozen=True, repr=False)
class FlowSchedule(Schedule):
    """alpha = 1 - t, sigma = t: t = 0 is data and t = 1 is noise (Liu et al. 2023; Lipman et al. 2023)."""

    kind: ClassVar[Kind] = "flow"

    @property
    def time_range(self) -> tuple[float, float]:
        return 0.0, 1.0

    def scales_at(self, time: ArrayLike) -> tuple[Array, Array]:
        times = self._checked(time)
        return 1 - times, times

    def _rho(self, time: Array) -> Array:
        with np.errstate(divide="ignore"):
            return np.divide(time, 1 - time)

    def _time(self, rho: Array) -> Array:
        return self.scales(rho)[1]

    def drift(self, time: ArrayLike) -> Array:
        with np.errstate(divide="ignore"):
            return np.divide(-1.0, 1 - self._checked(time))

    def diffusion(self, time: ArrayLike) -> Array:
        return np.sqrt(2 * self.rho(time))


def _to_json(value: Any) -> Any:
    if isinstance(value, Schedule):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    return f"<{len(value)} values>" if isinstance(value, tuple) else repr(value)
