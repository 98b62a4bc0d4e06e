"""Attention of the extension against float64, torch's own error, itself in another batch; where torch's is taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import every_instruction_set  # noqa: F401
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fastdiff.engine import attention as module
from fastdiff.engine import backends
from fastdiff.engine.attention import attention
from fastdiff.models.unet import UNet
from fastdiff.models.unet_config import UNetConfig

pytestmark = pytest.mark.skipif(not backends.probe()["cpp"].ok, reason="the extension is not built")

SHAPES = [(3, 1, 2, 8), (2, 7, 3, 5), (2, 33, 2, 8), (1, 64, 4, 16), (2, 49, 1, 24), (1, 100, 2, 64), (2, 16, 1, 1)]


def inputs(batch: int, tokens: int, heads: int, size: int, spread: float = 1.0) -> list[Tensor]:
    """q, k, v and the gradient of the result; q and k in `spread` times the usual range."""
    generator = torch.Generator().manual_seed(batch + tokens)
    return [
        torch.randn(batch, tokens, heads * size, generator=generator) * (spread if i < 2 else 1.0) for i in range(4)
    ]


def by_torch(given: list[Tensor], heads: int, dtype: torch.dtype) -> list[Tensor]:
    """The result and the three gradients of scaled_dot_product_attention."""
    q, k, v = leaves = [tensor.to(dtype).requires_grad_() for tensor in given[:3]]
    split = (tokens.unflatten(2, (heads, -1)).transpose(1, 2) for tokens in (q, k, v))
    out = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    return [out.detach(), *torch.autograd.grad(out, leaves, given[3].to(dtype))]


def by_us(given: list[Tensor], heads: int) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in given[:3]]
    out = attention(*leaves, heads)
    assert type(out.grad_fn).__name__ == "_AttentionBackward"
    return [out.detach(), *torch.autograd.grad(out, leaves, given[3])]


@pytest.mark.usefixtures("every_instruction_set")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_errors_are_those_of_torch(shape: tuple[int, int, int, int], spread: float) -> None:
    given, heads = inputs(*shape, spread), shape[2]
    exact, theirs, ours = (
        by_torch(given, heads, torch.float64),
        by_torch(given, heads, torch.float32),
        by_us(given, heads),
    )
    for name, best, peer, own in zip(("out", "dq", "dk", "dv"), exact, theirs, ours, strict=True):
        scale = float(best.abs().max())
        allowed = 2 * float((peer - best).abs().max()) + 4e-7 * scale
        assert float((own - best).abs().max()) <= allowed, name


@pytest.mark.usefixtures("every_instruction_set")
def test_logits_beyond_the_range_of_exp_are_no_overflow() -> None:
    """Logits of some hundreds: the largest one takes all."""
    given = inputs(1, 33, 2, 8, 30.0)
    exact, ours = by_torch(given, 2, torch.float64), by_us(given, 2)
    for best, own in zip(exact, ours, strict=True):
        torch.testing.assert_close(own.double(), best, rtol=1e-4, atol=1e-4 * float(best.abs().max()))


@pytest.mark.usefixtures("every_instruction_set")
def test_a_nan_stays_in_its_sample() -> None:
    given = inputs(2, 20, 2, 8)
    clean = by_us(given, 2)
    given[1][1, 3, 2] = float("nan")  # of the first head
    for own, before in zip(by_us(given, 2), clean, strict=True):
        assert torch.equal(own[0], before[0]) and torch.equal(own[1, :, 8:], before[1, :, 8:])
        assert own[1, :, :8].isnan().any()


def test_a_sample_does_not_see_its_batch_nor_the_threads() -> None:
    given, threads = inputs(9, 70, 4, 8), torch.get_num_threads()
    whole = by_us(given, 4)
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert all(torch.equal(a, b) for a, b in zip(by_us(given, 4), whole, strict=True))
    finally:
        torch.set_num_threads(threads)
    alone = by_us([tensor[4:5] for tensor in given], 4)
    assert all(torch.equal(a[0], b[4]) for a, b in zip(alone, whole, strict=True))


def test_tensors_that_are_views_are_read_right() -> None:
    packed = torch.randn(2, 12, 3 * 16, requires_grad=True)
    q, k, v = packed.chunk(3, dim=2)
    grad = torch.randn(2, 16, 12).transpose(1, 2)
    (own,) = torch.autograd.grad(attention(q, k, v, 2), packed, grad)
    expected = by_torch([q.detach(), k.detach(), v.detach(), grad], 2, torch.float32)[1:]
    torch.testing.assert_close(own, torch.cat(expected, dim=2), rtol=1e-5, atol=1e-6)


def test_torch_is_asked_where_it_must_be() -> None:
    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return function(*args, **(kwargs or {}))

    q, k, v = (torch.randn(1, 6, 16, requires_grad=True) for _ in range(3))

    def node() -> str:
        return type(attention(q, k, v, 2).grad_fn.next_functions[0][0]).__name__

    assert type(attention(q, k, v, 2).grad_fn).__name__ == "_AttentionBackward"
    with torch.no_grad():
        assert attention(q, k, v, 2).grad_fn is None
    with sdpa_kernel([SDPBackend.MATH]):
        assert type(attention(q, k, v, 2).grad_fn).__name__ != "_AttentionBackward"
    with Watch():
        assert type(attention(q, k, v, 2).grad_fn).__name__ != "_AttentionBackward"
    assert "Attention" not in node()
    wide = torch.randn(1, 6, 2 * module.SMALL_HEAD + 2, requires_grad=True)
    assert type(attention(wide, wide, wide, 2).grad_fn).__name__ != "_AttentionBackward"
    half = q.to(torch.bfloat16)
    assert attention(half, half, half, 2).dtype == torch.bfloat16


def test_the_second_derivative_is_that_of_torch() -> None:
    given, found = inputs(2, 9, 2, 8), []
    for plain in (False, True):
        q, k, v = (tensor.clone().requires_grad_(i != 1) for i, tensor in enumerate(given[:3]))
        with sdpa_kernel([SDPBackend.MATH, *([] if plain else [SDPBackend.FLASH_ATTENTION])]):
            out = attention(q, k, v, 2)
            assert (type(out.grad_fn).__name__ == "_AttentionBackward") is not plain
            first = torch.autograd.grad(out.square().sum(), q, create_graph=True)[0]
            found.append(torch.autograd.grad((first * given[3]).sum(), (q, v)))
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("made", ["the same", "of another"])
def test_the_second_derivative_of_inputs_that_are_made_of_each_other(made: str) -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        x = inputs(2, 5, 2, 4)[0].to(dtype).requires_grad_()
        q = 1.5 * x
        with sdpa_kernel([SDPBackend.MATH, *([SDPBackend.FLASH_ATTENTION] if dtype == torch.float32 else [])]):
            out = attention(*((q, q, q) if made == "the same" else (q, 2 * q, q.sin())), 2)
        assert (type(out.grad_fn).__name__ == "_AttentionBackward") is (dtype == torch.float32)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        found.append((first.detach().double(), torch.autograd.grad(first.square().sum(), x)[0].double()))
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_tensor_that_is_negated_when_it_is_read() -> None:
    *leaves, grad = inputs(2, 7, 2, 8)
    q, k, v = (tensor.requires_grad_() for tensor in leaves)
    out = attention(q, k, v, 2)
    negative = torch.autograd.grad(out, q, torch._neg_view(grad), retain_graph=True)[0]
    torch.testing.assert_close(negative, torch.autograd.grad(out, q, -grad)[0])
    torch.testing.assert_close(attention(torch._neg_view(q), k, v, 2), attention(-q, k, v, 2))


def test_other_tokens_for_keys_are_torchs() -> None:
    q = torch.randn(2, 4, 8, requires_grad=True)
    for batch, tokens in ((2, 5), (2, 3), (1, 4)):
        k, v = torch.randn(2, batch, tokens, 8)
        split = (one.unflatten(2, (2, 4)).transpose(1, 2) for one in (q, k, v))
        expected = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attention(q, k, v, 2), expected)
    with pytest.raises(RuntimeError, match="unflatten"):
        attention(q, q, q, 3)


def test_gradients_in_a_batch_and_under_a_compiler() -> None:
    *leaves, grad = inputs(2, 7, 2, 8)
    q, k, v = (tensor.requires_grad_() for tensor in leaves)
    out, grads = attention(q, k, v, 2), torch.stack([grad, -2.0 * grad, grad.flip(1)])
    found = torch.autograd.grad(out, (q, v), grads, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(out, (q, v), one, retain_graph=True) for one in grads]
    for own, expected in zip(found, map(torch.stack, zip(*one_by_one, strict=True)), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)
    compiled = torch.compile(lambda *given: attention(*given, 2), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), out, rtol=1e-5, atol=1e-6)


def test_a_network_trains_with_it_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    config = UNetConfig(
        block_out_channels=(16, 16), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    net = UNet(config).to(memory_format=torch.channels_last)
    for parameter in net.parameters():
        parameter.data.normal_(0.0, 0.2)
    x, time = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last), torch.tensor([1.0, 500.0])
    gradients = []
    for size in (module.SMALL_HEAD, 0):
        monkeypatch.setattr(module, "SMALL_HEAD", size)
        net.zero_grad()
        net(x, time).square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in net.named_parameters()})
    largest = max(float(gradient.abs().max()) for gradient in gradients[1].values())
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-4, atol=1e-6 * largest, msg=name)
