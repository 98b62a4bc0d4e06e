"""The checks that both ops make of their tensors, before their memory is read as it stands.

May import: the table's layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.compiler import layout as at

MODEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Shapes = tuple[tuple[int, ...], ...]


def channels_of(sample: Tensor) -> int:
    """1 when [B, *S] is contiguous, C when it is channels_last, 0 when it is neither."""
    if sample.is_contiguous():
        return 1
    if sample.dim() == 4 and sample.is_contiguous(memory_format=torch.channels_last):
        return sample.shape[1]
    return 0


class Checks:
    """What an op's tensors must be, given its state: fp32 [registers, batch, *shape], dense."""

    def __init__(self, op: str, state: Tensor) -> None:
        if state.dim() < 3:
            raise ValueError(f"{op}: state must be [registers, batch, *shape], got {tuple(state.shape)}")
        if state.numel() == 0:
            raise ValueError(f"{op}: state has no elements, got {tuple(state.shape)}; draw at least one sample")
        if state.dtype != torch.float32:
            raise TypeError(f"{op}: state has dtype {state.dtype}, expected torch.float32; cast it first")
        self._op, self._device = op, state.device
        self._channels = channels_of(state[0])
        if self._channels == 0 or (state.shape[0] > 1 and state.stride(0) != state[0].numel()):
            raise ValueError(
                f"{op}: state must hold dense registers, contiguous or channels_last, "
                f"got strides {state.stride()} for shape {tuple(state.shape)}; allocate it with Sampler"
            )

    def numbers(self, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shapes: Shapes) -> None:
        """A tensor of scalars: dtype, shape, device, contiguous."""
        self._expect(name, tensor, dtypes, shapes)
        if not tensor.is_contiguous():
            raise ValueError(f"{self._op}: {name} must be contiguous, got strides {tensor.stride()}")

    def image(self, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shapes: Shapes) -> None:
        """A stack of images: dtype, shape, device, and the state's memory format."""
        self._expect(name, tensor, dtypes, shapes)
        if not self.dense(tensor):
            wanted = "contiguous" if self._channels == 1 else "channels_last"
            raise ValueError(f"{self._op}: {name} must be {wanted} like the state, got strides {tensor.stride()}")

    def dense(self, tensor: Tensor) -> bool:
        """Whether a stack of images lies in memory as the state does."""
        if self._channels == 1:
            return tensor.is_contiguous()
        return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)

    def branches(
        self, model_out: Tensor, unguided: Tensor | None, perturbed: Tensor | None, batch: int, sample: tuple[int, ...]
    ) -> None:
        """The network's outputs: a stack of up to three, or branches that stand apart."""
        stacked = 1 if unguided is not None else 2 if perturbed is not None else 3
        self.image("model_out", model_out, MODEL_DTYPES, tuple((n * batch, *sample) for n in range(1, stacked + 1)))
        for name, tensor in (("unguided", unguided), ("perturbed", perturbed)):
            if tensor is not None:
                self.image(name, tensor, (model_out.dtype,), ((batch, *sample),))

    def table(self, coef: Tensor, ids: Tensor) -> None:
        """A packed plan: coef fp32 and ids int32 of one number of rows and terms."""
        op = self._op
        if coef.dtype != torch.float32 or ids.dtype != torch.int32:
            raise TypeError(f"{op}: coef and ids must be float32 and int32, got {coef.dtype} and {ids.dtype}")
        if coef.dim() != 2 or coef.shape[0] == 0:
            raise ValueError(f"{op}: coef must be [rows, columns] with at least one row, got {tuple(coef.shape)}")
        rows, terms = coef.shape[0], (coef.shape[-1] - at.COEF_FIXED) // at.NOISE_STRIDE
        expected = (
            (rows, at.COEF_FIXED + at.NOISE_STRIDE * terms),
            (rows, at.IDS_FIXED + at.TERM_IDS_STRIDE * terms),
        )
        if (tuple(coef.shape), tuple(ids.shape)) != expected:
            raise ValueError(
                f"{op}: coef {tuple(coef.shape)} and ids {tuple(ids.shape)} are not one packed plan; use plan.pack()"
            )
        if not (coef.is_contiguous() and ids.is_contiguous()):
            raise ValueError(f"{op}: coef and ids must be contiguous; call .contiguous() when uploading the plan")
        for name, tensor in (("coef", coef), ("ids", ids)):
            if tensor.device != self._device:
                raise ValueError(f"{op}: {name} is on {tensor.device}, the state on {self._device}")

    def _expect(self, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shapes: Shapes) -> None:
        if tensor.dtype not in dtypes:
            raise TypeError(f"{self._op}: {name} has dtype {tensor.dtype}, expected {_either(dtypes)}; cast it first")
        if tuple(tensor.shape) not in shapes:
            raise ValueError(f"{self._op}: {name} has shape {tuple(tensor.shape)}, expected {_either(shapes)}")
        if tensor.device != self._device:
            raise ValueError(f"{self._op}: {name} is on {tensor.device}, the state on {self._device}; move one of them")


def _either(options: tuple[object, ...]) -> str:
    return " or ".join(str(option) for option in options)
