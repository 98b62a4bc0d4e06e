"""Group normalisation of a sum, its affine map, a scale and shift, and SiLU: one read and one write of the image.

Bytes moved per element, 2 or 4 each: x read, y written, the residual read and the sum written where they are there.
A group that fits the registers of one program is read once (`whole`). A larger one is read twice, the second time from
L2: by one program where batch and groups fill the GPU (`looped`), else by programs that share it, in two launches
(`parts` and `mapped`), so that a batch of one fills the GPU too. Must reach 80 % of copy bandwidth at batch 64, and at
batch 1 the latency of one launch, or of two.

What a group's statistics are summed from depends on the size of a sample alone, `looped` and `mapped` add the same
parts in the same order: neither the batch nor the choice between them changes a bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .branches import load_float, round_to

WHOLE = 16384  # elements of a group, or of a few, that one program keeps: 32 registers of 512 threads
SECTOR = 32  # bytes of consecutive channels that a read should not fall below
ROW = 128  # and should come to where a program's groups do not stay in L2 anyway
CACHED = 160 * 1024  # bytes that each of PROGRAMS programs can read a second time from L2
TILE = 4096  # elements of a tile that is read again
PART_TILES = 2  # at least; a sample has at most PARTS parts
PARTS = 64
PROGRAMS = 264  # two for each multiprocessor: from then on a program works alone
REGISTERS = 128


class Geometry(NamedTuple):
    """How a sample is cut: `groups` groups of a program, `width` lanes for their channels, tiles of `pixels`."""

    groups: int
    width: int
    pixels: int
    parts: int  # 1 where one program keeps a group
    part: int  # pixels of a part
    whole: bool


@triton.jit
def _lanes(chunk, channels, CG: tl.constexpr, NG: tl.constexpr, CH: tl.constexpr):
    """The channels of a program's groups, and which of its lanes have one."""
    lane = tl.arange(0, CH)
    channel = chunk * (NG * CG) + lane
    return channel, (lane < NG * CG) & (channel < channels)


