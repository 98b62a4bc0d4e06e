"""The measure op: one reduction per sample, of which the host reads a number to decide on between rows.

May import: fastdiff.kernels and the compiled extension (through engine.native), ops, backends, checks, the reference.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastdiff.compiler import layout as at
from fastdiff.engine import backends, reference_measure
from fastdiff.engine.checks import Checks
from fastdiff.engine.ops import on_device

_library = torch.library.Library("fastdiff", "FRAGMENT")
_library.define(
    "measure(Tensor value, Tensor(a!) before, Tensor(b!) found, Tensor(c!) partial, Tensor(d!) ticket, "
    "Tensor? after=None, Tensor? status=None, *, int quantity, float rtol, float atol, str executor) -> ()"
)

FOUND = 2  # columns of `found`


@dataclass
class MeasureTensors:
    """What the op reads and writes; B samples of shape S, images contiguous or all channels_last.

    value, before: fp32 [B, *S]; CHANGE replaces `before` by `value`.
    found: fp32 [B, 2]; receives the number and, so that the host reads back once, the status.
    partial: fp64 [B, 64]; scratch: a sample is summed in parts, in an order that only its size decides.
    ticket: int32 [B] of zeros; scratch.
    after: fp32 [B, *S] or None; needed by ERROR.
    status: int32 [B] or None (then -1); as in `ops.StepTensors`.
    """

    value: Tensor
    before: Tensor
    found: Tensor
    partial: Tensor
    ticket: Tensor
    after: Tensor | None = None
    status: Tensor | None = None

    def arguments(self) -> tuple[Tensor | None, ...]:
        """The op's tensors, in the schema's order."""
        return tuple(getattr(self, field.name) for field in fields(self))


def scratch(batch: int, device: torch.device) -> dict[str, Tensor]:
    """`found`, `partial` and `ticket` for a batch."""
    return {
        "found": torch.zeros(batch, FOUND, dtype=torch.float32, device=device),
        "partial": torch.zeros(batch, at.PARTS, dtype=torch.float64, device=device),
        "ticket": torch.zeros(batch, dtype=torch.int32, device=device),
    }


def measure(tensors: MeasureTensors, quantity: int, executor: str, rtol: float = 0.0, atol: float = 1.0) -> None:
    """Write each sample's number and status, through the torch dispatcher, with every argument checked.

    Means over the elements of one sample, terms in fp32 and their sum in fp64:
        ERROR   found_0 = sqrt(mean((value / max(atol, rtol max(|before|, |after|)))^2))
        CHANGE  found_0 = mean(|value - before|);  before <- value
    A number depends on its sample alone: not on the batch, the threads, the memory format or the executor, but for a
    rounding of fp64 that seldom shows in fp32. inf and NaN stay in their sample; a NaN of `before` is not larger than
    anything in ERROR, and so passed over. Deterministic; capturable on executors
    "triton" and "cuda". Raises ValueError or TypeError for an argument that does not fit and BackendUnavailable for an
    executor that is not there.
    """
    torch.ops.fastdiff.measure(*tensors.arguments(), quantity=quantity, rtol=rtol, atol=atol, executor=executor)


def bind(
    tensors: MeasureTensors, quantity: int, executor: str, rtol: float = 0.0, atol: float = 1.0
) -> Callable[[], None]:
    """Check once and return `find()`: no dispatcher, no allocation."""
    check(tensors, quantity, rtol, atol)
    backends.require(executor, tensors.value.device)
    if executor in ("cpp", "cuda"):
        from fastdiff.engine import native

        return native.bind_measure(tensors, quantity, rtol, atol, executor)
    own: dict[str, Any] = dict(zip((field.name for field in fields(tensors)), tensors.arguments(), strict=True))
    if executor == "triton":
        from fastdiff.kernels import measure as triton_measure

        return on_device(triton_measure.bind(**own, quantity=quantity, rtol=rtol, atol=atol), tensors.value.device)
    return lambda: reference_measure.measure(**own, quantity=quantity, rtol=rtol, atol=atol)


def check(t: MeasureTensors, quantity: int, rtol: float, atol: float) -> None:
    """Raise ValueError or TypeError unless every tensor has the shape, dtype, device and layout of `MeasureTensors`."""
    if quantity not in (at.ERROR, at.CHANGE):
        raise ValueError(f"measure: quantity must be 0 or 1 (ERROR, CHANGE), got {quantity}")
    least, most = (ctypes.c_float(tolerance).value for tolerance in (atol, rtol))  # as the terms have them
    if not (0.0 <= most < math.inf and 0.0 < least < math.inf):
        raise ValueError(f"measure: rtol must be finite and at least 0 and atol above 0 in fp32, got {rtol} and {atol}")
    given = Checks("measure", t.value.unsqueeze(0))
    batch, sample = t.value.shape[0], tuple(t.value.shape[1:])
    for name in ("value", "before", "after"):
        image = getattr(t, name)
        if image is not None:
            given.image(name, image, (torch.float32,), ((batch, *sample),))
        elif quantity == at.ERROR:
            raise ValueError("measure: ERROR is relative to the state before and after, fp32 [B, *S]; after is None")
    given.numbers("found", t.found, (torch.float32,), ((batch, FOUND),))
    given.numbers("partial", t.partial, (torch.float64,), ((batch, at.PARTS),))
    for name in ("ticket", "status"):
        if (number := getattr(t, name)) is not None:
            given.numbers(name, number, (torch.int32,), ((batch,),))


def _measure(*arguments: object, quantity: int, rtol: float, atol: float, executor: str) -> None:
    bind(MeasureTensors(*arguments), quantity, executor, rtol, atol)()  # type: ignore[arg-type]


def _fake_measure(*arguments: object, quantity: int, rtol: float, atol: float, executor: str) -> None:
    check(MeasureTensors(*arguments), quantity, rtol, atol)  # type: ignore[arg-type]


_library.impl("measure", _measure, "CompositeExplicitAutograd")
torch.library.register_fake("fastdiff::measure", _fake_measure, lib=_library)
