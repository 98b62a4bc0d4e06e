"""The proof of a capture: the scheduler itself on random tensors against the table.

May import: torch, plan, verify, and the files of this folder that call the scheduler.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdiff.compiler.capture.basis import Found
from fastdiff.compiler.capture.intercept import Array, Random, relative
from fastdiff.compiler.capture.source import Source, latent_scale
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.verify import execute
from fastdiff.process.schedules import Level

SHAPE = (2, 3, 4, 4)
SCALES = np.array([1.0, 1e6]).reshape(2, 1, 1, 1)  # of the samples: the second one meets what clips far out
BRANCHES = "it branches on data, clips further out, multiplies tensors, or keeps state where the capture cannot see it"
TOLERANCE = {"float64": 1e-9, "float32": 2e-5}  # relative mismatch, by what the scheduler computes in


@dataclass(frozen=True)
class Witness:
    """The scheduler itself on random tensors: what it was given, every state, and how it computes."""

    outputs: Array
    normals: list[Tensor]
    inputs: list[Array]
    states: list[Array]
    precision: str
    quantile: bool


def witness_of(source: Source, found: Found, watched: bool) -> Witness:
    """Run the scheduler on random tensors, normal and of the size it expects, and a million times that.

    watched: its torch calls may draw, so they are followed.
    """
    generator = np.random.default_rng(20)
    random = Random(generator, SHAPE)
    scheduler = source.fresh(lambda *_: random.draw(SHAPE, torch.float64))
    times = source.times(scheduler)
    outputs = torch.from_numpy(generator.standard_normal((len(times), *SHAPE)) * SCALES)
    x = torch.from_numpy(generator.standard_normal(SHAPE) * SCALES) * latent_scale(scheduler)
    states, inputs = [x.numpy().copy()], []  # copies: a scheduler may write into what it is given
    for i, time in enumerate(times):
        following = times[i + 1] if i + 1 < len(times) else None
        with random if watched else nullcontext():
            x = x.double()
            inputs.append(source.scaled(scheduler, i, x, time).double().numpy().copy())
            x, _ = source.step(scheduler, i, outputs[i].clone(), time, x, following)
        states.append(x.double().numpy().copy())
    return Witness(outputs.numpy(), random.normals, inputs, states, found.precision, found.quantile)


def prove(source: Source, plan: Plan, witness: Witness) -> float:
    """The largest relative mismatch, over all states, between the table and the scheduler on random tensors."""
    reached: list[Array] = []
    if len(witness.normals) < plan.draws:
        raise _not_affine(source.name, f"it draws {len(witness.normals)} normals, its table {plan.draws}", BRANCHES)

    def denoise(state: Array, level: Level) -> tuple[Array, Array]:
        i = len(reached)
        row, reading = plan.rows[i + 1], plan.rows[i + 1].reading
        assert reading is not None
        if i:
            _check(source, i - 1, relative(state, witness.states[i]), witness, "its next state")
        _check(source, i, relative(reading.c_in * state, witness.inputs[i]), witness, "the network's input")
        reached.append(state)
        estimate = reading.P * state + reading.Q * witness.outputs[i]
        return estimate if row.clamp is None else estimate.clip(*row.clamp), estimate

    result = execute(plan, denoise, witness.states[0], lambda index, _: witness.normals[index].double().numpy())
    _check(source, plan.nfe - 1, relative(result, witness.states[-1]), witness, "its result")
    return max(relative(ours, theirs) for ours, theirs in zip([*reached, result], witness.states, strict=True))


def _check(source: Source, i: int, mismatch: float, witness: Witness, what: str) -> None:
    allowed = TOLERANCE[witness.precision]
    if mismatch <= allowed:
        return
    if witness.quantile:
        why = "it thresholds by a quantile of each sample; set thresholding=False or clip_sample=True"
    else:
        why = BRANCHES
    differs = f"{what} differs from the table by {mismatch:.1e} (relative; allowed {allowed:.0e})"
    raise _not_affine(f"{source.name}, step {i}", differs, why)


def _not_affine(where: str, differs: str, why: str) -> TypeError:
    return TypeError(f"{where}: is not affine: on random tensors {differs}; {why}. Otherwise run it with its own loop")
