"""Samplers that choose their steps while they run: the phases of such a run as rows, and the plan that holds them.

May import: run, assemble, plan, explain, step_control, process. A run is a start, trial steps each accepted or not, and
a finish; each is a few ordinary rows. Between them a few registers are held: register 0 is the state x / alpha, which a
rejected step leaves as it is. All of it is in the coordinates alpha = 1, sigma = rho = sigma/alpha, so that a sampler
takes the same steps on every schedule on which the network answers alike.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fastdiff.compiler import explain, guided
from fastdiff.compiler.assemble import Output, Row, place
from fastdiff.compiler.lin import Atom, Lin
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.run import Run
from fastdiff.compiler.solvers.registry import Solver
from fastdiff.compiler.step_control import Control
from fastdiff.process.schedules import CLEAN, Level, Schedule

if TYPE_CHECKING:
    from fastdiff.compiler.verify import Report

FIRST_RHO = 1e3  # where the steps begin on a schedule that reaches alpha = 0, after one evaluation there


@dataclass(frozen=True)
class Trial:
    """What one step makes of the held registers.

    end: the state at t. error: the estimate of its error. carried: what the other held registers become.
    """

    end: Lin
    error: Lin
    carried: tuple[Lin, ...]


@dataclass(frozen=True)
class Method(ABC):
    """An adaptive sampler with its options; levels it is given have alpha = 1.

    A step is accepted by `control` (fastdiff.compiler.step_control) on the root mean square over one sample of
    error / max(atol, rtol max(|a|, |b|)), a and b held register `scale` before and after the step.
    noise: (eta, s_noise): a step to t goes down to rho_down, then s_noise sqrt(rho_t^2 - rho_down^2) is added.
    max_steps: of one sample, rejected ones included.
    """

    rtol: float
    atol: float
    control: Control
    max_steps: int
    held: int
    scale: int
    noise: tuple[float, float]

    @abstractmethod
    def start(self, run: Run, x: Lin, top: Level) -> tuple[Lin, ...]:
        """The held values at the first level, x / alpha first."""

    @abstractmethod
    def step(self, run: Run, s: Level, t: Level, *held: Lin) -> Trial:
        """A trial step from s down to t."""

    @abstractmethod
    def finish(self, run: Run, bottom: Level, *held: Lin) -> Lin:
        """The sample from what is held at the last noisy level."""


@dataclass(frozen=True)
class Phase:
    """rows[0] evaluates nothing: it reads held registers and makes the first state evaluated, or the result.

    results: the register of each value the phase makes.
    """

    rows: tuple[Row, ...]
    registers: int
    results: tuple[int, ...]


class _ScaledRun(Run):
    """A run whose levels have alpha = 1."""

    def level_from_rho(self, rho: float) -> Level:
        return scaled(super().level_from_rho(rho))


def scaled(level: Level) -> Level:
    """The same level for x / alpha."""
    return Level(1.0, level.rho, level.time)


def phase(
    solver: str, schedule: Schedule, held: int, function: Callable[..., Sequence[Lin]], lasting: bool = False
) -> Phase:
    """The rows of `function(run, *held)`, which returns the values it makes; lasting: what is held stays as it is."""
    run = _ScaledRun(solver, (), schedule)
    atoms = [Atom("held", i) for i in range(held)]
    made, *others = function(run, *(run.linear({atom: 1.0}) for atom in atoms))
    kept = [next(iter(run.keep(value).terms)) for value in others]
    keep = (*kept, *atoms) if lasting else kept
    rows, registers, home = place(solver, run.finish(made), {atom: i for i, atom in enumerate(atoms)}, keep)
    return Phase(rows, registers, (rows[-1].outputs[0].dest, *(home[atom] for atom in kept)))


@dataclass(frozen=True)
class AdaptivePlan(Plan):
    """A sampler whose rows are made as it goes, for each sample its own (`fastdiff.compiler.walk`).

    levels: the first, the last noisy one, and the clean one. rows: the opening, the start and the first trial step, as
    an example. guidance: what `Plan.guided` wrote into its rows, and writes into every row it makes.
    """

    method: Method = field(kw_only=True)
    guidance: Mapping[str, tuple[float, float] | None] = field(default_factory=dict, kw_only=True)

    @property
    def nfe(self) -> int:
        """Not known before the run: ValueError."""
        raise ValueError(f"{self.solver} chooses its steps while it runs; its evaluations are in sampler.last_run")

    @property
    def partly_guided(self) -> bool:
        """True when a row may leave out a branch of the guidance."""
        return any(self.guidance.get(name) is not None for name in ("interval", "perturbed_interval"))

    def guided(
        self,
        *,
        interval: tuple[float, float] | None = None,
        schedule: Sequence[float] | Callable[[Level], float] | None = None,
        perturbed_interval: tuple[float, float] | None = None,
        cfg_pp: bool = False,
        clamp: tuple[float, float] | None = None,
    ) -> Plan:
        """`Plan.guided`, but for schedule and cfg_pp, which need all rows beforehand: ValueError."""
        if schedule is not None or cfg_pp:
            raise ValueError(
                f"{self.solver} makes its rows as it goes, and guidance_schedule and cfg_pp need them beforehand; use "
                "guidance_interval, or a solver with a grid"
            )
        given = {"interval": interval, "perturbed_interval": perturbed_interval, "clamp": clamp}
        known = {**self.guidance, **{name: value for name, value in given.items() if value is not None}}
        return replace(self, guidance=known, rows=_guided(self.rows, known))

    def skipping(self, rows: Sequence[int] | None = None, *, every: int | None = None, order: int = 2) -> Plan:
        """ValueError: its rows are not known beforehand."""
        raise ValueError(f"{self.solver} makes its rows as it goes, so none can be skipped; use a solver with a grid")

    @property
    def first(self) -> Level:
        """Where the first step starts, with alpha = 1."""
        top = self.levels[0]
        assert self.schedule is not None
        return scaled(top if top.alpha > 0.0 else self.schedule.level_from_rho(FIRST_RHO))

    @property
    def last(self) -> Level:
        """Where the last step ends, with alpha = 1."""
        return scaled(self.levels[1])

    @property
    def stages(self) -> int:
        """Evaluations of one trial step."""
        return len(self.example.rows) - 1

    def level(self, lam: float) -> Level:
        """The level with this log(alpha/sigma), with alpha = 1; the last one for all below it, and for what is near."""
        assert self.schedule is not None
        if lam > self.last.lam - 1e-5:
            return self.last
        return scaled(self.schedule.level_from_rho(math.exp(-lam), clip=True))

    def trial(self, s: Level, t: Level) -> Phase:
        """The rows of a step from s to t; results: the end, the error, and the other held values."""

        def function(run: Run, *held: Lin) -> tuple[Lin, ...]:
            step = self.method.step(run, s, t, *held)
            return (step.end, step.error, *step.carried)

        return self._phase(self.method.held, function, lasting=True)

    @cached_property
    def example(self) -> Phase:
        """The first trial step; every other one has its results in the same registers."""
        return self.trial(self.first, self.level(self.first.lam + self.method.control.h_init))

    @cached_property
    def start(self) -> Phase:
        """The rows before the first step, from the state at the first level to what is held."""
        return self._phase(1, lambda run, x: self.method.start(run, x, self.levels[0]))

    @cached_property
    def finish(self) -> Phase:
        """The rows after the last step, from what is held to the sample in register 0."""
        return self._phase(self.method.held, lambda run, *held: (self.method.finish(run, self.last, *held),))

    def _phase(self, held: int, function: Callable[..., Sequence[Lin]], lasting: bool = False) -> Phase:
        assert self.schedule is not None
        made = phase(self.solver, self.schedule, held, function, lasting)
        return replace(made, rows=_guided(made.rows, self.guidance)) if self.guidance else made

    def for_batch(self, batch: int) -> Plan:
        """A plan with a row for every evaluation that a trial step of a batch makes; it shapes a run's buffers."""
        opening, *rows = self.rows
        return replace(self, rows=(opening, *rows, *rows[-1:] * (self.stages * batch)))

    def explain(self) -> str:
        """What the sampler does, and the rows of its start and of its first trial step as formulas."""
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        assert self.schedule is not None
        lines = [
            f"{self.solver}({options}), adaptive, schedule {self.schedule.name}",
            f"sigma/alpha from {self.levels[0].rho:.6g} to {self.last.rho:.6g}, {self.stages} model evaluations a "
            f"trial step, {self.registers} registers",
            "x: the state evaluated in this row, over alpha; D: denoised estimate; r: registers",
            "the start and the first trial step; every later one is made from the error of those before it:",
            "",
        ]
        for i, row in enumerate(self.rows):
            lines += explain.row_lines(i, row)
        return "\n".join(lines)

    def verify(self) -> Report:
        """Run it on data of known law and hold it to its tolerance; see `fastdiff.compiler.verify_adaptive`."""
        from fastdiff.compiler.verify_adaptive import verify

        return verify(self)

    def to_json(self) -> str:
        """An adaptive sampler has no table to write: ValueError."""
        raise ValueError(
            f"{self.solver} chooses its steps while it runs, so it has no table to write; store its name and options "
            "and make it with fd.plan"
        )


