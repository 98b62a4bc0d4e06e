"""The norm op where torch has to see it: tracers, dispatch modes, forward derivatives, transforms, negative views."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.engine import norm

LAST = torch.channels_last
WEIGHT, BIAS, BEFORE = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def normalised(x: Tensor) -> Tensor:
    return norm.norm_act(x, WEIGHT, BIAS, 4, before=BEFORE, residual=x)


def summed(x: Tensor) -> Tensor:
    return norm.channel_add(x, BEFORE, x)


def total_in_torch(x: Tensor) -> Tensor:
    return 2 * x + BEFORE.to(x.dtype)[:, None, None]


def normalised_in_torch(x: Tensor) -> Tensor:
    return F.silu(F.group_norm(total_in_torch(x), 4, WEIGHT.to(x.dtype), BIAS.to(x.dtype), 1e-5))


CALLS = pytest.mark.parametrize(
    ("call", "in_torch"),
    [(normalised, normalised_in_torch), (summed, total_in_torch)],
    ids=["norm_act", "channel_add"],
)
Call = Callable[[Tensor], Tensor]


def images(layout: torch.memory_format = torch.contiguous_format) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 8, 4, 5, generator=generator).contiguous(memory_format=layout) for _ in range(2)]


@CALLS
@torch.no_grad()
def test_what_was_traced_on_one_image_computes_another(call: Call, in_torch: Call) -> None:
    x, other = images(LAST)
    for traced in (torch.jit.trace(call, (x,)), make_fx(call)(x)):
        torch.testing.assert_close(traced(other), in_torch(other), rtol=1e-5, atol=1e-5)


@CALLS
@torch.no_grad()
def test_a_dispatch_mode_sees_one_operator(call: Call, in_torch: Call) -> None:
    seen: list[str] = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x = images()[0]
    with Log():
        got = call(x)
    assert [name for name in seen if name.startswith("fastdiff")] == [
        "fastdiff.norm_act.default" if call is normalised else "fastdiff.channel_add.default"
    ]
    assert not any("empty" in name for name in seen)
    torch.testing.assert_close(got, in_torch(x), rtol=1e-5, atol=1e-5)


@CALLS
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["first", "last"])
@pytest.mark.parametrize("grad_mode", [True, False])
def test_forward_derivatives(call: Call, in_torch: Call, layout: torch.memory_format, grad_mode: bool) -> None:
    x, tangent = images(layout)
    exact = x.double().contiguous(), tangent.double().contiguous()
    expected = torch.func.jvp(in_torch, exact[:1], exact[1:])
    with torch.set_grad_enabled(grad_mode):
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(call(forward_ad.make_dual(x, tangent)))
        for got in ((dual.primal, dual.tangent), torch.func.jvp(call, (x,), (tangent,))):
            for mine, exact in zip(got, expected, strict=True):
                torch.testing.assert_close(mine, exact.float(), rtol=1e-5, atol=1e-5)


@CALLS
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["first", "last"])
def test_transforms(call: Call, in_torch: Call, layout: torch.memory_format) -> None:
    many = torch.stack(images(layout))
    torch.testing.assert_close(
        torch.func.vmap(call)(many), torch.stack([in_torch(x) for x in many]), rtol=1e-5, atol=1e-5
    )

    def per_sample(function: Call) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda x: function(x[None]).square().sum()))(many[0])

    torch.testing.assert_close(per_sample(call), per_sample(in_torch), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"residual has shape \(2, 8, 4\)"):
        torch.func.vmap(lambda x: norm.norm_act(x, WEIGHT, BIAS, 4, residual=x[..., 0]))(many)


@pytest.mark.parametrize("executor", [None, "cpp", "reference"])
@torch.no_grad()
def test_negative_views_are_read_as_what_they_stand_for(executor: str | None) -> None:
    x, residual = images(LAST)
    given = {"weight": WEIGHT, "bias": BIAS, "before": BEFORE, "residual": residual, "skip": None}

    def both(**changed: Tensor) -> tuple[Tensor, ...]:
        own = {"x": x} | given | changed
        added = norm.channel_add(own["x"], own["before"], own["residual"], executor)
        return *norm.sum_norm_act(groups=4, executor=executor, **own), added

    for name in ("x", "weight", "bias", "before", "residual"):
        plain = x if name == "x" else given[name]
        both(**{name: plain})  # the layout is known
        for got, expected in zip(both(**{name: torch._neg_view(plain)}), both(**{name: -plain}), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6, msg=name)
