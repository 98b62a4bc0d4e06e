"""The instruction sets that the C++ executor has on this machine, for tests that go through them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastdiff.engine import eager, native
from fastdiff.errors import BackendUnavailable

NAMES = ("scalar", "avx2", "avx512")


def _there() -> list[int]:
    try:
        choose = native.load().fastdiff_cpu_isa
    except BackendUnavailable:
        return []
    best = choose(-1)
    found = [number for number in range(len(NAMES)) if choose(number) == number]
    choose(best)
    return found


INSTRUCTION_SETS = _there()


def _choose_best() -> None:
    if INSTRUCTION_SETS:
        native.load().fastdiff_cpu_isa(max(INSTRUCTION_SETS))


@pytest.fixture(autouse=True)
def best_instruction_set() -> Iterator[None]:
    """Every test of a file that imports this starts, and leaves the process, with the fastest set there is."""
    _choose_best()
    yield
    _choose_best()


@pytest.fixture(params=[NAMES[number] for number in INSTRUCTION_SETS])
def every_instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each executor of this machine in turn; what trains on a CPU takes the scalar one here too."""
    library, number = native.load(), NAMES.index(request.param)
    assert library.fastdiff_cpu_isa(number) == number
    monkeypatch.setattr(eager, "_there", lambda: True)
    yield
    _choose_best()
