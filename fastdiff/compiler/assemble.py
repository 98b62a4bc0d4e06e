"""Segments to rows: which value lives in which register, decided by liveness.

May import: lin, run, layout, process. A value gets a register in the row that makes it and frees it after the last row
that reads it; the next state prefers the register of the state it replaces, so one-step samplers run in place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fastdiff.compiler import layout as at
from fastdiff.compiler.lin import Atom, nonzero
from fastdiff.compiler.run import Segment
from fastdiff.process.predictions import Prediction
from fastdiff.process.schedules import Level

Terms = dict[Atom, float]


@dataclass(frozen=True)
class Output:
    """One register a row writes: dest <- x X + sum_j slots[j] r_j + denoised D + other E + sum_k noise[k] z_k."""

    dest: int
    x: float
    slots: tuple[float, ...]
    denoised: float
    noise: tuple[float, ...]
    other: float = 0.0


@dataclass(frozen=True)
class Row:
    """One model evaluation and the linear map after it.

    level: where the model is evaluated; None for the opening row, which evaluates nothing.
    x: the register evaluated (in the opening row: the one that holds a given start).
    slots: other registers read. noise: (id, stream) of every unit normal drawn.
    gain: how much of the guidance applies here, w_row = 1 + gain * (w - 1).
    reading: how this row calls the network and reads its output, D = P x + Q F, where the plan itself knows it
    (captured from a scheduler); None: from the network's prediction type. clamp: bounds of D, None for none.
    estimate: what E is, "unguided" (P x + Q Fu) or "unclamped" (D before its clamp); None where it is not used.
    spread: (log, slope), the noise times exp(log + slope V), V the network's learned variance; None: as it is.
    perturb: how much of the perturbed branch's scale applies here. muted: the network's output is taken as 0.
    reused: the network is not asked; its outputs have no D, and level is where it would have been evaluated.
    """

    level: Level | None
    x: int
    slots: tuple[int, ...]
    outputs: tuple[Output, ...]
    noise: tuple[tuple[int, int], ...]
    gain: float = 1.0
    reading: Prediction | None = None
    clamp: tuple[float, float] | None = None
    estimate: str | None = None
    spread: tuple[float, float] | None = None
    perturb: float = 1.0
    muted: bool = False
    reused: bool = False


def assemble(solver: str, segments: list[Segment], givens: int = 0) -> tuple[tuple[Row, ...], int, int]:
    """Rows, the number of registers, and the register of the result. The first row is the opening row.

    givens: how many tensors the caller fills before it; the k-th is in register 1 + k until its last use. Raises
    ValueError when a row needs more outputs or inputs than the kernel has.
    """
    held = {Atom("start", 0): 0, **{Atom("given", k): 1 + k for k in range(givens)}}
    rows, registers, _ = place(solver, segments, held)
    return rows, registers, rows[-1].outputs[0].dest


def place(
    solver: str, segments: list[Segment], held: Mapping[Atom, int], keep: Collection[Atom] = ()
) -> tuple[tuple[Row, ...], int, dict[Atom, int]]:
    """Rows, the number of registers, and where every value that outlives the rows is.

    held: what lies in which register beforehand, the value that the opening row takes for x first. keep: values that
    must outlive the rows besides the result, which is Atom("result", 0). Raises ValueError as `assemble` does.
    """
    first = next(iter(held))
    made = [_makes(i, segment, first, last=i == len(segments) - 1) for i, segment in enumerate(segments)]
    last_read = _last_reads(made, keep)
    home: dict[Atom, int] = dict(held)
    registers = max(held.values()) + 1
    rows = []
    state = first
    for i, (segment, values) in enumerate(zip(segments, made, strict=True)):
        others: list[Atom] = []
        drawn: list[Atom] = []
        model: dict[str, Atom] = {}
        for atom in {atom for terms in values.values() for atom in terms}:
            if atom in home:
                if atom != state:
                    others.append(atom)
            elif atom.kind == "z":
                drawn.append(atom)
            else:
                model[atom.kind] = atom
        others.sort(key=_name)
        drawn.sort(key=_normal)
        x, slots = home[state], tuple([home[atom] for atom in others])
        home = {atom: register for atom, register in home.items() if last_read.get(atom, -1) > i}
        taken = home.values()
        free = [register for register in range(registers) if register not in taken]
        free.sort(key=x.__ne__)  # the register of the state it replaces first
        columns = (state, others, model, drawn)
        outputs = []
        for atom, terms in values.items():
            if atom not in home:
                if not free:
                    free.append(registers)
                    registers += 1
                home[atom] = free.pop(0)
            outputs.append(_output(home[atom], terms, *columns))
        _check_size(solver, i - 1, slots, outputs)
        noise = tuple([_normal(atom) for atom in drawn])
        state = next(iter(values))
        rows.append(
            Row(segment.level, x, slots, tuple(outputs), noise, estimate=segment.estimate, spread=segment.spread)
        )
    return tuple(rows), registers, home


def _name(atom: Atom) -> tuple[str, str]:
    """By what the other registers of a row are put in order: their numbers as text, as stored plans have them."""
    return atom.kind, str(atom.number)


def _normal(atom: Atom) -> tuple[int, int]:
    return atom.number, atom.stream


def _makes(i: int, segment: Segment, first: Atom, last: bool) -> dict[Atom, Terms]:
    """Every value row i may have to write, the next state first, each over atoms known in that row."""
    kept: dict[Atom, Terms] = {}
    for atom, terms in segment.kept.items():
        kept[atom] = _inline(terms, kept)
    values = {Atom("result", 0) if last else Atom("x", i): _inline(segment.state, kept)}
    values.update(kept)
    given = [first] if not i and first.kind == "start" else []
    given += [Atom("D", i - 1)] if i else []
    given += [Atom("E", i - 1)] if segment.estimate else []
    for atom in given:
        values[atom] = {atom: 1.0}
    return values


def _inline(terms: Terms, known: dict[Atom, Terms]) -> Terms:
    if known.keys().isdisjoint(terms):
        return nonzero(terms)
    total: Terms = {}
    for atom, c in terms.items():
        for inner, weight in known.get(atom, {atom: 1.0}).items():
            total[inner] = total.get(inner, 0.0) + c * weight
    return nonzero(total)


def _last_reads(made: list[dict[Atom, Terms]], keep: Collection[Atom]) -> dict[Atom, int]:
    """The last row that reads each value; values nobody reads later are dropped from `made`, last row first."""
    last = dict.fromkeys(keep, len(made))
    for i in reversed(range(len(made))):
        _, *others = made[i]
        for atom in others:
            if atom not in last:
                del made[i][atom]
        for terms in made[i].values():
            for atom in terms:
                last.setdefault(atom, i)
    return last


def _output(
    dest: int, terms: Terms, state: Atom, others: list[Atom], model: dict[str, Atom], drawn: list[Atom]
) -> Output:
    return Output(
        dest=dest,
        x=terms.get(state, 0.0),
        slots=tuple([terms.get(atom, 0.0) for atom in others]),
        denoised=terms.get(model["D"], 0.0) if "D" in model else 0.0,
        noise=tuple([terms.get(atom, 0.0) for atom in drawn]),
        other=terms.get(model["E"], 0.0) if "E" in model else 0.0,
    )


def _check_size(solver: str, row: int, slots: tuple[int, ...], outputs: list[Output]) -> None:
    if len(outputs) > at.MAX_OUTPUTS or len(slots) >= at.MAX_SLOTS:
        raise ValueError(
            f"solver {solver!r}, row {row}: writes {len(outputs)} registers and reads {len(slots) + 1}, the row kernel "
            f"writes at most {at.MAX_OUTPUTS} and reads at most {at.MAX_SLOTS}; carry fewer values from row to row, "
            "or combinations of them (run.keep)"
        )
