"""The guide kernels: the sums over a sample that a guidance rule needs, and a quantile of |D|, as scalars for the row.

Bytes moved per element: F of every branch the rule reads once (2 or 4 each); APG also M read and written (8) and x (4).
A sample is summed in at most 64 parts whose size only its length decides, each by one program; the last program to
arrive adds the parts in order. So the scalars do not depend on the batch, and must reach 80 % of copy bandwidth where
parts times samples fill the GPU. The quantile reads a sample 12 times, from L2, in one program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import branches
from . import layout as at
from .branches import guided_output, load_float, perturbed_output, sum_quads, where_all

BLOCK = 1024  # elements of a tile: 4 warps of 32 threads of twice 4 consecutive elements
LONG_BLOCK = 2048  # of a sample of LONG elements, whose 64 parts would otherwise leave memory waiting
LONG = 64 * LONG_BLOCK
QUANTILE_BLOCK = 4096  # 16 warps: one program has to draw all the bandwidth of its multiprocessor
REGISTERS = 128


@triton.jit
def _scalars(coef, ids, row, guidance, mix, b, rows, coef_width, ids_width):
    """What both kernels know of sample b: whether it has a row with a model, the row's pointers, and w and s."""
    i = tl.load(row + b)
    alive = (i >= 0) & (i < rows)
    i = tl.where(alive, i, 0).to(tl.int64)
    coef += i * coef_width
    ids += i * ids_width
    alive = alive & ((tl.load(ids + at.FLAGS) & at.READS_MODEL) != 0)
    p = tl.load(coef + at.P)
    q = tl.load(coef + at.Q)
    gain = tl.load(coef + at.GAIN) * (tl.load(guidance + b) - 1.0)
    strength = tl.load(coef + at.PERTURB) * tl.load(mix + b * at.MIX + at.MIX_S)
    return alive, ids, p, q, gain, strength


@triton.jit
def _combined(conditional, seconds, thirds, index, mask, weight, scale, strength, guided, perturbs):
    """F = u Fu + w (Fc - u Fu) + s (Fc - Fp) of a tile; a branch that does not count is not read."""
    second = scale * load_float(seconds + index, where_all(mask, guided))
    raw = guided_output(conditional, second, weight, guided)
    if thirds is not None:
        third = load_float(thirds + index, where_all(mask, perturbs))
        raw = perturbed_output(raw, conditional, third, strength, perturbs)
    return raw


@triton.jit
def _store_mix(mix, weight, scale, x_weight, raw_weight, momentum_weight, mask):
    """One sample's scalars w, u, p, q, m, its bound open."""
    tl.store(mix + at.MIX_W, weight, mask=mask)
    tl.store(mix + at.MIX_U, scale, mask=mask)
    tl.store(mix + at.MIX_P, x_weight, mask=mask)
    tl.store(mix + at.MIX_Q, raw_weight, mask=mask)
    tl.store(mix + at.MIX_M, momentum_weight, mask=mask)
    tl.store(mix + at.MIX_BOUND, float("inf"), mask=mask)
    tl.store(mix + at.MIX_POST, 1.0, mask=mask)


@triton.jit
def _column(partial, column, parts):
    """One sum of every part, from the cache all multiprocessors share; 0 for parts that are not there."""
    part = tl.arange(0, at.PARTS)
    return tl.load(partial + part * at.SUMS + column, mask=part < parts, other=0.0, cache_modifier=".cg")


@triton.jit
def _ratio(above, below, otherwise):
    """above / below, or `otherwise` where below is 0."""
    return tl.where(below != 0.0, above / tl.where(below != 0.0, below, 1.0), otherwise)


@triton.jit
def _squares(count, shift, total, square):
    """Sum of squared deviations from the mean, of parts that each have sums about a shift of their own."""
    held = tl.maximum(count, 1.0)
    offset = shift - tl.sum(tl.where(tl.arange(0, at.PARTS) == 0, shift, 0.0), 0) + total / held
    away = offset - tl.sum(count * offset, 0) / tl.sum(count, 0)
    within = square - total * (total / held)
    within = tl.where(within < 0.0, 0.0, within)
    return tl.sum(within + count * (away * away), 0)


