"""Noise as increments of one Brownian path per sample, so that a seed gives the same path at any number of steps.

May import: assemble, layout, plan. The path lives on the clock u = log(sigma/alpha), scaled to [0, 1] over a range that
every schedule shares, and is Lévy's dyadic construction (Lévy 1948; Karatzas and Shreve, section 2.3):
    W(u) = Z_root u + sum_{l,k} Z_{l,k} e_{l,k}(u),   e_{l,k} the tent on [k, k + 1] / 2^l of height 2^-(l/2 + 1).
A draw over the interval [a, b] is (W(b) - W(a)) / sqrt(b - a): a short weighted sum of node normals, exactly of unit
variance and independent of draws over other intervals. Nodes are named by 2^l + k, so nothing is stored and every
executor draws them as it draws any noise term.
"""

from __future__ import annotations

import math
from dataclasses import replace

from fastdiff.compiler import layout as at
from fastdiff.compiler.assemble import Output, Row
from fastdiff.compiler.plan import Plan

LOG_RHO = math.log(1e5)  # the clock covers sigma/alpha in [1e-5, 1e5]; levels beyond are its ends
DEEPEST = 30  # node names fit an int32
CELLS = 6  # an end of an interval is rounded to 2^-CELLS of the shorter interval it belongs to
FINEST = 26  # an end whose neighbours are not known is rounded to 2^-FINEST of the clock, 3.4e-7 in log(sigma/alpha)
RESOLUTION = 2.0 * LOG_RHO * 2.0**-FINEST  # in log(sigma/alpha): levels closer than that are one place
MOST_NODES = 2 * FINEST + 1  # of `increment`

Terms = dict[int, float]


def on_path(plan: Plan) -> Plan:
    """The same plan with every draw replaced by the increment of a Brownian path over the draw's interval.

    Raises ValueError where a draw has no interval of its own: a traced or captured sampler, or one that draws twice
    within a step.
    """
    if not plan.draws:
        return plan
    if len(plan.intervals) != plan.draws:
        raise ValueError(f"noise='brownian': {plan.solver} does not say over which levels it draws; use noise='white'")
    if len(set(plan.intervals)) < plan.draws:
        raise ValueError(
            f"noise='brownian': {plan.solver} draws more than once between two levels, and a path has one increment "
            "there; use noise='white'"
        )
    draws = increments(list(plan.intervals))
    return replace(plan, rows=tuple(_row(row, draws) for row in plan.rows))


def increments(intervals: list[tuple[float, float]]) -> list[Terms]:
    """Per interval (rho_s, rho_t) of disjoint intervals: {node: weight}, with unit sum of squared weights."""
    clock = [(_clock(t), _clock(s)) for s, t in intervals]
    places = _rounded(clock)
    return [_increment(places[a], places[b]) for a, b in clock]


def increment(rho_s: float, rho_t: float) -> Terms:
    """Of one interval among others not known yet: {node: weight}; intervals that share an end share its place.

    At most MOST_NODES of them. Raises ValueError where the two ends are one.
    """
    a, b = (round(_clock(rho) * 2.0**FINEST) / 2.0**FINEST for rho in (rho_t, rho_s))
    if not b > a:
        raise ValueError("noise='brownian': two levels are the same beyond sigma/alpha in [1e-5, 1e5]")
    return _increment(a, b)


def near(rho: float, step: float) -> float:
    """The level nearest to rho whose place on the path is short: a multiple of a power of two, at most step/8 apart.

    step: the length in log rho of the interval that ends there. Fewer bits are fewer nodes; and a level that rounding
    moved a little is moved back, where the path, which is rough, would make much of it.
    """
    spacing = 2.0 ** max(-FINEST, math.floor(math.log2(step / (16.0 * LOG_RHO))))
    return math.exp(LOG_RHO * (2.0 * spacing * round(_clock(rho) / spacing) - 1.0))


def _clock(rho: float) -> float:
    log = math.log(rho) if 0.0 < rho < math.inf else math.copysign(math.inf, rho - 1.0)
    return (min(max(log, -LOG_RHO), LOG_RHO) + LOG_RHO) / (2.0 * LOG_RHO)


def _rounded(clock: list[tuple[float, float]]) -> dict[float, float]:
    """Each end to a dyadic number: the fewer its bits, the fewer nodes matter."""
    finest: dict[float, float] = {}
    for a, b in clock:
        if not b > a:
            raise ValueError("noise='brownian': two levels are the same beyond sigma/alpha in [1e-5, 1e5]")
        for end in (a, b):
            finest[end] = min(finest.get(end, 1.0), b - a)
    places = {}
    for end, gap in finest.items():
        depth = min(DEEPEST, math.ceil(-math.log2(gap)) + CELLS)
        places[end] = round(end * 2.0**depth) / 2.0**depth
    return places


def _increment(a: float, b: float) -> Terms:
    scale = 1.0 / math.sqrt(b - a)
    weights = {0: (b - a) * scale}
    for level in range(DEEPEST):
        size = 2.0**-level
        height = 0.5 * math.sqrt(size)
        for node in {int(a / size), int(b / size)}:
            weight = height * (_tent(b / size - node) - _tent(a / size - node)) * scale
            if weight != 0.0:
                weights[(1 << level) + node] = weight
    return weights


def _tent(x: float) -> float:
    """1 at x = 1/2, 0 at 0 and 1 and outside."""
    return max(0.0, 1.0 - abs(2.0 * x - 1.0))


def _row(row: Row, draws: list[Terms]) -> Row:
    steps = [t for t, (_, stream) in enumerate(row.noise) if stream == at.STREAM_STEP]
    others = [t for t in range(len(row.noise)) if t not in steps]
    nodes = sorted({node for t in steps for node in draws[row.noise[t][0]]})

    def output(o: Output) -> Output:
        summed = tuple(sum(o.noise[t] * draws[row.noise[t][0]].get(node, 0.0) for t in steps) for node in nodes)
        return replace(o, noise=tuple(o.noise[t] for t in others) + summed)

    names = tuple(row.noise[t] for t in others) + tuple((node, at.STREAM_BROWNIAN) for node in nodes)
    return replace(row, noise=names, outputs=tuple(output(o) for o in row.outputs))
