"""Rows that go from the network to the kernel directly, and the way around for outputs that are not like the last."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff as fd

pytestmark = pytest.mark.skipif(not fd.backends()["cpp"].ok, reason="no compiled extension")

SHAPE = (2, 3, 6, 6)


class Changing:
    """A network whose outputs are changed in the calls that `change` names."""

    def __init__(self, change: dict[int, Any]) -> None:
        self.calls, self.change = 0, change

    def __call__(self, x: Tensor, t: Tensor, **cond: Tensor) -> Any:
        output = torch.tanh(x) * 0.5
        self.calls += 1
        return self.change.get(self.calls - 1, lambda output: output)(output)


def sample(change: dict[int, Any], **more: Any) -> Tensor:
    net = Changing(change)
    model = fd.Denoiser(net, fd.schedules.linear(), "eps")
    drawn = fd.sample(model, SHAPE, solver="dpmpp_2m", steps=8, backend="cpp", **more)
    assert net.calls == 8
    return drawn


@pytest.mark.parametrize(
    "change",
    [
        lambda output: output.contiguous(memory_format=torch.channels_last),
        lambda output: torch.nn.Parameter(output),
        lambda output: (output, None),
    ],
    ids=["channels_last", "parameter", "tuple"],
)
@pytest.mark.parametrize("rows", [range(8), [3], [0], [4, 5, 7]], ids=str)
def test_a_network_may_return_its_outputs_in_another_form(change: Any, rows: Any) -> None:
    assert torch.equal(sample(dict.fromkeys(rows, change)), sample({}))


def test_and_in_another_dtype() -> None:
    half = {i: lambda output: output.half().float() for i in (2, 3, 6)}
    assert torch.equal(sample({i: lambda output: output.half() for i in half}), sample(half))


@pytest.mark.parametrize("row", [0, 1, 5, 7])
def test_errors_name_the_row_and_the_sample(row: int) -> None:
    def broken(output: Tensor) -> Tensor:
        output[1, 0, 0, 0] = float("nan")
        return output

    with pytest.raises(FloatingPointError, match=rf"inf or nan at row {row} of 8 \(sample 1, time="):
        sample({row: broken})
    with pytest.raises(ValueError, match=r"returned shape \(1, 3, 6, 6\) for an input of shape \(2, 3") as refused:
        sample({row: lambda output: output[:1]})
    assert refused.value.__context__ is None
    with pytest.raises(TypeError, match="returned torch.float64 on cpu, expected float32"):
        sample({row: lambda output: output.double()})


def test_the_network_s_own_value_error_is_its_own() -> None:
    def fail(output: Tensor) -> Tensor:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="^mine$"):
        sample({4: fail})


def test_guidance_that_is_on_in_some_rows_asks_for_both_branches_there_alone() -> None:
    plan = fd.plan("ddim", fd.schedules.linear(), 8)
    seen: list[int] = []

    def net(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(len(x))
        return torch.tanh(x) * (0.4 + 0.1 * y.view(-1, 1, 1, 1))

    labels, none = {"y": torch.ones(2)}, {"y": torch.zeros(2)}
    off = [replace(row, gain=0.0) if i in (1, 2, 6) else row for i, row in enumerate(plan.rows)]
    plan = replace(plan, rows=tuple(off))
    drawn = []
    # a parameter takes the longer way in every row
    for form in (lambda output: output, torch.nn.Parameter):
        seen.clear()
        model = fd.Denoiser(lambda x, t, y, form=form: form(net(x, t, y)), fd.schedules.linear(), "eps")
        drawn.append(fd.Sampler(plan, model, "cpp").sample(SHAPE, cond=labels, uncond=none, guidance=3.0))
        assert seen == [2, 2, 4, 4, 4, 2, 4, 4]
    assert torch.equal(*drawn)


def test_seconds_in_the_model_are_counted_in_every_row() -> None:
    def slow(x: Tensor, t: Tensor) -> Tensor:
        time.sleep(0.01)
        return x * 0.1

    plan = fd.plan("ddim", fd.schedules.linear(), 5)
    sampler = fd.Sampler(plan, fd.Denoiser(slow, fd.schedules.linear(), "eps"), "cpp")
    sampler.sample(SHAPE)
    assert sampler.last_run is not None and sampler.last_run.model_seconds is not None
    assert 0.05 <= sampler.last_run.model_seconds <= sampler.last_run.seconds
