"""The gradient of group normalisation, its affine map, scale and shift, and SiLU, which is computed again.

Bytes moved per element, 2 or 4 each: the sum u and the gradient read twice, the second time from L2, du written: three
passes where L2 holds what a program reads twice. Of the forward pass it needs u, mean and rstd alone. One program takes
a few groups of a sample where batch and groups fill the GPU or a group is small, else they are shared, in two launches.
Must reach 70 % of copy bandwidth at batch 64, and 1.5 times the speed of torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .branches import load_float
from .norm import (
    PROGRAMS,
    REGISTERS,
    TILE,
    _fold,
    _lanes,
    _map,
    _members,
    _per_channel,
    _places,
    _power,
    _spread,
    _store,
    _stride,
    _wide,
    geometry,
)

ALONE = 32768  # elements of a few groups that one program reads twice, whatever the batch
BACKWARD_PARTS = 32  # at most, of a sample


@triton.jit
def _gradient(
    grad, u, b, pixel, channel, mask, pixels, channels, mean, rstd, factor, constant,
    ACT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """n = (u - mean) rstd, and the gradient of what SiLU was given."""
    places = _places(b, pixel, channel, pixels, channels, LAST)
    normal = (load_float(u + places, mask) - mean[None, :]) * rstd[None, :]
    normal = tl.where(mask, normal, 0.0)
    gradient = load_float(grad + places, mask)
    if ACT:
        value = tl.math.fma(normal, factor[None, :], constant[None, :])
        sigmoid = 1.0 / (1.0 + tl.exp(-value))
        gradient *= sigmoid * tl.math.fma(value, 1.0 - sigmoid, 1.0)
    return normal, gradient


@triton.jit
def _sums(
    grad, u, b, begin, end, channel, there, pixels, channels, mean, rstd, factor, constant,
    PX: tl.constexpr, CH: tl.constexpr, ACT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Sums of g, g n and n over the pixels begin .. end of each channel."""
    of_g = tl.full((PX, CH), 0.0, tl.float32)
    of_gn = tl.full((PX, CH), 0.0, tl.float32)
    of_n = tl.full((PX, CH), 0.0, tl.float32)
    for start in range(begin, end, PX):
        pixel = (start + tl.arange(0, PX))[:, None]
        mask = (pixel < end) & there[None, :]
        n, g = _gradient(
            grad, u, b, pixel, channel[None, :], mask, pixels, channels, mean, rstd, factor, constant, ACT, LAST
        )  # fmt: skip
        of_g += g
        of_gn = tl.math.fma(g, n, of_gn)
        of_n += n
    return tl.sum(of_g, 0), tl.sum(of_gn, 0), tl.sum(of_n, 0)


@triton.jit
def _statistics(stats, added, b, chunk, groups, member, NG: tl.constexpr, NG2: tl.constexpr):
    """Mean, less what is added to u, and rstd of each lane's group."""
    lane = tl.arange(0, NG2)
    group = chunk * NG + lane
    mask = (lane < NG) & (group < groups)
    mean = tl.load(stats + (b * groups + group) * 2, mask=mask, other=0.0)
    rstd = tl.load(stats + (b * groups + group) * 2 + 1, mask=mask, other=0.0)
    return _spread(member, mean) - added, _spread(member, rstd)


