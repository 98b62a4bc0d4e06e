"""The training ops on plain tensors of a CPU, which one function of the extension takes as they are, or leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from train_cases import Case, fresh

import fastdiff as fd
from fastdiff.engine import native, train_ops
from fastdiff.engine.train_ops import IMAGE_DTYPES, TrainTensors

pytestmark = pytest.mark.skipif(not fd.backends()["cpp"].ok, reason="the extension is not built")
LAYOUTS = (torch.contiguous_format, torch.channels_last)
B = 4


class Watching(TorchDispatchMode):
    """What torch has to be shown, and is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that were checked in Python and launched one by one."""
    seen: list[str] = []
    train = native.train

    def watched(op: str, *rest: Any) -> None:
        seen.append(op)
        train(op, *rest)

    monkeypatch.setattr(native, "train", watched)
    return seen


def step(t: TrainTensors) -> tuple[torch.Tensor, ...]:
    """x_in, the mean, each sample's error and the gradient."""
    assert t.model_out is not None and t.weight is not None
    leaf = t.model_out.clone().requires_grad_()
    mean, error = train_ops.squared_error(leaf, t.weight, t.images, t.table, t.key)
    noised = train_ops.noised(t.images, t.table, t.key, leaf.dtype)
    return noised, torch.autograd.grad(mean, leaf)[0], error, mean.detach()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("image_dtype", IMAGE_DTYPES)
def test_the_same_as_one_by_one(image_dtype: torch.dtype, layout: torch.memory_format, launches: list[str]) -> None:
    for model_dtype in (torch.float32, torch.float16, torch.bfloat16):
        t = Case((3, 9, 11), B, layout, image_dtype, model_dtype).tensors()
        found = step(t)
        assert launches == []
        with Watching():
            expected = step(t)
        assert launches == ["loss", "noise_images"]
        launches.clear()
        for got, want in zip(found[:2], expected[:2], strict=True):
            assert got.stride() == want.stride() and torch.equal(got, want)
        np.testing.assert_allclose(found[2], expected[2], rtol=3e-7)  # sums in double, and in torch's own order
        np.testing.assert_allclose(found[3], expected[3], rtol=5e-7)


def test_what_is_left_to_python(launches: list[str]) -> None:
    t = Case((3, 8, 8), B).tensors()
    plain = step(t)
    assert t.model_out is not None and t.weight is not None

    def same(**changes: torch.Tensor) -> None:
        launches.clear()
        given = TrainTensors(**(vars(fresh(t)) | changes))
        for got, want in zip(step(given), plain, strict=True):
            torch.testing.assert_close(got, want, rtol=5e-7, atol=0)

    same(images=t.images.to(memory_format=torch.channels_last))  # beside a contiguous answer
    assert launches == ["loss"]
    same(images=torch._neg_view(-t.images))
    assert launches == ["loss", "noise_images"]
    same(weight=torch._neg_view(-t.weight))
    assert launches == ["loss"]
    same(table=torch.nn.Parameter(t.table))
    assert launches == ["loss", "noise_images"]
    same()
    assert launches == []


def test_a_second_derivative_is_refused_and_a_first_is_not() -> None:
    t = Case((3, 8, 8), B).tensors()
    assert t.model_out is not None and t.weight is not None
    leaf = t.model_out.clone().requires_grad_()
    mean, _ = train_ops.squared_error(leaf, t.weight, t.images, t.table, t.key)
    first = torch.autograd.grad(mean.square(), leaf, create_graph=True)[0]
    torch.testing.assert_close(first.detach(), 2 * mean.detach() * step(t)[1])
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_half_of_a_second_derivative_is_refused_too() -> None:
    """Of a network, whose own second derivative is there: the mean's would be left out of it without a word."""
    t = Case((3, 8, 8), B).tensors()
    assert t.model_out is not None and t.weight is not None
    scale = torch.ones((), requires_grad=True)
    mean, _ = train_ops.squared_error((t.model_out * scale).tanh(), t.weight, t.images, t.table, t.key)
    first = torch.autograd.grad(mean, scale, create_graph=True)[0]
    torch.testing.assert_close(first.detach(), torch.autograd.grad(mean, scale, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().backward()


@pytest.mark.parametrize("place", range(9))
def test_the_extension_leaves_what_it_cannot_take(place: int) -> None:
    t = Case((3, 8, 8), B).tensors()
    results = torch.empty(B), torch.empty(())
    given = [*t.arguments(), *results]
    call = native.python().train
    assert call(torch.Tensor, 0.5, *given) == 0
    tensor = given[place]
    assert tensor is not None
    others = [tensor.to(torch.float64), torch.nn.Parameter(tensor, requires_grad=False), tensor.to("meta")]
    if tensor.dim():
        others += [tensor[:1], torch.stack((tensor, tensor), -1)[..., 0], tensor.to_sparse()]
    for other in others:
        assert call(torch.Tensor, 0.5, *given[:place], other, *given[place + 1 :]) is None


def test_the_extension_may_leave_the_gradient_out() -> None:
    t = Case((3, 8, 8), B).tensors()
    assert t.partial is not None
    error, mean = torch.empty(B), torch.empty(())
    call = native.python().train
    assert call(torch.Tensor, 0.5, *fresh(t, out=None).arguments(), error, mean) == 0
    torch.testing.assert_close(error, step(t)[2], rtol=0, atol=0)
    with pytest.raises(TypeError, match="expected 11 arguments, got 2"):
        call(torch.Tensor, 0.5)


@pytest.mark.parametrize("place", [0, 1, 2, 5, 6, 7, 8])
def test_the_extension_leaves_a_call_without_what_it_needs(place: int) -> None:
    """Also where what lay on the stack is still that of a call that had it."""
    t = Case((3, 8, 8), B).tensors()
    given = [*t.arguments(), torch.empty(B), torch.empty(())]
    call = native.python().train
    assert call(torch.Tensor, 0.5, *given) == 0
    assert call(torch.Tensor, 0.5, *given[:place], None, *given[place + 1 :]) is None
