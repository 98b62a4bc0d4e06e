"""The kernels of a training step: noising images, and the squared error with its gradient.

Bytes moved per element: noising reads the image (1, 2 or 4) and writes x_in (4 or 2); the loss reads F (4 or 2), writes
the gradient (as much), and reads the image where the target has it, which eps and score do not. With a bf16 network and
uint8 images: 3 and 4. Normals never touch memory. Must reach 80 % of copy bandwidth; where bytes are so few that
drawing takes longer, the limit is the integer arithmetic of Philox.

A sample is cut into at most 64 parts, which its size alone decides; each program sums one, so that a sample's error
depends neither on its batch nor on the order programs finish in. Sums of products are explicit fma.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import layout as at
from .affine import REGISTERS, REGISTERS_CHANNELS_LAST, choose_draw, tile_shape
from .branches import load_float, round_to, sum_quads, where_all
from .philox import QUADS, draw_tile


@triton.jit
def _load_image(pointers, mask):
    """A tile of images as fp32, bytes as -1 .. 1."""
    if pointers.dtype.element_ty == tl.uint8:
        return (tl.load(pointers, mask=mask, other=0).to(tl.float32) - 127.5) * 0.00784313725490196
    else:
        return load_float(pointers, mask)


@triton.jit
def _mirrored(index, width, CHANNELS: tl.constexpr):
    """Where element `index` of a mirrored sample lies: the same row, channel and distance from the other end."""
    column = index // CHANNELS % width
    return index + (width - 1 - 2 * column) * CHANNELS


@triton.jit(do_not_specialize=["units", "width", "parts", "tiles", "factor"])
def train_kernel(
    images, table, key, out, model_out, weight, partial,
    units, width, parts, tiles, factor,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, DRAW: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One part of one sample per program: tiles part * tiles, ... of it; see fastdiff.engine.train_ops for the tensors.

    model_out None: the noising. out None: the loss alone. units * UNIT elements per sample.
    """
    program = tl.program_id(0)
    b = (program // parts).to(tl.int64)
    part = (program % parts).to(tl.int64)
    length = units.to(tl.int64) * UNIT
    sample = b * length
    row = table + b * at.TRAIN_COLUMNS
    if model_out is None:
        image, first, second = tl.load(row + at.INPUT_X0), tl.load(row + at.INPUT_Z), tl.load(row + at.INPUT_Y)
    else:
        image, first, second = tl.load(row + at.TARGET_X0), tl.load(row + at.TARGET_Z), tl.load(row + at.TARGET_Y)
        scale = tl.load(weight + b) * factor
    flips = tl.load(row + at.FLIP) != 0.0
    seed = tl.load(key + b)
    pixels = length // CHANNELS

    noise_z = tl.full((), at.NOISE_Z, tl.int32)
    noise_y = tl.full((), at.NOISE_Y, tl.int32)
    stream = tl.full((), at.STREAM_TRAINING, tl.int32)
    local = tl.arange(0, BLOCK)
    zero = tl.full((BLOCK,), 0.0, tl.float32)
    total = tl.full((BLOCK // 4,), 0.0, tl.float32)
    end = tl.minimum((part + 1) * tiles * TILE, length)
    for start in range(part * tiles * TILE, end, TILE):
        mask = start + local < length
        if TILE < BLOCK:
            mask = mask & (local < TILE)
        if model_out is not None:
            output = load_float(model_out + sample + start + local, mask)
        read = where_all(mask, image != 0.0)
        if flips:
            x0 = _load_image(images + sample + _mirrored(start + local, width, CHANNELS), read)
        else:
            x0 = _load_image(images + sample + start + local, read)
        z, y = zero, zero
        if first != 0.0:
            z = draw_tile(start, local, seed, noise_z, stream, pixels, CHANNELS, DRAW)
        if second != 0.0:
            y = draw_tile(start, local, seed, noise_y, stream, pixels, CHANNELS, DRAW)
        blend = first * z
        blend = tl.where(second != 0.0, tl.math.fma(second, y, blend), blend)
        blend = tl.where(image != 0.0, tl.math.fma(image, x0, blend), blend)
        if model_out is not None:
            rest = tl.where(mask, output - blend, 0.0)
            total += sum_quads(rest * rest)
            blend = scale * rest
        if out is not None:
            tl.store(out + sample + start + local, round_to(blend, out.dtype.element_ty), mask=mask)

    if model_out is not None:
        partial += b * at.PARTS
        tl.store(partial + part, tl.sum(total, 0))
        column = tl.arange(0, at.PARTS)
        tl.store(partial + column, tl.full((at.PARTS,), 0.0, tl.float32), mask=where_all(column >= parts, part == 0))


def bind(
    images: Tensor,
    table: Tensor,
    key: Tensor,
    out: Tensor | None,
    model_out: Tensor | None = None,
    weight: Tensor | None = None,
    partial: Tensor | None = None,
    *,
    factor: float,
) -> Callable[[], None]:
    """`run()` launching one op on tensors that fastdiff.engine.train_ops has checked. Deterministic, capturable."""
    batch, length = len(images), images[0].numel()
    channels = 1 if images.is_contiguous() else images.shape[1]
    draw, channels = choose_draw(channels, length, given=False, noisy=True, extended=False)
    unit = 4 if length % 4 == 0 else 1
    block, tile = tile_shape(draw, channels, unit, False)
    count = triton.cdiv(length, tile)
    tiles = triton.cdiv(count, at.PARTS.value)
    parts = triton.cdiv(count, tiles)
    options: dict[str, Any] = {
        "UNIT": unit,
        "CHANNELS": channels,
        "DRAW": draw,
        "TILE": tile,
        "BLOCK": block,
        "num_warps": 4,
        "maxnreg": REGISTERS if draw == QUADS.value else REGISTERS_CHANNELS_LAST,
        "enable_fp_fusion": False,
    }
    shape = (length // unit, images.shape[-1], parts, tiles, factor)
    launch = train_kernel[(batch * parts,)]

    def run() -> None:
        launch(images, table, key, out, model_out, weight, partial, *shape, **options)

    return run