@triton.jit
def _members(there, CG: tl.constexpr, NG2: tl.constexpr, CH: tl.constexpr):
    """[NG2, CH]: whether a lane is of a group."""
    lane = tl.arange(0, CH)
    return (lane[None, :] // CG == tl.arange(0, NG2)[:, None]) & there[None, :]


@triton.jit
def _fold(member, channels):
    """Sums over the channels of each group: [CH] to [NG2]."""
    return tl.sum(tl.where(member, channels[None, :], 0.0), 1)


@triton.jit
def _spread(member, groups):
    """The value of each lane's group: [NG2] to [CH]."""
    return tl.sum(tl.where(member, groups[:, None], 0.0), 0)


@triton.jit
def _per_channel(vector, b, stride, channel, there, otherwise):
    """Row b of a [B, C] tensor at these channels, or `otherwise` where there is none."""
    value = tl.full(channel.shape, otherwise, tl.float32)
    if vector is not None:
        value += load_float(vector + b * stride + channel, there)
    return value


@triton.jit
def _places(b, pixel, channel, pixels, width, LAST: tl.constexpr):
    """Where elements of sample b lie in an image of `width` channels."""
    base = b * width * pixels
    if LAST:
        return base + (pixel * width + channel)
    else:
        return base + (channel * pixels + pixel)


@triton.jit
def _sum_of(
    x, residual, skip, added, b, pixel, channel, mask, pixels, channels, first, residual_batch, LAST: tl.constexpr
):
    """x + residual + before, and the skip's channels after those of x, as fp32."""
    if skip is None:
        value = load_float(x + _places(b, pixel, channel, pixels, first, LAST), mask)
        if residual is not None:
            value += load_float(residual + _places(b * residual_batch, pixel, channel, pixels, first, LAST), mask)
    else:
        mine = mask & (channel < first)
        value = load_float(x + _places(b, pixel, channel, pixels, first, LAST), mine)
        if residual is not None:
            value += load_float(residual + _places(b * residual_batch, pixel, channel, pixels, first, LAST), mine)
        other = mask & (channel >= first)
        value += load_float(skip + _places(b, pixel, channel - first, pixels, channels - first, LAST), other)
    return value + added[None, :]


@triton.jit
def _map(weight, bias, scale, shift, b, scale_stride, shift_stride, channel, there):
    """What a normalised channel is multiplied by, and what is added to it."""
    more = 1.0 + _per_channel(scale, b, scale_stride, channel, there, 0.0)
    factor = load_float(weight + channel, there) * more
    constant = tl.math.fma(
        load_float(bias + channel, there), more, _per_channel(shift, b, shift_stride, channel, there, 0.0)
    )
    return factor, constant


@triton.jit
def _silu(value):
    return value / (1.0 + tl.exp(-value))


@triton.jit
def _store(image, value, b, pixel, channel, mask, pixels, channels, LAST: tl.constexpr):
    places = _places(b, pixel, channel, pixels, channels, LAST)
    tl.store(image + places, round_to(value, image.dtype.element_ty), mask=mask)


@triton.jit
def _store_normalised(
    y, value, mean, factor, constant, b, pixel, channel, mask, pixels, channels, ACT: tl.constexpr, LAST: tl.constexpr
):
    value = tl.math.fma(value - mean[None, :], factor[None, :], constant[None, :])
    if ACT:
        value = _silu(value)
    _store(y, value, b, pixel, channel, mask, pixels, channels, LAST)


@triton.jit
def _store_stats(stats, mean, rstd, b, chunk, groups, NG: tl.constexpr, NG2: tl.constexpr):
    lane = tl.arange(0, NG2)
    group = chunk * NG + lane
    mask = (lane < NG) & (group < groups)
    tl.store(stats + (b * groups + group) * 2, mean, mask=mask)
    tl.store(stats + (b * groups + group) * 2 + 1, rstd, mask=mask)


@triton.jit
def _part_moments(
    x, residual, skip, total, added, b, begin, end, channel, there, member, pixels, channels, first, residual_batch,
    CG: tl.constexpr, PX: tl.constexpr, CH: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each group over pixels begin .. end; writes the sum where it is wanted.

    Each channel counts from the mean of its first pixels, which keeps a large mean out of the squares.
    """
    c = channel[None, :]
    few = tl.minimum(begin + tl.arange(0, 4), end - 1)[:, None]
    head = _sum_of(
        x, residual, skip, added, b, few, c, there[None, :] & (few < end), pixels, channels, first, residual_batch, LAST
    )  # fmt: skip
    head = tl.sum(head, 0) * 0.25
    sums = tl.full((PX, CH), 0.0, tl.float32)
    squares = tl.full((PX, CH), 0.0, tl.float32)
    for start in range(begin, end, PX):
        pixel = (start + tl.arange(0, PX))[:, None]
        mask = (pixel < end) & there[None, :]
        value = _sum_of(
            x, residual, skip, added, b, pixel, c, mask, pixels, channels, first, residual_batch, LAST
        )  # fmt: skip
        if total is not None:
            _store(total, value, b, pixel, c, mask, pixels, channels, LAST)
        value = tl.where(mask, value - head[None, :], 0.0)
        sums += value
        squares = tl.math.fma(value, value, squares)
    count = (end - begin).to(tl.float32)
    away = tl.sum(sums, 0) / count
    within = tl.sum(squares, 0) - count * away * away
    centre = head + away
    mean = _fold(member, centre) / CG
    beside = centre - _spread(member, mean)
    return mean, _fold(member, tl.where(within < 0.0, 0.0, within) + count * beside * beside)


@triton.jit
def _merged(mean, squares, pixels, part, eps, CG: tl.constexpr, PARTS2: tl.constexpr):
    """Mean and rstd of each group from those of its parts, [NG2, PARTS2]."""
    lane = tl.arange(0, PARTS2)
    count = tl.minimum(tl.maximum(pixels - lane * part, 0), part).to(tl.float32)
    origin = tl.sum(tl.where((lane == 0)[None, :], mean, 0.0), 1)
    away = tl.where((count > 0.0)[None, :], mean - origin[:, None], 0.0)
    middle = tl.sum(away * count[None, :], 1) / pixels
    beside = away - middle[:, None]
    spread = tl.where((count > 0.0)[None, :], squares, 0.0) + CG * count[None, :] * beside * beside
    variance = tl.sum(spread, 1) / (CG * (pixels + 0.0))
    return origin + middle, 1.0 / tl.math.sqrt_rn(variance + eps)


@triton.jit
def _wide(pixel, LONG: tl.constexpr):
    """As int64 where a sample has 2^31 elements or more."""
    return pixel.to(tl.int64) if LONG else pixel


@triton.jit(do_not_specialize=["residual_batch", "part", "parts", "chunks"])
def whole_kernel(
    x, residual, skip, before, scale, shift, weight, bias, y, total, stats,
    pixels, channels, first, groups, residual_batch, before_stride, scale_stride, shift_stride, chunks, eps,
    CG: tl.constexpr, NG: tl.constexpr, NG2: tl.constexpr, CH: tl.constexpr, PX: tl.constexpr,
    ACT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """A few groups of one sample per program, kept between the statistics and the map."""
    program = tl.program_id(0)
    b = (program // chunks).to(tl.int64)
    chunk = program % chunks
    channel, there = _lanes(chunk, channels, CG, NG, CH)
    member = _members(there, CG, NG2, CH)
    c = channel[None, :]
    pixel = tl.arange(0, PX)[:, None]
    mask = (pixel < pixels) & there[None, :]
    added = _per_channel(before, b, before_stride, channel, there, 0.0)
    value = _sum_of(x, residual, skip, added, b, pixel, c, mask, pixels, channels, first, residual_batch, LAST)
    if total is not None:
        _store(total, value, b, pixel, c, mask, pixels, channels, LAST)
    factor, constant = _map(weight, bias, scale, shift, b, scale_stride, shift_stride, channel, there)
    count = CG * (pixels + 0.0)
    mean = _fold(member, tl.sum(tl.where(mask, value, 0.0), 0)) / count
    centre = _spread(member, mean)
    away = tl.where(mask, value - centre[None, :], 0.0)
    rstd = 1.0 / tl.math.sqrt_rn(_fold(member, tl.sum(away * away, 0)) / count + eps)
    _store_stats(stats, mean, rstd, b, chunk, groups, NG, NG2)
    factor *= _spread(member, rstd)
    _store_normalised(y, value, centre, factor, constant, b, pixel, c, mask, pixels, channels, ACT, LAST)


@triton.jit(do_not_specialize=["residual_batch", "part", "parts", "chunks"])
def looped_kernel(
    x, residual, skip, before, scale, shift, weight, bias, y, total, stats,
    pixels, channels, first, groups, residual_batch, before_stride, scale_stride, shift_stride, chunks, eps,
    part, parts,
    CG: tl.constexpr, NG: tl.constexpr, NG2: tl.constexpr, CH: tl.constexpr, PX: tl.constexpr, PARTS2: tl.constexpr,
    ACT: tl.constexpr, LAST: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """A few groups of one sample per program, read twice."""
    program = tl.program_id(0)
    b = (program // chunks).to(tl.int64)
    chunk = program % chunks
    channel, there = _lanes(chunk, channels, CG, NG, CH)
    member = _members(there, CG, NG2, CH)
    c = channel[None, :]
    added = _per_channel(before, b, before_stride, channel, there, 0.0)
    lane = tl.arange(0, PARTS2)
    means = tl.full((NG2, PARTS2), 0.0, tl.float32)
    squares = tl.full((NG2, PARTS2), 0.0, tl.float32)
    for j in range(parts):
        begin = _wide(j * part, LONG)
        mean, square = _part_moments(
            x, residual, skip, total, added, b, begin, tl.minimum(begin + part, pixels), channel, there, member,
            pixels, channels, first, residual_batch, CG, PX, CH, LAST,
        )  # fmt: skip
        means = tl.where((lane == j)[None, :], mean[:, None], means)
        squares = tl.where((lane == j)[None, :], square[:, None], squares)
    mean, rstd = _merged(means, squares, pixels, part, eps, CG, PARTS2)
    _store_stats(stats, mean, rstd, b, chunk, groups, NG, NG2)
    factor, constant = _map(weight, bias, scale, shift, b, scale_stride, shift_stride, channel, there)
    factor *= _spread(member, rstd)
    centre = _spread(member, mean)
    for start in range(0, pixels, PX):
        pixel = _wide(start + tl.arange(0, PX), LONG)[:, None]
        mask = (pixel < pixels) & there[None, :]
        value = _sum_of(x, residual, skip, added, b, pixel, c, mask, pixels, channels, first, residual_batch, LAST)
        _store_normalised(y, value, centre, factor, constant, b, pixel, c, mask, pixels, channels, ACT, LAST)


@triton.jit(do_not_specialize=["residual_batch", "part", "parts", "chunks"])
def parts_kernel(
    x, residual, skip, before, total, partial,
    pixels, channels, first, groups, residual_batch, before_stride, chunks, part, parts,
    CG: tl.constexpr, NG: tl.constexpr, NG2: tl.constexpr, CH: tl.constexpr, PX: tl.constexpr,
    LAST: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Mean and squares of a few groups over one part of one sample per program, into partial [B, G, parts, 2]."""
    program = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    chunk = program % chunks
    j = program // chunks
    channel, there = _lanes(chunk, channels, CG, NG, CH)
    member = _members(there, CG, NG2, CH)
    added = _per_channel(before, b, before_stride, channel, there, 0.0)
    begin = _wide(j * part, LONG)
    mean, square = _part_moments(
        x, residual, skip, total, added, b, begin, tl.minimum(begin + part, pixels), channel, there, member,
        pixels, channels, first, residual_batch, CG, PX, CH, LAST,
    )  # fmt: skip
    lane = tl.arange(0, NG2)
    group = chunk * NG + lane
    mask = (lane < NG) & (group < groups)
    to = partial + ((b * groups + group) * parts + j) * 2
    tl.store(to, mean, mask=mask)
    tl.store(to + 1, square, mask=mask)


@triton.jit(do_not_specialize=["residual_batch", "part", "parts", "chunks"])
def mapped_kernel(
    x, residual, skip, before, scale, shift, weight, bias, y, partial, stats,
    pixels, channels, first, groups, residual_batch, before_stride, scale_stride, shift_stride, chunks, eps,
    part, parts,
    CG: tl.constexpr, NG: tl.constexpr, NG2: tl.constexpr, CH: tl.constexpr, PX: tl.constexpr, PARTS2: tl.constexpr,
    ACT: tl.constexpr, LAST: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """The map of one part of one sample per program, once `parts_kernel` has been over all of them."""
    program = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    chunk = program % chunks
    j = program // chunks
    channel, there = _lanes(chunk, channels, CG, NG, CH)
    member = _members(there, CG, NG2, CH)
    c = channel[None, :]
    group = chunk * NG + tl.arange(0, NG2)
    known = ((tl.arange(0, NG2) < NG) & (group < groups))[:, None] & (tl.arange(0, PARTS2) < parts)[None, :]
    places = ((b * groups + group)[:, None] * parts + tl.arange(0, PARTS2)[None, :]) * 2
    means = tl.load(partial + places, mask=known, other=0.0)
    squares = tl.load(partial + places + 1, mask=known, other=0.0)
    mean, rstd = _merged(means, squares, pixels, part, eps, CG, PARTS2)
    if j == 0:
        _store_stats(stats, mean, rstd, b, chunk, groups, NG, NG2)
    added = _per_channel(before, b, before_stride, channel, there, 0.0)
    factor, constant = _map(weight, bias, scale, shift, b, scale_stride, shift_stride, channel, there)
    factor *= _spread(member, rstd)
    centre = _spread(member, mean)
    begin = _wide(j * part, LONG)
    end = tl.minimum(begin + part, pixels)
    for start in range(begin, end, PX):
        pixel = (start + tl.arange(0, PX))[:, None]
        mask = (pixel < end) & there[None, :]
        value = _sum_of(x, residual, skip, added, b, pixel, c, mask, pixels, channels, first, residual_batch, LAST)
        _store_normalised(y, value, centre, factor, constant, b, pixel, c, mask, pixels, channels, ACT, LAST)


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def geometry(pixels: int, channels: int, groups: int, size: int) -> Geometry:
    """The cut of a sample of `channels` channels in `groups` groups, elements of `size` bytes."""
    each = channels // groups
    high = _power(pixels)
    if high * _power(each) <= WHOLE:
        count = 1
        while count < groups and count * each * size < SECTOR and high * _power(2 * count * each) <= WHOLE:
            count *= 2
        return Geometry(count, _power(count * each), high, 1, pixels, True)
    row = each * size
    counts = [n for n in range(1, groups + 1) if n == 1 or SECTOR <= n * row <= 2 * ROW]

    def lanes(n: int) -> int:
        return triton.cdiv(groups, n) * _power(n * each)

    cached = [n for n in counts if n * row >= SECTOR and n * row * pixels <= CACHED]
    counts = cached or [n for n in counts if n * row >= ROW] or counts[-1:]
    count = min(counts, key=lambda n: (lanes(n), -n))
    width = _power(count * each)
    tile = min(max(TILE // width, 1), high)
    part = max(PART_TILES * tile, triton.cdiv(triton.cdiv(pixels, PARTS), tile) * tile)
    return Geometry(count, width, tile, triton.cdiv(pixels, part), part, False)


def launches(batch: int, pixels: int, channels: int, groups: int, size: int) -> int:
    """How many kernels `forward` launches."""
    cut = geometry(pixels, channels, groups, size)
    return 1 if cut.whole or batch * triton.cdiv(groups, cut.groups) >= PROGRAMS else 2


def forward(
    given: Any, groups: int, eps: float, act: bool, y: Tensor, total: Tensor | None, stats: Tensor, last: bool
) -> None:
    """Write y, the sum and the statistics; tensors and equation as in fastdiff.engine.norm, where they are checked.

    given: x, weight, bias, before, scale, shift, residual, skip.
    """
    x, weight, bias, before, scale, shift, residual, skip = given
    batch, channels = y.shape[:2]
    first, pixels = x.shape[1], y[0, 0].numel()
    cut = geometry(pixels, channels, groups, y.element_size())
    chunks = triton.cdiv(groups, cut.groups)
    sources = [x, residual, skip, before]
    maps = [scale, shift, weight, bias, y]
    sizes = [pixels, channels, first, groups, _moves(residual), _stride(before)]
    rest = [_stride(scale), _stride(shift), chunks, eps]
    cuts = {
        "CG": channels // groups, "NG": cut.groups, "NG2": _power(cut.groups), "CH": cut.width, "PX": cut.pixels,
        "LAST": last, "num_warps": _warps(cut), "maxnreg": REGISTERS, "enable_fp_fusion": False,
    }  # fmt: skip
    if cut.whole:
        whole_kernel[(batch * chunks,)](*sources, *maps, total, stats, *sizes, *rest, ACT=act, **cuts)
        return
    long = pixels * channels >= 2**31
    parts = {"PARTS2": _power(cut.parts), "ACT": act, "LONG": long}
    if batch * chunks >= PROGRAMS:
        looped_kernel[(batch * chunks,)](
            *sources, *maps, total, stats, *sizes, *rest, cut.part, cut.parts, **parts, **cuts
        )
        return
    partial = torch.empty(batch, groups, cut.parts, 2, dtype=torch.float32, device=x.device)
    grid = (chunks * cut.parts, batch)
    parts_kernel[grid](*sources, total, partial, *sizes, chunks, cut.part, cut.parts, LONG=long, **cuts)
    if total is not None:
        sources, sizes = [total, None, None, None], [pixels, channels, channels, groups, 1, 0]
    mapped_kernel[grid](*sources, *maps, partial, stats, *sizes, *rest, cut.part, cut.parts, **parts, **cuts)


def _warps(cut: Geometry) -> int:
    return max(min(cut.width * cut.pixels // (32 * 16), 16), 1)


def _stride(vector: Tensor | None) -> int:
    return 0 if vector is None else vector.stride(0)


def _moves(residual: Tensor | None) -> int:
    return 0 if residual is None or residual.shape[0] == 1 else 1
