"""Draws by the extension and without it are the same, whatever torch's defaults are and whoever wrote the times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdiff.engine import backends, train_draws
from fastdiff.process.schedules import Schedule
from fastdiff.training import objectives
from fastdiff.training.objectives import Objective, times
from fastdiff.training.objectives.times import Array

SEEDS = torch.arange(40)


@pytest.fixture
def same(monkeypatch: pytest.MonkeyPatch) -> Callable[[Objective], objectives.Draw]:
    """The draw of SEEDS, which is held to be the one that is made without the extension."""

    def drawn(objective: Objective) -> objectives.Draw:
        found = objective.draw(SEEDS, 3)
        with monkeypatch.context() as without:
            without.setattr(train_draws.backends, "probe", lambda: {"cpp": backends.Backend(False, ())})
            expected = objective.draw(SEEDS, 3)
        for name, tensor in vars(expected).items():
            got = getattr(found, name)
            assert (got.dtype, got.device) == (tensor.dtype, tensor.device), name
            assert torch.equal(got, tensor), name
        return found

    return drawn


@pytest.fixture(params=["float64", "meta"])
def default(request: pytest.FixtureRequest) -> Iterator[None]:
    """Another dtype, or another device, than those of a program that says nothing."""
    if request.param == "float64":
        torch.set_default_dtype(torch.float64)
    else:
        torch.set_default_device("meta")
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("name", ["ddpm", "edm"])
def test_defaults_of_torch_are_not_those_of_a_draw(
    name: str, default: None, same: Callable[..., objectives.Draw]
) -> None:
    draw = same(objectives.get(name))
    assert draw.importance.dtype == torch.float32 and draw.key.device.type == "cpu"


def test_any_truth_mirrors(same: Callable[..., objectives.Draw]) -> None:
    assert 0 < same(objectives.get("ddpm", flip=np.bool_(True))).table[:, 6].sum() < len(SEEDS)


@dataclass(frozen=True)
class Late(times.Uniform):
    """Draws otherwise than the class whose choices it has."""

    def at(self, u: Array, schedule: Schedule) -> Array:
        return 900.0 + np.floor(10 * u)


@dataclass(frozen=True)
class Weighed(times.Discrete):
    """Weighs the losses."""

    def importance(self, time: Array, schedule: Schedule) -> Array:
        return 1 / (1 + time)


@dataclass(frozen=True)
class Whole(times.Times):
    """Says its choices as integers, of which every other one lies between."""

    name: ClassVar[str] = "whole"

    def at(self, u: Array, schedule: Schedule) -> Array:
        chosen: Array = self.choices(schedule)[np.floor(u * 10).astype(np.int64)]
        return chosen

    def choices(self, schedule: Schedule) -> Array:
        return np.arange(20)[::2]  # type: ignore[return-value]


def test_times_of_ones_own(same: Callable[..., objectives.Draw]) -> None:
    assert same(objectives.get("ddpm", times=Late())).time.min() >= 900
    weighed = same(objectives.get("ddpm", times=Weighed((3.0, 7.0))))
    assert sorted(set(weighed.importance.tolist())) == [0.125, 0.25] and torch.equal(weighed.importance, weighed.weight)
    assert sorted(set(same(objectives.get("ddpm", times=Whole())).time.tolist())) == [2.0 * i for i in range(10)]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_draw_whose_tensors_have_no_memory_keeps_none_for_later() -> None:
    objective = objectives.get("ddpm", flip=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert objective.draw(SEEDS, 3).table.shape == (len(SEEDS), 8)
    found, expected = (vars(o.draw(SEEDS, 3)) for o in (objective, objectives.get("ddpm", flip=True)))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace` is deprecated")
def test_a_trace_holds_the_draw_and_not_what_lay_in_its_memory_before() -> None:
    objective, none = objectives.get("ddpm"), torch.zeros(len(SEEDS))
    traced = torch.jit.trace(lambda x: x + objective.draw(SEEDS, 3).weight * objective.draw(SEEDS, 3).time, none)
    filled = torch.full((1000, len(SEEDS)), torch.nan)
    del filled
    assert torch.equal(traced(none), objective.draw(SEEDS, 3).time)
