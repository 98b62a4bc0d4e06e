"""Which times an objective trains at: each distribution is a quantile function of a uniform number.

May import: process. Times are on the schedule's clock; what is importance-sampled says its weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from fastdiff.errors import unknown_name
from fastdiff.process.schedules import Schedule

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Times:
    """A distribution of times on a schedule's clock."""

    name: ClassVar[str]

    def at(self, u: Array, schedule: Schedule) -> Array:
        """The times at quantiles u in (0, 1), [B] float64."""
        raise NotImplementedError

    def choices(self, schedule: Schedule) -> Array | None:
        """Where they are a few times, each as likely as another: these, [T] float64 in the order of their quantiles."""
        return None

    @classmethod
    def chosen(cls) -> bool:
        """Whether `choices` says all: a subclass may draw otherwise than the class whose choices it has, or weigh."""
        drawn, said = (next(kind for kind in cls.__mro__ if name in vars(kind)) for name in ("at", "choices"))
        return drawn is said and cls.importance is Times.importance

    def importance(self, time: Array, schedule: Schedule) -> Array | float:
        """What multiplies the loss at these times, so that its mean is that of the distribution that was asked for."""
        return 1.0

    def observe(self, time: Array, loss: Array, schedule: Schedule) -> None:
        """Hear of the losses at these times, [B] each."""

    def state(self) -> dict[str, Any]:
        """What was heard, as JSON values, for a checkpoint."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` said."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for `get`."""
        return {"name": self.name, **{entry.name: getattr(self, entry.name) for entry in fields(self) if entry.init}}


@dataclass(frozen=True)
class Uniform(Times):
    """Every step of a discrete schedule as likely as another; of a continuous one, uniform in time on [low, high].

    low, high: None is the schedule's own end. For those that reach sigma = 0 and an objective that divides by it, low
    of 1e-5 is usual (Song et al. 2021, appendix C).
    """

    low: float | None = None
    high: float | None = None
    name: ClassVar[str] = "uniform"

    def at(self, u: Array, schedule: Schedule) -> Array:
        low, high = self._ends(schedule)
        return low + (high - low) * u if schedule.steps is None else _chosen(self.choices(schedule), u)

    def choices(self, schedule: Schedule) -> Array | None:
        low, high = self._ends(schedule)
        if schedule.steps is None:
            return None
        if math.ceil(low) > math.floor(high):
            raise ValueError(
                f"uniform times from {low:.6g} to {high:.6g} hold no whole step of {schedule!r}; widen them"
            )
        return np.arange(math.ceil(low), math.floor(high) + 1, dtype=np.float64)

    def _ends(self, schedule: Schedule) -> tuple[float, float]:
        first, last = schedule.time_range
        low = first if self.low is None else self.low
        high = last if self.high is None else self.high
        if not first <= low <= high <= last:
            raise ValueError(
                f"uniform times from {low:.6g} to {high:.6g} are not within the clock of {schedule!r}, {first:.6g} to "
                f"{last:.6g}. Leave low and high out, or choose them inside."
            )
        return low, high


@dataclass(frozen=True)
class Discrete(Times):
    """One of these times, each as likely as another: the levels of NCSN (Song & Ermon 2019)."""

    values: tuple[float, ...] = ()
    name: ClassVar[str] = "discrete"

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("discrete times need at least one value, on the schedule's clock; got none")
        object.__setattr__(self, "values", tuple(float(value) for value in self.values))

    def at(self, u: Array, schedule: Schedule) -> Array:
        return _chosen(self.choices(schedule), u)

    def choices(self, schedule: Schedule) -> Array:
        return np.asarray(self.values)


@dataclass(frozen=True)
class LogNormal(Times):
    """log(sigma/alpha) ~ N(mean, std^2), cut off at the schedule's ends (Karras et al. 2022, Table 1: -1.2, 1.2)."""

    mean: float = -1.2
    std: float = 1.2
    name: ClassVar[str] = "lognormal"

    def __post_init__(self) -> None:
        _positive(self.name, self.std)

    def at(self, u: Array, schedule: Schedule) -> Array:
        time = schedule.time_from_rho(np.exp(self.mean + self.std * _normal(u)), clip=True)
        return time if schedule.steps is None else np.rint(time)


