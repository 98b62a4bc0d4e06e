"""Laws every table must obey, checked in float64 without a network and without sampling error.

May import: build, plan, solvers, process. On Gaussian data with the exact denoiser every row is linear, so a state is
a vector of coefficients over independent unit normals, and its mean and variance are exact, reused draws included.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastdiff.compiler import layout as at
from fastdiff.compiler import solvers
from fastdiff.compiler.assemble import Output, Row
from fastdiff.compiler.build import compile_levels
from fastdiff.compiler.plan import Plan
from fastdiff.process.grids import RHO_CAP
from fastdiff.process.schedules import Level, Schedule

Array = NDArray[np.float64]

EXACT = 1e-10  # relative error allowed where a law holds exactly
ROUNDING = 64 * 2.0**-52  # times the size of the terms that cancel: what float64 may lose of a state
LOST = 1e-6  # a table that loses more than this to rounding in float64 is wrong, whatever its terms
SMALL = 1e-6  # relative error of the variance that needs no refinement to pass
DATA_VARIANCES = (0.05, 0.25, 1.0, 4.0)
DATA_MEAN = 1.0
GIVEN = 0.5  # the value of tensors that the caller would give
REFINEMENTS = (4, 16, 64)
BUDGET = 5e7  # rows x draws of the largest table compiled to see an error shrink


@dataclass(frozen=True)
class Check:
    """One law: `value` was measured and must be at most `bound`; the sentence says of what."""

    name: str
    ok: bool
    value: float
    bound: float
    sentence: str


@dataclass(frozen=True)
class Report:
    """What `verify` found; `print(report)` shows it."""

    title: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """True when every check holds."""
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        lines = [f"{self.title}: {'ok' if self.ok else 'FAILED'}"]
        for check in self.checks:
            lines.append(f"  {'ok  ' if check.ok else 'FAIL'} {check.name}: {check.sentence}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Moments:
    """Exact law of the state at every point of a plan, data N(mean, variance) in each of V cases.

    levels: where the states are: one per model evaluation, and the result. mean, variance: [len(levels), V].
    """

    levels: tuple[Level, ...]
    mean: Array
    variance: Array


def execute(
    plan: Plan,
    denoise: Callable[[Array, Level], Array | tuple[Array, Array]],
    start: ArrayLike,
    normal: Callable[[int, int], ArrayLike] | None = None,
    given: Mapping[str, ArrayLike] | None = None,
) -> Array:
    """Run a plan in float64 NumPy: the slow executor the others are held against.

    denoise(x, level): D for the state x at a level, called once per row in order, or (D, E) where a row's second
    estimate is not D itself. start: the state at the plan's first
    level, any shape. normal(id, stream): the unit normal of that name, of start's shape; needed if the plan draws.
    given: the tensors the plan takes from the caller, by name, of start's shape or broadcast to it.
    Returns the sample. Deterministic.
    """
    registers: dict[int, Array] = {plan.rows[0].x: np.array(start, dtype=np.float64)}
    if set(given or {}) != set(plan.given):
        raise ValueError(f"this plan takes given={{{', '.join(plan.given) or 'nothing'}}}, got {sorted(given or {})}")
    for name, value in (given or {}).items():
        registers[plan.given[name]] = np.broadcast_to(np.asarray(value, np.float64), registers[plan.rows[0].x].shape)
    for row in plan.rows:
        execute_row(row, registers, denoise, normal)
    return registers[plan.result]


def execute_row(
    row: Row,
    registers: dict[int, Array],
    denoise: Callable[[Array, Level], Array | tuple[Array, Array]],
    normal: Callable[[int, int], ArrayLike] | None = None,
) -> None:
    """One row of `execute`, in place."""
    x = registers[row.x]
    read = [registers[slot] for slot in row.slots]
    estimates = x if row.level is None or row.reused else denoise(x, row.level)
    denoised, other = estimates if isinstance(estimates, tuple) else (estimates, estimates)
    if row.noise and normal is None:
        raise ValueError("this plan draws noise: give normal(id, stream), a function that returns the unit normals")
    drawn = [np.asarray(normal(*name), dtype=np.float64) for name in row.noise] if normal is not None else []
    written = {}
    for output in row.outputs:
        # a register that is not read may hold anything, so a zero coefficient must not touch it
        terms = [(output.x, x), (output.denoised, denoised), (output.other, other)]
        terms += [*zip(output.slots, read, strict=True), *zip(output.noise, drawn, strict=True)]
        written[output.dest] = sum((c * value for c, value in terms if c != 0.0), np.zeros_like(x))
    registers.update(written)


def propagate(
    plan: Plan, mean: ArrayLike = DATA_MEAN, variance: ArrayLike = DATA_VARIANCES, start: str = "marginal"
) -> Moments:
    """The exact mean and variance of every state of a plan on data N(mean, variance) with the exact denoiser.

    D = mu + alpha v (x - alpha mu) / (alpha^2 v + sigma^2). Every state is m + sum_k c_k z_k over the latent and the
    draws; the vector (m, c_0, c_1, ...) goes through the table, so nothing is estimated.
    mean, variance: scalars or [V]; variance 0 is the point mass, whose D == mean. start: "marginal", the law
    N(alpha mu, alpha^2 v + sigma^2) of the first level, or "noise", N(0, sigma^2), what a sampler begins with. Where
    the process runs about a centre c (`Plan.centre`), c = GIVEN, states have (1 - alpha) c more, and noise c.
    """
    v = np.atleast_1d(np.asarray(variance, dtype=np.float64))
    mu = np.broadcast_to(np.asarray(mean, dtype=np.float64), v.shape)
    first = plan.levels[0]
    names = sorted({name for row in plan.rows for name in row.noise})
    column = {name: 2 + i for i, name in enumerate(names)}
    state = np.zeros((len(v), len(names) + 2))
    if start == "marginal":
        state[:, 0], state[:, 1] = first.alpha * mu + _shift(plan, first), np.sqrt(first.alpha**2 * v + first.sigma**2)
    elif start == "noise":
        state[:, 0], state[:, 1] = 0.0 if plan.centre is None else GIVEN, first.sigma
    else:
        raise ValueError(f"start must be 'marginal' or 'noise', got {start!r}")
    seen: list[tuple[Level, Array]] = []

    def denoise(x: Array, level: Level) -> Array:
        seen.append((level, x))
        total = level.alpha**2 * v + level.sigma**2
        gain = np.divide(level.alpha * v, total, out=np.zeros_like(v), where=total > 0)
        denoised: Array = gain[:, None] * x
        shift = _shift(plan, level)
        denoised[:, 0] += mu * (1.0 - gain * level.alpha) - gain * shift
        if _reads_noise(plan):
            denoised[:, 0] += shift / level.alpha
        return denoised

    def normal(index: int, stream: int) -> Array:
        unit = np.zeros(len(names) + 2)
        unit[column[index, stream]] = 1.0
        return np.broadcast_to(unit, state.shape)

    constant = np.zeros_like(state)
    constant[:, 0] = GIVEN
    seen.append((plan.levels[-1], execute(plan, denoise, state, normal, dict.fromkeys(plan.given, constant))))
    return Moments(
        levels=tuple(level for level, _ in seen),
        mean=np.array([x[:, 0] for _, x in seen]),
        variance=np.array([np.square(x[:, 1:]).sum(axis=1) for _, x in seen]),
    )


def _shift(plan: Plan, level: Level) -> float:
    """What the centre adds to the mean of the states at a level."""
    return 0.0 if plan.centre is None else (1.0 - level.alpha) * GIVEN


def _reads_noise(plan: Plan) -> bool:
    """True where D comes from a prediction of the noise about a centre, so that it is x0 + (1/alpha - 1) centre."""
    return plan.centre is not None and plan.options.get("prediction") in ("eps", "score")


def verify(plan: Plan, refine: bool = True) -> Report:
    """Hold a plan to four laws that need no network.

    point mass: with D == mu the state's mean is alpha mu at every level, to EXACT (or to float64's rounding, LOST at
    most); where the solver declares `exact_marginal`, its variance is sigma^2 as well. A solver that does not declare
    it need only come closer to that mean when the grid is refined.
    gaussian data: the law of the state that enters the last evaluation (of the result, if the last level is noisy)
    against N(alpha mu, alpha^2 v + sigma^2), worst case over DATA_VARIANCES, from that law at the first level. The
    error must be below SMALL, or shrink on a grid with every interval cut in 4, else 16, else 64: far too few steps
    give errors of order 1 that may first grow. One decrease does not show that the error goes to 0: a bias that stays
    is found by the order (`convergence.measure`, a trial of the suite), not here. What the last denoise from sigma > 0
    loses is no solver's fault, so the sample's own error is stated and not judged; nor is the law where the solver
    takes D for a sample, or with s_noise other than 1: both lead elsewhere.
    finite: every scalar, in float64 and rounded to fp32. last row: x' = alpha D and no noise where the last level is
    clean, unless the options ask for a last step that is not a denoise.
    A plan that cannot be compiled again (recorded from foreign code, tables as long as the grid) is held to finite
    errors instead of shrinking ones, and the report says so. So is every plan with refine=False, which is quick.
    Raises ValueError where the levels are not known.
    """
    if any(math.isnan(level.alpha) or math.isnan(level.sigma) for level in plan.levels):
        raise ValueError(
            f"{plan.solver} does not say at what level it evaluates its network, so no law can be checked; "
            "what is known of it is in plan.options (for a capture: its mismatch against the scheduler)"
        )
    with np.errstate(all="ignore"):
        checks = (_point_mass(plan, refine), _gaussian(plan, refine), finite(plan), _last_row(plan))
    return Report(f"{plan.solver}, {plan.nfe} model evaluations, grid {plan.grid}", checks)


def _refined(plan: Plan, cut: int) -> Plan:
    """The plan with every interval between noisy levels in `cut` parts; ValueError or TypeError if it has none."""
    noisy = [level for level in plan.levels if level.sigma > 0]
    if len(noisy) < 2:
        raise ValueError("it has one noisy level")
    if plan.nfe * plan.draws * cut**2 > BUDGET:
        raise ValueError("too many rows and draws")
    upward = noisy[0].rho < noisy[-1].rho
    noisy = noisy[::-1] if upward else noisy
    levels: list[Level] = []
    for s, t in itertools.pairwise(noisy):
        levels += [s, *(_between(plan.schedule, s, t, i / cut) for i in range(1, cut))]
    levels += [noisy[-1], *(level for level in plan.levels if level.sigma == 0.0)]
    levels = levels[::-1] if upward else levels
    return compile_levels(plan.solver, levels, plan.schedule, "refined", plan.options)


def _between(schedule: Schedule | None, s: Level, t: Level, weight: float) -> Level:
    """A level between two others, geometric in rho; RHO_CAP or more stands for rho = inf, as in the grids."""
    if schedule is None:
        return Level((1.0 - weight) * s.alpha + weight * t.alpha, s.sigma ** (1.0 - weight) * t.sigma**weight)
    top = s.rho if math.isfinite(s.rho) else max(RHO_CAP, 4.0 * t.rho)
    return schedule.level_from_rho(top ** (1.0 - weight) * t.rho**weight)


def _shrinks(
    name: str, plan: Plan, first: float, error: Callable[[Plan], float], small: float, sentence: str, refine: bool
) -> Check:
    """The check that an error, `first` of this plan, is small or becomes smaller on a finer grid."""
    if first <= small:
        return Check(name, True, first, small, sentence)
    if not refine:
        return Check(name, math.isfinite(first), first, math.inf, sentence)
    if plan.solver not in solvers.names():
        sentence += "; a traced or captured plan has no finer grid to compare with"
        return Check(name, math.isfinite(first), first, math.inf, sentence)
    finer, cut = math.inf, 1
    try:
        for cut in REFINEMENTS:
            finer = error(_refined(plan, cut))
            if finer < first:
                break
    except (ValueError, TypeError) as reason:
        if cut == REFINEMENTS[0]:
            why = str(reason).split(";")[0]
            sentence += f"; no finer grid to compare with: {why}"
            return Check(name, math.isfinite(first), first, math.inf, sentence)
        cut //= 4
    falls = "it falls" if finer < first else "it does not fall"
    return Check(name, finer < first, finer, first, f"{sentence}, {finer:.1e} with {cut} x the steps: {falls}")


def _point_mass(plan: Plan, refine: bool) -> Check:
    mean, variance = _point_mass_errors(plan)
    declared = plan.solver in solvers.names() and solvers.get(plan.solver).keeps_marginal(plan.options)
    if declared:
        value = max(mean, variance)
        bound = min(LOST, max(EXACT, ROUNDING * _cancellation(plan)))
        sentence = f"with D == mu every state has mean alpha mu and variance sigma^2, off by {value:.1e}"
        return Check("point mass", value <= bound, value, bound, sentence)
    sentence = f"with D == mu every state has mean alpha mu, off by {mean:.1e} (variance, not promised: {variance:.1e})"
    return _shrinks("point mass", plan, mean, lambda p: _point_mass_errors(p)[0], EXACT, sentence, refine)


def _point_mass_errors(plan: Plan) -> tuple[float, float]:
    """The worst relative error of the mean, and of the variance, over all states."""
    states = propagate(plan, DATA_MEAN, 0.0)
    mean = variance = 0.0
    for i, level in enumerate(states.levels):
        size = math.hypot(level.alpha * DATA_MEAN, level.sigma)
        off = abs(float(states.mean[i, 0]) - level.alpha * DATA_MEAN - _shift(plan, level)) / size
        spread = abs(float(states.variance[i, 0]) - level.sigma**2) / (level.sigma**2 or 1.0)
        mean, variance = _worst(mean, off), _worst(variance, spread)
    return mean, variance


def _cancellation(plan: Plan) -> float:
    """How much larger than a state the terms are that add up to it: |coefficients| on |values|, over sigma."""
    rows = tuple(replace(row, outputs=tuple(_positive(output) for output in row.outputs)) for row in plan.rows)
    sizes: list[float] = []

    def denoise(x: Array, level: Level) -> Array:
        sizes.append(float(x[0]) / (level.sigma or 1.0))
        return np.array([DATA_MEAN])

    first = plan.levels[0]
    start = np.array([first.alpha * DATA_MEAN + first.sigma])
    end = execute(replace(plan, rows=rows), denoise, start, lambda *_: np.ones(1), dict.fromkeys(plan.given, GIVEN))
    return max([*sizes, float(end[0]) / (plan.levels[-1].sigma or 1.0)])


def _positive(output: Output) -> Output:
    slots, noise = tuple(map(abs, output.slots)), tuple(map(abs, output.noise))
    return Output(output.dest, abs(output.x), slots, abs(output.denoised), noise, abs(output.other))


def _gaussian(plan: Plan, refine: bool) -> Check:
    states = propagate(plan)
    error = _law_error(plan, states)
    sentence = f"worst error of the law on Gaussian data {error:.1e}"
    if plan.levels[-1].sigma == 0.0:
        sample = _worst(*np.abs(states.variance[-1] / np.array(DATA_VARIANCES) - 1.0))
        sentence += f" (of the sample's variance {sample:.1e})"
    if plan.solver in solvers.names() and not solvers.get(plan.solver).leads_to_data(plan.options):
        sentence += ", stated and not judged: this solver takes D for a sample"
        return Check("gaussian data", math.isfinite(error), error, math.inf, sentence)
    if plan.options.get("s_noise", 1.0) != 1.0:
        sentence += ", stated and not judged: with s_noise other than 1 no refinement leads to the data"
        return Check("gaussian data", math.isfinite(error), error, math.inf, sentence)
    return _shrinks("gaussian data", plan, error, lambda p: _law_error(p, propagate(p)), SMALL, sentence, refine)


def _law_error(plan: Plan, states: Moments) -> float:
    """Relative error of the variance, or of the mean in standard deviations, at the last noisy level."""
    last = -2 if plan.levels[-1].sigma == 0.0 else -1
    level = states.levels[last]
    target = level.alpha**2 * np.array(DATA_VARIANCES) + level.sigma**2
    spread = np.abs(states.variance[last] / target - 1.0)
    shift = np.abs(states.mean[last] - level.alpha * DATA_MEAN - _shift(plan, level)) / np.sqrt(target)
    return _worst(*spread, *shift)


def finite(plan: Plan) -> Check:
    """Every scalar of a plan, in float64 and as its table holds it."""
    exact = _scalars(plan)
    rounded = np.array(exact).astype(np.float32)
    if plan.schedule is not None:
        packed = plan.pack().coef
        rounded = np.delete(packed, [at.CLAMP_LO, at.CLAMP_HI], axis=1).ravel()
    bad = [int(np.sum(~np.isfinite(numbers))) for numbers in (exact, rounded)]
    sentence = f"of {len(exact)} scalars {bad[0]} are not finite in float64, and {bad[1]} of the table in fp32"
    return Check("finite", not any(bad), sum(bad), 0, sentence)


def _scalars(plan: Plan) -> list[float]:
    """Every coefficient of the table."""
    outputs = [output for row in plan.rows for output in row.outputs]
    return [c for o in outputs for c in (o.x, o.denoised, o.other, *o.slots, *o.noise)]


def _last_row(plan: Plan) -> Check:
    row, final = plan.rows[-1], plan.levels[-1]
    output = next(output for output in row.outputs if output.dest == plan.result)
    slots = list(output.slots)
    taken = 1.0 - 1.0 / plan.levels[-2].alpha if _reads_noise(plan) else 0.0
    if taken != 0.0:  # of the centre, because a reading of the noise has added it to D
        slots[row.slots.index(plan.given[str(plan.centre)])] -= taken
    others = (output.x, *slots, *output.noise)
    off = _worst(abs(output.denoised + output.other - final.alpha), *(abs(c) for c in others))
    formula = f"the last row is x' = {output.denoised:.6g} D"
    formula += "".join(
        f" + {c:.6g} {name}"
        for name, c in (("x", output.x), ("(registers)", sum(output.slots)), ("z", math.hypot(*output.noise)))
        if c != 0.0
    )
    if final.sigma > 0.0:
        return Check("last row", True, off, math.inf, f"{formula}; the plan ends at sigma = {final.sigma:.6g}")
    if plan.solver in solvers.names() and not solvers.get(plan.solver).ends_in_denoise(plan.options):
        return Check("last row", True, off, math.inf, f"{formula}; the options ask for a last step without denoising")
    return Check("last row", off <= EXACT, off, EXACT, formula)


def _worst(*errors: float) -> float:
    """The largest of the errors; nan counts as infinite."""
    return max(math.inf if math.isnan(error) else float(error) for error in errors)
