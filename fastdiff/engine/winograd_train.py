"""A 3x3 convolution, trained on a CPU by Winograd's minimal filtering, with its gradients.

May import: native, native_blocks, eager.

F(4x4, 3x3) of Lavin & Gray 2015, the weights transformed anew in every call (engine.winograd has the equation and, for
inference, weights that are kept). The gradient of the image is the same with weights turned and channels exchanged;
that of the weight is G^T [sum over tiles of (B^T d B) . (A dY A^T)] G.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _has_storage

from fastdiff.engine import eager, native
from fastdiff.engine.native_blocks import WinogradTrainArgs

SIDE = 4  # of a tile
FEWEST, FEWEST_OF_GRADIENT = 16, 4  # tiles, below which the library is as fast
_BLOCK, _BLOCK_OF_GRADIENT = 48, 128  # tiles at a time
_LAST = torch.channels_last


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = conv2d(x, weight, bias, padding=1).

    x: [B, C_in, H, W]; weight: [C_out, C_in, 3, 3]; bias: [C_out] or None. Differentiable: where a gradient is wanted
    on a CPU, in fp32, channels_last, with multiples of 16 channels and enough pixels, by the extension, whose results
    do not depend on the number of threads; else by torch's conv2d. Which of them is decided by shapes alone. Errors
    against float64: up to 5e-6 of the largest entry of the result and of the image's gradient, several times torch's
    own, and 2e-6 of the weight's, less than torch's own where there are many pixels. The second derivative is torch's.
    """
    if _is_ours(x, weight, bias):
        found: Tensor = _Conv3x3.apply(x, weight, bias)
        return found
    return F.conv2d(x, weight, bias, padding=1)


def tiles(batch: int, height: int, width: int) -> int:
    """Tiles of such images, or 0 where most of their pixels would lie outside."""
    per_image = -(-height // SIDE) * -(-width // SIDE)
    return batch * per_image if 2 * height * width >= per_image * SIDE**2 else 0


def _is_ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        eager.trains((x, weight) if bias is None else (x, weight, bias))
        and not torch.is_autocast_enabled("cpu")
        and x.dim() == 4
        and weight.shape[1:] == (x.shape[1], 3, 3)
        and x.shape[1] % 16 == 0
        and len(weight) % 16 == 0
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and weight.stride(2) == 3 * weight.stride(3)
        and x.is_contiguous(memory_format=_LAST)
        and tiles(x.shape[0], *x.shape[2:]) >= FEWEST_OF_GRADIENT
    )


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        if tiles(x.shape[0], *x.shape[2:]) < FEWEST:
            return F.conv2d(x, weight, bias, padding=1)
        return _convolution(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        if torch.is_grad_enabled() or not _has_storage(grad):  # to be differentiated; a batch of gradients has none
            return _by_torch(grad, x, weight, (of_x, of_weight, of_bias))
        grad = grad.contiguous(memory_format=_LAST).resolve_neg()
        dx = None
        if of_x and tiles(x.shape[0], *x.shape[2:]) < FEWEST:
            dx, *_ = _by_torch(grad, x, weight, (True, False, False))
        elif of_x:
            dx = _convolution(grad, weight, None, turned=True)
        dw = _of_weight(grad, x, weight) if of_weight else None
        return dx, dw, grad.sum((0, 2, 3)) if of_bias else None


def _by_torch(grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    one = [1, 1]
    found: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
        grad, x, weight, [len(weight)], one, one, one, False, [0, 0], 1, wanted
    )
    return found


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool = False) -> Tensor:
    """turned: with each weight turned by 180 degrees and its channels in and out exchanged."""
    batch, _, height, width = x.shape
    columns = weight.shape[1] if turned else weight.shape[0]
    y = torch.empty((batch, columns, height, width), dtype=x.dtype, device=x.device, memory_format=_LAST)
    args = _arguments(x, y, weight)
    args.bias = None if bias is None else bias.data_ptr()
    if turned:  # the last tap first
        args.row, args.column, args.tap = args.column, args.row, -args.tap
        args.weight += 8 * weight.stride(3) * weight.element_size()
    threads, count = torch.get_num_threads(), tiles(batch, height, width)
    parts = -(-count // (_BLOCK * threads)) * threads
    args.block = -(-count // parts)
    _launch("convolution", args)
    return y


def _of_weight(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    dw = torch.empty_like(weight)
    args = _arguments(x, grad, dw)
    count = tiles(x.shape[0], *x.shape[2:])
    args.block = -(-count // -(-count // _BLOCK_OF_GRADIENT))
    _launch("gradient", args)
    return dw


def _arguments(x: Tensor, y: Tensor, weight: Tensor) -> WinogradTrainArgs:
    batch, channels, height, width = x.shape
    column, row, _, tap = weight.stride()
    return WinogradTrainArgs(
        x=x.data_ptr(), y=y.data_ptr(), weight=weight.data_ptr(), B=batch, C=channels, N=y.shape[1], H=height, W=width,
        row=row, column=column, tap=tap,
    )  # fmt: skip


def _launch(which: str, args: WinogradTrainArgs) -> None:
    library = native.load()
    if code := getattr(library, f"fastdiff_winograd_{which}_cpu")(ctypes.addressof(args)):
        raise native.failed(f"winograd {which} on cpp", code)
