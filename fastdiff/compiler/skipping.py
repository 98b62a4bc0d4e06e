"""Approximate plans: rows that do not ask the network, whose D comes from what it said in rows before.

May import: assemble, lin, plan, run. What is carried over is the noise estimate e = (x - alpha D) / sigma, which the
papers call the model's output; D of a row that reuses it is (x - sigma e) / alpha.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral

from fastdiff.compiler.assemble import Output, Row, assemble
from fastdiff.compiler.lin import Atom
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.run import Segment
from fastdiff.process.schedules import Level

Terms = dict[Atom, float]


def extrapolated(plan: Plan, rows: Sequence[int] | None, every: int | None, order: int) -> Plan:
    """The plan with e of some rows extrapolated from the last `order` rows that ask (AB-Cache: Yu et al. 2025).

    The polynomial through them in log(alpha/sigma); for equal steps its weights are the paper's (-1)^(j+1) C(order, j),
    e_n = e_{n-1} for order 1, 2 e_{n-1} - e_{n-2} for order 2. rows: which do not ask, counted from 0; or every: all
    but the rows 0, every, 2 every, ... and the last, which makes the sample. Where fewer rows than `order` have asked,
    those are used. Samplers that add noise want order 1: a higher one amplifies it.
    """
    chosen = _chosen(plan, rows, every)
    if not isinstance(order, Integral) or isinstance(order, bool) or not 1 <= order <= 4:
        raise ValueError(f"skipping: order must be an integer from 1 to 4, got {order!r}")
    if any(row.reused for row in plan.rows):
        raise ValueError("skipping: some rows of this plan reuse outputs already; give all rows at once")
    segments = _segments(plan)
    known: list[tuple[Level, Atom]] = []
    for i, row in enumerate(plan.rows[1:]):
        segment, level = segments[i + 1], _level(plan, row, i)
        x, estimate = Atom("x", i), Atom("D", i)
        if i not in chosen:
            saved = Atom("kept", -1 - i)
            segment.kept[saved] = {x: 1.0 / level.sigma, estimate: -level.alpha / level.sigma}
            known.append((level, saved))
            continue
        weights = _weights(known, level, int(order))
        guess = {saved: -level.sigma / level.alpha * w for saved, w in weights.items()} | {x: 1.0 / level.alpha}
        segment.state = _with(segment.state, i, guess)
        segment.kept = {atom: _with(terms, i, guess) for atom, terms in segment.kept.items()}
    try:
        made, registers, result = assemble(plan.solver, segments, len(plan.given))
    except ValueError as error:
        raise ValueError(
            f"skipping with order={order} leaves no room in a row ({error}); take a lower order or a solver with a "
            "shorter history (ddim, euler, dpmpp_2m)"
        ) from None
    fresh = [
        replace(
            new,
            gain=old.gain,
            reading=old.reading,
            clamp=None if i - 1 in chosen else old.clamp,
            estimate=None if i - 1 in chosen else old.estimate,
            perturb=old.perturb,
            muted=old.muted,
            reused=i - 1 in chosen,
        )
        for i, (new, old) in enumerate(zip(made, plan.rows, strict=True))
    ]
    note = f"approximate: rows {', '.join(map(str, sorted(chosen)))} do not ask the network (order {order})"
    return replace(
        plan,
        solver=f"{plan.solver} (skipping)",
        rows=tuple(fresh),
        registers=registers,
        result=result,
        notes=(*plan.notes, note),
    )


def twins(plan: Plan) -> Plan:
    """Every row twice: n rows that ask and save e in one more register, then n that take e from there.

    Of a sample that has run row i, either version of row i + 1 may follow.
    """
    saved = plan.registers
    opening, *rows = plan.rows
    asking, reusing = [], []
    for i, row in enumerate(rows):
        level = _level(plan, row, i)
        save = Output(
            saved, 1.0 / level.sigma, (0.0,) * len(row.slots), -level.alpha / level.sigma, (0.0,) * len(row.noise)
        )
        asking.append(replace(row, outputs=(*row.outputs, save)))
        outputs = tuple(_from_saved(output, level) for output in row.outputs)
        reusing.append(replace(row, slots=(*row.slots, saved), outputs=outputs, clamp=None, estimate=None, reused=True))
        if len(asking[-1].outputs) > 3 or len(reusing[-1].slots) > 5:
            raise ValueError(
                f"{plan.solver}: row {i} writes and reads as many registers as a row can, so there is none left to "
                "save the network's output in; take a solver with a shorter history (ddim, euler, dpmpp_2m)"
            )
    return replace(plan, rows=(opening, *asking, *reusing), registers=saved + 1)


def _from_saved(output: Output, level: Level) -> Output:
    b = output.denoised + output.other
    return replace(
        output,
        x=output.x + b / level.alpha,
        slots=(*output.slots, -b * level.sigma / level.alpha),
        denoised=0.0,
        other=0.0,
    )


def _chosen(plan: Plan, rows: Sequence[int] | None, every: int | None) -> set[int]:
    count = len(plan.rows) - 1
    if (rows is None) == (every is None):
        raise ValueError("skipping: give rows=, those that do not ask the network, or every=")
    if every is not None:
        if not isinstance(every, Integral) or isinstance(every, bool) or every < 1:
            raise ValueError(f"skipping: every must be an integer >= 1, got {every!r}")
        return {i for i in range(count - 1) if i % every}
    assert rows is not None
    for i in rows:
        if not isinstance(i, Integral) or isinstance(i, bool) or not 0 < i < count:
            raise ValueError(
                f"skipping: rows must be integers from 1 to {count - 1} (row 0 has nothing to reuse), got {i!r}"
            )
    return {int(i) for i in rows}


def _level(plan: Plan, row: Row, i: int) -> Level:
    """The level of a row whose D may be replaced; ValueError where it cannot."""
    level = row.level
    assert level is not None
    if row.estimate == "unguided":
        raise ValueError(
            f"skipping: {plan.solver} uses the unguided branch's own estimate in row {i} (CFG++), which is not kept"
        )
    if math.isnan(level.alpha) or math.isnan(level.sigma) or level.sigma == 0.0:
        raise ValueError(f"skipping: {plan.solver} does not say at what noisy level it evaluates row {i}")
    if level.alpha == 0.0 and i:
        raise ValueError(f"skipping: row {i} of {plan.solver} is at alpha = 0, where e says nothing of D")
    return level if level.alpha else replace(level, alpha=0.0)


def _weights(known: list[tuple[Level, Atom]], level: Level, order: int) -> Terms:
    """Lagrange's weights at a level from the last rows that asked, each at a place of its own."""
    places: dict[float, Atom] = {}
    for at, atom in reversed(known):
        if len(places) < order and (math.isfinite(at.lam) or not places):
            places.setdefault(at.lam, atom)
    if len(places) == 1:
        return dict.fromkeys(places.values(), 1.0)
    return {
        atom: math.prod((level.lam - other) / (lam - other) for other in places if other != lam)
        for lam, atom in places.items()
    }