@triton.jit
def _find_rescale(partial, parts, length, size, settings, mix):
    """mix_q = phi std(Fc) / std(G) + 1 - phi."""
    count = tl.minimum(tl.maximum(length - tl.arange(0, at.PARTS) * size, 0), size).to(tl.float32)
    above = _squares(count, _column(partial, 4, parts), _column(partial, 0, parts), _column(partial, 1, parts))
    below = _squares(count, _column(partial, 5, parts), _column(partial, 2, parts), _column(partial, 3, parts))
    phi = tl.load(settings + at.PHI)
    found = tl.math.fma(phi, tl.math.sqrt_rn(_ratio(above, below, 1.0)), 1.0 - phi)
    _store_mix(mix, 1.0, 1.0, 1.0, tl.where(below != 0.0, found, 1.0), 0.0, True)


@triton.jit
def _find_cfg_zero(partial, parts, mix):
    """mix_u = <Fc, Fu> / <Fu, Fu>."""
    scale = _ratio(tl.sum(_column(partial, 0, parts), 0), tl.sum(_column(partial, 1, parts), 0), 1.0)
    _store_mix(mix, 1.0, scale, 1.0, 1.0, 0.0, True)


@triton.jit
def _find_apg(partial, parts, gain, settings, mix):
    """mix_m = (w - 1) min(1, radius / |M|), mix_p = mix_q = 1 - mix_m (1 - eta) <M, Dc> / <Dc, Dc>.

    Plain where a sum is not finite: the row then reads Fu itself, and reports it.
    """
    radius = tl.load(settings + at.RADIUS)
    norm = tl.math.sqrt_rn(tl.sum(_column(partial, 0, parts), 0))
    momentum_weight = gain * tl.where((radius > 0.0) & (radius < norm), _ratio(radius, norm, 1.0), 1.0)
    along = _ratio(tl.sum(_column(partial, 1, parts), 0), tl.sum(_column(partial, 2, parts), 0), 0.0)
    kept = 1.0 - momentum_weight * (1.0 - tl.load(settings + at.ETA)) * along
    finite = tl.abs(norm + along) < float("inf")
    kept = tl.where(finite, kept, 1.0)
    _store_mix(mix, tl.where(finite, 0.0, 1.0), 1.0, kept, kept, tl.where(finite, momentum_weight, 0.0), True)


@triton.jit
def _shift(values, mask, count):
    """The mean of a tile, taken about its first element so that a constant tile gives the constant itself."""
    first = tl.sum(tl.where(tl.arange(0, values.shape[0]) == 0, values, 0.0), 0)
    return first + tl.sum(tl.where(mask, values - first, 0.0), 0) / count


