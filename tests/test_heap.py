"""A training run on a CPU keeps the memory it frees."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from fastdiff.training.heap import keep_heap

def faults(rounds=10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        tensors = [torch.ones(12 << 20) for _ in range(2)]
        del tensors
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // rounds

torch.set_num_threads(1)
first = faults()
assert keep_heap()
faults()
print(first, faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_freed_tensors_are_had_again_without_a_page_fault() -> None:
    found = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout.split()
    before, after = map(int, found)
    assert before > 10_000  # two tensors of 48 MiB in pages of 4 KiB are 24,576
    assert after < 100
