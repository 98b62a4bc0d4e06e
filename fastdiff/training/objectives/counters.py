"""What a training draw is made of: a key and uniform numbers, from the counters of engine.noise.

A draw is named by (seed, step): seed is the global index of a sample mixed with the run's seed, step counts draws. It
depends neither on the batch, nor on a sample's place in it, nor on the number of processes.
May import: engine.noise, the table's layout.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastdiff.compiler.layout import STREAM_TRAINING
from fastdiff.engine.noise import philox_block

_UNIFORMS = (2, 3)  # ids of the uniforms of a draw; 0 and 1 are those of its two unit noises
_KEY = 0xFFFFFFFF  # the id that keys themselves are drawn under, with the step where a noise has its element

Words = NDArray[np.uint32]


def keys(seeds: NDArray[np.int64], step: int) -> NDArray[np.int64]:
    """The 64-bit key of each sample's draw: int64 [B] from int64 [B] and 0 <= step < 2^64."""
    if not 0 <= step < 2**64:
        raise ValueError(f"step must be an unsigned 64-bit integer, got {step}; count draws from 0")
    words = _words(seeds, (step & 0xFFFFFFFF, step >> 32), _KEY)
    return _join(words[:, 0], words[:, 1]).view(np.int64)


def uniforms(key: NDArray[np.int64]) -> NDArray[np.float64]:
    """[B, 4] uniform numbers within (0, 1), 52 bits each: the level's, one unused, flip's and the label's."""
    words = _words(key[:, None], (0, 0), _UNIFORMS).reshape(len(key), 8)
    bits = _join(words[:, 0::2], words[:, 1::2])
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _words(key: NDArray[np.int64], counter: tuple[int, int], number: ArrayLike) -> Words:
    bits = np.ascontiguousarray(key, dtype=np.int64).view(np.uint64)
    halves = np.stack([bits & np.uint64(0xFFFFFFFF), bits >> np.uint64(32)], axis=-1)
    numbers = np.asarray(number, dtype=np.uint64)
    columns = [np.full_like(numbers, value) for value in counter]
    return philox_block(np.stack([*columns, numbers, np.full_like(numbers, STREAM_TRAINING)], axis=-1), halves)


def _join(low: Words, high: Words) -> NDArray[np.uint64]:
    return low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