@triton.jit(
    do_not_specialize=[
        "batch", "units", "rows", "coef_width", "ids_width", "parts", "tiles", "unguided_place", "perturbed_place",
    ]
)  # fmt: skip
def guide_kernel(
    model_out, unguided, perturbed, state, coef, ids, row, guidance, settings, mix, partial, ticket, momentum,
    batch, units, rows, coef_width, ids_width, parts, tiles, unguided_place, perturbed_place,
    UNIT: tl.constexpr, RULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One part of one sample per program, of `tiles` tiles; see fastdiff.engine.guide for the tensors and the rules."""
    program = tl.program_id(0)
    b = (program // parts).to(tl.int64)
    part = (program % parts).to(tl.int64)
    alive, ids, p, q, gain, strength = _scalars(coef, ids, row, guidance, mix, b, rows, coef_width, ids_width)
    if alive == 0:
        return
    weight = 1.0 + gain
    guided = (weight != 1.0) & (unguided_place >= 0)
    perturbs = (strength != 0.0) & (perturbed_place >= 0)
    works = guided & (RULE != at.PLAIN)
    if RULE == at.RESCALE:
        works |= perturbs
    mix += b * at.MIX
    if works == 0:
        _store_mix(mix, 1.0, 1.0, 1.0, 1.0, 0.0, part == 0)
        return

    length = units.to(tl.int64) * UNIT
    all_samples = batch.to(tl.int64) * length
    sample = b * length
    begin = part * tiles * BLOCK
    end = tl.minimum(begin + tiles.to(tl.int64) * BLOCK, length)
    conditionals = model_out + sample
    seconds = unguided + unguided_place * all_samples + sample
    local = tl.arange(0, BLOCK)
    zero = tl.full((BLOCK,), 0.0, tl.float32)
    partial += b * (at.PARTS * at.SUMS)
    mine = partial + part * at.SUMS

    first, second, third, fourth = zero, zero, zero, zero
    if RULE == at.RESCALE:
        thirds = None
        if perturbed is not None:
            thirds = perturbed + perturbed_place * all_samples + sample
        mask = begin + local < length
        conditional = load_float(conditionals + begin + local, mask)
        raw = _combined(conditional, seconds, thirds, begin + local, mask, weight, 1.0, strength, guided, perturbs)
        held = tl.minimum(end - begin, BLOCK).to(tl.float32)
        conditional_shift = _shift(conditional, mask, held)
        raw_shift = _shift(raw, mask, held)
        tl.store(mine + 4, conditional_shift)
        tl.store(mine + 5, raw_shift)
    for start in range(begin, end, BLOCK):
        mask = start + local < length
        conditional = load_float(conditionals + start + local, mask)
        if RULE == at.RESCALE:
            raw = _combined(conditional, seconds, thirds, start + local, mask, weight, 1.0, strength, guided, perturbs)
            centred = tl.where(mask, conditional - conditional_shift, 0.0)
            first += centred
            second = tl.math.fma(centred, centred, second)
            centred = tl.where(mask, raw - raw_shift, 0.0)
            third += centred
            fourth = tl.math.fma(centred, centred, fourth)
        elif RULE == at.CFG_ZERO:
            other = load_float(seconds + start + local, mask)
            first = tl.math.fma(conditional, other, first)
            second = tl.math.fma(other, other, second)
        elif RULE == at.APG:
            slot = tl.load(ids + at.SLOT, mask=p != 0.0, other=0)
            x = tl.load(state + slot * all_samples + sample + start + local, mask=where_all(mask, p != 0.0), other=0.0)
            before = tl.load(momentum + sample + start + local, mask=mask, other=0.0)
            other = load_float(seconds + start + local, mask)
            direction = tl.math.fma(tl.load(settings + at.BETA), before, q * (conditional - other))
            tl.store(momentum + sample + start + local, direction, mask=mask)
            estimate = tl.math.fma(q, conditional, p * x)
            first = tl.math.fma(direction, direction, first)
            second = tl.math.fma(direction, estimate, second)
            third = tl.math.fma(estimate, estimate, third)
    tl.store(mine, tl.sum(first, 0))
    tl.store(mine + 1, tl.sum(second, 0))
    tl.store(mine + 2, tl.sum(third, 0))
    tl.store(mine + 3, tl.sum(fourth, 0))

    # The barrier puts this program's sums before its arrival; the last arrival has acquired everybody's.
    tl.debug_barrier()
    arrived = tl.atomic_add(ticket + b, 1, sem="acq_rel", scope="gpu")
    if arrived == parts - 1:
        tl.atomic_xchg(ticket + b, 0, sem="acquire", scope="gpu")
        if RULE == at.RESCALE:
            _find_rescale(partial, parts, length, tiles.to(tl.int64) * BLOCK, settings, mix)
        elif RULE == at.CFG_ZERO:
            _find_cfg_zero(partial, parts, mix)
        elif RULE == at.APG:
            _find_apg(partial, parts, gain, settings, mix)


@triton.jit
def _magnitudes(
    conditionals, seconds, thirds, state, momentum, index, mask,
    weight, scale, strength, p, q, momentum_weight, guided, perturbs,
):  # fmt: skip
    """|D| before its clamp of a tile, as bits, which are in the order of the values."""
    conditional = load_float(conditionals + index, mask)
    raw = _combined(conditional, seconds, thirds, index, mask, weight, scale, strength, guided, perturbs)
    estimate = p * tl.load(state + index, mask=where_all(mask, p != 0.0), other=0.0)
    estimate = tl.where(q != 0.0, tl.math.fma(q, raw, estimate), estimate)
    if momentum is not None:
        direction = tl.load(momentum + index, mask=where_all(mask, momentum_weight != 0.0), other=0.0)
        estimate = tl.where(momentum_weight != 0.0, tl.math.fma(momentum_weight, direction, estimate), estimate)
    return estimate.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit(
    do_not_specialize=[
        "batch", "units", "rows", "coef_width", "ids_width", "unguided_place", "perturbed_place",
    ]
)  # fmt: skip
def quantile_kernel(
    model_out, unguided, perturbed, state, coef, ids, row, guidance, settings, mix, momentum,
    batch, units, rows, coef_width, ids_width, unguided_place, perturbed_place,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The bound of one sample per program: order statistics of |D|, three bits a pass, interpolated.

    `low` are the leading bits of the value of rank `rank`, which then counts from the first value with those bits.
    """
    b = tl.program_id(0).to(tl.int64)
    alive, ids, p, q, gain, strength = _scalars(coef, ids, row, guidance, mix, b, rows, coef_width, ids_width)
    if alive == 0:
        return
    mix += b * at.MIX
    weight = 1.0 + gain * tl.load(mix + at.MIX_W)
    scale = tl.load(mix + at.MIX_U)
    slot = tl.load(ids + at.SLOT, mask=p != 0.0, other=0)
    p *= tl.load(mix + at.MIX_P)
    q *= tl.load(mix + at.MIX_Q)
    momentum_weight = tl.load(mix + at.MIX_M)
    guided = (weight != 1.0) & (unguided_place >= 0)
    perturbs = (strength != 0.0) & (perturbed_place >= 0)

    length = units.to(tl.int64) * UNIT
    all_samples = batch.to(tl.int64) * length
    sample = b * length
    conditionals = model_out + sample
    seconds = unguided + unguided_place * all_samples + sample
    thirds = None
    if perturbed is not None:
        thirds = perturbed + perturbed_place * all_samples + sample
    state += slot * all_samples + sample
    if momentum is not None:
        momentum += sample
    local = tl.arange(0, BLOCK)
    digits = tl.arange(0, 8)

    # rank and fraction of percentile (N - 1), in fixed point: fp32 has not the digits
    percentile = tl.minimum(tl.maximum(tl.load(settings + at.PERCENTILE), 0.0), 1.0)
    position = (percentile * 1073741824.0).to(tl.int64) * (length - 1)
    rank = position >> 30
    fraction = (position - (rank << 30)).to(tl.float32) * 9.313225746154785e-10

    low = tl.full((), 0, tl.int32)
    equal = tl.full((), 0, tl.int32)
    for step in range(11):
        shift = tl.maximum(28 - 3 * step, 0)
        counts = tl.full((BLOCK // 4, 8), 0, tl.int32)
        for start in range(0, length, BLOCK):
            mask = start + local < length
            bits = _magnitudes(
                conditionals, seconds, thirds, state, momentum, start + local, mask,
                weight, scale, strength, p, q, momentum_weight, guided, perturbs,
            )  # fmt: skip
            digit = (bits - low) >> shift
            counted = mask & (digit >= 0) & (digit < 8)
            # a quad's counts of the eight digits, four bits each
            packed = sum_quads(tl.where(counted, 1 << (4 * (digit & 7)), 0))
            counts += (packed[:, None] >> (4 * digits)[None, :]) & 15
        totals = tl.sum(counts, 0)
        digit = tl.sum((tl.cumsum(totals, 0) <= rank).to(tl.int32), 0)
        rank -= tl.sum(tl.where(digits < digit, totals, 0), 0)
        equal = tl.sum(tl.where(digits == digit, totals, 0), 0)
        low += digit << shift
    following = low
    if (fraction > 0.0) & (rank + 1 >= equal):
        least = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
        for start in range(0, length, BLOCK):
            mask = start + local < length
            bits = _magnitudes(
                conditionals, seconds, thirds, state, momentum, start + local, mask,
                weight, scale, strength, p, q, momentum_weight, guided, perturbs,
            )  # fmt: skip
            least = tl.minimum(least, tl.where(mask & (bits > low), bits, 0x7FFFFFFF))
        following = tl.min(least, 0)

    value = low.to(tl.float32, bitcast=True)
    value = tl.math.fma(fraction, following.to(tl.float32, bitcast=True) - value, value)
    ceiling = tl.load(settings + at.CEILING)
    value = tl.where(value < 1.0, 1.0, value)
    value = tl.where(value > ceiling, ceiling, value)
    tl.store(mix + at.MIX_BOUND, value)
    tl.store(mix + at.MIX_POST, 1.0 / value)


def bind(
    state: Tensor,
    model_out: Tensor,
    coef: Tensor,
    ids: Tensor,
    row: Tensor,
    guidance: Tensor,
    settings: Tensor,
    mix: Tensor,
    partial: Tensor,
    ticket: Tensor,
    unguided: Tensor | None = None,
    perturbed: Tensor | None = None,
    momentum: Tensor | None = None,
    *,
    rule: int,
    threshold: bool,
) -> Callable[..., None]:
    """`find(model_out, unguided, perturbed)` writing every sample's scalars, on tensors like the ones given.

    Tensors and equations as in fastdiff.engine.guide, where they are checked. Deterministic; capturable; no allocation.
    """
    batch = state.shape[1]
    length = state[0, 0].numel()
    unit = 4 if length % 4 == 0 else 1
    block, tiles, parts = part_shape(length)
    quantile_block = QUANTILE_BLOCK if unit == 4 else QUANTILE_BLOCK // 2
    unguided_place, perturbed_place = branches.places(model_out, unguided, perturbed, batch)
    if rule == at.PLAIN.value:
        parts = 1
    if rule != at.APG.value:
        momentum = None
    shape = [batch, length // unit, coef.shape[0], coef.shape[1], ids.shape[1]]
    places = [unguided_place, perturbed_place]
    table = [state, coef, ids, row, guidance, settings, mix]
    sums: list[Any] = [*table, partial, ticket, momentum, *shape, parts, tiles, *places]
    quantile: list[Any] = [*table, momentum, *shape, *places]
    sum_up, bound = guide_kernel[(batch * parts,)], quantile_kernel[(batch,)]
    warp = 256 if unit == 4 else 128  # elements of a warp; those of an odd sample need an address each
    common = {"UNIT": unit, "maxnreg": REGISTERS, "enable_fp_fusion": False}

    def find(model_out: Tensor, unguided: Tensor | None = None, perturbed: Tensor | None = None) -> None:
        apart = branches.tensors(model_out, unguided, perturbed, perturbed_place >= 0)
        sum_up(*apart, *sums, RULE=rule, BLOCK=block, num_warps=block // warp, **common)
        if threshold:
            bound(*apart, *quantile, BLOCK=quantile_block, num_warps=quantile_block // warp, **common)

    return find


def part_shape(length: int) -> tuple[int, int, int]:
    """BLOCK, tiles of a part and parts of a sample, from its length alone, so that a sum depends on nothing else."""
    block = BLOCK if length < LONG else LONG_BLOCK
    if length % 4:
        block //= 2
    tiles = triton.cdiv(triton.cdiv(length, block), at.PARTS.value)
    return block, tiles, triton.cdiv(length, block * tiles)
