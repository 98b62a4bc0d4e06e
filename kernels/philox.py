"""Counter-based unit normals as Triton device functions; the definition is fastdiff/engine/noise.py.

Philox-4x32-10 (Salmon et al. 2011) and Box-Muller. The words equal the reference bit for bit. The normals do too,
because every product that is added is one fused operation on both sides; the promise is 2 ulp of fp32 scale.
Register-only: 20 wide multiplications for four words, about 110 operations for the four normals.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Where the normal of an element comes from.
GIVEN = tl.constexpr(0)  # a tensor
QUADS = tl.constexpr(1)  # the counter, memory order = element order
PIXELS = tl.constexpr(2)  # the counter, channels_last: tiles of whole groups of 4 pixels, so Philox runs once per quad
ELEMENTS = tl.constexpr(3)  # the counter, any channels_last: Philox runs once per element


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four uint32 words from the counter (c0, c1, c2, c3) and the key (k0, k1), all uint32."""
    for _ in tl.static_range(10):
        even, odd = c0, c2
        c0 = tl.math.umulhi(odd, 0xCD9E8D57) ^ c1 ^ k0
        c1 = tl.mul(odd, 0xCD9E8D57, sanitize_overflow=False)
        c2 = tl.math.umulhi(even, 0xD2511F53) ^ c3 ^ k1
        c3 = tl.mul(even, 0xD2511F53, sanitize_overflow=False)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def philox_words(quad, seed, noise_id, stream):
    """The words of four consecutive elements: quad int64 block = element // 4, seed int64, the others int32."""
    low = quad.to(tl.uint32)
    high = (quad >> 32).to(tl.uint32)
    zero = low ^ low
    return philox(
        low,
        high,
        zero ^ noise_id.to(tl.uint32, bitcast=True),
        zero ^ stream.to(tl.uint32, bitcast=True),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )


@triton.jit
def log_unit(u):
    """log(u) for u in (0, 1], fp32: u = 2^e m, log m = f - f^2/2 + f^3 L(f) with f = m - 1, a minimax fit."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = tl.sub(bits, 0x3F3504F3, sanitize_overflow=False) >> 23
    f = tl.sub(bits, exponent << 23, sanitize_overflow=False).to(tl.float32, bitcast=True) - 1.0
    scale = exponent.to(tl.float32)
    tail = tl.math.fma(f, 0.06915578246116638, -0.11788799613714218)
    tail = tl.math.fma(tail, f, 0.11872309446334839)
    tail = tl.math.fma(tail, f, -0.1238449439406395)
    tail = tl.math.fma(tail, f, 0.14218780398368835)
    tail = tl.math.fma(tail, f, -0.16669245064258575)
    tail = tl.math.fma(tail, f, 0.20002219080924988)
    tail = tl.math.fma(tail, f, -0.24999986588954926)
    tail = tl.math.fma(tail, f, 0.3333331048488617)
    square = f * f
    tail = (square * f) * tail
    tail = tl.math.fma(scale, -2.12194440e-4, tail)
    tail = tl.math.fma(square, -0.5, tail)
    return tl.math.fma(scale, 0.693359375, f + tail)


@triton.jit
def sincos_pi(word):
    """sin and cos of pi * int32(word) / 2^31: the nearest quarter turn k, then polynomials on |s| <= 1/4."""
    angle = word.to(tl.int32, bitcast=True)
    quarter = tl.add(word, 0x20000000, sanitize_overflow=False).to(tl.int32, bitcast=True) >> 30
    rest = tl.sub(angle, quarter << 30, sanitize_overflow=False)
    s = rest.to(tl.float32) * 4.656612873077393e-10
    square = s * s
    sine = tl.math.fma(square, -0.5890786647796631, 2.549767255783081)
    sine = tl.math.fma(sine, square, -5.167707920074463)
    sine = s * tl.math.fma(sine, square, 3.1415927410125732)
    cosine = tl.math.fma(square, 0.23146937787532806, -1.3350635766983032)
    cosine = tl.math.fma(cosine, square, 4.058708190917969)
    cosine = tl.math.fma(cosine, square, -4.934802055358887)
    cosine = tl.math.fma(square, cosine, 1.0)
    swap = (quarter & 1) != 0
    turned_sine = tl.where(swap, cosine, sine)
    turned_cosine = tl.where(swap, sine, cosine)
    # a sign is flipped by its bit: sine in the half turns 2 and 3, cosine in 1 and 2
    sine = (turned_sine.to(tl.int32, bitcast=True) ^ ((quarter & 2) << 30)).to(tl.float32, bitcast=True)
    cosine = (turned_cosine.to(tl.int32, bitcast=True) ^ (((quarter + 1) & 2) << 30)).to(tl.float32, bitcast=True)
    return sine, cosine


@triton.jit
def box_muller(radius_word, angle_word):
    """Two unit normals from two words: sqrt(-2 ln u) (cos pi t, sin pi t), u = (w0 + 1/2) / 2^32, t = w1 / 2^31."""
    uniform = tl.math.fma(radius_word.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    radius = tl.math.sqrt_rn(log_unit(uniform) * -2.0)
    sine, cosine = sincos_pi(angle_word)
    return radius * cosine, radius * sine


@triton.jit
def normal_quads(quad, seed, noise_id, stream):
    """The normals of elements 4q .. 4q+3 for an int64 block [Q] of quads: fp32 [Q, 2, 2], element order."""
    w0, w1, w2, w3 = philox_words(quad, seed, noise_id, stream)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return tl.join(tl.join(n0, n2), tl.join(n1, n3))


@triton.jit
def normal_elements(element, seed, noise_id, stream):
    """The normal of each element of an int64 block in any order: one Philox call each, so four times the work."""
    w0, w1, w2, w3 = philox_words(element >> 2, seed, noise_id, stream)
    upper = (element & 2) != 0
    even, odd = box_muller(tl.where(upper, w2, w0), tl.where(upper, w3, w1))
    return tl.where((element & 1) != 0, odd, even)


@triton.jit
def draw_tile(start, local, seed, noise_id, stream, pixels, CHANNELS: tl.constexpr, DRAW: tl.constexpr):
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
