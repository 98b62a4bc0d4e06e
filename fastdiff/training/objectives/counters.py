"""What a training draw is made of: a key and uniform numbers, from the counters of engine.noise.

A draw is named by (seed, step): seed is the global index of a sample mixed with the run's seed, step counts draws. It
depends neither on the batch, nor on a sample's place in it, nor on the number of processes.
May import: the table's layout, engine.noise, engine.train_draws.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.compiler.layout import STREAM_TRAINING
from fastdiff.engine import train_draws
from fastdiff.engine.noise import philox_block
from fastdiff.engine.train_draws import Rows

_UNIFORMS = (2, 3)  # ids of the uniforms of a draw; 0 and 1 are those of its two unit noises
_KEY = 0xFFFFFFFF  # the id that keys themselves are drawn under, with the step where a noise has its element


def draws(seeds: Tensor, step: int) -> tuple[Tensor, NDArray[np.float64]]:
    """`keys(seeds, step)` and the `uniforms` of those, by the extension where there is one: the same numbers."""
    if train_draws.ready():
        found, numbers = train_draws.uniforms(_checked(seeds), _unsigned(step))
        return found, numbers.numpy()
    key = keys(_checked(seeds).numpy(), step)
    return torch.from_numpy(key), uniforms(key)


def rows(given: Rows, seeds: Tensor, step: int, flip: bool, drop_label: float) -> tuple[Tensor, ...]:
    """What the `draws` choose from the rows, see engine.train_draws."""
    return train_draws.rows(given, _checked(seeds), _unsigned(step), flip, drop_label)


def keys(seeds: NDArray[np.int64], step: int) -> NDArray[np.int64]:
    """The 64-bit key of each sample's draw: int64 [B] from int64 [B] and 0 <= step < 2^64."""
    words = _words(seeds, _unsigned(step), (_KEY,))
    return np.ascontiguousarray(words[:, 0, :2]).view(np.int64)[:, 0]


def uniforms(key: NDArray[np.int64]) -> NDArray[np.float64]:
    """[B, 4] uniform numbers within (0, 1), 52 bits each: the level's, one unused, flip's and the label's."""
    bits = _words(key, 0, _UNIFORMS).reshape(len(key), 8).view(np.uint64)
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _checked(seeds: Tensor) -> Tensor:
    if seeds.dtype != torch.int64 or seeds.dim() != 1:
        raise ValueError(f"seeds must be int64 [batch], got {seeds.dtype} {list(seeds.shape)}")
    return seeds


def _unsigned(step: int) -> int:
    if not 0 <= step < 2**64:
        raise ValueError(f"step must be an unsigned 64-bit integer, got {step}; count draws from 0")
    return step


def _words(key: NDArray[np.int64], step: int, numbers: tuple[int, ...]) -> NDArray[np.uint32]:
    """[B, len(numbers), 4] words of the counters (step, number, training stream), little end first."""
    halves = np.empty((len(key), len(numbers), 2), dtype=np.uint32)
    halves[:] = np.ascontiguousarray(key, dtype="<i8").view("<u4").reshape(-1, 1, 2)
    counter = np.empty((len(key), len(numbers), 4), dtype=np.uint32)
    counter[:, :, 0], counter[:, :, 1] = step & 0xFFFFFFFF, step >> 32
    counter[:, :, 2], counter[:, :, 3] = numbers, STREAM_TRAINING
    return philox_block(counter.reshape(-1, 4), halves.reshape(-1, 2)).reshape(counter.shape)
