"""The state a run keeps on the device, and the call that runs one of its rows on the caller's tensors.

May import: torch, engine, and the table. The whole batch is one sample of the kernel, in memory order: the noise is
given, so nothing depends on where a sample begins, and any dense memory format runs as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.engine import backends, ops
from fastdiff.integrations.diffusers.table import Table


class Registers:
    """Registers of a table for samples of one shape and layout on one device.

    noise: the slots of normals, views in the sample's shape and strides.
    """

    def __init__(self, table: Table, sample: Tensor) -> None:
        if sample.numel() == 0:
            raise ValueError(f"step: the sample has no elements, got shape {tuple(sample.shape)}")
        self.table = table
        self.shape, self.stride, self.device = sample.shape, torch.empty_like(sample).stride(), sample.device
        self.executor = backends.choose(sample.device)
        with torch.inference_mode(False):  # a later call outside it writes here too
            self._state = torch.zeros(table.plan.registers, 1, sample.numel(), device=sample.device)
            self._noise = torch.zeros(table.slots, 1, sample.numel(), device=sample.device)
            self._coef = torch.from_numpy(table.coef).to(sample.device)
            self._ids = torch.from_numpy(table.ids).to(sample.device)
        self._view()

    def _view(self) -> None:
        state = [register.as_strided(self.shape, self.stride, register.storage_offset()) for register in self._state]
        self._states = tuple(state[register] for register in self.table.states)
        self.noise = tuple(one.as_strided(self.shape, self.stride, one.storage_offset()) for one in self._noise)
        self.in_order = bool(self.noise) and self.noise[0].is_contiguous()
        self._calls: dict[tuple[torch.dtype, torch.dtype], ops.Apart] = {}

    def noise_of(self, row: int, draws: int) -> tuple[Tensor, ...]:
        """Where the draws of a row go."""
        first, slots = self.table.slot_of[row], max(self.table.slots, 1)
        return tuple(self.noise[(first + i) % slots] for i in range(draws))

    def fits(self, table: Table, sample: Tensor) -> bool:
        """Whether these are registers of this table for samples like this one."""
        return table is self.table and self.holds(sample)

    def holds(self, sample: Tensor) -> bool:
        """Whether a sample like this one has its place here."""
        return sample.shape == self.shape and sample.device == self.device and self.stride_of(sample) == self.stride

    @staticmethod
    def stride_of(sample: Tensor) -> tuple[int, ...]:
        """The strides of a new tensor like this one."""
        return sample.stride() if sample.is_contiguous() else torch.empty_like(sample).stride()

    def state(self, row: int, sample: Tensor) -> Tensor | None:
        """Where a sample like this one goes before the row; None: it is read where it lies."""
        in_place = ops.reads_in_place(self.executor, sample.dtype) and sample.stride() == self.stride
        return None if in_place and not self.table.kept[row] else self._states[row]

    def call(self, model_dtype: torch.dtype, out_dtype: torch.dtype) -> ops.Apart:
        """`call(row, model_output, x, prev_sample, denoised)` for tensors of these dtypes in this layout."""
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
                guidance=torch.ones(1, device=device),
                noise=self._noise if len(self._noise) else None,
                denoised=torch.empty(flat, device=device),
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
        left_out = ("_states", "noise", "_calls")
        return {key: value for key, value in vars(self).items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._view()


def _flat(tensor: Tensor) -> Tensor:
    """A dense tensor as [1, elements] in memory order."""
    return tensor.as_strided((1, tensor.numel()), (tensor.numel(), 1), tensor.storage_offset())