@triton.jit
def _write(
    grad, u, du, b, begin, end, channel, there, pixels, channels, mean, rstd, factor, constant, of_g, of_gn,
    member, CG: tl.constexpr, PX: tl.constexpr, ACT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """du = rstd (factor g - mean of factor g - n mean of factor g n); returns both means."""
    count = CG * pixels.to(tl.float32)
    level = _spread(member, _fold(member, factor * of_g)) / count
    slope = _spread(member, _fold(member, factor * of_gn)) / count
    for start in range(begin, end, PX):
        pixel = (start + tl.arange(0, PX))[:, None]
        mask = (pixel < end) & there[None, :]
        n, g = _gradient(
            grad, u, b, pixel, channel[None, :], mask, pixels, channels, mean, rstd, factor, constant, ACT, LAST
        )  # fmt: skip
        value = tl.math.fma(g, factor[None, :], -tl.math.fma(n, slope[None, :], level[None, :]))
        _store(du, rstd[None, :] * value, b, pixel, channel[None, :], mask, pixels, channels, LAST)
    return level, slope


@triton.jit
def _store_sums(
    sums, b, channel, there, channels, pixels, of_g, of_gn, of_n, level, slope, factor, rstd
):  # fmt: skip
    """[3, C] of one sample: the sums of g, of g n, and of du, which follows from the others."""
    of_du = rstd * (factor * of_g - pixels.to(tl.float32) * level - slope * of_n)
    to = sums + b * 3 * channels + channel
    tl.store(to, of_g, mask=there)
    tl.store(to + channels, of_gn, mask=there)
    tl.store(to + 2 * channels, of_du, mask=there)


@triton.jit(do_not_specialize=["chunks"])
def alone_kernel(
    grad, u, before, scale, shift, weight, bias, stats, du, sums,
    pixels, channels, groups, before_stride, scale_stride, shift_stride, chunks,
    CG: tl.constexpr, NG: tl.constexpr, NG2: tl.constexpr, CH: tl.constexpr, PX: tl.constexpr,
    ACT: tl.constexpr, LAST: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """A few groups of one sample per program, read twice."""
    program = tl.program_id(0)
    b = (program // chunks).to(tl.int64)
    chunk = program % chunks
    channel, there = _lanes(chunk, channels, CG, NG, CH)
    member = _members(there, CG, NG2, CH)
    added = _per_channel(before, b, before_stride, channel, there, 0.0)
    mean, rstd = _statistics(stats, added, b, chunk, groups, member, NG, NG2)
    factor, constant = _map(weight, bias, scale, shift, b, scale_stride, shift_stride, channel, there)
    end = _wide(pixels, LONG)
    of_g, of_gn, of_n = _sums(
        grad, u, b, end - end, end, channel, there, pixels, channels, mean, rstd, factor, constant, PX, CH, ACT, LAST
    )  # fmt: skip
    level, slope = _write(
        grad, u, du, b, end - end, end, channel, there, pixels, channels, mean, rstd, factor, constant, of_g, of_gn,
        member, CG, PX, ACT, LAST,
    )  # fmt: skip
    _store_sums(sums, b, channel, there, channels, pixels, of_g, of_gn, of_n, level, slope, factor, rstd)


@triton.jit(do_not_specialize=["chunks", "part", "parts"])
def shared_sums_kernel(
    grad, u, before, scale, shift, weight, bias, stats, partial,
    pixels, channels, groups, before_stride, scale_stride, shift_stride, chunks, part, parts,
    CG: tl.constexpr, NG: tl.constexpr, NG2: tl.constexpr, CH: tl.constexpr, PX: tl.constexpr,
    ACT: tl.constexpr, LAST: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """The sums of one part of one sample per program, into partial [B, parts, 3, C]."""
    program = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    chunk = program % chunks
    j = program // chunks
    channel, there = _lanes(chunk, channels, CG, NG, CH)
    member = _members(there, CG, NG2, CH)
    added = _per_channel(before, b, before_stride, channel, there, 0.0)
    mean, rstd = _statistics(stats, added, b, chunk, groups, member, NG, NG2)
    factor, constant = _map(weight, bias, scale, shift, b, scale_stride, shift_stride, channel, there)
    begin = _wide(j * part, LONG)
    of_g, of_gn, of_n = _sums(
        grad, u, b, begin, tl.minimum(begin + part, pixels), channel, there, pixels, channels, mean, rstd, factor,
        constant, PX, CH, ACT, LAST,
    )  # fmt: skip
    to = partial + (b * parts + j) * 3 * channels + channel
    tl.store(to, of_g, mask=there)
    tl.store(to + channels, of_gn, mask=there)
    tl.store(to + 2 * channels, of_n, mask=there)


@triton.jit(do_not_specialize=["chunks", "part", "parts"])
def shared_kernel(
    grad, u, before, scale, shift, weight, bias, stats, partial, du, sums,
    pixels, channels, groups, before_stride, scale_stride, shift_stride, chunks, part, parts,
    CG: tl.constexpr, NG: tl.constexpr, NG2: tl.constexpr, CH: tl.constexpr, PX: tl.constexpr, PARTS2: tl.constexpr,
    ACT: tl.constexpr, LAST: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """du of one part of one sample per program, once `shared_sums_kernel` has been over all of them."""
    program = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    chunk = program % chunks
    j = program // chunks
    channel, there = _lanes(chunk, channels, CG, NG, CH)
    member = _members(there, CG, NG2, CH)
    added = _per_channel(before, b, before_stride, channel, there, 0.0)
    mean, rstd = _statistics(stats, added, b, chunk, groups, member, NG, NG2)
    factor, constant = _map(weight, bias, scale, shift, b, scale_stride, shift_stride, channel, there)
    lane = tl.arange(0, PARTS2)
    known = (lane < parts)[:, None] & there[None, :]
    places = partial + (b * parts + lane)[:, None] * 3 * channels + channel[None, :]
    of_g = tl.sum(tl.load(places, mask=known, other=0.0), 0)
    of_gn = tl.sum(tl.load(places + channels, mask=known, other=0.0), 0)
    begin = _wide(j * part, LONG)
    level, slope = _write(
        grad, u, du, b, begin, tl.minimum(begin + part, pixels), channel, there, pixels, channels, mean, rstd, factor,
        constant, of_g, of_gn, member, CG, PX, ACT, LAST,
    )  # fmt: skip
    if j == 0:
        of_n = tl.sum(tl.load(places + 2 * channels, mask=known, other=0.0), 0)
        _store_sums(sums, b, channel, there, channels, pixels, of_g, of_gn, of_n, level, slope, factor, rstd)


def backward(
    grad: Tensor, given: Any, stats: Tensor, groups: int, act: bool, du: Tensor, sums: Tensor, last: bool
) -> None:
    """Write du and the sums [B, 3, C]; tensors and equation as in fastdiff.engine.norm, where they are checked.

    given: as of the forward pass, with u for x, and no residual and skip.
    """
    u, weight, bias, before, scale, shift, *_ = given
    batch, channels = u.shape[:2]
    pixels = u[0, 0].numel()
    cut = geometry(pixels, channels, groups, u.element_size())
    chunks = triton.cdiv(groups, cut.groups)
    tile = min(max(TILE // cut.width, 1), _power(pixels))
    part = max(2 * tile, triton.cdiv(triton.cdiv(pixels, BACKWARD_PARTS), tile) * tile)
    parts = triton.cdiv(pixels, part)
    vectors = [before, scale, shift, weight, bias, stats]
    sizes = [pixels, channels, groups, _stride(before), _stride(scale), _stride(shift), chunks]
    cuts = {
        "CG": channels // groups, "NG": cut.groups, "NG2": _power(cut.groups), "CH": cut.width, "PX": tile,
        "ACT": act, "LAST": last, "LONG": pixels * channels >= 2**31,
        "num_warps": max(min(tile * cut.width // 512, 8), 1), "maxnreg": REGISTERS, "enable_fp_fusion": False,
    }  # fmt: skip
    if cut.width * pixels <= ALONE or parts == 1 or batch * chunks >= PROGRAMS:
        alone_kernel[(batch * chunks,)](grad, u, *vectors, du, sums, *sizes, **cuts)
        return
    partial = torch.empty(batch, parts, 3, channels, dtype=torch.float32, device=u.device)
    grid = (chunks * parts, batch)
    shared_sums_kernel[grid](grad, u, *vectors, partial, *sizes, part, parts, **cuts)
    shared_kernel[grid](grad, u, *vectors, partial, du, sums, *sizes, part, parts, PARTS2=_power(parts), **cuts)
