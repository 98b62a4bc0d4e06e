"""One suite for any sampler, shipped or a user's own: its order, every schedule, grid, prediction and CPU executor.

May import: compiler, engine, models.denoiser, process. `fastdiff verify --solver` runs it; `trials` hands the same
trials to a test runner.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastdiff.compiler import convergence, layout, solvers
from fastdiff.compiler.build import plan as build
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.verify import GIVEN, execute, verify
from fastdiff.engine import backends
from fastdiff.engine.sampler import Sampler
from fastdiff.models.denoiser import Denoiser
from fastdiff.process import grids, predictions, schedules
from fastdiff.process.schedules import Level, Schedule

Array = NDArray[np.float64]

STEPS = (1, 2, 3, 8)  # the last one is held to the laws too
RUN_STEPS = 7
SHOWN = 20  # failures that a summary spells out
SHAPE = (2, 3, 5, 4)
ROUNDING = 2e-4  # of the largest element: fp32 rows against float64
HOMES = (("edm", "karras"), ("rectified_flow", "trailing"), ("vp", "linspace"), ("linear", "trailing"))


class Refused(Exception):
    """The combination has no meaning; the message is the ValueError that says so."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: `ok`, with a sentence. refused: the combination has no meaning, and the sentence is why."""

    ok: bool
    sentence: str
    refused: bool = False


@dataclass(frozen=True)
class Trial:
    """One check of one sampler; `str(trial)` names it and `trial.run()` does it.

    what: "table", "order", "prediction" or "executor"; name: of the prediction or the executor, or "order".
    """

    solver: str
    options: Mapping[str, Any] = field(hash=False)
    schedule: str
    grid: str
    what: str = "table"
    name: str = ""

    def __str__(self) -> str:
        given = [self.solver, *(f"{key}={value}" for key, value in self.options.items())]
        return "-".join([*given, self.schedule, self.grid, *([self.name] if self.name else [])])

    def run(self) -> Outcome:
        """Never raises for what the sampler does. A ValueError of the compiler or of the prediction is a refusal."""
        try:
            wrong = _CHECKS[self.what](self)
        except Refused as reason:
            return Outcome(True, " ".join(str(reason).split()), refused=True)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            return Outcome(False, f"{type(error).__name__} at {where.filename}:{where.lineno}: {error}")
        return Outcome(not wrong, wrong or "holds")


def trials(solver: str, **options: Any) -> list[Trial]:
    """The suite of a registered sampler with these options.

    Every schedule on one grid, every grid on one schedule, the order, every prediction, every executor of the CPU.

    For a test runner: `@pytest.mark.parametrize("trial", fd.suite.trials("mine"), ids=str)`, and in the test
    `outcome = trial.run(); assert outcome.ok, outcome.sentence`. Raises ValueError for an unknown name, and where the
    sampler runs on no schedule at all.
    """
    if solvers.get(solver).adaptive:
        raise ValueError(
            f"{solver} chooses its steps while it runs and the suite is of tables; see fd.plan(...).verify()"
        )
    schedule, grid = home(solver, options)
    found = [Trial(solver, options, name, grid) for name in processes()]
    for name in grids.names():
        if name == "gits":
            continue  # measured on a network, it is no grid of a schedule's own
        where = _schedule_for(name, schedule)
        if (where, name) != (schedule, grid):
            found.append(Trial(solver, options, where, name))
    found.append(Trial(solver, options, schedule, convergence.GRID, "order", "order"))
    for kind in predictions.names():
        found.append(Trial(solver, options, schedule, grid, "prediction", kind))
    for name in _executors():
        found.append(Trial(solver, options, schedule, grid, "executor", name))
    return found


@cache
def _executors() -> tuple[str, ...]:
    return tuple(name for name, backend in backends.probe().items() if backend.ok and "cpu" in backend.devices)


