"""Laws every table must obey, checked in float64 without a network and without sampling error.

May import: build, plan, solvers, process. On Gaussian data with the exact denoiser every row is linear, so a state is
a vector of coefficients over independent unit normals, and its mean and variance are exact, reused draws included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastdiff.compiler import solvers
from fastdiff.compiler.build import compile_levels
from fastdiff.compiler.plan import Plan
from fastdiff.process.schedules import CLEAN, Level

Array = NDArray[np.float64]

EXACT = 1e-10  # relative error allowed where a law holds exactly
SMALL = 1e-6  # relative error of the variance that needs no refinement to pass
DATA_VARIANCES = (0.05, 0.25, 1.0, 4.0)
DATA_MEAN = 1.0
REFINEMENT = 4


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
    denoise: Callable[[Array, Level], Array],
    start: ArrayLike,
    normal: Callable[[int, int], ArrayLike] | None = None,
) -> Array:
    """Run a plan in float64 NumPy: the slow executor the others are held against.

    denoise(x, level): D for the state x at a level, called once per row in order. start: the state at the plan's first
    level, any shape. normal(id, stream): the unit normal of that name, of start's shape; needed if the plan draws.
    Returns the sample. Deterministic.
    """
    registers: dict[int, Array] = {plan.rows[0].x: np.array(start, dtype=np.float64)}
    for row in plan.rows:
        x = registers[row.x]
        read = [registers[slot] for slot in row.slots]
        denoised = x if row.level is None else denoise(x, row.level)
        if row.noise and normal is None:
            raise ValueError("this plan draws noise: give normal(id, stream), a function that returns the unit normals")
        drawn = [np.asarray(normal(*name), dtype=np.float64) for name in row.noise] if normal is not None else []
        written = {}
        for output in row.outputs:
            # a register that is not read may hold anything, so a zero coefficient must not touch it
            terms = [(output.x, x), (output.denoised, denoised)]
            terms += [*zip(output.slots, read, strict=True), *zip(output.noise, drawn, strict=True)]
            written[output.dest] = sum((c * value for c, value in terms if c != 0.0), np.zeros_like(x))
        registers.update(written)
    return registers[plan.result]


def propagate(
    plan: Plan, mean: ArrayLike = DATA_MEAN, variance: ArrayLike = DATA_VARIANCES, start: str = "marginal"
) -> Moments:
    """The exact mean and variance of every state of a plan on data N(mean, variance) with the exact denoiser.

    D = mu + alpha v (x - alpha mu) / (alpha^2 v + sigma^2). Every state is m + sum_k c_k z_k over the latent and the
    draws; the vector (m, c_0, c_1, ...) goes through the table, so nothing is estimated.
    mean, variance: scalars or [V]; variance 0 is the point mass, whose D == mean. start: "marginal", the law
    N(alpha mu, alpha^2 v + sigma^2) of the first level, or "noise", N(0, sigma^2), what a sampler begins with.
    """
    v = np.atleast_1d(np.asarray(variance, dtype=np.float64))
    mu = np.broadcast_to(np.asarray(mean, dtype=np.float64), v.shape)
    first = plan.levels[0]
    state = np.zeros((len(v), plan.draws + 2))
    if start == "marginal":
        state[:, 0], state[:, 1] = first.alpha * mu, np.sqrt(first.alpha**2 * v + first.sigma**2)
    elif start == "noise":
        state[:, 1] = first.sigma
    else:
        raise ValueError(f"start must be 'marginal' or 'noise', got {start!r}")
    seen: list[tuple[Level, Array]] = []

    def denoise(x: Array, level: Level) -> Array:
        seen.append((level, x))
        total = level.alpha**2 * v + level.sigma**2
        gain = np.divide(level.alpha * v, total, out=np.zeros_like(v), where=total > 0)
        denoised: Array = gain[:, None] * x
        denoised[:, 0] += mu * (1.0 - gain * level.alpha)
        return denoised

    def normal(index: int, stream: int) -> Array:
        unit = np.zeros(plan.draws + 2)
        unit[2 + index] = 1.0
        return np.broadcast_to(unit, state.shape)

    seen.append((plan.levels[-1], execute(plan, denoise, state, normal)))
    return Moments(
        levels=tuple(level for level, _ in seen),
        mean=np.array([x[:, 0] for _, x in seen]),
        variance=np.array([np.square(x[:, 1:]).sum(axis=1) for _, x in seen]),
    )
