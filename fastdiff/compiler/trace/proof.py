"""The proof of a trace: the function itself on random tensors against the table.

May import: torch, plan, verify, and the interception of draws that captures use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.compiler.capture.intercept import Array, Random, relative
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.verify import execute
from fastdiff.process.schedules import Level

SHAPE = (2, 3, 4, 4)
TOLERANCE = 1e-9


def prove(fn: Callable[..., Any], name: str, plan: Plan, arguments: Mapping[str, Any], watched: bool) -> float:
    """Run fn on random tensors and return the largest relative mismatch of any state against the table.

    watched: its torch calls may draw, so they are followed. Raises TypeError with the row where they part.
    """
    generator = np.random.default_rng(20)
    random = Random(generator, SHAPE)
    outputs = generator.standard_normal((plan.nfe, *SHAPE))
    start = plan.levels[0].sigma * generator.standard_normal(SHAPE)
    states: list[Array] = []

    def model(x: Tensor, *_: Any, **__: Any) -> Tensor:
        states.append(x.double().numpy().copy())
        if len(states) > plan.nfe:
            raise _differs(name, plan.nfe, "calls the model more often than on registers")
        return torch.from_numpy(outputs[len(states) - 1].copy())

    given = dict(arguments)
    if "noise_sampler" in given:
        given["noise_sampler"] = lambda *_: random.draw(SHAPE, torch.float64)
    with torch.no_grad(), random if watched else nullcontext():
        result = fn(model, torch.from_numpy(start.copy()), **given)
    states.append((result[0] if isinstance(result, tuple | list) else result).double().numpy())
    if len(states) != plan.nfe + 1:
        raise _differs(name, len(states) - 1, "calls the model less often than on registers")
    if len(random.normals) < plan.draws:
        raise _differs(name, plan.nfe, "draws fewer normals than on registers")
    worst, row = 0.0, 0

    def compare(x: Array) -> None:
        nonlocal worst
        mismatch = relative(x, states[row])
        if not mismatch <= TOLERANCE:
            raise _differs(name, row - 1, f"gives a state that differs from the table's by {mismatch:.1e} (relative)")
        worst = max(worst, mismatch)

    def denoise(x: Array, level: Level) -> Array:
        nonlocal row
        compare(x)
        row += 1
        return outputs[row - 1]

    compare(execute(plan, denoise, start, lambda index, _: random.normals[index].double().numpy()))
    return worst


def _differs(name: str, row: int, what: str) -> TypeError:
    return TypeError(
        f"solver {name!r}, row {row}: on random tensors it {what}. It keeps state from call to call, depends on the "
        "shape, or writes into a tensor that another variable holds. Make each run start anew and avoid in-place "
        "writes, or run this sampler with its own loop."
    )