@cache
def processes() -> dict[str, Schedule]:
    """Every schedule by name; those made of data or of another schedule from a usual one."""
    usual = schedules.linear()
    data: dict[str, dict[str, Any]] = {
        "betas": {"betas": np.linspace(1e-4, 0.05, 400)},
        "alpha_bar": {"alpha_bar": usual.alpha_bar(np.arange(0.0, 1000.0, 4.0))},
        "schedule": {"schedule": schedules.scaled_linear()},
    }
    found = {}
    for name in schedules.names():
        try:
            found[name] = schedules.get(name)
        except ValueError as error:
            missing = [options for key, options in data.items() if f"argument: {key!r}" in str(error)]
            if not missing:
                raise
            found[name] = schedules.get(name, **missing[0])
    return found


def home(solver: str, options: Mapping[str, Any]) -> tuple[str, str]:
    """The first usual schedule and grid on which the sampler compiles."""
    reasons = []
    for schedule, grid in HOMES:
        try:
            build(solver, schedule, RUN_STEPS, grid, **options)
        except ValueError as reason:
            reasons.append(f"{schedule}: {' '.join(str(reason).split())}")
        else:
            return schedule, grid
    raise ValueError(f"{solver} compiles on none of the usual schedules. {' | '.join(reasons)}")


def make_plan(trial: Trial, steps: int) -> Plan:
    """The trial's plan; a grid that takes levels gets uniform ones. Raises Refused where it has none."""
    process = processes()[trial.schedule]
    try:
        if trial.grid == "custom":
            return build(trial.solver, process, grid=grids.make("linspace", process, steps), **trial.options)
        return build(trial.solver, process, steps, trial.grid, **trial.options)
    except ValueError as reason:
        raise Refused(str(reason)) from reason


@cache
def _schedule_for(grid: str, wanted: str) -> str:
    """The wanted schedule, or else the first on which this grid has levels."""
    if grid == "custom":
        return wanted
    for name in (wanted, *processes()):
        try:
            grids.make(grid, processes()[name], RUN_STEPS)
        except ValueError:
            continue
        return name
    return wanted


def _table(trial: Trial) -> str:
    """Finite, as wide as the kernel allows, the same again from JSON, ends as it declares, and keeps the laws."""
    wrong = []
    for steps in STEPS:
        plan = make_plan(trial, steps)
        read = Plan.from_json(plan.to_json())
        packed, again = plan.pack(), read.pack()
        if read != plan or not (np.array_equal(packed.coef, again.coef) and np.array_equal(packed.ids, again.ids)):
            wrong.append(f"{steps} steps: the plan read back from JSON is another one")
        if steps == STEPS[-1] and make_plan(trial, steps) != plan:
            wrong.append(f"{steps} steps: compiled twice, two different tables")
        widest = max(len(row.outputs) for row in plan.rows), max(len(row.slots) + 1 for row in plan.rows)
        if widest[0] > layout.MAX_OUTPUTS or widest[1] > layout.MAX_SLOTS:
            wrong.append(f"{steps} steps: a row of {widest[0]} outputs and {widest[1]} inputs is too wide")
        report = verify(plan, refine=steps == STEPS[-1])
        wrong += [f"{steps} steps: {check.name}: {check.sentence}" for check in report.checks if not check.ok]
    return "; ".join(wrong)


def _order(trial: Trial) -> str:
    """The error falls at the declared order up to 160 steps: a bias that no refinement removes stops it."""
    steps, ends = convergence.STEPS[0], convergence.ENDS
    try:
        build(trial.solver, trial.schedule, steps, convergence.GRID, grid_options=ends, **trial.options)
    except ValueError as reason:
        raise Refused(str(reason)) from reason
    measured = convergence.measure_table(solvers.get(trial.solver), trial.schedule, trial.options)
    return "" if measured.order_holds else f"order: {measured.order_sentence}"


def _runs_with(trial: Trial) -> str:
    """A network of this prediction gives the sample that its D gives in float64."""
    plan = make_plan(trial, RUN_STEPS)
    try:
        plan.pack(trial.name)
    except ValueError as reason:
        raise Refused(str(reason)) from reason
    return _compare(plan, *_engine(plan, trial.name, "reference"))


def _runs_on(trial: Trial) -> str:
    """The executor gives the float64 sample from the plan read back from JSON, whose table `_table` finds the same."""
    plan = make_plan(trial, RUN_STEPS)
    return _compare(plan, *_engine(Plan.from_json(plan.to_json()), "x0", trial.name))