def adaptive_plan(
    solver: Solver,
    options: Mapping[str, Any],
    schedule: Schedule,
    grid: str,
    top: Level,
    bottom: Level,
) -> AdaptivePlan:
    """The plan of an adaptive solver between two levels. Raises what the solver raises for its options."""
    method: Method = solver.function(top, bottom, **options)
    bare = AdaptivePlan(
        solver=solver.name,
        options={**solver.options(), **options},
        schedule=schedule,
        grid=grid,
        levels=(top, bottom, CLEAN),
        rows=(),
        registers=0,
        result=0,
        draws=int(method.noise[0] * method.noise[1] > 0.0),
        method=method,
    )
    start, finish, trial = bare.start, bare.finish, bare.example
    if start.results != tuple(range(method.held)) or finish.results != (0,):
        raise ValueError(f"{solver.name}: its start must leave what is held, and its finish the sample, in place")
    opening, *rows = start.rows
    return replace(
        bare,
        rows=(_into_scale(opening, top), *rows, *trial.rows[1:]),
        registers=max(p.registers for p in (start, trial, finish)),
    )


def _guided(rows: tuple[Row, ...], guidance: Mapping[str, tuple[float, float] | None]) -> tuple[Row, ...]:
    changes = {"interval": guided.within, "perturbed_interval": guided.perturbed_within, "clamp": guided.clamped}
    for name, change in changes.items():
        value = guidance.get(name)
        if value is not None:
            rows = change(rows, value)
    return rows


def _into_scale(opening: Row, top: Level) -> Row:
    """The row that takes the given state to x / alpha; at alpha = 0 the start itself must."""
    factor = 1.0 / top.alpha if top.alpha > 0.0 else 1.0

    def times(output: Output) -> Output:
        return replace(output, x=factor * output.x)

    return replace(opening, outputs=tuple(times(output) for output in opening.outputs))
