"""Launches of the Triton executor: rows and programs, status, rounding, and what only a GPU can show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreted import DEVICE, affine, interpreted  # noqa: F401
from row_cases import Case
from triton_cases import INF, NAN, copy_step, launch, run, run_reference, simple_step

from fastdiff.compiler import layout as at

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy under the interpreter, on inf and NaN


def test_an_idle_sample_is_left_alone() -> None:
    step = Case((3, 4, 4), rows=2).tensors()
    step.row.copy_(torch.tensor([-1, 2, 2**31 - 1]))
    for before, after in zip(step.arguments(), run(step).arguments(), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def test_rows_advance_to_the_end_and_stop() -> None:
    step = simple_step((3, 24, 20), batch=2)
    for _ in range(2):
        step = run(step)
    assert step.row.tolist() == [1, 1]
    assert step.ticket.tolist() == [0, 0]


def test_the_number_of_programs_changes_nothing() -> None:
    step = simple_step((70 * 60,), batch=2)
    outcomes = [run(step, programs=programs) for programs in (1, 3, 9, 100)]
    for got in outcomes:
        assert got.row.tolist() == [1, 1]
        assert got.ticket.tolist() == [0, 0]
        assert torch.equal(got.state, outcomes[0].state)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_status_names_the_first_row_that_is_not_finite(bad: float, dtype: torch.dtype) -> None:
    shape, batch = (3, 20, 21), 5
    coef, ids = (t.repeat(3, 1) for t in (simple_step(shape).coef, simple_step(shape).ids))
    coef[:, at.Q], coef[:, at.GAIN], coef[:, at.OUTPUT + at.OUT_B] = 1.0, 1.0, 0.5
    ids[:, at.FLAGS] = at.READS_MODEL
    ids[1, at.FLAGS] = 0
    model_out = torch.zeros(2 * batch, *shape, dtype=dtype)
    model_out[0, 0, 0, 0] = bad  # sample 0: conditional, first element
    model_out[batch + 1, 2, 19, 20] = bad  # sample 1: unconditional, last element, guided
    model_out[batch + 2, 0, 0, 1] = bad  # sample 2: unconditional, not read at weight 1
    model_out[3, 1, 1, 1] = bad  # sample 3: its row does not read the model
    model_out[4, 2, 2, 2] = bad  # sample 4: already marked
    step = simple_step(
        shape,
        batch,
        coef=coef,
        ids=ids,
        model_out=model_out,
        row=torch.tensor([2, 2, 2, 1, 2], dtype=torch.int32),
        guidance=torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0]),
        status=torch.tensor([-1, -1, -1, -1, 0], dtype=torch.int32),
    )
    got = run(step)
    assert got.status.tolist() == [2, 2, -1, -1, 0] == run_reference(step).status.tolist()
    assert got.state[0, 2].isfinite().all() and got.state[0, 3].isfinite().all()


def test_large_finite_outputs_are_not_reported() -> None:
    """Not even where the difference of the branches or the guided output overflows."""
    model_out = torch.full((2, 5000), 3e38) * torch.tensor([[1.0], [-1.0]])
    step = simple_step((5000,), model_out=model_out, guidance=torch.tensor([2.0]))
    step.coef[0, at.GAIN] = 1.0
    step.ids[:, at.FLAGS] = at.READS_MODEL
    assert run(step).status.tolist() == [-1]


EDGES = torch.tensor(
    [0.0, -0.0, 1.0, 1.00390625, 1.01171875, 1.0039063692092896, -1.00390625, 3.3895314e38, 3.3961775e38, 3.4028235e38,
     1e-40, 9.1835e-41, 1.1754944e-38, 65504.0, 65519.996, 65520.0, 6e-8, 2.9802322e-08, 2.9802326e-08, INF, -INF]
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_model_input_is_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    bits = torch.from_numpy(np.random.default_rng(1).integers(0, 2**32, 3000, dtype=np.uint32).view(np.int32))
    random = bits.view(torch.float32)
    values = torch.cat([EDGES, random])
    step = simple_step(
        tuple(values.shape), state=values.view(1, 1, -1).clone(), model_in=torch.zeros(1, len(values), dtype=dtype)
    )
    step.coef[0, at.NOISE] = 0.0
    got = run(step)
    assert got.model_in is not None
    expected = values.to(dtype)
    assert torch.equal(got.model_in[0].isnan(), expected.isnan())
    finite = ~expected.isnan()
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    nonzero = finite & (values != 0)
    assert torch.equal(got.model_in[0][nonzero].view(integer), expected[nonzero].view(integer))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_widened_exactly(dtype: torch.dtype) -> None:
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()][:: 1 if DEVICE.type == "cuda" else 7]
    step = simple_step((len(values),), model_out=values.view(1, -1), denoised=torch.full((1, len(values)), NAN))
    step.coef[0, [at.Q, at.NOISE]] = torch.tensor([1.0, 0.0])
    step.ids[0, at.FLAGS] = at.READS_MODEL
    got = run(step)
    assert got.denoised is not None
    assert torch.equal(got.denoised[0], values.float())


@pytest.mark.gpu
def test_a_captured_step_replays_every_row() -> None:
    case = Case((4, 32, 32), 3, torch.channels_last, torch.bfloat16, torch.bfloat16)
    step = case.tensors()
    step.state.normal_()
    step.row.zero_()
    eager, captured = copy_step(step, DEVICE), copy_step(step, DEVICE)
    launch(copy_step(step, DEVICE))
    bound = affine.bind(*captured.arguments())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bound(captured.model_out)
    for _ in range(5):
        launch(eager)
        graph.replay()
    torch.cuda.synchronize()
    assert captured.row.tolist() == [4, 4, 4]
    for one, other in zip(eager.arguments(), captured.arguments(), strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_rows_advance_once_under_contention() -> None:
    """Thousands of programs of one sample, many launches: no program may see the advanced row, no arrival be lost."""
    length, launches = 2**22 + 4, 50
    step = copy_step(simple_step((length,), batch=2), DEVICE)
    step.coef, step.ids = step.coef.repeat(launches, 1), step.ids.repeat(launches, 1)
    step.coef[:, at.NOISE] = 0.0
    step.coef[:, at.OUTPUT + at.OUT_K] = 0.0
    step.coef[:, at.Q] = 1.0
    step.coef[:, at.OUTPUT + at.OUT_B] = 1.0
    step.coef[:, at.OUTPUT + at.OUT_DELTA] = 0.0
    step.coef[:, at.CLAMP_LO] = torch.arange(launches, device=DEVICE, dtype=torch.float32)
    step.ids[:, at.FLAGS] = at.READS_MODEL
    for done in range(launches):
        launch(step, programs=2**20)
        assert bool((step.state == done).all()), "a program saw the next row"
        assert step.row.tolist() == [done + 1] * 2 and step.ticket.tolist() == [0, 0]


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    length = 2**30
    if torch.cuda.mem_get_info()[0] < 22 * 2**30:
        pytest.skip("needs 22 GiB on the CUDA device")
    small = simple_step((8,))
    small.ids[0, [at.SLOT, at.DEST]] = torch.tensor([2, 3], dtype=torch.int32)
    small.coef[0, at.NOISE] = 0.0
    step = copy_step(small, DEVICE)
    step.state = torch.zeros(4, 1, length, device=DEVICE)
    step.state[2, 0] = torch.arange(length, device=DEVICE, dtype=torch.float32)
    step.model_out = torch.zeros(1, length, device=DEVICE, dtype=torch.float16)
    launch(step)
    assert torch.equal(step.state[3], step.state[2])
