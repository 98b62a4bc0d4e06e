"""Noise as increments of one Brownian path per sample, so that a seed gives the same path at any number of steps.

May import: assemble, layout, plan, run, process. The path lives on the clock u = log(sigma/alpha), scaled to [0, 1]
over a range that every schedule shares and cut into 64 cells; within a cell it is Lévy's dyadic construction (Lévy
1948; Karatzas and Shreve, section 2.3), so that over cell c, of size 1/64,
    W(u) - W(c / 64) = Z_c (64 u - c) / 8 + sum_{l >= 6, k} Z_{l,k} e_{l,k}(u),
e_{l,k} the tent on [k, k + 1] / 2^l of height 2^-(l/2 + 1). The nodes are named c and 2^l + k, so nothing is stored and
every executor draws them as it draws any noise term.

A draw over the interval [a, b] is (W(b) - W(a)) / sqrt(b - a): a short weighted sum of node normals, exactly of unit
variance, independent of draws over disjoint intervals and rightly correlated with draws over overlapping ones. A level
is rounded to the same place whatever grid it is in, so increments add up exactly when steps are cut in parts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from fastdiff.compiler import layout as at
from fastdiff.compiler.assemble import Output, Row
from fastdiff.compiler.plan import Interval, Plan
from fastdiff.compiler.run import Run
from fastdiff.process.schedules import Level

LOG_RHO = math.log(1e5)  # the clock covers sigma/alpha in [1e-5, 1e5]; levels beyond are its ends
FIRST = 6  # the cells are 2^-FIRST of the clock, 0.36 in log(sigma/alpha): what a step of a short run covers
DEPTH = 18  # a level is rounded to 2^-DEPTH of the clock, 9e-5 in log(sigma/alpha); 16 spoils strong order at 160 steps
FINEST = 26  # bits of a place where steps are made as they go, 3e-7 in log(sigma/alpha)
RESOLUTION = LOG_RHO * 2.0 ** (1 - FINEST)  # in log(sigma/alpha): levels closer than that are one place even there
MOST_NODES = 2**FIRST + 1 + 2 * (FINEST - FIRST)  # of an increment at depth FINEST
SAME = 1e-6  # foreign code's sigmas this close (relative) to a level of its plan are that level

Terms = dict[int, float]


def on_path(plan: Plan) -> Plan:
    """The same plan with every draw that has an interval replaced by the path's increment over it.

    Noise that is no part of the way down (churn, Langevin correctors: `run.white_noise`) stays as it is. Raises
    ValueError where it is not known which levels each draw covers.
    """
    if not plan.draws:
        return plan
    draws = draws_of(plan)
    return replace(plan, rows=tuple(_row(row, draws) for row in plan.rows))


def draws_of(plan: Plan) -> list[Terms | None]:
    """Each draw of a plan as a sum of the path's nodes, None for white noise; ValueError as in `on_path`."""
    if len(plan.intervals) != plan.draws:
        raise ValueError(
            f"noise='brownian': {plan.solver} does not say which levels each of its draws covers, and draws more than "
            "once in a step or at levels that do not descend; use noise='white'. In a solver of your own write "
            "run.noise(s, t) for a draw on the way from level s to level t, run.white_noise() for any other"
        )
    return [None if interval is None else increment(*interval) for interval in plan.intervals]


def increments(intervals: Sequence[tuple[float, float]]) -> list[Terms]:
    """`increment` over each interval (rho left, rho reached)."""
    return [increment(s, t) for s, t in intervals]


