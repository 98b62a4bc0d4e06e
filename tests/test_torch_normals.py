"""The extension draws torch's normals: every bit, and the generator's state after, on every instruction set."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from instruction_sets import INSTRUCTION_SETS, best_instruction_set  # noqa: F401
from torch import Tensor

from fastdiff.engine import native, torch_normals

Array = np.ndarray[Any, np.dtype[np.uint32]]


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32)


def pair(seed: int) -> tuple[torch.Generator, torch.Generator]:
    return torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)


def test_on_this_machine_it_is_exact() -> None:
    """Torch's wheels for x86 CPUs with AVX2: one that rounds otherwise shows here; pictures would only be slower."""
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert torch_normals.is_exact()


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("count", [16, 17, 31, 623, 624, 625, 640, 1248, 5003, 1 << 16])
def test_bits_and_state(isa: int, count: int) -> None:
    """Three draws in a row, so that they begin anywhere in the generator's turn, also after an odd number of words."""
    native.load().fastdiff_cpu_isa(isa)
    theirs, ours = pair(count)
    for skipped in (0, 3, 1):
        for generator in (theirs, ours):
            torch.empty(skipped, dtype=torch.int32).random_(generator=generator)
        want = torch.empty(count).normal_(generator=theirs)
        got = torch.empty(count)
        torch_normals._draw(got, ours)
        assert torch.equal(bits(got), bits(want))
        assert torch.equal(ours.get_state(), theirs.get_state())


def untempered(words: Array) -> Array:
    """The state words whose tempering gives these: mt19937's four shifts and masks undone, the last one first."""
    y = words ^ (words >> 18)
    y ^= (y << 15) & np.uint32(0xEFC60000)
    found = y.copy()
    for _ in range(4):  # seven more bits are right each time
        found = y ^ ((found << 7) & np.uint32(0x9D2C5680))
    return found ^ (found >> 11) ^ (found >> 22)


@pytest.mark.slow  # 2^24 of each, a few seconds
def test_every_uniform_torch_can_draw() -> None:
    """All 2^24 radii and all 2^24 angles, laid into the generator's state: log, sine and cosine have torch's bits."""
    library, generator, pairs = native.load(), torch.Generator(), 304
    state = generator.get_state()
    fields, words = state[8:24].view(torch.int32), state[24:5016].view(torch.int64)
    radii = np.arange(1 << 24, dtype=np.uint32)
    both = np.stack([radii, radii * np.uint32(0x9E3779B1) & np.uint32(0xFFFFFF)])
    both = np.pad(both, ((0, 0), (0, -both.shape[1] % pairs)), mode="edge")
    stream = torch.from_numpy(untempered(both.reshape(2, -1, 8).swapaxes(0, 1).reshape(-1)).astype(np.int64))
    got, want = torch.empty(2 * pairs), torch.empty(2 * pairs)
    wrong = torch.zeros((), dtype=torch.int64)
    for part in stream.view(-1, 2 * pairs):
        words[1 : 1 + 2 * pairs] = part
        fields[0], fields[2], fields[3] = 624, 1, 0
        generator.set_state(state)
        want.normal_(generator=generator)
        start = state.data_ptr()
        assert library.fastdiff_torch_normal(start, state.numel(), got.numel(), got.data_ptr(), start) == 0
        wrong += (bits(got) != bits(want)).sum()
    assert int(wrong) == 0


def test_states_laid_by_hand() -> None:
    """The words of `untempered` are the ones that are drawn: uniforms of known size, one in each place."""
    generator = torch.Generator()
    state = generator.get_state()
    wanted = (np.arange(623, dtype=np.uint32) * 26_927) & np.uint32(0xFFFFFF)
    state[24:5016].view(torch.int64)[1:] = torch.from_numpy(untempered(wanted).astype(np.int64))
    state[8:24].view(torch.int32)[[0, 2]] = torch.tensor([624, 1], dtype=torch.int32)
    generator.set_state(state)
    assert torch.equal(torch.rand(623, generator=generator), torch.from_numpy(wanted * np.float32(2**-24)))