def _with(terms: Terms, i: int, guess: Terms) -> Terms:
    """Terms with D and E of row i replaced."""
    weight = terms.get(Atom("D", i), 0.0) + terms.get(Atom("E", i), 0.0)
    total = {atom: c for atom, c in terms.items() if atom not in (Atom("D", i), Atom("E", i))}
    for atom, c in guess.items():
        total[atom] = total.get(atom, 0.0) + weight * c
    return {atom: c for atom, c in total.items() if c != 0.0}


def _segments(plan: Plan) -> list[Segment]:
    """A table as the segments it could have been assembled from: every register's content is a value of its own."""
    opening = plan.rows[0]
    holds = {opening.x: Atom("start", 0)}
    holds |= {register: Atom("given", k) for k, register in enumerate(plan.given.values())}
    segments, made = [], 0
    for i, row in enumerate(plan.rows):
        segment = Segment(row.level, estimate=row.estimate, spread=row.spread)
        written = {}
        for o, output in enumerate(row.outputs):
            terms = {holds[row.x]: output.x}
            for c, register in zip(output.slots, row.slots, strict=True):
                if c != 0.0:
                    terms[holds[register]] = terms.get(holds[register], 0.0) + c
            terms |= {Atom("D", i - 1): output.denoised, Atom("E", i - 1): output.other}
            terms |= {Atom("z", *name): c for c, name in zip(output.noise, row.noise, strict=True)}
            terms = {atom: c for atom, c in terms.items() if c != 0.0}
            if o == 0:
                segment.state, written[output.dest] = terms, Atom("x", i)
            else:
                atom = Atom("kept", made)
                made += 1
                segment.kept[atom] = terms
                written[output.dest] = atom
        holds |= written
        segments.append(segment)
    return segments
