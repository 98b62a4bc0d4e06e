"""The row op as torch sees it: opcheck on every CPU executor, and what its checks refuse."""

from __future__ import annotations

import pytest
import torch

import fastdiff as fd
from fastdiff.engine import ops
from fastdiff.engine.buffers import Buffers
from fastdiff.engine.room import Room

EXECUTORS = [name for name in ("reference", "cpp") if fd.backends()[name].ok]


def step_tensors(
    solver: str = "dpmpp_2m_sde", layout: torch.memory_format = torch.contiguous_format
) -> ops.StepTensors:
    """A run of `solver` loaded and stopped before row 3, guided, with noise and history."""
    model = fd.Denoiser(lambda x, t: x, fd.schedules.edm(), "edm", sigma_data=0.5)
    plan = fd.plan(solver, model.schedule, 6, "karras")
    shape = torch.Size((2, 3, 5, 4))
    buffers = Buffers(Room.of(plan, shape, 2, model, layout, keep_denoised=True))
    buffers.start(plan, model, torch.tensor([3, 4]), [2.0, 1.0], None, "state", "white", {}, "reference")
    generator = torch.Generator().manual_seed(0)
    buffers.tensors.state.copy_(torch.randn(buffers.tensors.state.shape, generator=generator))
    buffers.tensors.model_out = torch.randn(4, 3, 5, 4, generator=generator).contiguous(memory_format=layout)
    buffers.tensors.row.fill_(3)
    return buffers.tensors


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck(executor: str, layout: torch.memory_format) -> None:
    tensors = step_tensors(layout=layout)
    torch.library.opcheck(torch.ops.fastdiff.affine_step.default, tensors.arguments(), {"executor": executor})


@pytest.mark.parametrize("executor", EXECUTORS)
def test_bound_step_equals_the_dispatched_op(executor: str) -> None:
    dispatched, bound = step_tensors(), step_tensors()
    ops.affine_step(dispatched, executor)
    ops.bind(bound, executor)(bound.model_out)
    assert torch.equal(dispatched.state, bound.state)
    assert torch.equal(dispatched.model_in, bound.model_in)  # type: ignore[arg-type]
    assert bound.row.tolist() == [4, 4]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"state": torch.zeros(2, 2)}, ValueError, "state must be"),
        ({"state": torch.zeros(2, 2, 5, 4, 3).transpose(2, 4)}, ValueError, "dense registers"),
        ({"model_out": torch.zeros(3, 3, 5, 4)}, ValueError, r"model_out has shape \(3, 3, 5, 4\), expected"),
        ({"model_out": torch.zeros(4, 3, 5, 4).double()}, TypeError, "float64, expected torch.float32 or"),
        ({"model_out": torch.zeros(4, 4, 5, 3).permute(0, 3, 2, 1)}, ValueError, "model_out must be contiguous"),
        ({"model_in": torch.zeros(4, 3, 5, 4, device="meta")}, ValueError, "model_in is on meta"),
        ({"row": torch.zeros(2)}, TypeError, "row has dtype torch.float32, expected torch.int32"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, "seed has shape"),
        ({"guidance": torch.zeros(2, 1)}, ValueError, "guidance has shape"),
        ({"noise": torch.zeros(1, 2, 3, 4, 5)}, ValueError, "noise has shape"),
        ({"coef": torch.zeros(6, 32)}, ValueError, "not one packed plan"),
        ({"coef": torch.zeros(0, 36)}, ValueError, "at least one row"),
        ({"state": torch.zeros(2, 0, 3, 5, 4)}, ValueError, "no elements"),
        ({"coef": torch.zeros(6, 40).double()}, TypeError, "coef and ids must be"),
    ],
)
def test_checks(change: dict[str, torch.Tensor], error: type[Exception], words: str) -> None:
    tensors = step_tensors()
    for name, value in change.items():
        setattr(tensors, name, value)
    with pytest.raises(error, match=words):
        ops.affine_step(tensors, "reference")


def test_unknown_executor() -> None:
    with pytest.raises(ValueError, match="Unknown backend 'cpu'.*'cpp'"):
        ops.affine_step(step_tensors(), "cpu")
