"""Noise that is not drawn inside the rows: tensors and functions a caller gives, and what frames share.

May import: ops, noise, frames, compiler.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.compiler import layout as at
from fastdiff.compiler.plan import Plan
from fastdiff.engine import noise as counter_noise
from fastdiff.engine import ops
from fastdiff.engine.frames import FrameNoise

Noise = str | Tensor | FrameNoise | Callable[[int, torch.Size], Tensor]


def fill(
    noise: Noise, plan: Plan, tensors: ops.StepTensors, into: Callable[[int], Tensor], executor: str
) -> Tensor | None:
    """fp32 [plan.draws + 1, B, *S], the latents last, for noise the rows do not draw themselves; None where they do.

    tensors: of the run, with its seeds; a caller's noise leaves the latents to them. into(n): n empty images of the
    batch. Raises ValueError or TypeError for noise that is of no known kind or does not fit the plan and the shape.
    """
    if isinstance(noise, str):
        if noise not in ("white", "brownian"):
            raise ValueError(
                f"noise must be 'white', 'brownian', a FrameNoise, a tensor or a function f(id, shape), got {noise!r}"
            )
        return None
    if isinstance(noise, type):
        raise TypeError(f"noise is the class {noise.__name__}; give an object of it: {noise.__name__}(...)")
    shape = tensors.state.shape[1:]
    table = into(plan.draws + 1)
    if isinstance(noise, FrameNoise):
        noise.draw(plan, tensors, table, executor)
        return table
    if isinstance(noise, Tensor):
        expected = (plan.draws, *shape)
        if tuple(noise.shape) != expected:
            raise ValueError(
                f"noise must have shape {expected} ([draws, *shape] of this plan), got {tuple(noise.shape)}"
            )
        table[:-1].copy_(noise)
    elif callable(noise):
        for i in range(plan.draws):
            table[i].copy_(_checked(noise(i, shape), i, shape))
    else:
        raise TypeError(
            "noise must be 'white', 'brownian', a FrameNoise, a tensor or a function f(id, shape), got "
            f"{type(noise).__name__}"
        )
    for b, seed in enumerate(tensors.seed.tolist()):
        latent = counter_noise.normal(seed, table[-1, b].numel(), 0, at.STREAM_LATENT)
        table[-1, b].copy_(torch.from_numpy(latent).view(shape[1:]))
    return table


def _checked(draw: object, index: int, shape: torch.Size) -> Tensor:
    if not isinstance(draw, Tensor) or draw.shape != shape:
        got = tuple(draw.shape) if isinstance(draw, Tensor) else type(draw).__name__
        raise ValueError(f"noise({index}, shape) must return a tensor of shape {tuple(shape)}, got {got}")
    return draw
