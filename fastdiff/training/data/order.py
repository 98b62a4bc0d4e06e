"""Which image and which seed the global sample `g` has: pure functions of (run seed, g), nothing to store or to share.

Sample g is the image at place g mod N of epoch g div N. Any process of any number of them computes its own share, and
a resume in mid-epoch is a matter of going on at the next g. May import: NumPy only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_WEYL = np.uint64(0x9E3779B97F4A7C15)


def image_indices(size: int, seed: int, first: int, count: int) -> NDArray[np.int64]:
    """Image of each global sample first .. first + count - 1 of a set of `size`: int64 [count].

    Every epoch is a permutation of its own: a Feistel network on the smallest even number of bits that hold `size`,
    walked along its cycle until it is inside (Black & Rogaway 2002, Ciphers with arbitrary finite domains).
    Raises: ValueError for an empty set or a negative start.
    """
    if size < 1 or first < 0 or count < 0:
        raise ValueError(
            f"image_indices: got size {size}, first {first}, count {count}; expected size >= 1, others >= 0"
        )
    samples = np.arange(first, first + count, dtype=np.uint64)
    epoch, place = samples // np.uint64(size), samples % np.uint64(size)
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    keys = [_mix(_mix(np.uint64((seed + r * int(_WEYL)) & _ALL)) ^ epoch) for r in range(_ROUNDS)]
    value = _feistel(place, half, keys)
    while (outside := value >= size).any():
        value[outside] = _feistel(value[outside], half, [key[outside] for key in keys])
    return value.astype(np.int64)


def sample_seeds(seed: int, first: int, count: int) -> NDArray[np.int64]:
    """Seed of each global sample's noise, level, flip and label drop: int64 [count]."""
    samples = np.arange(first, first + count, dtype=np.uint64)
    return _mix(_mix(np.uint64((seed ^ 0xD1B54A32D192ED03) & _ALL)) + samples * _WEYL).view(np.int64)


_ALL = 2**64 - 1


def _mix(value: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014, Fast splittable pseudorandom number generators)."""
    with np.errstate(over="ignore"):
        z = np.asarray(value, np.uint64) + _WEYL
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)), np.uint64)


def _feistel(value: NDArray[np.uint64], half: np.uint64, keys: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """One pass of the cipher: a bijection of the numbers below 2^(2 half) for each key."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right
