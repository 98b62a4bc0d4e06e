"""The state a run keeps on the device, and the call that runs one of its rows on the caller's tensors.

May import: torch, engine, the table and the output. The whole batch is one sample of the kernel, in memory order: the
noise is given, so nothing depends on where a sample begins, and any dense memory format runs as it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.engine import backends, ops
from fastdiff.integrations.diffusers.output import Output, output_of
from fastdiff.integrations.diffusers.table import Draw, Form, Table


class Ready(NamedTuple):
    """A row made ready for tensors of given dtypes: its call, its draws, and how its output is made.

    x: the register to put the sample in; None: it is read where it lies. dtype: of the next state; None: the sample's.
    """

    x: Tensor | None
    call: ops.Apart
    dtype: torch.dtype | None
    draws: tuple[tuple[Draw, Tensor], ...]
    short: Output
    full: Output


class Registers:
    """Registers of a table for samples of one shape and layout on one device.

    noise: the slots of normals, views in the sample's shape and strides.
    """

    def __init__(self, table: Table, sample: Tensor) -> None:
        if sample.numel() == 0:
            raise ValueError(f"step: the sample has no elements, got shape {tuple(sample.shape)}")
        self.table = table
        self.shape, self.stride, self.device = sample.shape, _stride(sample), sample.device
        self.executor = backends.choose(sample.device)
        with torch.inference_mode(False):  # a later call outside it writes here too
            self._state = torch.zeros(
                table.plan.registers, 1, sample.numel(), dtype=torch.float32, device=sample.device
            )
            self._noise = torch.zeros(table.slots, 1, sample.numel(), dtype=torch.float32, device=sample.device)
            self._coef = torch.from_numpy(table.coef).to(sample.device, non_blocking=True)
            self._ids = torch.from_numpy(table.ids).to(sample.device, non_blocking=True)
        self._view()

    def _view(self) -> None:
        state = [register.as_strided(self.shape, self.stride, register.storage_offset()) for register in self._state]
        self._states = tuple(state[register] for register in self.table.states)
        self.noise = tuple(one.as_strided(self.shape, self.stride, one.storage_offset()) for one in self._noise)
        self.contiguous = self._states[0].is_contiguous()
        self._ready: dict[tuple[torch.dtype, torch.dtype, bool], tuple[Ready, ...]] = {}
        self._calls: dict[tuple[torch.dtype, torch.dtype], ops.Apart] = {}

    def fits(self, table: Table, sample: Tensor) -> bool:
        """Whether these are registers of this table for samples that lie like this one."""
        return table is self.table and self.holds(sample) and _stride(sample) == self.stride

    def holds(self, sample: Tensor) -> bool:
        """Whether a sample of this shape has its place here, however it lies."""
        return sample.shape == self.shape and sample.device == self.device

    def new(self, dtype: torch.dtype) -> Tensor:
        """A new tensor that lies as these registers do."""
        return torch.empty_like(self._states[0], dtype=dtype)

    def lies(self, tensor: Tensor) -> bool:
        """Whether a tensor of this shape lies in memory as these registers do."""
        return tensor.stride() == self.stride or (self.contiguous and tensor.is_contiguous())

    def ready(self, model_dtype: torch.dtype, sample: Tensor) -> tuple[Ready, ...]:
        """Every row, ready for tensors of these dtypes."""
        key = model_dtype, sample.dtype, self.lies(sample)
        if key not in self._ready:
            forms = self.table.forms(model_dtype, sample.dtype)
            self._ready[key] = tuple(self._row(i, form, model_dtype, sample) for i, form in enumerate(forms))
        return self._ready[key]

    def _row(self, i: int, form: Form, model_dtype: torch.dtype, sample: Tensor) -> Ready:
        table = self.table
        dtype = form.dtypes[table.state_field]
        assert dtype is not None
        first, slots = table.slot_of[i], max(table.slots, 1)
        noise = tuple(self.noise[(first + k) % slots] for k in range(len(form.draws)))
        short, full = (
            output_of(names, kind, table.state_field, table.fields[i], form, noise)
            for names, kind in ((table.tuple_fields, tuple), (tuple(form.dtypes), table.kind))
        )
        in_place = ops.reads_in_place(self.executor, sample.dtype) and self.lies(sample) and not table.kept[i]
        return Ready(
            x=None if in_place else self._states[i],
            call=self._call(model_dtype, dtype),
            dtype=None if dtype == sample.dtype else dtype,
            draws=tuple(zip(form.draws, noise, strict=True)),
            short=short,
            full=full,
        )

    def _call(self, model_dtype: torch.dtype, out_dtype: torch.dtype) -> ops.Apart:
        key = model_dtype, out_dtype
        if key not in self._calls:
            self._calls[key] = self._bound(*key)
        return self._calls[key]

    def _bound(self, model_dtype: torch.dtype, out_dtype: torch.dtype) -> ops.Apart:
        flat, device = (1, self._state.shape[2]), self.device

        def integers(value: int, dtype: torch.dtype) -> Tensor:
            return torch.full((1,), value, dtype=dtype, device=device)

        with torch.inference_mode(False):
            tensors = ops.StepTensors(
                state=self._state,
                model_out=torch.empty(flat, dtype=model_dtype, device=device),
                model_in=torch.empty(flat, dtype=out_dtype, device=device),
                model_time=None,
                coef=self._coef,
                ids=self._ids,
                row=integers(0, torch.int32),
                seed=integers(0, torch.int64),
                guidance=torch.ones(1, dtype=torch.float32, device=device),
                noise=self._noise if len(self._noise) else None,
                denoised=torch.empty(flat, dtype=torch.float32, device=device),
                status=integers(-1, torch.int32),
                ticket=integers(0, torch.int32),
            )
        call = ops.bind_apart(tensors, self.executor)
        if self.executor in ("cpp", "cuda"):
            return call

        def on_flat(i: int, model_out: Tensor, x: Tensor | None, first: Tensor, denoised: Tensor | None) -> None:
            call(i, _flat(model_out), x, _flat(first), None if denoised is None else _flat(denoised))

        return on_flat

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_states", "noise", "_calls", "_ready")
        return {key: value for key, value in vars(self).items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._view()


def _stride(sample: Tensor) -> tuple[int, ...]:
    """The strides of a new tensor like this one; what dimensions of size 1 say is not looked at."""
    if sample.is_contiguous():
        return torch.empty(sample.shape, device="meta").stride()
    return torch.empty_like(sample).stride()


def _flat(tensor: Tensor) -> Tensor:
    """A dense tensor as [1, elements] in memory order."""
    return tensor.as_strided((1, tensor.numel()), (tensor.numel(), 1), tensor.storage_offset())
