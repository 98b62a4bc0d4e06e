"""What a sampler costs and how fast its error falls, measured on Gaussian data by exact propagation.

May import: build, plan, solvers, verify, process. NumPy only; nothing is drawn and no network is called.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdiff.compiler import solvers, verify
from fastdiff.compiler.adaptive import AdaptivePlan
from fastdiff.compiler.build import plan as build
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.solvers import Solver
from fastdiff.compiler.verify_adaptive import Cost, at_tolerance
from fastdiff.compiler.verify_adaptive import measure as measure_cost

STEPS = (20, 40, 80, 160)  # the order is the slope between the last two
COARSE = (5, 10)  # the curve begins before the error falls at its order
BUDGETS = (10, 20, 50)
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # of an adaptive solver: rtol and atol
GRID = "karras"  # in equal ratios the first step of a multistep method would cap its order at 2
ENDS = {"sigma_min": 0.01, "sigma_max": 20.0}  # sigma / alpha
TOLERANCE = 0.35  # how far below its order a solver may be at 160 steps
FLOOR = 1e-11  # errors below are rounding and have no slope


@dataclass(frozen=True)
class Bias:
    """The error of the run of most steps whose evaluations do not exceed a budget.

    error: signed, None where two steps cost more than the budget.
    """

    budget: int
    nfe: int
    error: float | None


@dataclass(frozen=True)
class Measurement:
    """What `measure` found of one solver; `print(measurement)` shows it.

    declared: the solver's order; with options that are not its defaults, which may lower it, 1: the error must fall.
    order: slope of the error, inf where it is rounding from the start, nan where it is not finite. order_options: those
    it was measured with besides the chosen ones: s_noise = 1, since more noise than the levels hold leaves a bias that
    no refinement removes. errors: those it is the slope of. curve: (model evaluations, signed error) at 5, 10, 20, ...
    160 steps. unjudged: why the order has no meaning, or "". nfe, registers, width (outputs, inputs of the widest row),
    draws: of the table of 20 steps; report: its laws.
    """

    solver: Solver
    schedule: str
    declared: int
    order: float
    order_options: Mapping[str, Any]
    errors: tuple[float, ...]
    curve: tuple[tuple[int, float], ...]
    bias: tuple[Bias, ...]
    nfe: int
    registers: int
    width: tuple[int, int]
    draws: int
    unjudged: str
    report: verify.Report

    @property
    def order_holds(self) -> bool:
        """False where the measured order is less than the declared one by more than TOLERANCE."""
        return bool(self.unjudged) or self.order >= self.declared - TOLERANCE

    @property
    def order_sentence(self) -> str:
        """What the order was declared and measured to be, and the errors."""
        errors = ", ".join(f"{abs(error):.1e}" for error in self.errors)
        order = f"declared {self.declared}, measured {self.order:.2f}"
        order += "".join(f" with {name} = {value:g}" for name, value in self.order_options.items())
        if self.unjudged:
            order = f"stated and not judged, {self.unjudged}; slope {self.order:.2f}"
        return f"{order}; error {errors} at N = {', '.join(map(str, STEPS))} steps"

    @property
    def ok(self) -> bool:
        """True when the laws hold and the declared order does."""
        return self.report.ok and self.order_holds

    def __str__(self) -> str:
        bias = (
            f"{b.error:+.2%} at {b.nfe}" if b.error is not None else f"two steps cost more than {b.budget}"
            for b in self.bias
        )
        noise = f"{self.draws} draws of noise" if self.draws else "deterministic"
        return "\n".join(
            (
                f"{self.solver.name}: {self.solver.summary}",
                str(self.report),
                f"  {'ok  ' if self.order_holds else 'FAIL'} order: {self.order_sentence}",
                f"  bias: {'; '.join(bias)} evaluations",
                f"  cost: {self.nfe} evaluations at {STEPS[0]} steps, {self.registers} registers, rows of at most "
                f"{self.width[0]} outputs and {self.width[1]} inputs, {noise}",
                f"  error: of the variance entering the last evaluation, relative, worst of data N(0, v) with v = "
                f"{', '.join(f'{v:g}' for v in verify.DATA_VARIANCES)}; schedule {self.schedule}, grid {GRID}, "
                f"sigma/alpha from {ENDS['sigma_max']:g} to {ENDS['sigma_min']:g}",
            )
        )


@dataclass(frozen=True)
class AdaptiveMeasurement:
    """What `measure` found of a solver that chooses its steps; `print(measurement)` shows it.

    costs: at each of TOLERANCES. registers, width: of its start and its first trial step; report: its laws.
    """

    solver: Solver
    schedule: str
    costs: tuple[Cost, ...]
    registers: int
    width: tuple[int, int]
    report: verify.Report

    @property
    def order_holds(self) -> bool:
        """False where a tolerance ten times smaller does not lower the error."""
        return all(fine.error < coarse.error for coarse, fine in itertools.pairwise(self.costs))

    @property
    def ok(self) -> bool:
        """True when the laws hold and the error falls with the tolerance."""
        return self.report.ok and self.order_holds

    def __str__(self) -> str:
        lines = [f"{self.solver.name}: {self.solver.summary}", str(self.report)]
        lines += [
            f"  {'ok  ' if self.order_holds else 'FAIL'} rtol = atol = {c.rtol:g}: error {c.error:.1e} with {c.nfe} "
            f"evaluations, {c.accepted} steps accepted and {c.rejected} rejected"
            for c in self.costs
        ]
        lines += [
            f"  cost: {self.registers} registers, rows of at most {self.width[0]} outputs and {self.width[1]} inputs",
            f"  error: of the last noisy state, root mean square over the data's spread, worst of data N(1, v) with "
            f"v = {', '.join(f'{v:g}' for v in verify.DATA_VARIANCES)}; schedule {self.schedule}, sigma/alpha from "
            f"{ENDS['sigma_max']:g} to {ENDS['sigma_min']:g}",
        ]
        return "\n".join(lines)


def measure(name: str) -> Measurement | AdaptiveMeasurement:
    """Compile a registered solver with its default options at several step counts and measure it; deterministic.

    On edm (rectified_flow where the solver is defined on flows only). An adaptive solver is measured at several
    tolerances instead. Raises what compiling raises.
    """
    chosen = solvers.get(name)
    if chosen.adaptive:
        return _measure_adaptive(chosen)
    return measure_table(chosen, "rectified_flow" if chosen.flow_only else "edm", {})


def _measure_adaptive(chosen: Solver) -> AdaptiveMeasurement:
    plan = build(chosen.name, "edm", grid=GRID, grid_options=ENDS)
    assert isinstance(plan, AdaptivePlan)
    return AdaptiveMeasurement(
        solver=chosen,
        schedule="edm",
        costs=tuple(measure_cost(at_tolerance(plan, rtol, rtol)) for rtol in TOLERANCES),
        registers=plan.registers,
        width=_width(plan),
        report=plan.verify(),
    )


def measure_table(chosen: Solver, schedule: str, options: Mapping[str, Any]) -> Measurement:
    """`measure` of a solver that compiles to a table, on a schedule and with options. Raises what compiling raises."""
    defaults = chosen.options()
    chosen.check_options(dict(options))
    plans: dict[int, Plan] = {}

    def make(steps: int, **more: Any) -> Plan:
        return build(chosen.name, schedule, steps, GRID, grid_options=ENDS, **{**options, **more})

    def plan(steps: int) -> Plan:
        if steps not in plans:
            plans[steps] = make(steps)
        return plans[steps]

    curve = tuple((plan(n).nfe, variance_error(plan(n))) for n in (*COARSE, *STEPS))
    falling = [error for _, error in curve[len(COARSE) :]]
    without = {"s_noise": 1.0} if {**defaults, **options}.get("s_noise", 1.0) != 1.0 else {}
    if without:
        falling = [variance_error(make(n, **without)) for n in STEPS]
    table = plan(STEPS[0])
    return Measurement(
        solver=chosen,
        schedule=schedule,
        declared=chosen.order if {**defaults, **options} == defaults else min(1, chosen.order),
        order=slope(STEPS, falling),
        order_options=without,
        errors=tuple(falling),
        curve=curve,
        bias=tuple(_bias(plan, budget) for budget in BUDGETS),
        nfe=table.nfe,
        registers=table.registers,
        width=_width(table),
        draws=table.draws,
        unjudged=_unjudged(chosen, options),
        report=verify.verify(table),
    )


def _width(plan: Plan) -> tuple[int, int]:
    """The most outputs and the most inputs of a row."""
    return max(len(row.outputs) for row in plan.rows), max(len(row.slots) + 1 for row in plan.rows)


def variance_error(plan: Plan) -> float:
    """Relative error of the variance of the state that enters the last evaluation, the worst over DATA_VARIANCES.

    var / (alpha^2 v + sigma^2) - 1 on data N(0, v), from that law at the first level; at the result where the plan
    ends in noise. Signed: below 0 the samples spread too little. What the last denoise loses is no solver's doing.
    """
    v = np.array(verify.DATA_VARIANCES)
    with np.errstate(all="ignore"):
        states = verify.propagate(plan, 0.0, v)
        at = -2 if plan.levels[-1].sigma == 0.0 else -1
        level = states.levels[at]
        errors = states.variance[at] / (level.alpha**2 * v + level.sigma**2) - 1.0
    return float(errors[np.argmax(np.abs(errors))])  # argmax takes the first nan, if there is one


def slope(steps: Sequence[int], errors: Sequence[float]) -> float:
    """-d log|error| / d log steps between the two finest runs above rounding; inf where there are no such two."""
    sizes = [abs(error) for error in errors]
    if not all(math.isfinite(size) for size in sizes):
        return math.nan
    kept = [(n, size) for n, size in zip(steps, sizes, strict=True) if size > FLOOR]
    if len(kept) < 2:
        return math.inf
    (n, coarse), (m, fine) = kept[-2:]
    return math.log(coarse / fine) / math.log(m / n)


def _unjudged(solver: Solver, options: Mapping[str, Any]) -> str:
    if solver.upward:
        return "it goes from the data to the noise, so what it ends in is no sample"
    if not solver.leads_to_data(options):
        return "it takes D for a sample, so with an exact mean no refinement leads to the data"
    return ""


def _bias(plan: Callable[[int], Plan], budget: int) -> Bias:
    """The plan of most steps within a budget: the number of steps is near budget / evaluations per step."""
    steps = max(2, budget * STEPS[0] // plan(STEPS[0]).nfe)
    while steps > 2 and plan(steps).nfe > budget:
        steps -= 1
    while plan(steps + 1).nfe <= budget:
        steps += 1
    nfe = plan(steps).nfe
    return Bias(budget, nfe, variance_error(plan(steps)) if nfe <= budget else None)
