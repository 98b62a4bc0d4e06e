"""The C++ executor's noise: Philox words bit for bit, and normals within 2 ulp."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from instruction_sets import INSTRUCTION_SETS, best_instruction_set  # noqa: F401

from fastdiff.engine import native
from fastdiff.engine import noise as counter_noise


def c_array(call: str, n: int, seed: int, noise_id: int, stream: int, dtype: type) -> np.ndarray:
    out = np.zeros(n, dtype)
    getattr(native.load(), call)(
        ctypes.c_int64(n), ctypes.c_uint64(seed), ctypes.c_uint32(noise_id), ctypes.c_uint32(stream),
        out.ctypes.data_as(ctypes.c_void_p),
    )  # fmt: skip
    return out


@pytest.mark.parametrize(
    ("counter", "key", "words"),  # Random123's known-answer vectors for philox4x32-10
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, words: str) -> None:
    def array(text: str) -> ctypes.Array[ctypes.c_uint32]:
        return (ctypes.c_uint32 * len(text.split()))(*(int(word, 16) for word in text.split()))

    out = array("0 0 0 0")
    native.load().fastdiff_philox_blocks(1, array(counter), array(key), out)
    assert list(out) == list(array(words))


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 12345, 2**64 - 1])
def test_philox_words_equal_the_reference(seed: int) -> None:
    words = c_array("fastdiff_philox", 4000, seed, 2**32 - 1, 3, np.uint32)
    assert np.array_equal(words, counter_noise.philox(seed, np.arange(1000), 2**32 - 1, 3).reshape(-1))


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("n", [1, 5, 64, 1023, 1024, 1025, 100_003])
def test_normals_equal_the_reference(instruction_set: int, n: int) -> None:
    native.load().fastdiff_cpu_isa(instruction_set)
    got = c_array("fastdiff_normal", n, 77, 9, 1, np.float32)
    want = counter_noise.normal(77, n, 9, 1)
    assert np.max(np.abs(got - want)) <= 2 * np.finfo(np.float32).eps


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("first", [2**34 - 64, 2**34 - 4, 2**35 + 8, 2**40 + 4])
def test_counters_beyond_32_bits(instruction_set: int, first: int) -> None:
    library = native.load()
    library.fastdiff_cpu_isa(instruction_set)
    got = np.zeros(300, np.float32)
    library.fastdiff_normal_from(
        ctypes.c_int64(first), ctypes.c_int64(300), ctypes.c_uint64(5), ctypes.c_uint32(1), ctypes.c_uint32(0),
        got.ctypes.data_as(ctypes.c_void_p),
    )  # fmt: skip
    words = counter_noise.philox(5, first // 4 + np.arange(75), 1, 0).reshape(-1, 2)
    want = counter_noise.box_muller(words[:, 0], words[:, 1]).reshape(-1)
    assert np.max(np.abs(got - want)) <= 2 * np.finfo(np.float32).eps