def increment(left: float, reached: float, depth: int = DEPTH) -> Terms:
    """The unit normal of the path from rho = `left` down to `reached`: {node: weight}, squares summing to 1.

    The same for these two numbers in any grid. depth: bits of a place, DEPTH or FINEST; a level whose place has few
    bits (`near`) is at the same place with either. Raises ValueError where both are one place.
    """
    a, b = place(reached, depth), place(left, depth)
    if not b > a:
        raise ValueError(
            f"noise='brownian': sigma/alpha = {left:.6g} and {reached:.6g} are one place of the path. It covers "
            f"[1e-5, 1e5] and tells levels apart that differ by {LOG_RHO * 2.0 ** (1 - depth):.0e} of themselves: "
            "choose levels further apart, or noise='white'"
        )
    scale = 1.0 / math.sqrt(b - a)
    cells = 2**FIRST
    weights = {}
    for cell in range(int(a * cells), math.ceil(b * cells)):
        covered = min(b * cells, cell + 1.0) - max(a * cells, float(cell))
        weights[cell] = covered * 2.0 ** (-FIRST / 2) * scale
    for level in range(FIRST, depth):
        count = 2.0**level
        height = 0.5 * math.sqrt(1.0 / count)
        for node in {int(a * count), int(b * count)}:
            weight = height * (_tent(b * count - node) - _tent(a * count - node)) * scale
            if weight != 0.0:
                weights[(1 << level) + node] = weight
    return weights


def near(rho: float, step: float) -> float:
    """The level nearest to rho whose place has few bits, a multiple of a power of two at most step/8 long.

    step: the length in log rho of the interval that ends there. A step that is free to end where it likes ends here:
    fewer bits are fewer nodes, and rounding cannot move the end to another place, where the path is another.
    """
    spacing = 2.0 ** max(-FINEST, math.floor(math.log2(step / (16.0 * LOG_RHO))))
    return math.exp(LOG_RHO * (2.0 * spacing * round(place(rho, FINEST) / spacing) - 1.0))


def place(rho: float, depth: int = DEPTH) -> float:
    """Where on the clock, in [0, 1], a level is: a multiple of 2^-depth."""
    log = math.log(rho) if 0.0 < rho < math.inf else math.copysign(math.inf, rho - 1.0)
    clock = (min(max(log, -LOG_RHO), LOG_RHO) + LOG_RHO) / (2.0 * LOG_RHO)
    return round(clock * 2.0**depth) / 2.0**depth


def partitioned(run: Run, rows: Sequence[Row], levels: Sequence[Level]) -> tuple[Interval, ...]:
    """The interval of each draw of a recorded run (traced, captured), or () where they cannot be told.

    levels: of every evaluation and of the result. A draw that the run has handed two sigmas covers what lies between
    them. The others share the way down: each covers what lies between the end of the one before, or the first level,
    and the level evaluated after it. A draw before the first evaluation is no part of the way down. Levels that are
    unknown or do not descend, and a row with two draws that it uses, give ().
    """
    rhos = [level.rho for level in levels]
    used = {index for row in rows for index, _ in row.noise}
    intervals: list[Interval] = [None] * run.draws
    reached = rhos[0]
    for index, segment in enumerate(run.drawn_in):
        own = run.drawn_over.get(index)
        if own is None and segment == 0:
            continue
        left, right = (_snapped(rho, rhos) for rho in own) if own is not None else (reached, rhos[segment])
        if left > right:
            intervals[index] = left, right
            reached = min(reached, right)
        elif index in used:
            return ()
    return tuple(intervals)


def _snapped(rho: float, rhos: Sequence[float]) -> float:
    return next((level for level in rhos if math.isclose(level, rho, rel_tol=SAME)), rho)


def _tent(x: float) -> float:
    """1 at x = 1/2, 0 at 0 and 1 and outside."""
    return max(0.0, 1.0 - abs(2.0 * x - 1.0))


def _row(row: Row, draws: Sequence[Terms | None]) -> Row:
    paths = [draws[index] if stream == at.STREAM_STEP else None for index, stream in row.noise]
    kept = [t for t, path in enumerate(paths) if path is None]
    nodes = sorted(set(itertools.chain.from_iterable(path for path in paths if path is not None)))

    def output(o: Output) -> Output:
        drawn = [(c, path) for c, path in zip(o.noise, paths, strict=True) if path is not None]
        summed = tuple(sum(c * path.get(node, 0.0) for c, path in drawn) for node in nodes)
        return replace(o, noise=tuple(o.noise[t] for t in kept) + summed)

    names = tuple(row.noise[t] for t in kept) + tuple((node, at.STREAM_BROWNIAN) for node in nodes)
    return replace(row, noise=names, outputs=tuple(output(o) for o in row.outputs))
