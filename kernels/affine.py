"""The row kernel: any row of any plan in one pass over memory, with a row number and a seed for each sample.

Bytes moved per element: 4 for each register read and each output, 4 or 2 for every branch of F that the row reads and
for each copy of the model input, 4 for D when asked, 4 for a rule's M, 4 or 2 for a learned variance. DPM++2M in half
precision: x, history and F read, x, D and the model input written, 4 + 4 + 2 + 4 + 4 + 2 = 20. A program reads its
table row, about 300 bytes, once for a few thousand elements; normals never touch memory. Must reach 90 % of copy
bandwidth without noise and 80 % with.

A thread owns groups of 4 consecutive elements: 16-byte accesses to fp32 and 8-byte ones to halves, one Philox call for
each group, and every load of a tile is issued before the first use. Bit-stable: sums of products are explicit fma.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import branches
from . import layout as at
from .branches import guided_output, load_float, perturbed_output, round_to, sum_quads, where_all
from .philox import ELEMENTS, GIVEN, PIXELS, QUADS, draw_tile

BLOCK = 1024  # elements of a tile: 4 warps of 32 threads of twice 4 consecutive elements
REGISTERS = 128  # of a thread, so that 4 programs of 128 threads share a multiprocessor
REGISTERS_CHANNELS_LAST = 168  # 3 programs; where normals are drawn in another order than memory's, 128 spill
PROGRAMS = 2048  # enough to fill any GPU; beyond that a program walks several tiles, which pays for its preamble
MAX_TILES = 8


@triton.jit
def _reads(column, has0, has1, has2):
    """Whether any output the row has gives this term a weight other than 0."""
    first = tl.load(column + at.OUTPUT, mask=has0, other=0.0) != 0.0
    second = tl.load(column + at.OUTPUT + at.OUTPUT_STRIDE, mask=has1, other=0.0) != 0.0
    third = tl.load(column + at.OUTPUT + 2 * at.OUTPUT_STRIDE, mask=has2, other=0.0) != 0.0
    return first | second | third


@triton.jit
def _load_slot(pointers, slot, all_samples, mask, reads):
    """The tile of the register a slot names; zeros, and no memory touched, when the row does not read it."""
    register = tl.load(slot, mask=reads, other=0)
    return tl.load(pointers + register * all_samples, mask=where_all(mask, reads), other=0.0)


@triton.jit
def _accumulate(total, weight, value):
    """total + weight * value, or total untouched when the weight is 0: 0 * inf must not leak."""
    return tl.where(weight != 0.0, tl.math.fma(weight, value, total), total)


@triton.jit
def _combine(x, denoised, other, r1, r2, r3, r4, r5, many, output, SECOND: tl.constexpr):
    """One output before noise and without its base d x: k x + b (D - d x) + e (E - d x) + sum_j a_j (r_j - d x)."""
    base = tl.where(tl.load(output + at.OUT_DELTA) != 0.0, x, 0.0)
    k = tl.load(output + at.OUT_K)
    total = tl.where(k != 0.0, k * x, 0.0)
    total = _accumulate(total, tl.load(output + at.OUT_B), denoised - base)
    if SECOND:
        total = _accumulate(total, tl.load(output + at.OUT_E), other - base)
    total = _accumulate(total, tl.load(output + at.OUT_A), r1 - base)
    if many:
        total = _accumulate(total, tl.load(output + at.OUT_A + 1), r2 - base)
        total = _accumulate(total, tl.load(output + at.OUT_A + 2), r3 - base)
        total = _accumulate(total, tl.load(output + at.OUT_A + 3), r4 - base)
        total = _accumulate(total, tl.load(output + at.OUT_A + 4), r5 - base)
    return total


@triton.jit
def _exp(value):
    """e^value as 2^(value log2 e), the rounding of the product put back: 2^hi (1 + lo ln 2), within 1e-6 relative."""
    high = value * 1.4426950216293335
    low = tl.math.fma(value, 1.925963033500e-8, tl.math.fma(value, 1.4426950216293335, -high))
    power = tl.exp2(high)
    return tl.where(tl.abs(high) < 256.0, power * tl.math.fma(low, 0.6931471805599453, 1.0), power)


@triton.jit
def _store_output(pointers, total, x, output, dest, all_samples, mask):
    """Add the base d x and store to the output's register; returns what was stored."""
    out = total + tl.where(tl.load(output + at.OUT_DELTA) != 0.0, x, 0.0)
    tl.store(pointers + tl.load(dest) * all_samples, out, mask=mask)
    return out


