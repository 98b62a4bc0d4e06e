"""The row kernel: any row of any plan in one pass over memory, with a row number and a seed for each sample.

Bytes moved per element: 4 for each register read and each output, 4 or 2 for F (twice that in a guided row) and for
each copy of the model input, and 4 for D when asked. DPM++2M in half precision: x, history and F read, x, D and the
model input written, 4 + 4 + 2 + 4 + 4 + 2 = 20. A program reads its table row, about 300 bytes, once for a few thousand
elements; normals never touch memory. Must reach 90 % of copy bandwidth without noise and 80 % with.

A thread owns groups of 4 consecutive elements: 16-byte accesses to fp32 and 8-byte ones to halves, one Philox call for
each group, and every load of a tile is issued before the first use. Bit-stable: sums of products are explicit fma.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .philox import normal_elements, normal_quads

# Columns of a packed plan; fastdiff/compiler/layout.py is the other copy.
P: tl.constexpr = tl.constexpr(0)
Q: tl.constexpr = tl.constexpr(1)
GAIN: tl.constexpr = tl.constexpr(2)
CLAMP_LO: tl.constexpr = tl.constexpr(3)
CLAMP_HI: tl.constexpr = tl.constexpr(4)
EMIT_SCALE: tl.constexpr = tl.constexpr(5)
EMIT_TIME: tl.constexpr = tl.constexpr(6)
OUTPUT: tl.constexpr = tl.constexpr(8)
OUTPUT_STRIDE: tl.constexpr = tl.constexpr(8)
OUT_K: tl.constexpr = tl.constexpr(0)
OUT_DELTA: tl.constexpr = tl.constexpr(1)
OUT_B: tl.constexpr = tl.constexpr(2)
OUT_A: tl.constexpr = tl.constexpr(3)
NOISE: tl.constexpr = tl.constexpr(32)
NOISE_STRIDE: tl.constexpr = tl.constexpr(4)
SLOT: tl.constexpr = tl.constexpr(0)
DEST: tl.constexpr = tl.constexpr(6)
FLAGS: tl.constexpr = tl.constexpr(9)
TERMS: tl.constexpr = tl.constexpr(10)
SLOTS: tl.constexpr = tl.constexpr(11)
TERM_IDS: tl.constexpr = tl.constexpr(16)
TERM_IDS_STRIDE: tl.constexpr = tl.constexpr(2)
READS_MODEL: tl.constexpr = tl.constexpr(1)

# Where the normal of an element comes from.
GIVEN = tl.constexpr(0)  # a tensor
QUADS = tl.constexpr(1)  # the counter, memory order = element order
PIXELS = tl.constexpr(2)  # the counter, channels_last: tiles of whole groups of 4 pixels, so Philox runs once per quad
ELEMENTS = tl.constexpr(3)  # the counter, any channels_last: Philox runs once per element

BLOCK = 1024  # elements of a tile: 4 warps of 32 threads of twice 4 consecutive elements
REGISTERS = 128  # of a thread, so that 4 programs of 128 threads share a multiprocessor
REGISTERS_CHANNELS_LAST = 168  # 3 programs; where normals are drawn in another order than memory's, 128 spill
PROGRAMS = 2048  # enough to fill any GPU; beyond that a program walks several tiles, which pays for its preamble
MAX_TILES = 8


@triton.jit
def _where(mask, condition):
    """mask and a scalar condition. Widened as an integer: the interpreter splats a comparison as what it compared."""
    return mask & ((tl.full(mask.shape, 0, tl.int32) + condition.to(tl.int32)) != 0)


@triton.jit
def _reads(column, has0, has1, has2):
    """Whether any output the row has gives this term a weight other than 0."""
    first = tl.load(column + OUTPUT, mask=has0, other=0.0) != 0.0
    second = tl.load(column + OUTPUT + OUTPUT_STRIDE, mask=has1, other=0.0) != 0.0
    third = tl.load(column + OUTPUT + 2 * OUTPUT_STRIDE, mask=has2, other=0.0) != 0.0
    return first | second | third


@triton.jit
def _load_slot(pointers, slot, all_samples, mask, reads):
    """The tile of the register a slot names; zeros, and no memory touched, when the row does not read it."""
    register = tl.load(slot, mask=reads, other=0)
    return tl.load(pointers + register * all_samples, mask=_where(mask, reads), other=0.0)


@triton.jit
def _load_float(pointers, mask):
    """Masked load as fp32. bf16 is widened by its bits, which is exact everywhere, the interpreter included."""
    value = tl.load(pointers, mask=mask, other=0.0)
    if value.dtype == tl.bfloat16:
        value = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def _round(value, dtype: tl.constexpr):
    """fp32 to `dtype`, to nearest even. bf16 by its bits: the interpreter's own cast truncates. NaN stays NaN."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = tl.add(bits, 0x7FFF + ((bits >> 16) & 1), sanitize_overflow=False)
        bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits | 0x00400000, nearest)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def _accumulate(total, weight, value):
    """total + weight * value, or total untouched when the weight is 0: 0 * inf must not leak."""
    return tl.where(weight != 0.0, tl.math.fma(weight, value, total), total)


