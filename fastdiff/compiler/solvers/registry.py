"""Solver functions by name, with what is known of each. May import: process, errors."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from fastdiff.compiler.solvers import elsewhere
from fastdiff.errors import unknown_name
from fastdiff.process.elsewhere import argument as arguments_elsewhere
from fastdiff.process.schedules import Schedule

F = TypeVar("F", bound=Callable[..., Any])


@cache
def _defaults(function: Callable[..., Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((p.name, p.default) for p in list(inspect.signature(function).parameters.values())[2:])


@dataclass(frozen=True)
class Solver:
    """A sampler: `function(run, x, **options)` returns the final state.

    order: global order of convergence in the step (weak order of the variance for stochastic ones); 0 where refining
    the grid leads nowhere, because D is taken for a sample and not for a mean (consistency samplers).
    exact_marginal: with D == mu at every level the state keeps the law N(alpha mu, sigma^2) exactly; always, never,
    or where these options have these values.
    denoises: the step to sigma = 0 is x' = D; same values.
    refines: refining the grid leads to the data, as an order above 0 says; same values, False by order = 0.
    upward: the solver goes from the data to the noise, so its levels ascend.
    flow_only: it is defined on flow schedules only.
    adaptive: it chooses its steps while it runs; `function(top, bottom, **options)` returns its
    `fastdiff.compiler.adaptive.Method` between two levels.
    """

    name: str
    function: Callable[..., Any]
    order: int
    exact_marginal: bool | Mapping[str, Any]
    denoises: bool | Mapping[str, Any] = True
    refines: bool | Mapping[str, Any] = True
    upward: bool = False
    flow_only: bool = False
    adaptive: bool = False

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.function) or "").split("\n")[0]

    def options(self) -> dict[str, Any]:
        """Option names and defaults."""
        return dict(_defaults(self.function))

    def keeps_marginal(self, options: Mapping[str, Any]) -> bool:
        """Whether `exact_marginal` holds with these options, defaults filled in."""
        return self._holds(self.exact_marginal, options)

    def ends_in_denoise(self, options: Mapping[str, Any]) -> bool:
        """Whether `denoises` holds with these options, defaults filled in."""
        return self._holds(self.denoises, options)

    def leads_to_data(self, options: Mapping[str, Any]) -> bool:
        """Whether the law of many steps is that of the data with these options, defaults filled in."""
        return self.order > 0 and self._holds(self.refines, options)

    def _holds(self, law: bool | Mapping[str, Any], options: Mapping[str, Any]) -> bool:
        if isinstance(law, bool):
            return law
        chosen = {**self.options(), **options}
        return all(chosen[name] == value for name, value in law.items())

    def check_schedule(self, schedule: Schedule | None) -> None:
        """ValueError for a schedule this solver is not defined on."""
        if self.flow_only and (schedule is None or schedule.kind != "flow"):
            given = "custom levels" if schedule is None else f"schedule {schedule.name!r}"
            raise ValueError(
                f"{self.name} needs a flow schedule (rectified_flow), got {given}; use 'euler' or 'ddim' there"
            )

    def check_options(self, given: dict[str, Any]) -> None:
        """TypeError for an option this solver does not have or not of its default's kind, ValueError for nan."""
        known = self.options()
        for name, value in given.items():
            if name not in known:
                instead = arguments_elsewhere(name)
                raise TypeError(
                    f"solver {self.name!r} has no option {name!r}{f', {instead}' * bool(instead)}; its options: "
                    f"{', '.join(known) or 'none'}"
                )
            kind = _KINDS.get(type(known[name]))
            if kind and (not isinstance(value, kind[0]) or (isinstance(value, bool) and kind[0] is not bool)):
                raise TypeError(f"solver {self.name!r}: option {name!r} must be {kind[1]}, got {value!r}")
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"solver {self.name!r}: option {name!r} is nan, expected a number")
            if name in _AMOUNTS and isinstance(value, numbers.Real) and value < 0:
                raise ValueError(f"solver {self.name!r}: option {name!r} is an amount of noise, >= 0, got {value!r}")


_KINDS: dict[type, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (numbers.Integral, "an integer"),
    float: (numbers.Real, "a number"),
    str: (str, "a name"),
}
_AMOUNTS = ("eta", "s_churn", "s_noise")
_SOLVERS: dict[str, Solver] = {}


def solver(
    name: str,
    *,
    order: int,
    exact_marginal: bool | Mapping[str, Any] = True,
    denoises: bool | Mapping[str, Any] = True,
    refines: bool | Mapping[str, Any] = True,
    upward: bool = False,
    flow_only: bool = False,
    adaptive: bool = False,
) -> Callable[[F], F]:
    """Register a solver function under `name`; the flags are claims, and say what `plan.verify` holds a table to.

    See `Solver` for each flag and README, "Add a sampler", for an example. Raises ValueError for a name that is taken.
    """

    def register(function: F) -> F:
        taken = _SOLVERS.get(name)
        if taken and (taken.function.__module__, taken.function.__qualname__) != (
            function.__module__,
            function.__qualname__,
        ):
            raise ValueError(f"a solver named {name!r} exists already; choose another name")
        _SOLVERS[name] = Solver(name, function, order, exact_marginal, denoises, refines, upward, flow_only, adaptive)
        return function

    return register


def get(name: str) -> Solver:
    """The solver called `name`; ValueError where there is none, saying what another library's name is called here."""
    if name not in _SOLVERS:
        raise unknown_name("solver", name, _SOLVERS, elsewhere.meant(name, _SOLVERS))
    return _SOLVERS[name]


def names() -> list[str]:
    """Every solver's name, sorted."""
    return sorted(_SOLVERS)