def test_extremes() -> None:
    """A word of zeros is a radius of 0, and one of ones the largest: sqrt(-2 log 2^-24)."""
    generator, out = torch.Generator(), torch.empty(16)
    for word, radius in ((0, 0.0), (0xFFFFFF, math.sqrt(48 * math.log(2)))):
        state = generator.get_state()
        words = np.array([word] * 8 + [0] * 8, dtype=np.uint32)
        state[24:5016].view(torch.int64)[1:17] = torch.from_numpy(untempered(words).astype(np.int64))
        state[8:24].view(torch.int32)[[0, 2]] = torch.tensor([624, 1], dtype=torch.int32)
        generator.set_state(state)
        torch_normals._draw(out, generator)
        assert out[:8].tolist() == pytest.approx([radius] * 8, rel=1e-6) and out[8:].tolist() == [0.0] * 8


def test_what_it_leaves_to_torch() -> None:
    """Other dtypes, small and strided tensors: the same numbers all the same."""
    for out in (
        torch.empty(100),
        torch.empty(8192, dtype=torch.float64),
        torch.empty(8192, dtype=torch.bfloat16),
        torch.empty(128, 128).t(),
    ):
        theirs, ours = pair(4)
        want = torch.empty_like(out).normal_(generator=theirs)
        assert torch_normals.fill(out, ours) is out
        assert torch.equal(out, want) and torch.equal(ours.get_state(), theirs.get_state())


def test_a_cached_normal_is_kept() -> None:
    """A small double draw leaves one normal behind in the generator; drawing many in between keeps it there."""
    theirs, ours = pair(9)
    for generator in (theirs, ours):
        torch.empty(3, dtype=torch.float64).normal_(generator=generator)
    torch.empty(8192).normal_(generator=theirs)
    torch_normals.fill(torch.empty(8192), ours)
    assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize("count", [64, 4096, 5003, 1 << 15])
def test_skipped_normals(count: int) -> None:
    theirs, ours = pair(count)
    for _ in range(3):
        torch.empty(count).normal_(generator=theirs)
        torch_normals.skip(torch.empty(count), ours)
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_the_global_generator() -> None:
    torch.manual_seed(6)
    want = torch.randn(2, 3, 64, 64), torch.get_rng_state()
    torch.manual_seed(6)
    got = torch_normals.fill(torch.empty(2, 3, 64, 64)), torch.get_rng_state()
    assert all(map(torch.equal, got, want))


def test_threads_that_share_a_generator_never_draw_the_same_numbers() -> None:
    """Whoever comes first, all numbers together are those of one stream."""
    shared, alone = pair(12)
    count, each = 8192, 40
    drawn: list[Tensor] = []

    def work(draw) -> None:
        for _ in range(each):
            drawn.append(draw(torch.empty(count)))

    threads = [threading.Thread(target=work, args=(lambda out: torch_normals.fill(out, shared),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    want = {torch.empty(count).normal_(generator=alone).numpy().tobytes() for _ in range(each * len(threads))}
    assert {part.numpy().tobytes() for part in drawn} == want
    assert torch.equal(shared.get_state(), alone.get_state())


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [(8, 0, "does not fit"), (8, 700, "does not fit"), (16, 600, "does not fit")],
    ids=["no word left", "too many left", "a place that is not its own"],
)
def test_a_state_that_is_none(at: int, value: int, words: str) -> None:
    class Broken:
        def __init__(self) -> None:
            self.state = torch.Generator().get_state()
            self.state[8:12].view(torch.int32)[0] = 5
            self.state[at : at + 4].view(torch.int32)[0] = value

        def get_state(self) -> Tensor:
            return self.state

    with pytest.raises(RuntimeError, match=words):
        torch_normals._draw(torch.empty(8192), Broken())  # type: ignore[arg-type]


def test_another_default_dtype() -> None:
    expected = torch.empty(5000, dtype=torch.float32).normal_(generator=torch.Generator().manual_seed(3))
    for dtype in (torch.float64, torch.bfloat16):
        torch_normals.is_exact.cache_clear()
        torch.set_default_dtype(dtype)
        try:
            drawn = torch_normals.fill(torch.empty(5000, dtype=torch.float32), torch.Generator().manual_seed(3))
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(drawn, expected) and torch_normals.is_exact()