@triton.jit(
    do_not_specialize=[
        "batch", "units", "rows", "coef_width", "ids_width", "blocks",
        "unguided_place", "perturbed_place", "model_in_copies", "model_time_copies", "has_denoised",
    ]
)  # fmt: skip
def affine_kernel(
    model_out, unguided, perturbed, state, model_in, model_time, coef, ids, row, seed, guidance, noise, denoised,
    status, ticket, mix, momentum, variance,
    batch, units, rows, coef_width, ids_width, blocks,
    unguided_place, perturbed_place, model_in_copies, model_time_copies, has_denoised,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, DRAW: tl.constexpr, SECOND: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sample per program: tiles `block`, `block + blocks`, ... of it; see fastdiff.engine.ops for the tensors.

    units * UNIT elements per sample, so that UNIT = 4 tells the compiler what vector accesses need. What a plan does
    without is not compiled: perturbed, mix, momentum and variance may be None, and SECOND says that some row uses E.
    """
    program = tl.program_id(0)
    b = (program // blocks).to(tl.int64)
    block = (program % blocks).to(tl.int64)
    i = tl.load(row + b)
    if (i < 0) | (i >= rows):
        return
    length = units.to(tl.int64) * UNIT
    all_samples = batch.to(tl.int64) * length
    sample = b * length
    coef += i.to(tl.int64) * coef_width
    ids += i.to(tl.int64) * ids_width

    reads_model = (tl.load(ids + at.FLAGS) & at.READS_MODEL) != 0
    used = tl.load(ids + at.SLOTS)
    terms = tl.load(ids + at.TERMS)
    has0 = tl.load(ids + at.DEST) >= 0
    has1 = tl.load(ids + at.DEST + 1) >= 0
    has2 = tl.load(ids + at.DEST + 2) >= 0
    p = tl.load(coef + at.P, mask=reads_model, other=0.0)
    q = tl.load(coef + at.Q, mask=reads_model, other=0.0)
    gain = tl.load(coef + at.GAIN, mask=reads_model, other=0.0)
    x_weight, raw_weight = p, q
    if mix is not None:
        mix += b * at.MIX
        gain *= tl.load(mix + at.MIX_W)
        unguided_scale = tl.load(mix + at.MIX_U)
        x_weight *= tl.load(mix + at.MIX_P)
        raw_weight *= tl.load(mix + at.MIX_Q)
        momentum_weight = tl.load(mix + at.MIX_M, mask=reads_model, other=0.0)
        strength = tl.load(coef + at.PERTURB, mask=reads_model, other=0.0) * tl.load(mix + at.MIX_S)
    weight = 1.0 + gain * (tl.load(guidance + b) - 1.0)
    guided = reads_model & (weight != 1.0) & (unguided_place >= 0)
    reads_unguided = guided
    if SECOND:
        by_unguided = reads_model & ((tl.load(ids + at.FLAGS) & at.E_UNGUIDED) != 0)
        by_unguided &= _reads(coef + at.OUT_E, has0, has1, has2)
        reads_unguided |= by_unguided & (unguided_place >= 0)
    if variance is not None:
        spreads = (tl.load(ids + at.FLAGS) & at.SPREADS_NOISE) != 0
    watched = reads_model & (tl.load(status + b) < 0)
    reads_x = (p != 0.0) | _reads(coef + at.OUT_K, has0, has1, has2) | _reads(coef + at.OUT_DELTA, has0, has1, has2)
    many = used > 1
    reads_1 = (used > 0) & _reads(coef + at.OUT_A, has0, has1, has2)
    reads_2 = (used > 1) & _reads(coef + at.OUT_A + 1, has0, has1, has2)
    reads_3 = (used > 2) & _reads(coef + at.OUT_A + 2, has0, has1, has2)
    reads_4 = (used > 3) & _reads(coef + at.OUT_A + 3, has0, has1, has2)
    reads_5 = (used > 4) & _reads(coef + at.OUT_A + 4, has0, has1, has2)

    local = tl.arange(0, BLOCK)
    zero = tl.full((BLOCK,), 0.0, tl.float32)
    broken = tl.full((BLOCK // 4,), 0.0, tl.float32)
    for start in range(block * TILE, length, blocks.to(tl.int64) * TILE):
        mask = start + local < length
        if TILE < BLOCK:
            mask = mask & (local < TILE)
        here = state + sample + start
        x = _load_slot(here + local, ids + at.SLOT, all_samples, mask, reads_x)
        r1 = _load_slot(here + local, ids + at.SLOT + 1, all_samples, mask, reads_1)
        if many:
            r2 = _load_slot(here + local, ids + at.SLOT + 2, all_samples, mask, reads_2)
            r3 = _load_slot(here + local, ids + at.SLOT + 3, all_samples, mask, reads_3)
            r4 = _load_slot(here + local, ids + at.SLOT + 4, all_samples, mask, reads_4)
            r5 = _load_slot(here + local, ids + at.SLOT + 5, all_samples, mask, reads_5)
        else:
            r2, r3, r4, r5 = zero, zero, zero, zero
        conditional = load_float(model_out + sample + start + local, where_all(mask, reads_model))
        second = load_float(
            unguided + unguided_place * all_samples + sample + start + local, where_all(mask, reads_unguided)
        )
        # a branch is 0 where it is not read; 0 times infinity or NaN is NaN, and stays NaN in a sum
        broken += sum_quads(tl.math.fma(second, 0.0, conditional * 0.0))
        if mix is None:
            raw = guided_output(conditional, second, weight, guided)
        else:
            raw = guided_output(conditional, unguided_scale * second, weight, guided)
            if perturbed is not None:
                perturbs = reads_model & (strength != 0.0)
                third = load_float(
                    perturbed + perturbed_place * all_samples + sample + start + local, where_all(mask, perturbs)
                )
                broken += sum_quads(third * 0.0)
                raw = perturbed_output(raw, conditional, third, strength, perturbs)

        x0 = tl.where(raw_weight != 0.0, tl.math.fma(raw_weight, raw, x_weight * x), x_weight * x)
        low = tl.load(coef + at.CLAMP_LO, mask=reads_model, other=float("-inf"))
        high = tl.load(coef + at.CLAMP_HI, mask=reads_model, other=float("inf"))
        if mix is not None:
            if momentum is not None:
                direction = tl.load(
                    momentum + sample + start + local, mask=where_all(mask, momentum_weight != 0.0), other=0.0
                )
                x0 = _accumulate(x0, momentum_weight, direction)
            bound = tl.load(mix + at.MIX_BOUND)
            low = tl.maximum(low, -bound)
            high = tl.minimum(high, bound)
        other = x0
        if SECOND:
            # Fc stands in where there is no Fu
            second = tl.where(unguided_place >= 0, second, conditional)
            other = tl.where(by_unguided, tl.math.fma(q, second, p * x), x0)
        x0 = tl.where(x0 < low, low, x0)
        x0 = tl.where(x0 > high, high, x0)
        if mix is not None:
            x0 *= tl.load(mix + at.MIX_POST)
        if has_denoised != 0:
            tl.store(denoised + sample + start + local, x0, mask=where_all(mask, reads_model))

        total0, total1, total2 = zero, zero, zero
        if has0:
            total0 = _combine(x, x0, other, r1, r2, r3, r4, r5, many, coef + at.OUTPUT, SECOND)
        if has1:
            total1 = _combine(x, x0, other, r1, r2, r3, r4, r5, many, coef + at.OUTPUT + at.OUTPUT_STRIDE, SECOND)
        if has2:
            total2 = _combine(x, x0, other, r1, r2, r3, r4, r5, many, coef + at.OUTPUT + 2 * at.OUTPUT_STRIDE, SECOND)
        if variance is not None:
            learned = load_float(variance + sample + start + local, where_all(mask, spreads))
            spread = _exp(tl.math.fma(tl.load(coef + at.SPREAD_SLOPE), learned, tl.load(coef + at.SPREAD_LOG)))
            spread = tl.where(spreads, spread, 1.0)
        for t in range(terms):
            c0 = tl.load(coef + at.NOISE + at.NOISE_STRIDE * t)
            c1 = tl.load(coef + at.NOISE + at.NOISE_STRIDE * t + 1)
            c2 = tl.load(coef + at.NOISE + at.NOISE_STRIDE * t + 2)
            if (c0 != 0.0) | (c1 != 0.0) | (c2 != 0.0):
                noise_id = tl.load(ids + at.TERM_IDS + at.TERM_IDS_STRIDE * t)
                if DRAW == GIVEN:
                    z = tl.load(noise + noise_id * all_samples + sample + start + local, mask=mask, other=0.0)
                else:
                    stream = tl.load(ids + at.TERM_IDS + at.TERM_IDS_STRIDE * t + 1)
                    key = tl.load(seed + b)
                    z = draw_tile(start, local, key, noise_id, stream, length // CHANNELS, CHANNELS, DRAW)
                if variance is not None:
                    z *= spread
                total0 = _accumulate(total0, c0, z)
                total1 = _accumulate(total1, c1, z)
                total2 = _accumulate(total2, c2, z)

        if has0:
            out = _store_output(here + local, total0, x, coef + at.OUTPUT, ids + at.DEST, all_samples, mask)
            if model_in_copies > 0:
                emitted = round_to(tl.load(coef + at.EMIT_SCALE) * out, model_in.dtype.element_ty)
                tl.store(model_in + sample + start + local, emitted, mask=mask)
                for copy in tl.static_range(1, 3):
                    again = where_all(mask, model_in_copies > copy)
                    tl.store(model_in + copy * all_samples + sample + start + local, emitted, mask=again)
        if has1:
            _store_output(
                here + local, total1, x, coef + at.OUTPUT + at.OUTPUT_STRIDE, ids + at.DEST + 1, all_samples, mask
            )
        if has2:
            _store_output(
                here + local, total2, x, coef + at.OUTPUT + 2 * at.OUTPUT_STRIDE, ids + at.DEST + 2, all_samples, mask
            )

    tl.store(status + b + tl.full((BLOCK // 4,), 0, tl.int32), i, mask=where_all(broken != broken, watched))
    if block == 0:
        emit_time = tl.load(coef + at.EMIT_TIME)
        for copy in tl.static_range(3):
            tl.store(model_time + copy * batch + b, emit_time, mask=model_time_copies > copy)
    # The barrier puts every thread's read of the row before its program's arrival. Arrivals release, and the last one
    # acquires their whole chain before it writes: no program of this launch can see the advanced row.
    tl.debug_barrier()
    arrived = tl.atomic_add(ticket + b, 1, sem="release", scope="gpu")
    if arrived == blocks - 1:
        tl.atomic_xchg(ticket + b, 0, sem="acquire", scope="gpu")
        tl.store(row + b, i + 1)


def bind(
    state: Tensor,
    model_out: Tensor,
    model_in: Tensor | None,
    model_time: Tensor | None,
    coef: Tensor,
    ids: Tensor,
    row: Tensor,
    seed: Tensor,
    guidance: Tensor,
    noise: Tensor | None,
    denoised: Tensor | None,
    status: Tensor,
    ticket: Tensor,
    unguided: Tensor | None = None,
    perturbed: Tensor | None = None,
    mix: Tensor | None = None,
    momentum: Tensor | None = None,
    variance: Tensor | None = None,
    *,
    second: bool = True,
    programs: int = PROGRAMS,
) -> Callable[..., None]:
    """`step(model_out, unguided, perturbed)` launching one row per sample, in place, on tensors like the ones given.

    Tensors and equation as in fastdiff.engine.ops, where they are checked. second: whether a row of this table, or of
    one copied into it later, may use E. `programs` is the number of programs aimed at; the step is deterministic
    whatever it is, and capturable.
    """
    batch = state.shape[1]
    length = state[0, 0].numel()
    if mix is None:
        momentum = None
    extended = mix is not None or variance is not None or second
    channels = 1 if state[0].is_contiguous() else state.shape[2]
    draw, channels = choose_draw(channels, length, noise is not None, coef.shape[1] > at.NOISE.value, extended)
    unit = 4 if length % 4 == 0 else 1
    block, tile = tile_shape(draw, channels, unit, extended)
    tiles = triton.cdiv(length, tile)
    blocks = triton.cdiv(tiles, min(MAX_TILES, max(1, tiles * batch // programs)))
    unguided_place, perturbed_place = branches.places(model_out, unguided, perturbed, batch)
    arguments: list[Any] = [
        state,
        state if model_in is None else model_in,
        state if model_time is None else model_time,
        coef,
        ids,
        row,
        seed,
        guidance,
        state if noise is None else noise,
        state if denoised is None else denoised,
        status,
        ticket,
        mix,
        momentum,
        variance,
        batch,
        length // unit,
        coef.shape[0],
        coef.shape[1],
        ids.shape[1],
        blocks,
        unguided_place,
        perturbed_place,
        0 if model_in is None else model_in.shape[0] // batch,
        0 if model_time is None else model_time.shape[0] // batch,
        int(denoised is not None),
    ]
    options = {
        "UNIT": unit,
        "CHANNELS": channels,
        "DRAW": draw,
        "SECOND": second,
        "TILE": tile,
        "BLOCK": block,
        "num_warps": 4,
        "maxnreg": REGISTERS if draw in (GIVEN.value, QUADS.value) else REGISTERS_CHANNELS_LAST,
        "enable_fp_fusion": False,
    }
    launch = affine_kernel[(batch * blocks,)]

    def step(model_out: Tensor, unguided: Tensor | None = None, perturbed: Tensor | None = None) -> None:
        launch(*branches.tensors(model_out, unguided, perturbed, perturbed_place >= 0), *arguments, **options)

    return step


def tile_shape(draw: int, channels: int, unit: int, extended: bool) -> tuple[int, int]:
    """BLOCK, the elements a program holds, and TILE, those it uses: for PIXELS whole groups of 4 pixels only."""
    block = _block(extended)
    if unit == 1 or draw == ELEMENTS.value:
        return BLOCK // 2, BLOCK // 2  # addresses or Philox for each element: half the elements fit the registers
    if draw == PIXELS.value:
        return block, block // (4 * channels) * (4 * channels)
    return block, block


def _block(extended: bool) -> int:
    return BLOCK // 2 if extended else BLOCK  # more tensors at once: half the elements fit the registers


def choose_draw(channels: int, length: int, given: bool, noisy: bool, extended: bool) -> tuple[int, int]:
    """Where normals come from, and the channel count the kernel must know: 1 wherever memory order is all it needs."""
    if given:
        return GIVEN.value, 1
    if channels == 1 or not noisy:
        return QUADS.value, 1
    whole_groups = length // channels % 4 == 0 and 4 * channels <= _block(extended)
    return (PIXELS if whole_groups else ELEMENTS).value, channels
