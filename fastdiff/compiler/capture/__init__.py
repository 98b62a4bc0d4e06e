"""A diffusers-style scheduler object to a Plan: run it once, unmodified, on basis vectors.

May import: torch, the rest of the compiler, process; its files are its own.

The state, the model output, every tensor the scheduler has stored and every normal it draws are a vector each with a
single 1; each element of what `step` returns or stores is then one coefficient of the row, exact in the scheduler's own
arithmetic. Between steps the stored tensors (found by walking the object's attributes, lists and dicts) are replaced by
the basis vectors of the registers they have become, so every step is measured on its own. The places of the ones
rotate, so a tensor that the walk cannot see betrays itself by an old place. A clamp of a combination of state and
output is cut: its argument is the row's D = P x + Q F, its result a new basis vector. A second run on random tensors
is compared with the table, state by state, and anything that is not affine differs there.

The rows are in D where the scheduler says what its network predicts (`pred_original_sample`, a clamp, or the
prediction type in its config), else in D := F; each row carries P, Q, c_in = scale_model_input, the model time and the
clamp, so the network's own `prediction` is only compared with the scheduler's. A Brownian tree of the scheduler's is
replaced by named normals, and each draw is given the levels it covers, so noise="brownian" puts them on our path.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from fastdiff.compiler.assemble import Row, assemble
from fastdiff.compiler.brownian import partitioned
from fastdiff.compiler.capture import readings
from fastdiff.compiler.capture.basis import Found, measure
from fastdiff.compiler.capture.proof import prove, witness_of
from fastdiff.compiler.capture.source import Refused, Source, check_interface
from fastdiff.compiler.plan import Plan


def capture(scheduler: Any, steps: int = 20, *, step_options: Mapping[str, Any] | None = None, **kw: Any) -> Plan:
    """Compile a scheduler object to a table that does what its `step` does, by running it on basis vectors.

    scheduler: an object with `set_timesteps`, `timesteps` and `step(model_output, timestep, sample)`, as diffusers'
    have; it is copied, not changed. steps: for set_timesteps, with kw (which may give timesteps or sigmas instead).
    step_options: further arguments of `step`, e.g. {"eta": 1.0}.
    The plan's `options` state the arithmetic found ("float32" where the scheduler casts) and the largest relative
    mismatch against the scheduler itself on random tensors. Its noise ids are the scheduler's draws in order.
    Raises TypeError, with the step, for a scheduler that is not a table: not affine (with the size of the mismatch),
    hidden state, or a step that needs more than these three arguments; RuntimeError when the scheduler itself fails.
    Deterministic. Generators stay as they are, except that a `step` which has no `generator` argument and draws all the
    same draws its first normals from torch's default generator for real; they are lost.
    """
    name = type(scheduler).__name__
    options = dict(step_options or {})
    check_interface(scheduler, name, options)
    return compile_source(Source(scheduler, name, steps, options, kw))


def compile_source(source: Source) -> Plan:
    """The table of a scheduler that is stepped as `source` says, proved; what `capture` raises, this raises.

    Where `step` is not made to draw, only the torch calls on our own tensors are watched at first. Where that fails,
    every call is, and what is refused then is refused.
    """
    with torch.no_grad():
        if not source.takes_generator:
            with suppress(TypeError, ValueError, RuntimeError):
                return _proved(source, every_call=False)
        return _proved(source, every_call=True)


def _proved(source: Source, every_call: bool) -> Plan:
    try:
        found = measure(source, every_call)
    except Refused as refused:
        raise refused.error from None
    plan = _plan(source, found)
    mismatch = prove(source, plan, witness_of(source, found, every_call))
    return replace(plan, options={**plan.options, "mismatch": float(f"{mismatch:.1e}")})


def _plan(source: Source, found: Found) -> Plan:
    segments = found.run.finish(found.result)
    rows, registers, home = assemble(source.name, segments)
    opening, *evaluated = rows
    read: list[Row] = [
        replace(row, reading=reading, clamp=clamp)
        for row, reading, clamp in zip(evaluated, found.readings, found.clamps, strict=True)
    ]
    draws = found.run.draws if any(row.noise for row in rows) else 0
    levels = [row.level for row in read if row.level is not None]
    prediction = readings.kind(source.scheduler)
    return Plan(
        solver=f"capture:{source.name}",
        options={
            "steps": source.steps,
            **{key: _plain(value) for key, value in {**source.timesteps_options, **source.options}.items()},
            **({} if prediction is None else {"prediction": prediction}),
            "precision": found.precision,
        },
        schedule=None,
        grid="captured",
        levels=(*levels, found.last),
        rows=(opening, *read),
        registers=registers,
        result=home,
        draws=draws,
        intervals=partitioned(found.run, rows, [*levels, found.last]) if draws else (),
        latent_scale=found.latent_scale,
    )


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if isinstance(value, bool | int | float | str | list | dict | None) else repr(value)