@dataclass(frozen=True)
class LogitNormal(Times):
    """logit of the fraction of the clock ~ N(mean, std^2) (Esser et al. 2024, eq. 19: 0, 1)."""

    mean: float = 0.0
    std: float = 1.0
    name: ClassVar[str] = "logitnormal"

    def __post_init__(self) -> None:
        _positive(self.name, self.std)

    def at(self, u: Array, schedule: Schedule) -> Array:
        low, high = schedule.time_range
        time = low + (high - low) / (1 + np.exp(-(self.mean + self.std * _normal(u))))
        return time if schedule.steps is None else np.rint(time)


@dataclass(frozen=True)
class LossSecondMoment(Times):
    """Steps of a discrete schedule as often as their loss is large (Nichol & Dhariwal 2021, eq. 18).

    p_t is proportional to sqrt(E[L_t^2]) over the last `history` losses of each step, mixed with `floor` of a uniform
    distribution; the loss is divided by T p_t. Uniform until every step has its history. What was heard is not part of
    to_dict: `state` and `restore` are for checkpoints, and every process must hear the same.
    """

    history: int = 10
    floor: float = 0.001
    name: ClassVar[str] = "loss_second_moment"
    _heard: dict[str, NDArray[Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.history < 1 or not 0 < self.floor <= 1:
            raise ValueError(
                f"loss_second_moment: history must be at least 1 and floor within (0, 1], got {self.history!r} and "
                f"{self.floor!r}"
            )

    def at(self, u: Array, schedule: Schedule) -> Array:
        chance = self.chances(schedule)
        return np.minimum(np.searchsorted(np.cumsum(chance), u, side="right"), len(chance) - 1).astype(np.float64)

    def importance(self, time: Array, schedule: Schedule) -> Array:
        chance = self.chances(schedule)
        return 1 / (len(chance) * chance[time.astype(np.int64)])

    def observe(self, time: Array, loss: Array, schedule: Schedule) -> None:
        losses, counts = self._memory(schedule)
        for index, value in zip(time.astype(np.int64), loss, strict=True):
            losses[index, counts[index] % self.history] = value
            counts[index] += 1

    def chances(self, schedule: Schedule) -> Array:
        """The probability of every step, [T]."""
        losses, counts = self._memory(schedule)
        total = len(counts)
        if (counts < self.history).any():
            return np.full(total, 1 / total)
        size = np.sqrt(np.square(losses).mean(1))
        return (1 - self.floor) * size / size.sum() + self.floor / total

    def state(self) -> dict[str, Any]:
        return {key: value.tolist() for key, value in self._heard.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._heard.update({key: np.array(value) for key, value in state.items()})

    def _memory(self, schedule: Schedule) -> tuple[NDArray[Any], NDArray[Any]]:
        if schedule.steps is None:
            raise ValueError(f"loss_second_moment counts the steps of a discrete schedule, and {schedule!r} has none")
        if not self._heard:
            self._heard["losses"] = np.zeros((schedule.steps, self.history))
            self._heard["counts"] = np.zeros(schedule.steps, dtype=np.int64)
        return self._heard["losses"], self._heard["counts"]


_CLASSES: dict[str, type[Times]] = {
    kind.name: kind for kind in (Uniform, Discrete, LogNormal, LogitNormal, LossSecondMoment)
}


def names() -> list[str]:
    """Names that `get` knows."""
    return list(_CLASSES)


def get(times: str | Mapping[str, Any] | Times) -> Times:
    """The distribution: by name, by what `to_dict` wrote, or itself. Raises ValueError for anything else."""
    if isinstance(times, Times):
        return times
    options = {"name": times} if isinstance(times, str) else dict(times)
    name = options.pop("name", None)
    if name not in _CLASSES:
        raise unknown_name("time distribution", name, names())
    try:
        return _CLASSES[name](**options)
    except TypeError as error:
        known = ", ".join(entry.name for entry in fields(_CLASSES[name]) if entry.init)
        raise ValueError(f"Time distribution {name}: {error}. Its options: {known}.") from None


def _chosen(values: Array | None, u: Array) -> Array:
    assert values is not None
    return values[np.minimum((u * len(values)).astype(np.int64), len(values) - 1)]


def _normal(u: Array) -> Array:
    return torch.special.ndtri(torch.from_numpy(np.ascontiguousarray(u))).numpy()


def _positive(name: str, std: float) -> None:
    if not (math.isfinite(std) and std > 0):
        raise ValueError(f"{name} times: std must be finite and above 0, got {std!r}")
