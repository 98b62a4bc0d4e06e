"""Outputs whose sign torch has still to turn (its negative bit), of which the elements in memory say nothing."""

from __future__ import annotations

import pytest
import torch
from guided_cases import BACKENDS
from row_cases import Case
from torch import Tensor

import fastdiff as fd
from fastdiff.engine import native, ops

SHAPE = (2, 3, 4, 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("turned", [range(4), range(1, 4), range(2, 3)])
def test_from_whichever_row_it_comes(turned: range, backend: str) -> None:
    calls = 0

    def net(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch._neg_view(-torch.tanh(x)) if calls - 1 in turned else torch.tanh(x)

    plain = fd.Denoiser(lambda x, t: torch.tanh(x), "edm", "x0")
    got = fd.sample(fd.Denoiser(net, "edm", "x0"), SHAPE, "ddim", 4, backend=backend)
    assert torch.equal(got, fd.sample(plain, SHAPE, "ddim", 4, backend=backend)) and calls == 4


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
def test_a_bound_step_reads_what_torch_would(bound_tensors: ops.StepTensors) -> None:
    step, state, row = native.bind(bound_tensors, "cpp"), bound_tensors.state, bound_tensors.row
    before, output = state.clone(), bound_tensors.model_out.clone()
    found = []
    for given in (output, torch._neg_view(-output), -output):
        state.copy_(before)
        row.zero_()
        step(given)
        found.append(state.clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.fixture
def bound_tensors() -> ops.StepTensors:
    return Case(shape=(70,), batch=2, rows=1, registers=3, terms=0, seed=1).tensors()  # a row that reads F
