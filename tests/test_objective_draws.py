"""Draws by the extension and without it are the same, whatever torch's defaults are."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from fastdiff.engine import backends, train_draws
from fastdiff.training import objectives
from fastdiff.training.objectives import Objective

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
