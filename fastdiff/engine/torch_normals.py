"""Torch's own normals on a CPU, to the bit, in about a third of the time torch takes.

May import: torch, errors, native. Torch runs its generator one word at a time; csrc/mersenne.h runs it on whole
registers. Torch's bits depend on how torch was built, so the first use compares the two on 2^17 normals: where they
differ (another machine, another compiler) torch draws itself.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.engine import native
from fastdiff.errors import BackendUnavailable

SMALLEST = 4096  # below this many normals torch is as quick as the way around it
TRIED = 1 << 17
_lock = threading.Lock()


def fill(out: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """`out.normal_(generator=generator)`: the same bits, and the generator is left where torch leaves it.

    Quicker for contiguous fp32 on a CPU, otherwise torch's own. Threads may share a generator for draws made here;
    a draw that torch itself makes from it in another thread at the same moment may give the same numbers.
    """
    filler(out, generator)()
    return out


def filler(out: Tensor, generator: torch.Generator | None = None) -> Callable[[], Any]:
    """What does as `fill(out, generator)` each time it is called, the choice of how being made."""
    source = _quick(out, generator)
    if source is None:
        return functools.partial(out.normal_, generator=generator)
    return functools.partial(_draw, out, source)


def skip(out: Tensor, generator: torch.Generator | None = None) -> None:
    """Leave the generator where `fill(out, generator)` does, for normals that nobody reads; out is undefined then."""
    source = _quick(out, generator)
    if source is None:
        out.normal_(generator=generator)
    else:
        _draw(out, source, keep=False)


def _quick(out: Tensor, generator: torch.Generator | None) -> torch.Generator | None:
    """The generator to draw from, or None where torch draws itself."""
    if out.dtype is not torch.float32 or not out.is_cpu or out.numel() < SMALLEST or not out.is_contiguous():
        return None
    source = torch.default_generator if generator is None else generator
    return source if source.device.type == "cpu" and is_exact() else None


@functools.cache
def is_exact() -> bool:
    """Whether this machine's torch draws what the extension draws; False without the extension."""
    try:
        native.load()
    except BackendUnavailable:
        return False
    ours, theirs = torch.Generator("cpu"), torch.Generator("cpu")
    with torch.inference_mode(False):
        for count in (TRIED, SMALLEST + 5):
            drawn, expected = (torch.empty(count, dtype=torch.float32, device="cpu") for _ in range(2))
            _draw(drawn, ours)
            if not torch.equal(drawn.view(torch.int32), expected.normal_(generator=theirs).view(torch.int32)):
                return False
    return torch.equal(ours.get_state(), theirs.get_state())


def _draw(out: Tensor, source: torch.Generator, keep: bool = True) -> None:
    library, count, to = native.load(), out.numel(), out.data_ptr() if keep else None
    with _lock:
        after = _after()
        while True:
            state = source.get_state()
            before = state.data_ptr()
            code = library.fastdiff_torch_normal(before, state.numel(), count, to, after.data_ptr())
            if code:
                raise native.failed("torch_normals", code)
            # a thread that draws with torch may have come in between: its numbers are not to be drawn twice
            now = source.get_state()
            if library.fastdiff_torch_generator_unmoved(before, now.data_ptr()):
                source.set_state(after)
                return


@functools.cache
def _after() -> Tensor:
    """Where the extension leaves the state after a draw, which one thread at a time makes."""
    with torch.inference_mode(False):
        return torch.Generator("cpu").get_state()
