"""Counter-based normals: the NumPy reference that every executor must equal.

A normal is named, not stored: z = N(seed, element, id, stream). Key = the sample's 64-bit seed,
counter = (element // 4, id, stream), so an image depends on its seed alone.
May import: NumPy only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = np.uint64(0xFFFFFFFF)

# minimax fits: log(1+f) = f - f^2/2 + f^3 L(f); sin(pi s) = s S(s^2); cos(pi s) = 1 + s^2 C(s^2)
_LOG = (
    0.3333331048488617, -0.24999986588954926, 0.20002219080924988, -0.16669245064258575,
    0.14218780398368835, -0.1238449439406395, 0.11872309446334839, -0.11788799613714218,
    0.06915578246116638,
)  # fmt: skip
_SIN = (3.1415927410125732, -5.167707920074463, 2.549767255783081, -0.5890786647796631)
_COS = (-4.934802055358887, 4.058708190917969, -1.3350635766983032, 0.23146937787532806)


def philox_block(counter: ArrayLike, key: ArrayLike) -> NDArray[np.uint32]:
    """Philox-4x32-10 (Salmon et al. 2011, Random numbers: as easy as 1, 2, 3).

    counter: [..., 4] uint32 words; key: [..., 2] uint32 words. Returns [..., 4] uint32 words.
    """
    word = [np.asarray(counter)[..., i].astype(np.uint64) for i in range(4)]
    key_word = [np.asarray(key)[..., i].astype(np.uint64) for i in range(2)]
    for _ in range(10):
        even, odd = word[0] * _MULTIPLIERS[0], word[2] * _MULTIPLIERS[1]
        word = [
            (odd >> np.uint64(32)) ^ word[1] ^ key_word[0],
            odd & _MASK,
            (even >> np.uint64(32)) ^ word[3] ^ key_word[1],
            even & _MASK,
        ]
        key_word = [(k + np.uint64(w)) & _MASK for k, w in zip(key_word, _WEYL, strict=True)]
    return np.stack(np.broadcast_arrays(*word), axis=-1).astype(np.uint32)


def philox(seed: int, quads: ArrayLike, noise_id: int, stream: int) -> NDArray[np.uint32]:
    """The four words of each quad (four consecutive elements) of one noise tensor: [..., 4] uint32."""
    quad = np.asarray(quads, dtype=np.uint64)
    counter = np.stack(
        np.broadcast_arrays(quad & _MASK, quad >> np.uint64(32), np.uint64(noise_id), np.uint64(stream)), axis=-1
    )
    bits = seed & 0xFFFFFFFFFFFFFFFF
    return philox_block(counter, np.array([bits & 0xFFFFFFFF, bits >> 32], dtype=np.uint64))


def normal(seed: int, count: int, noise_id: int, stream: int) -> NDArray[np.float32]:
    """`count` unit normals of one sample, element order, fp32 [count]: Box-Muller on Philox words.

    n0 + i n1 = sqrt(-2 ln u) exp(i pi t), u = (w0 + 1/2) / 2^32, t = int32(w1) / 2^31.
    """
    words = philox(seed, np.arange((count + 3) // 4), noise_id, stream)
    pairs = words.reshape(-1, 2)
    return box_muller(pairs[:, 0], pairs[:, 1]).reshape(-1)[:count]


def box_muller(radius_word: NDArray[np.uint32], angle_word: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Two normals from two words, fp32 [n, 2], in the fixed order of fused operations all executors share."""
    uniform = _fma(radius_word.astype(np.float32), np.float32(2.0**-32), np.float32(2.0**-33))
    radius = np.sqrt(np.float32(-2.0) * _log(uniform))
    sine, cosine = _sincos_pi(angle_word.view(np.int32))
    return np.stack([radius * cosine, radius * sine], axis=-1)


def _fma(a: ArrayLike, b: ArrayLike, c: ArrayLike) -> NDArray[np.float32]:
    # the product of two fp32 numbers is exact in float64, so only the sum rounds
    return (np.asarray(a, np.float64) * np.asarray(b, np.float64) + np.asarray(c, np.float64)).astype(np.float32)


def _horner(coefficients: tuple[float, ...], x: NDArray[np.float32]) -> NDArray[np.float32]:
    total = np.full_like(x, np.float32(coefficients[-1]))
    for coefficient in reversed(coefficients[:-1]):
        total = _fma(total, x, np.float32(coefficient))
    return total


def _log(u: NDArray[np.float32]) -> NDArray[np.float32]:
    bits = u.view(np.int32)
    exponent = (bits - np.int32(0x3F3504F3)) >> np.int32(23)
    f = (bits - (exponent << np.int32(23))).view(np.float32) - np.float32(1.0)
    scale = exponent.astype(np.float32)
    square = f * f
    tail = (square * f) * _horner(_LOG, f)
    tail = _fma(scale, np.float32(-2.12194440e-4), tail)
    tail = _fma(np.float32(-0.5), square, tail)
    return _fma(scale, np.float32(0.693359375), f + tail)


def _sincos_pi(word: NDArray[np.int32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """sin and cos of pi * word / 2^31, by the nearest quarter turn k and the rest |s| <= 1/4."""
    wide = word.astype(np.int64)
    quarter = (wide + (1 << 29)) >> 30
    rest = (wide - (quarter << 30)).astype(np.float32) * np.float32(2.0**-31)
    square = rest * rest
    sine = rest * _horner(_SIN, square)
    cosine = _fma(square, _horner(_COS, square), np.float32(1.0))
    sine, cosine = np.where(quarter & 1, cosine, sine), np.where(quarter & 1, -sine, cosine)
    flip = np.where(quarter & 2, np.float32(-1.0), np.float32(1.0))
    return sine * flip, cosine * flip
