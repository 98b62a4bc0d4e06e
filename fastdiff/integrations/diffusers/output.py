"""What a step returns: the original's tuple or output class, each field in the original's dtype.

May import: torch, and the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.integrations.diffusers.table import DENOISED, Constant, Field, Form, Missing, Mix

Make = Callable[[Tensor, "Tensor | None", Tensor, Tensor], Any]


class Output(NamedTuple):
    """`make(prev_sample, denoised, sample, model_output)`; reads_denoised: whether it wants D."""

    make: Make
    reads_denoised: bool


def output_of(
    names: Sequence[str], kind: type, state: str, fields: Mapping[str, Field], form: Form, noise: Sequence[Tensor]
) -> Output:
    """How the fields `names` become a tuple, a bare tensor or an object of the output class `kind`."""
    parts = [_prev if name == state else _part(fields[name], form.dtypes[name], noise) for name in names]
    reads = any(_reads_denoised(fields.get(name)) for name in names)
    if issubclass(kind, Tensor):
        return Output(_prev, False)
    if kind in (tuple, list):
        return Output(_tuple(parts), reads)
    return Output(_object(kind, names, parts), reads)


def _reads_denoised(field: Field | None) -> bool:
    return isinstance(field, Mix) and field.denoised != 0.0


def _tuple(parts: Sequence[Make]) -> Make:
    if len(parts) == 1:
        return lambda prev, denoised, sample, model_output: (prev,)
    if list(parts) == [_prev, _denoised]:
        return lambda prev, denoised, sample, model_output: (prev, denoised)
    return lambda *tensors: tuple(part(*tensors) for part in parts)


def _object(kind: type, names: Sequence[str], parts: Sequence[Make]) -> Make:
    return lambda *tensors: kind(**{name: part(*tensors) for name, part in zip(names, parts, strict=True)})


def _prev(prev: Tensor, denoised: Tensor | None, sample: Tensor, model_output: Tensor) -> Tensor:
    return prev


def _denoised(prev: Tensor, denoised: Tensor | None, sample: Tensor, model_output: Tensor) -> Tensor | None:
    return denoised


def _part(field: Field, dtype: torch.dtype | None, noise: Sequence[Tensor]) -> Make:
    if isinstance(field, Constant):
        return lambda *_: field.value
    if isinstance(field, Missing):
        return _refusing(field.reason)
    assert dtype is not None
    if field == DENOISED:
        return _denoised if dtype == torch.float32 else lambda prev, denoised, *_: denoised.to(dtype)

    def mixed(prev: Tensor, denoised: Tensor | None, sample: Tensor, model_output: Tensor) -> Tensor:
        total = torch.mul(sample.float(), field.x).add_(model_output.float(), alpha=field.model_output)
        if denoised is not None and field.denoised:
            total.add_(denoised, alpha=field.denoised)
        for weight, normal in zip(field.noise, noise, strict=True):
            if weight:
                total.add_(normal, alpha=weight)
        return total.to(dtype)

    return mixed


def _refusing(reason: str) -> Make:
    def make(*_: Any) -> Any:
        raise TypeError(f"{reason}; take the state alone with return_dict=False, or use the original class")

    return make