_CHECKS: dict[str, Callable[[Trial], str]] = {
    "table": _table,
    "order": _order,
    "prediction": _runs_with,
    "executor": _runs_on,
}


def _compare(plan: Plan, times: float, got: Array) -> str:
    """The engine's sample against that of `execute`. times: how far off those are that the network was shown."""
    start, normals = _inputs(plan)
    expected = execute(plan, estimate, start, lambda i, _: normals[i], dict.fromkeys(plan.given, GIVEN))
    error = float(np.abs(got - expected).max() / np.abs(expected).max())
    if not error <= ROUNDING:
        return f"off by {error:.1e} of the largest element from the float64 table"
    return "" if times <= 1e-5 else f"the network is shown times off by {times:.1e}"


def estimate(x: Array, level: Level) -> Array:
    """What the trials' networks know: a bounded D that is not linear in the state."""
    spread = max(level.sigma, level.alpha)
    denoised: Array = 0.6 * np.tanh(x / spread) + 0.1 * np.cos(2.0 * x / spread)
    return denoised


def _inputs(plan: Plan) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    scale = max(plan.levels[0].sigma, 0.5)
    return scale * rng.standard_normal(SHAPE), rng.standard_normal((max(1, plan.draws), *SHAPE))


def _engine(plan: Plan, kind: str, executor: str) -> tuple[float, Array]:
    """In fp32 with a network of this prediction whose D is `estimate`: how far off its times are, and the sample."""
    start, normals = _inputs(plan)
    folds = [
        (row.level, predictions.coefficients(kind, row.level, plan.schedule))
        for row in plan.rows
        if row.level is not None
    ]
    calls = iter(folds)
    off = [0.0]

    def net(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        level, fold = next(calls)
        off[0] = max(off[0], float((time - fold.time).abs().max()) / max(1.0, abs(fold.time)))
        state = x.double().numpy() / fold.c_in
        return torch.from_numpy((estimate(state, level) - fold.P * state) / fold.Q).float()

    assert plan.schedule is not None
    sampler = Sampler(plan, Denoiser(net, plan.schedule, kind), executor)
    noise = torch.from_numpy(normals[: plan.draws]).float() if plan.draws else "white"
    given = {name: torch.full(SHAPE, GIVEN) for name in plan.given}
    got = sampler.sample(SHAPE, seed=0, init=torch.from_numpy(start).float(), noise=noise, given=given)
    return off[0], got.double().numpy()


def summary(outcomes: Mapping[Trial, Outcome]) -> str:
    """Lines for `fastdiff verify --solver`: how many trials hold, which are refused and why, and the first failures."""
    failed = {trial: outcome for trial, outcome in outcomes.items() if not outcome.ok}
    refused: dict[str, list[Trial]] = {}
    for trial, outcome in outcomes.items():
        if outcome.refused:
            refused.setdefault(outcome.sentence, []).append(trial)
    held = len(outcomes) - len(failed) - sum(map(len, refused.values()))
    lines = [f"  {'FAIL' if failed else 'ok  '} suite: {held} of {len(outcomes)} hold, over {_counted(outcomes)}"]
    lines += [f"       refused on {', '.join(map(_place, them))}: {reason}" for reason, them in refused.items()]
    shown = list(failed.items())[:SHOWN]
    lines += [f"       FAIL {_place(trial)}: {outcome.sentence}" for trial, outcome in shown]
    lines += [f"       and {len(failed) - SHOWN} more"] * (len(failed) > SHOWN)
    return "\n".join(lines)


def _counted(outcomes: Mapping[Trial, Outcome]) -> str:
    kinds = {what: sum(trial.what == what for trial in outcomes) for what in _CHECKS}
    return (
        f"{len({trial.schedule for trial in outcomes})} schedules and {len({trial.grid for trial in outcomes})} grids "
        f"({kinds['table']} tables), {kinds['prediction']} predictions, {kinds['executor']} executors, and the order"
    )


def _place(trial: Trial) -> str:
    return trial.name or f"{trial.schedule} with {trial.grid}"
