"""The noise of the Triton executor: Philox words bit for bit, normals, and that a sample depends on its seed alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from interpreted import DEVICE, interpreted, jit, philox_module  # noqa: F401
from triton_cases import NAN, run, simple_step

from fastdiff.compiler import layout as at
from fastdiff.engine import noise as counter_noise

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy under the interpreter, on inf and NaN

philox, philox_words = philox_module.philox, philox_module.philox_words
normal_quads, normal_elements = philox_module.normal_quads, philox_module.normal_elements


@jit
def load_word(pointer):
    return tl.load(pointer).to(tl.uint32, bitcast=True)


@jit
def store_words(pointer, w0, w1, w2, w3):
    tl.store(pointer, w0.to(tl.int32, bitcast=True))
    tl.store(pointer + 1, w1.to(tl.int32, bitcast=True))
    tl.store(pointer + 2, w2.to(tl.int32, bitcast=True))
    tl.store(pointer + 3, w3.to(tl.int32, bitcast=True))


@jit
def block_kernel(counter, key, words):
    lane = tl.arange(0, 4)
    c, k = counter + 4 * lane, key + 2 * lane
    w0, w1, w2, w3 = philox(
        load_word(c), load_word(c + 1), load_word(c + 2), load_word(c + 3), load_word(k), load_word(k + 1)
    )
    store_words(words + 4 * lane, w0, w1, w2, w3)


@jit
def words_kernel(seed, first, noise_id, stream, words, QUADS: tl.constexpr):
    lane = tl.arange(0, QUADS)
    w0, w1, w2, w3 = philox_words(tl.load(first) + lane, tl.load(seed), tl.load(noise_id), tl.load(stream))
    store_words(words + 4 * lane, w0, w1, w2, w3)


@jit
def normals_kernel(seed, noise_id, stream, by_quad, by_element, QUADS: tl.constexpr):
    quad = tl.arange(0, QUADS).to(tl.int64)
    element = tl.arange(0, 4 * QUADS).to(tl.int64)
    key = tl.load(seed)
    name = tl.load(noise_id)
    branch = tl.load(stream)
    tl.store(by_quad + element, tl.reshape(normal_quads(quad, key, name, branch), [4 * QUADS]))
    tl.store(by_element + element, normal_elements(element, key, name, branch))


def int32(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.uint32).view(np.int32).copy()).to(DEVICE)


def as_words(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy().view(np.uint32)


# kat_vectors of Random123 (Salmon et al. 2011), philox4x32 with 10 rounds: zero, all ones, the digits of pi
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def test_philox_gives_the_known_answers() -> None:
    known = [*KNOWN, KNOWN[0]]
    words = torch.zeros(4, 4, dtype=torch.int32, device=DEVICE)
    block_kernel[(1,)](int32([c for c, _, _ in known]), int32([k for _, k, _ in known]), words)
    assert as_words(words).tolist() == [answer for _, _, answer in known]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_words_equal_the_reference_bit_for_bit(seed: int) -> None:
    for first, noise_id, stream in [(0, 0, 0), (2**32 - 5, 2**31 - 1, 3), (2**40 + 7, 12345, 1), (99, -1, 2)]:
        words = torch.zeros(16, 4, dtype=torch.int32, device=DEVICE)
        words_kernel[(1,)](
            torch.tensor([seed], device=DEVICE),
            torch.tensor([first], device=DEVICE),
            torch.tensor([noise_id], dtype=torch.int32, device=DEVICE),
            torch.tensor([stream], dtype=torch.int32, device=DEVICE),
            words,
            QUADS=16,
        )
        expected = counter_noise.philox(seed, first + np.arange(16, dtype=np.uint64), noise_id & 0xFFFFFFFF, stream)
        assert np.array_equal(as_words(words), expected)


@pytest.mark.parametrize("seed", [0, -7, 2**62 + 11])
def test_normals_are_within_2_ulp_of_the_reference(seed: int) -> None:
    quads = 1024
    by_quad, by_element = (torch.full((4 * quads,), NAN, device=DEVICE) for _ in range(2))
    normals_kernel[(1,)](
        torch.tensor([seed], device=DEVICE),
        torch.tensor([5], dtype=torch.int32, device=DEVICE),
        torch.tensor([1], dtype=torch.int32, device=DEVICE),
        by_quad,
        by_element,
        QUADS=quads,
    )
    expected = counter_noise.normal(seed, 4 * quads, 5, 1)
    assert torch.equal(by_quad, by_element)
    scale = np.maximum(np.abs(expected), np.float32(1.0))
    assert np.all(np.abs(by_quad.cpu().numpy() - expected) <= 2 * np.spacing(scale))


def test_noise_depends_on_the_seed_alone() -> None:
    """Bitwise: neither batch size nor place, memory format or number of programs changes a sample."""
    shape = (3, 22, 24)
    batch = run(simple_step(shape, 3)).state[0]
    assert torch.equal(run(simple_step(shape, 3, torch.channels_last)).state[0], batch)
    assert torch.equal(run(simple_step(shape, 2)).state[0], batch[:2])
    assert torch.equal(run(simple_step(shape, 3), programs=1).state[0], batch)
    alone = run(simple_step(shape, seed=torch.tensor([42]))).state[0, 0]
    assert torch.equal(alone, batch[2])
    expected = counter_noise.normal(42, alone.numel(), 3, at.STREAM_STEP)
    torch.testing.assert_close(alone.flatten(), torch.from_numpy(expected), rtol=3e-7, atol=3e-7)


def test_pixel_noise_equals_element_noise() -> None:
    """An odd image takes the path that draws every element on its own; the shared quads must give the same image."""
    for shape in ((3, 5, 5), (4, 6, 6), (300, 2, 2)):
        contiguous = run(simple_step(shape)).state
        assert torch.equal(run(simple_step(shape, layout=torch.channels_last)).state, contiguous)
