"""What a Denoiser says of a network that was not called as it wants to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff as fd
from fastdiff.models.denoiser import ask

SHAPE = (2, 3, 4, 4)


class Labelled(nn.Module):
    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return 0.5 * x * labels.view(-1, 1, 1, 1)


class Broken(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + None  # type: ignore[operator]


def run(net: Callable[..., Any], cond: Any = None) -> Tensor:
    return fd.sample(fd.Denoiser(net, "edm", "x0"), SHAPE, "euler", steps=2, cond=cond)


def test_a_plain_function_is_a_network() -> None:
    """D = x / 2 over two steps of Euler from 80: x' = r x + (1 - r) x / 2, then x' = D."""
    levels = fd.plan("euler", "edm", 2).levels
    model = fd.Denoiser(lambda x, t: 0.5 * x, "edm", "x0")
    start = torch.ones(SHAPE)
    got = fd.Sampler(fd.plan("euler", "edm", 2), model).sample(SHAPE, init=start)
    ratio = levels[1].sigma / levels[0].sigma
    torch.testing.assert_close(got, (ratio + (1 - ratio) * 0.5) * 0.5 * start)


@pytest.mark.parametrize(
    ("net", "cond", "words"),
    [
        (lambda x: x, None, r"the network takes \(x\) and was called with 2 tensors in order: too many positional"),
        (lambda x, t: x, {"class_labels": 1}, r"takes \(x, t\).*, class_labels=\.\.\.: got an unexpected keyword"),
        (lambda x, t: x, torch.ones(2), r"takes \(x, t\) and was called with 3 tensors in order: too many"),
        (lambda x, t, y: x, None, r"takes \(x, t, y\).*missing a required argument: 'y'.*cond=\{\.\.\.\}"),
        (Labelled(), None, r"takes \(x: .*, labels: .*\).*missing a required argument: 'labels'"),
        (Labelled(), {"label": torch.ones(2)}, r"label=\.\.\.: missing a required argument: 'labels'"),
        (Broken(), None, r"unsupported operand type"),  # what fails inside the network is its own error
    ],
)
def test_a_call_that_does_not_fit_is_explained(net: Callable[..., Any], cond: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        run(net, cond)


def test_conditions_that_fit_reach_the_network() -> None:
    by_name, in_order = run(Labelled(), {"labels": torch.tensor([1.0, 2.0])}), run(Labelled(), torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(by_name, in_order, rtol=0, atol=0)
    torch.testing.assert_close(by_name[0], run(lambda x, t: 0.5 * x)[0], rtol=0, atol=0)


def test_what_has_no_signature_fails_as_it_does() -> None:
    with pytest.raises(TypeError) as caught:
        ask(max, 1)  # int is not iterable: Python's own words
    assert "the network takes" not in str(caught.value)
