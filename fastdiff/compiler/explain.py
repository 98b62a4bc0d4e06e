"""A plan as text a person can check against the paper. May import: layout, and nothing that runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdiff.compiler import layout as at
from fastdiff.compiler.assemble import Output, Row

if TYPE_CHECKING:
    from fastdiff.compiler.plan import Plan

_NORMALS = {at.STREAM_STEP: "z", at.STREAM_BROWNIAN: "w"}


_ESTIMATES = {"unguided": "of the unguided branch", "unclamped": "before the clamp"}


def explain(plan: Plan) -> str:
    """Header, then per row its level and `register <- formula` for every register it writes."""
    schedule = plan.schedule.name if plan.schedule is not None else "custom levels"
    options = ", ".join(f"{key}={value}" for key, value in plan.options.items())
    lines = [
        f"{plan.solver}({options}) on grid {plan.grid}, schedule {schedule}",
        f"{plan.nfe} model evaluations, {plan.registers} registers, "
        + (f"{plan.draws} noise draws" if plan.stochastic else "deterministic after the latents"),
        "x: the state evaluated in this row; D: denoised estimate; r: registers; z, w: unit normals, w on a path",
        *(f"given: {name}, in r{register} at the start" for name, register in plan.given.items()),
        *(f"note: {text}" for text in plan.notes),
        "",
    ]
    for i, row in enumerate(plan.rows):
        lines += row_lines(i, row)
    lines.append(f"result: r{plan.result}")
    return "\n".join(lines)


def row_lines(i: int, row: Row) -> list[str]:
    """One row: where it evaluates the network, and what it writes."""
    if row.level is None:
        head = "start  x = the latents, or the state given"
    else:
        level = row.level
        where = f"alpha={level.alpha:.6g} sigma={level.sigma:.6g} time={level.time:.6g}"
        asked = "the network is not asked" if row.reused else f"D = model(r{row.x})"
        head = f"row {i - 1:<3d} {asked} at {where}"
        if row.clamp is not None:
            head += f", clamped to [{row.clamp[0]:g}, {row.clamp[1]:g}]"
        if row.gain != 1.0:
            head += ", guidance 1" + (f" + {row.gain:g} (w - 1)" if row.gain != 0.0 else "")
        if row.perturb != 1.0:
            head += ", perturbed branch off"
        if row.muted:
            head += ", its output taken as 0"
        if row.estimate is not None:
            head += f"; E = D {_ESTIMATES[row.estimate]}"
        if row.spread is not None:
            head += f"; z times exp({row.spread[0]:.6g} + {row.spread[1]:.6g} V), V the learned variance"
    return [head, *(f"       r{output.dest} <- {_formula(row, output)}" for output in row.outputs)]


def _formula(row: Row, output: Output) -> str:
    parts = [(output.x, "x"), (output.denoised, "D"), (output.other, "E")]
    parts += [(c, f"r{register}") for c, register in zip(output.slots, row.slots, strict=True)]
    parts += [(c, f"{_NORMALS[stream]}{index}") for c, (index, stream) in zip(output.noise, row.noise, strict=True)]
    text = ""
    for c, name in parts:
        if c == 0.0:
            continue
        sign = "-" if c < 0 else "+" if text else ""
        size = name if abs(c) == 1.0 else f"{abs(c):.9g} {name}"
        text += f" {sign} {size}" if text else f"{sign}{size}"
    return text or "0"
