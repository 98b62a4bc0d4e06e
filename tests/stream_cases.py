"""A network with labels and requests that differ in everything: for the tests of streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff as fd

SHAPE = (3, 6, 5)
# several orders, two-stage, noisy, with a history of model outputs, with draws that are used again
SOLVERS = ("ddim", "heun", "ddpm", "dpmpp_2m", "dpmpp_2s_ancestral", "dpmpp_2m_sde", "unipc", "sa_solver", "edm")


def labelled(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """Treats each element alone, so that only the stream can make a sample differ from itself alone."""
    return torch.tanh(x + 0.1 * label.view(-1, 1, 1, 1)) * (1 + 0.1 * t.cos().view(-1, 1, 1, 1))


@pytest.fixture(name="model")
def labelled_model() -> fd.Denoiser:
    return fd.Denoiser(labelled, fd.schedules.edm(), "edm", sigma_data=0.5)


def asks(count: int, **more: Any) -> list[dict[str, Any]]:
    """Requests that differ in everything."""
    return [
        {
            "solver": SOLVERS[i % len(SOLVERS)],
            "steps": 2 + (5 * i) % 7,
            "seed": 1000 - 17 * i,
            "guidance": (1.0, 2.5, 0.0, -1.0)[i % 4],
            "cond": {"label": torch.tensor([float(i)])},
            "uncond": {"label": torch.tensor([-float(i % 3)])},
            "noise": ("white", "brownian")[i % 10 == 4],
            **more,
        }
        for i in range(count)
    ]


def alone(model: fd.Denoiser, ask: dict[str, Any], backend: str = "auto") -> Tensor:
    return fd.sample(model, (1, *SHAPE), **{**ask, "seed": [ask["seed"]]}, backend=backend)[0]


def submit(stream: fd.Stream, ask: dict[str, Any]) -> Any:
    return stream.submit(ask["solver"], **{k: v for k, v in ask.items() if k != "solver"})
