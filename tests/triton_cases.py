"""One row on the Triton executor, on a GPU or interpreted, and the simplest step there is: for its tests."""

from __future__ import annotations

from typing import Any

import torch
from interpreted import DEVICE, affine

from fastdiff.compiler import layout as at
from fastdiff.engine import reference
from fastdiff.engine.ops import StepTensors, check

NAN, INF = float("nan"), float("inf")


def copy_step(step: StepTensors, device: torch.device | str = "cpu") -> StepTensors:
    def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.clone(memory_format=torch.preserve_format).to(device)

    return StepTensors(*[move(tensor) for tensor in step.arguments()])  # type: ignore[arg-type]


def launch(step: StepTensors, **options: int) -> None:
    """One row on the Triton executor, in place."""
    second = bool(step.coef[:, at.OUTPUT + at.OUT_E : at.SPREAD_LOG : at.OUTPUT_STRIDE].any())
    affine.bind(*step.arguments(), second=second, **options)(step.model_out, step.unguided, step.perturbed)


def run(step: StepTensors, **options: int) -> StepTensors:
    """The step after one row on the Triton executor, back on the CPU."""
    there = copy_step(step, DEVICE)
    check(there)
    launch(there, **options)
    return copy_step(there)


def run_reference(step: StepTensors) -> StepTensors:
    after = copy_step(step)
    reference.affine_step(*after.arguments())
    return after


def simple_step(
    shape: tuple[int, ...], batch: int = 1, layout: torch.memory_format = torch.contiguous_format, **changes: Any
) -> StepTensors:
    """One register, one row: x' = x + N(3), nothing else; fields may be replaced."""
    coef = torch.zeros(1, at.COEF_FIXED + at.NOISE_STRIDE)
    ids = torch.zeros(1, at.IDS_FIXED + at.TERM_IDS_STRIDE, dtype=torch.int32)
    coef[0, at.OUTPUT + at.OUT_DELTA] = 1.0
    coef[0, at.NOISE] = 1.0
    coef[0, at.CLAMP_LO : at.EMIT_SCALE] = torch.tensor([-INF, INF])
    coef[0, at.EMIT_SCALE] = 1.0
    ids[0, at.SLOT + 1 : at.FLAGS] = torch.tensor([-1] * 5 + [0, -1, -1], dtype=torch.int32)
    ids[0, at.TERMS] = 1
    ids[0, at.TERM_IDS : at.TERM_IDS + 2] = torch.tensor([3, at.STREAM_STEP], dtype=torch.int32)
    fields: dict[str, Any] = {
        "state": torch.zeros(batch, *shape).contiguous(memory_format=layout)[None],
        "model_out": torch.zeros(batch, *shape).contiguous(memory_format=layout),
        "model_in": None,
        "model_time": None,
        "coef": coef,
        "ids": ids,
        "row": torch.zeros(batch, dtype=torch.int32),
        "seed": torch.arange(batch) + 40,
        "guidance": torch.ones(batch),
        "noise": None,
        "denoised": None,
        "status": torch.full((batch,), -1, dtype=torch.int32),
        "ticket": torch.zeros(batch, dtype=torch.int32),
    }
    return StepTensors(**(fields | changes))
