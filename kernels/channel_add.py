"""A convolution's output, its bias and its residual added up, where no normalisation follows.

Bytes moved per element, 2 or 4 each: x read, the residual read where it is there, the sum written. Must reach 80 % of
copy bandwidth at batch 64, and at batch 1 the latency of one launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .norm import TILE, _lanes, _moves, _per_channel, _power, _store, _stride, _sum_of, _wide


@triton.jit(do_not_specialize=["residual_batch", "tiles"])
def sum_kernel(
    x, residual, before, total, pixels, channels, residual_batch, before_stride, tiles,
    PX: tl.constexpr, CH: tl.constexpr, LAST: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """x + before + residual, a tile per program, where no normalisation follows."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    channel, there = _lanes(tl.program_id(1), channels, 1, CH, CH)
    pixel = _wide(tl.program_id(0) % tiles * PX + tl.arange(0, PX), LONG)[:, None]
    mask = (pixel < pixels) & there[None, :]
    c = channel[None, :]
    added = _per_channel(before, b, before_stride, channel, there, 0.0)
    value = _sum_of(x, residual, None, added, b, pixel, c, mask, pixels, channels, channels, residual_batch, LAST)
    _store(total, value, b, pixel, c, mask, pixels, channels, LAST)


def add(x: Tensor, before: Tensor | None, residual: Tensor | None, total: Tensor, last: bool) -> None:
    """total = x + before + residual."""
    batch, channels = x.shape[:2]
    pixels = x[0, 0].numel()
    width = min(_power(channels), 64) if last else 1
    tile = min(TILE // width, _power(pixels))
    tiles = triton.cdiv(pixels, tile)
    sum_kernel[(tiles * batch, triton.cdiv(channels, width))](
        x, residual, before, total, pixels, channels, _moves(residual), _stride(before), tiles,
        PX=tile, CH=width, LAST=last, LONG=pixels * channels >= 2**31, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
