"""A network that is not linear, and a Denoiser of it: for the tests of the sampler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastdiff as fd


def bumpy(x: Tensor, t: Tensor) -> Tensor:
    """A network that treats each sample and element alone, not linear, and depends on the time."""
    return torch.tanh(x) * (1 + 0.1 * t.cos().view(-1, *[1] * (x.dim() - 1)))


@pytest.fixture(name="model")
def bumpy_model() -> fd.Denoiser:
    return fd.Denoiser(bumpy, fd.schedules.edm(), "edm", sigma_data=0.5)
