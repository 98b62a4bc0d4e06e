"""Adaptive samplers in float64, and what they are held to: the law of their data and their tolerance.

May import: adaptive, walk, verify, plan, process. NumPy only; no network is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from fastdiff.compiler import verify as laws
from fastdiff.compiler.adaptive import AdaptivePlan
from fastdiff.compiler.verify import DATA_MEAN, DATA_VARIANCES, EXACT, Array, Check, Report
from fastdiff.compiler.walk import Walk
from fastdiff.process.schedules import Level

ELEMENTS = 64  # of the one sample a run is measured on
FINER = 100.0  # what a tolerance is divided by to see its error fall
DRAWS = 200  # more than the steps of a run whose error is 0


@dataclass(frozen=True)
class Outcome:
    """A finished run of one sample: the sample, the state over alpha at the last noisy level, and its steps."""

    sample: Array
    state: Array
    walk: Walk


@dataclass(frozen=True)
class Cost:
    """The worst over DATA_VARIANCES at one tolerance: root mean square error over the data's spread, and the cost."""

    rtol: float
    error: float
    nfe: int
    accepted: int
    rejected: int


def execute(
    plan: AdaptivePlan,
    denoise: Callable[[Array, Level], Array],
    start: ArrayLike,
    normal: Callable[[int, int], ArrayLike] | None = None,
    path: bool = False,
) -> Outcome:
    """Run an adaptive plan on one sample in float64 NumPy: what the engine's loop is held against.

    denoise(x, level): D; levels have alpha = 1, except a first one with alpha = 0. start: the state at the plan's first
    level, any shape. normal(id, stream): the unit normal of that name; needed with eta > 0. path: Brownian noise.
    """
    method, walk = plan.method, Walk(plan, path=path)
    registers: dict[int, Array] = {0: np.array(start, dtype=np.float64)}
    for row in (plan.rows[0], *plan.start.rows[1:]):
        laws.execute_row(row, registers, denoise, normal)
    end, error, *carried = plan.example.results
    while not walk.done:
        for row in walk.trial():
            laws.execute_row(row, registers, denoise, normal)
        before, after = registers[method.scale], registers[(end, *carried)[method.scale]]
        allowed = np.maximum(method.atol, method.rtol * np.maximum(np.abs(before), np.abs(after)))
        walk.judge(float(np.sqrt(np.mean(np.square(registers[error] / allowed)))))
    state = registers[end]
    for row in walk.finish():
        laws.execute_row(row, registers, denoise, normal)
    return Outcome(registers[plan.result], state, walk)


def verify(plan: AdaptivePlan) -> Report:
    """Hold an adaptive plan to what it promises.

    point mass: with D == mu the state has mean mu and variance rho^2 at the last noisy level, noise included; with
    eta > 0 and s_noise other than 1 the noise leads to another variance, and only the mean is judged.
    gaussian data (eta = 0): the state there against the exact solution of the probability-flow ODE; its error must fall
    where the tolerance is divided by FINER. finite: every scalar of the first rows, in fp32 too.
    """
    checks = [_point_mass(plan), laws.finite(plan)]
    cost = None
    if plan.method.noise[0] == 0.0:
        cost, fine = measure(plan), measure(at_tolerance(plan, plan.method.rtol / FINER, plan.method.atol / FINER))
        checks.insert(1, _falls(cost, fine))
    spent = f", {cost.nfe} model evaluations on Gaussian data" if cost else ""
    return Report(f"{plan.solver}, adaptive{spent}, grid {plan.grid}", tuple(checks))


def measure(plan: AdaptivePlan) -> Cost:
    """What the plan costs on data N(mu, v), and how far from the exact solution it ends; needs eta = 0."""
    errors, walks = [], []
    for variance in DATA_VARIANCES:
        first, last = plan.first, plan.last
        z = np.array([NormalDist().inv_cdf((i + 0.5) / ELEMENTS) for i in range(ELEMENTS)])
        spread = np.sqrt(variance + np.square([first.rho, last.rho]))
        top = plan.levels[0]
        begin = top.alpha * (DATA_MEAN + spread[0] * z) if top.alpha > 0.0 else top.sigma * z
        outcome = execute(plan, _gaussian(variance), begin)
        # from alpha = 0 the solution is the limit sqrt(v + rho^2) z of no signal
        off = (outcome.state - (DATA_MEAN + spread[1] * z)) / spread[1]
        errors.append(float(np.sqrt(np.mean(np.square(off)))))
        walks.append(outcome.walk)
    most = max(walks, key=lambda walk: walk.evaluations)
    return Cost(plan.method.rtol, max(errors), most.evaluations, most.accepted, most.rejected)


def at_tolerance(plan: AdaptivePlan, rtol: float, atol: float) -> AdaptivePlan:
    """The plan with another tolerance."""
    return replace(plan, method=replace(plan.method, rtol=rtol, atol=atol))


def _gaussian(variance: float) -> Callable[[Array, Level], Array]:
    def denoise(x: Array, level: Level) -> Array:
        gain = level.alpha * variance / (level.alpha**2 * variance + level.sigma**2)
        return gain * x + DATA_MEAN * (1.0 - gain * level.alpha)

    return denoise


def _falls(cost: Cost, fine: Cost) -> Check:
    sentence = (
        f"with rtol={cost.rtol:g} {cost.nfe} evaluations, {cost.accepted} steps and {cost.rejected} rejected, end "
        f"{cost.error:.1e} from the exact solution; with rtol={fine.rtol:g} {fine.nfe} end {fine.error:.1e} from it"
    )
    return Check("gaussian data", fine.error < cost.error, fine.error, cost.error, sentence)


def _point_mass(plan: AdaptivePlan) -> Check:
    """The state as a vector of coefficients over (1, latent, draws), which a constant D and an error of 0 allow."""
    top, rho = plan.levels[0], plan.last.rho
    start = np.zeros(DRAWS)
    start[0], start[1] = top.alpha * DATA_MEAN, top.sigma
    mean = np.zeros(DRAWS)
    mean[0] = DATA_MEAN

    def normal(index: int, stream: int) -> Array:
        del stream
        unit = np.zeros(DRAWS)
        unit[2 + index] = 1.0
        return unit

    state = execute(plan, lambda x, level: mean, start, normal).state
    bound = max(EXACT, laws.ROUNDING * plan.first.rho / rho)
    mean_off, variance_off = abs(float(state[0]) - DATA_MEAN), abs(float(np.square(state[1:]).sum()) / rho**2 - 1.0)
    eta, s_noise = plan.method.noise
    if eta == 0.0 or s_noise == 1.0:
        off = max(mean_off, variance_off)
        sentence = f"with D == mu the last state has mean mu and variance rho^2, off by {off:.1e}"
    else:
        off = mean_off
        sentence = f"with D == mu the last state has mean mu, off by {off:.1e} (variance, stated and not judged with "
        sentence += f"s_noise other than 1: {variance_off:.1e})"
    return Check("point mass", off <= bound, off, bound, sentence)
