"""Guidance that is linear: what of a plan's rows it changes.

May import: assemble, plan, process. The rules that are not linear are fastdiff.engine.guidance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fastdiff.compiler.assemble import Output, Row
from fastdiff.compiler.plan import Plan
from fastdiff.process.schedules import Level

Rows = tuple[Row, ...]
Interval = tuple[float, float]
Schedule = Sequence[float] | Callable[[Level], float]

ROUNDING = 1e-9  # of a coefficient of order one


def within(rows: Rows, interval: Interval) -> Rows:
    """The rows with guidance off outside (low, high), in sigma/alpha (Kynkäänniemi et al. 2024).

    Rows where it is off do not evaluate the unguided branch.
    """
    inside = _interval("guidance_interval", interval)
    return _each(rows, lambda i, row, level: replace(row, gain=inside(level)))


def perturbed_within(rows: Rows, interval: Interval) -> Rows:
    """The rows with the perturbed branch off, and not evaluated, outside (low, high), in sigma/alpha."""
    inside = _interval("perturbed_interval", interval)
    return _each(rows, lambda i, row, level: replace(row, perturb=inside(level)))


def scheduled(rows: Rows, schedule: Schedule) -> Rows:
    """The rows with guidance 1 + g (w - 1) in each row: g from a sequence, one per evaluation, or g(level)."""
    given = [schedule(row.level) for row in rows[1:] if row.level] if callable(schedule) else schedule
    try:
        gains = np.array(given, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"guidance_schedule must hold numbers, or be a function of the level, got {given!r}") from None
    if gains.shape != (len(rows) - 1,):
        raise ValueError(
            f"guidance_schedule needs one number per evaluation of the network ({len(rows) - 1}), or a function of the "
            f"level, got {schedule!r}"
        )
    if not np.isfinite(gains).all():
        raise ValueError(f"guidance_schedule must be finite in every row, got {given!r}")
    return _each(rows, lambda i, row, level: replace(row, gain=float(gains[i]) * row.gain))


def clamped(rows: Rows, bounds: tuple[float, float]) -> Rows:
    """The rows with D clamped to (low, high) in every row, the network's output used through D only."""
    low, high = _pair("clamp", bounds)
    if not low < high:
        raise ValueError(f"clamp must be (low, high) with low < high, got {bounds}")
    return _each(rows, lambda i, row, level: replace(row, clamp=(low, high)))


def muted(plan: Plan, rows: int) -> Plan:
    """The plan with the network's output taken as 0 in its first rows (zero-init: Fan et al. 2025, CFG-Zero*)."""
    changed = _each(plan.rows, lambda i, row, level: replace(row, muted=True) if i < rows else row)
    return replace(plan, rows=changed)


def plus_plus(plan: Plan) -> Plan:
    """CFG++ (Chung et al. 2024) of any sampler: it runs on Du, and each row then moves its clean part to D.

    x' = [the sampler's x' with Du for D] + alpha' (D - Du), alpha' that of the level reached; for DDIM
    x' = alpha' D + (sigma'/sigma) (x - alpha Du). Guidance is the paper's lambda, in [0, 1]; rows where it is off stay.
    """
    if any(row.estimate is not None for row in plan.rows):
        raise ValueError(f"cfg_pp: {plan.solver} uses the second estimate of its rows itself; take another solver")
    if any(row.reused for row in plan.rows):
        raise ValueError("cfg_pp: some rows of this plan reuse outputs of others, which have no unguided estimate kept")
    reached = [row.level for row in plan.rows[2:]] + [plan.levels[-1]]
    if any(level is None or math.isnan(level.alpha) for level in reached):
        raise ValueError(f"cfg_pp: {plan.solver} does not say what levels it reaches, so alpha' is not known")

    carried = _carried(plan)
    if carried.size and (carried.min() < -ROUNDING or not carried.any()):
        how = "drops what a row adds to its state" if not carried.any() else "turns it round in a later row"
        raise ValueError(
            f"cfg_pp: {plan.solver} {how}, so the guidance of its rows would not add up; take a sampler that carries "
            "its state on: ddim, euler, euler_ancestral, dpmpp_2m, dpmpp_2m_sde, res_multistep, heun"
        )

    def moved(i: int, row: Row, level: Level) -> Row:
        if row.gain == 0.0:
            return row
        following, *kept = row.outputs
        alpha = reached[i].alpha  # type: ignore[union-attr]
        own = replace(following, denoised=alpha, other=following.denoised - alpha)
        return replace(row, estimate="unguided", outputs=(own, *(_unguided(output) for output in kept)))

    return replace(plan, rows=_each(plan.rows, moved))


def _carried(plan: Plan) -> NDArray[np.float64]:
    """[moves, states]: how a unit added to the state that row i writes is felt in each later state, D and z held."""
    registers = {register: np.zeros(plan.nfe) for register in (plan.rows[0].x, *plan.given.values())}
    states = []
    for i, row in enumerate(plan.rows):
        x = registers[row.x]
        read = [registers[slot] for slot in row.slots]
        written = {
            o.dest: o.x * x + sum((c * r for c, r in zip(o.slots, read, strict=True) if c), np.zeros(plan.nfe))
            for o in row.outputs
        }
        registers.update(written)
        if i:
            states.append(registers[row.outputs[0].dest])
            registers[row.outputs[0].dest] = states[-1] + np.eye(plan.nfe)[i - 1]
    felt = np.array(states).T[:-1, 1:]
    return felt[:, :-1] if plan.levels[-1].sigma == 0.0 else felt  # a clean sample is D alone, whatever its state was


def _interval(name: str, interval: Interval) -> Callable[[Level], float]:
    low, high = _pair(name, interval)
    if not 0.0 <= low < high:
        raise ValueError(f"{name} must be (low, high) in sigma/alpha with 0 <= low < high, got {interval}")
    return lambda level: float(low <= level.rho <= high)


def _pair(name: str, given: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = (float(value) for value in given)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be two numbers (low, high), got {given!r}") from None
    return low, high


def _unguided(output: Output) -> Output:
    return replace(output, denoised=0.0, other=output.denoised)


def _each(rows: Rows, change: Callable[[int, Row, Level], Row]) -> Rows:
    """The rows with every one that evaluates the network changed; i counts evaluations."""
    return tuple(change(i - 1, row, row.level) if row.level is not None else row for i, row in enumerate(rows))