@triton.jit
def _combine(x, denoised, r1, r2, r3, r4, r5, many, output):
    """One output before noise and without its base d x: k x + b (D - d x) + sum_j a_j (r_j - d x)."""
    base = tl.where(tl.load(output + OUT_DELTA) != 0.0, x, 0.0)
    k = tl.load(output + OUT_K)
    total = tl.where(k != 0.0, k * x, 0.0)
    total = _accumulate(total, tl.load(output + OUT_B), denoised - base)
    total = _accumulate(total, tl.load(output + OUT_A), r1 - base)
    if many:
        total = _accumulate(total, tl.load(output + OUT_A + 1), r2 - base)
        total = _accumulate(total, tl.load(output + OUT_A + 2), r3 - base)
        total = _accumulate(total, tl.load(output + OUT_A + 3), r4 - base)
        total = _accumulate(total, tl.load(output + OUT_A + 4), r5 - base)
    return total


@triton.jit
def _store_output(pointers, total, x, output, dest, all_samples, mask):
    """Add the base d x and store to the output's register; returns what was stored."""
    out = total + tl.where(tl.load(output + OUT_DELTA) != 0.0, x, 0.0)
    tl.store(pointers + tl.load(dest) * all_samples, out, mask=mask)
    return out


@triton.jit
def _sum_quads(values):
    """The sum of each 4 consecutive elements, fp32 [BLOCK] to [BLOCK / 4]; a thread has them all."""
    even, odd = tl.split(tl.reshape(values, [values.shape[0] // 4, 2, 2]))
    first, second = tl.split(even + odd)
    return first + second


@triton.jit
def _draw(start, local, seed, noise_id, stream, pixels, CHANNELS: tl.constexpr, DRAW: tl.constexpr):
    """The normals of the tile that begins at memory index `start`, in memory order."""
    BLOCK: tl.constexpr = local.shape[0]
    if DRAW == QUADS:
        quads = normal_quads(start // 4 + tl.arange(0, BLOCK // 4), seed, noise_id, stream)
        return tl.reshape(quads, [BLOCK])
    elif DRAW == PIXELS:
        # memory is [pixel group, 4 pixels, channel]; quads are drawn as [pixel group, channel], 4 pixels each
        quad = tl.arange(0, BLOCK // 4)
        group = start // (4 * CHANNELS) + quad // CHANNELS
        quads = normal_quads((quad % CHANNELS) * (pixels // 4) + group, seed, noise_id, stream)
        # word-major, which is how the threads hold them, so only the gather itself moves data between threads
        words = tl.reshape(tl.permute(quads, (1, 2, 0)), [BLOCK])
        pixel = local // CHANNELS
        source = (pixel % 4) * (BLOCK // 4) + (pixel // 4) * CHANNELS + local % CHANNELS
        return tl.gather(words, source, 0)
    else:
        element = start + local
        return normal_elements((element % CHANNELS) * pixels + element // CHANNELS, seed, noise_id, stream)


@triton.jit(
    do_not_specialize=[
        "batch", "units", "rows", "coef_width", "ids_width", "blocks",
        "model_out_copies", "model_in_copies", "model_time_copies", "has_denoised",
    ]
)  # fmt: skip
def affine_kernel(
    state, model_out, model_in, model_time, coef, ids, row, seed, guidance, noise, denoised, status, ticket,
    batch, units, rows, coef_width, ids_width, blocks,
    model_out_copies, model_in_copies, model_time_copies, has_denoised,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, DRAW: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sample per program: tiles `block`, `block + blocks`, ... of it; see fastdiff.engine.ops for the tensors.

    units * UNIT elements per sample, so that UNIT = 4 tells the compiler what vector accesses need.
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

    reads_model = (tl.load(ids + FLAGS) & READS_MODEL) != 0
    used = tl.load(ids + SLOTS)
    terms = tl.load(ids + TERMS)
    has0 = tl.load(ids + DEST) >= 0
    has1 = tl.load(ids + DEST + 1) >= 0
    has2 = tl.load(ids + DEST + 2) >= 0
    p = tl.load(coef + P, mask=reads_model, other=0.0)
    q = tl.load(coef + Q, mask=reads_model, other=0.0)
    gain = tl.load(coef + GAIN, mask=reads_model, other=0.0)
    weight = 1.0 + gain * (tl.load(guidance + b) - 1.0)
    guided = reads_model & (weight != 1.0) & (model_out_copies == 2)
    watched = reads_model & (tl.load(status + b) < 0)
    reads_x = (p != 0.0) | _reads(coef + OUT_K, has0, has1, has2) | _reads(coef + OUT_DELTA, has0, has1, has2)
    many = used > 1
    reads_1 = (used > 0) & _reads(coef + OUT_A, has0, has1, has2)
    reads_2 = (used > 1) & _reads(coef + OUT_A + 1, has0, has1, has2)
    reads_3 = (used > 2) & _reads(coef + OUT_A + 2, has0, has1, has2)
    reads_4 = (used > 3) & _reads(coef + OUT_A + 3, has0, has1, has2)
    reads_5 = (used > 4) & _reads(coef + OUT_A + 4, has0, has1, has2)

    local = tl.arange(0, BLOCK)
    zero = tl.full((BLOCK,), 0.0, tl.float32)
    broken = tl.full((BLOCK // 4,), 0.0, tl.float32)
    for start in range(block * TILE, length, blocks.to(tl.int64) * TILE):
        mask = start + local < length
        if TILE < BLOCK:
            mask = mask & (local < TILE)
        here = state + sample + start
        x = _load_slot(here + local, ids + SLOT, all_samples, mask, reads_x)
        r1 = _load_slot(here + local, ids + SLOT + 1, all_samples, mask, reads_1)
        if many:
            r2 = _load_slot(here + local, ids + SLOT + 2, all_samples, mask, reads_2)
            r3 = _load_slot(here + local, ids + SLOT + 3, all_samples, mask, reads_3)
            r4 = _load_slot(here + local, ids + SLOT + 4, all_samples, mask, reads_4)
            r5 = _load_slot(here + local, ids + SLOT + 5, all_samples, mask, reads_5)
        else:
            r2, r3, r4, r5 = zero, zero, zero, zero
        conditional = _load_float(model_out + sample + start + local, _where(mask, reads_model))
        unconditional = _load_float(model_out + all_samples + sample + start + local, _where(mask, guided))

        # Fu is 0 where it is not read; 0 times infinity or NaN is NaN, and stays NaN in a sum
        broken += _sum_quads(tl.math.fma(unconditional, 0.0, conditional * 0.0))
        raw = tl.where(guided, tl.math.fma(weight, conditional - unconditional, unconditional), conditional)

        x0 = tl.where(q != 0.0, tl.math.fma(q, raw, p * x), p * x)
        low = tl.load(coef + CLAMP_LO, mask=reads_model, other=float("-inf"))
        high = tl.load(coef + CLAMP_HI, mask=reads_model, other=float("inf"))
        x0 = tl.where(x0 < low, low, x0)
        x0 = tl.where(x0 > high, high, x0)
        if has_denoised != 0:
            tl.store(denoised + sample + start + local, x0, mask=_where(mask, reads_model))

        total0, total1, total2 = zero, zero, zero
        if has0:
            total0 = _combine(x, x0, r1, r2, r3, r4, r5, many, coef + OUTPUT)
        if has1:
            total1 = _combine(x, x0, r1, r2, r3, r4, r5, many, coef + OUTPUT + OUTPUT_STRIDE)
        if has2:
            total2 = _combine(x, x0, r1, r2, r3, r4, r5, many, coef + OUTPUT + 2 * OUTPUT_STRIDE)
        for t in range(terms):
            c0 = tl.load(coef + NOISE + NOISE_STRIDE * t)
            c1 = tl.load(coef + NOISE + NOISE_STRIDE * t + 1)
            c2 = tl.load(coef + NOISE + NOISE_STRIDE * t + 2)
            if (c0 != 0.0) | (c1 != 0.0) | (c2 != 0.0):
                noise_id = tl.load(ids + TERM_IDS + TERM_IDS_STRIDE * t)
                if DRAW == GIVEN:
                    z = tl.load(noise + noise_id * all_samples + sample + start + local, mask=mask, other=0.0)
                else:
                    stream = tl.load(ids + TERM_IDS + TERM_IDS_STRIDE * t + 1)
                    key = tl.load(seed + b)
                    z = _draw(start, local, key, noise_id, stream, length // CHANNELS, CHANNELS, DRAW)
                total0 = _accumulate(total0, c0, z)
                total1 = _accumulate(total1, c1, z)
                total2 = _accumulate(total2, c2, z)

        if has0:
            out = _store_output(here + local, total0, x, coef + OUTPUT, ids + DEST, all_samples, mask)
            if model_in_copies > 0:
                emitted = _round(tl.load(coef + EMIT_SCALE) * out, model_in.dtype.element_ty)
                tl.store(model_in + sample + start + local, emitted, mask=mask)
                again = _where(mask, model_in_copies == 2)
                tl.store(model_in + all_samples + sample + start + local, emitted, mask=again)
        if has1:
            _store_output(here + local, total1, x, coef + OUTPUT + OUTPUT_STRIDE, ids + DEST + 1, all_samples, mask)
        if has2:
            _store_output(here + local, total2, x, coef + OUTPUT + 2 * OUTPUT_STRIDE, ids + DEST + 2, all_samples, mask)

    tl.store(status + b + tl.full((BLOCK // 4,), 0, tl.int32), i, mask=_where(broken != broken, watched))
    if block == 0:
        emit_time = tl.load(coef + EMIT_TIME)
        tl.store(model_time + b, emit_time, mask=model_time_copies > 0)
        tl.store(model_time + batch + b, emit_time, mask=model_time_copies == 2)
    # The barrier puts every thread's read of the row before its program's arrival. Arrivals release, and the last one
    # acquires their whole chain before it writes: no program of this launch can see the advanced row.
    tl.debug_barrier()
    arrived = tl.atomic_add(ticket + b, 1, sem="release", scope="gpu")
    if arrived == blocks - 1:
        tl.atomic_xchg(ticket + b, 0, sem="acquire", scope="gpu")
        tl.store(row + b, i + 1)


def affine_step(
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
    *,
    programs: int = PROGRAMS,
) -> None:
    """Launch one row per sample, in place; tensors as in fastdiff.engine.ops, where they are checked.

    D = P x + Q F;  r_o' = sum_i A[o,i] r_i + B[o] D + sum_t C[o,t] N(id_t)   (fastdiff.compiler.plan).
    `programs` is the number of programs aimed at. Deterministic, whatever it is; capturable; allocates nothing.
    """
    batch = state.shape[1]
    length = state[0, 0].numel() if batch else 0
    if length == 0:
        return
    channels = 1 if state[0].is_contiguous() else state.shape[2]
    draw, channels = _choose_draw(channels, length, noise is not None, coef.shape[1] > NOISE.value)
    unit = 4 if length % 4 == 0 else 1
    block, tile = tile_shape(draw, channels, unit)
    tiles = triton.cdiv(length, tile)
    blocks = triton.cdiv(tiles, min(MAX_TILES, max(1, tiles * batch // programs)))
    affine_kernel[(batch * blocks,)](
        state,
        model_out,
        model_out if model_in is None else model_in,
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
        batch,
        length // unit,
        coef.shape[0],
        coef.shape[1],
        ids.shape[1],
        blocks,
        model_out.shape[0] // batch,
        0 if model_in is None else model_in.shape[0] // batch,
        0 if model_time is None else model_time.shape[0] // batch,
        int(denoised is not None),
        UNIT=unit,
        CHANNELS=channels,
        DRAW=draw,
        TILE=tile,
        BLOCK=block,
        num_warps=4,
        maxnreg=REGISTERS if draw in (GIVEN.value, QUADS.value) else REGISTERS_CHANNELS_LAST,
        enable_fp_fusion=False,
    )


def tile_shape(draw: int, channels: int, unit: int) -> tuple[int, int]:
    """BLOCK, the elements a program holds, and TILE, those it uses: for PIXELS whole groups of 4 pixels only."""
    if unit == 1 or draw == ELEMENTS.value:
        return BLOCK // 2, BLOCK // 2  # addresses or Philox for each element: half the elements fit the registers
    if draw == PIXELS.value:
        return BLOCK, BLOCK // (4 * channels) * (4 * channels)
    return BLOCK, BLOCK


def _choose_draw(channels: int, length: int, given: bool, noisy: bool) -> tuple[int, int]:
    """Where normals come from, and the channel count the kernel must know: 1 wherever memory order is all it needs."""
    if given:
        return GIVEN.value, 1
    if channels == 1 or not noisy:
        return QUADS.value, 1
    whole_groups = length // channels % 4 == 0 and 4 * channels <= BLOCK
    return (PIXELS if whole_groups else ELEMENTS).value, channels
