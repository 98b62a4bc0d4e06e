"""The UNet's inference form equals the plain one, in fewer kernels, and says which blocks it leaves as they are."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_unet import CONFIGS, random_inputs, random_peer, small_config

import fastdiff as fd
from fastdiff.engine import onednn
from fastdiff.models import unet_blocks
from fastdiff.models.packed_conv import PackedConv
from fastdiff.models.unet import UNet
from fastdiff.models.unet_fast import FastUNet, PreparedUNet
from fastdiff.models.unet_fast_blocks import FastUp
from fastdiff.models.unet_nodes import cost
from fastdiff.models.unet_presets import PRESETS, config_of

LAST = torch.channels_last


def networks(name: str) -> tuple[UNet, tuple[torch.Tensor, ...]]:
    return UNet.from_diffusers(random_peer(CONFIGS[name])), random_inputs(CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_agrees_with_the_plain_network(name: str) -> None:
    net, (x, *rest) = networks(name)
    expected, fast = net(x, *rest), net.fast()
    got = fast(x, *rest)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert got.is_contiguous(memory_format=LAST)
    again = fast(x.contiguous(memory_format=LAST), *rest)
    assert torch.equal(again, got), "the memory format of the input does not matter"
    one = fast(x[:1], *(value[:1] for value in rest))
    torch.testing.assert_close(one, expected[:1], rtol=0, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
def test_an_empty_batch_gives_an_empty_batch() -> None:
    for name in ("ddpm-cifar", "no-middle"):
        net, inputs = networks(name)
        nothing = [value[:0] for value in inputs]
        got, expected = net.fast()(*nothing), net(*nothing)
        assert got.shape == expected.shape == inputs[0][:0].shape and got.dtype == expected.dtype


def test_made_in_inference_mode_it_is_as_made_outside() -> None:
    net, inputs = networks("ddpm-cifar")
    with torch.inference_mode():
        inside = net.fast()
        got = inside(*inputs)
    with torch.no_grad():
        assert torch.equal(got, net.fast()(*inputs))
    assert not any(weight.is_inference() for weight in (*inside.parameters(), *inside.buffers()))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in CONFIGS), ("scale-shift", torch.float16), ("no-middle", torch.float16)],
)
@torch.no_grad()
def test_half_precision_errs_at_most_twice_as_much_as_torch(name: str, dtype: torch.dtype) -> None:
    """Weights cast once, no autocast, against float64; the plain network in the same dtype is torch's own error."""
    net, (x, *rest) = networks(name)
    fast = net.fast(dtype)
    got = fast(x, *rest)
    assert got.dtype == dtype
    exact = UNet.from_diffusers(random_peer(CONFIGS[name])).double()(x.double(), *rest)
    own = net.to(dtype)(x.to(dtype), *rest)
    for error in (torch.Tensor.abs, torch.Tensor.square):
        assert error(got - exact).mean() <= 2 * error(own - exact).mean()
    assert (got - exact).abs().max() <= 2 * (own - exact).abs().max()


@torch.no_grad()
def test_weights_are_cast_once_and_only_where_it_costs_no_digits() -> None:
    fast = networks("ddpm-cifar")[0].fast(torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in fast.named_parameters()}
    halves = {name.rpartition(".")[2] for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert halves == {"weight", "conv", "far", "conv_out", "conv_out_bias", "shortcut", "qkv", "qkv_bias"}
    assert dtypes["rows_weight"] == dtypes["layers.0.norm1_weight"] == torch.float32
    for net in (fast, fast.prepare_times(torch.tensor([3.0]))):
        assert fd.Denoiser(net, "linear").dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in fast.parameters())


@torch.no_grad()
def test_packed_weights_follow_a_change_and_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.nn.Parameter(torch.randn(8, 4, 3, 3).contiguous(memory_format=LAST), requires_grad=False)
    conv = PackedConv(weight, stride=2)
    for x in (torch.randn(2, 4, 9, 8), torch.randn(1, 4, 4, 6)):
        x = x.contiguous(memory_format=LAST)
        for module in (conv, copy.deepcopy(conv)):
            torch.testing.assert_close(module(x), F.conv2d(x, weight, stride=2, padding=1), rtol=1e-5, atol=1e-5)
        assert conv._packed, "the library's order was used"
        weight.mul_(1.5)
    expected = conv(x)
    compiled = torch.compile(conv.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    arguments = x, conv.weight.detach(), conv.number, 2, 1
    torch.library.opcheck(
        torch.ops.fastdiff.packed_conv.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
    monkeypatch.setattr(onednn, "available", lambda: False)
    torch.testing.assert_close(conv(x), expected, rtol=1e-5, atol=1e-5)


def _swapped(fast: FastUNet, weights: list[torch.Tensor], times: int = 1) -> None:
    for _ in range(times):
        for weight, other in zip(fast.parameters(), weights, strict=True):
            weight.data = other.clone(memory_format=torch.preserve_format)


CHANGES: dict[str, Any] = {
    "load_state_dict": lambda fast, other: fast.load_state_dict(other.state_dict()),
    "a doubling": lambda fast, other: [layer.conv.mul_(2) for layer in fast.layers if isinstance(layer, FastUp)],
    "biases left to add": lambda fast, other: [layer.after.zero_() for layer in fast.layers],
    "load_state_dict, assigned": lambda fast, other: fast.load_state_dict(other.state_dict(), assign=True),
    "copy_": lambda fast, other: [w.copy_(o) for w, o in zip(fast.parameters(), other.parameters(), strict=True)],
    "lerp_": lambda fast, other: torch._foreach_lerp_(list(fast.parameters()), list(other.parameters()), 0.25),
    "to and back": lambda fast, other: fast.to(torch.bfloat16).to(torch.float32),
    "swap": lambda fast, other: _swapped(fast, list(other.parameters())),
    "swap twice": lambda fast, other: (
        _swapped(fast, list(fast.parameters()), 3),
        _swapped(fast, list(other.parameters())),
    ),
    "data and repack": lambda fast, other: ([w.data.mul_(0.9) for w in fast.parameters()], fast.repack()),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_all_that_is_derived_from_weights_follows_their_change(change: str) -> None:
    """Packed convolutions and prepared times, as a copy has them that was made after the change."""
    config = CONFIGS["ddpm-cifar"]
    fast, other = (UNet.from_diffusers(random_peer(config, seed)).fast() for seed in (0, 1))
    x, t = random_inputs(config)
    model = fd.Denoiser(fast, "linear", "eps")
    sampler = fd.Sampler(fd.plan("ddim", "linear", 2), model)
    before, drawn = fast(x, t), sampler.sample(x.shape)
    CHANGES[change](fast, other)
    got, fresh = fast(x, t), copy.deepcopy(fast)
    assert torch.equal(got, fresh(x, t)) and not torch.equal(got, before)
    again = sampler.sample(x.shape)
    expected = fd.Sampler(sampler.plan, fd.Denoiser(fresh, "linear", "eps")).sample(x.shape)
    assert torch.equal(again, expected) and not torch.equal(again, drawn)


@torch.no_grad()
def test_a_doubling_follows_its_weights_at_every_size(tmp_path: Any) -> None:
    """Also at the size of the configuration, whose state is that of any other."""
    config = small_config(
        sample_size=16, block_out_channels=(16, 32), down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    net = UNet(config).eval()
    for parameter in net.parameters():
        parameter.normal_(0, 0.2)
    fast, inputs = net.fast(), [torch.randn(2, 1, size, size) for size in (16, 32)]

    def largest_error() -> float:
        pairs = [(fast(x, 3.0), net(x, 3.0)) for x in inputs]
        return max(float((got - expected).abs().max() / expected.abs().max()) for got, expected in pairs)

    assert largest_error() < 1e-5
    for module in net.modules():
        if isinstance(module, unet_blocks.Upsample):
            module.conv.weight.mul_(2)
    assert largest_error() > 1e-2
    doublings = [layer for layer in fast.layers if isinstance(layer, FastUp)]
    for layer in doublings:
        layer.conv.mul_(2)
    assert len(doublings) == 1 and largest_error() < 1e-5
    for layer in doublings:
        layer.conv.data.mul_(0.5)
    fast.repack()
    assert largest_error() > 1e-2
    other = UNet(replace(config, sample_size=32)).eval().fast()
    torch.save(fast.state_dict(), tmp_path / "fast.pt")
    other.load_state_dict(torch.load(tmp_path / "fast.pt"))
    assert all(torch.equal(other(x, 3.0), fast(x, 3.0)) for x in inputs)
    assert {name.rpartition(".")[2] for name in fast.state_dict() if name.startswith("layers.")} == {
        "norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias", "weight", "conv", "shortcut", "after",
        "norm_weight", "norm_bias", "qkv", "qkv_bias", "out",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_a_cast_after_it_was_made_is_refused_until_it_is_undone(dtype: torch.dtype) -> None:
    net, (x, t) = networks("ddpm-cifar")
    fast, expected = net.fast(), net(x, t)
    prepared = net.fast().prepare_times(t)
    how = "use the UNet itself" if dtype == torch.float64 else f"use net.to({dtype}).fast() or net.fast({dtype})"
    for call in (fast, prepared, lambda *_: fast.prepare_times(t)):
        fast.to(dtype), prepared.to(dtype)
        with pytest.raises(TypeError, match=rf"weights were cast to {dtype} after fast\(\).*{re.escape(how)}"):
            call(x, t)
    error = (fast.float()(x, t) - expected).abs().max() / expected.abs().max()
    assert error < 0.05
    if dtype != torch.float64:
        copied = net.to(dtype).fast()(x, t)
        assert copied.dtype == dtype and (copied - expected).abs().max() < 0.05 * expected.abs().max()


def test_it_is_not_trained() -> None:
    net, inputs = networks("ddpm-cifar")
    fast = net.fast().eval()
    with pytest.raises(TypeError, match=r"for inference and gives no gradients; train the UNet it was made from"):
        torch.nn.Sequential(fast).train()
    assert not fast.training and not fast(*inputs).requires_grad


@torch.no_grad()
def test_a_write_through_data_is_not_seen_before_repack() -> None:
    """As the documentation of the network says; where this fails that has become too modest."""
    fast, inputs = networks("ddpm-cifar")[0].fast(), networks("ddpm-cifar")[1]
    fast(*inputs)
    for weight in fast.parameters():
        weight.data.mul_(0.9)
    stale, fresh = fast(*inputs), copy.deepcopy(fast)(*inputs)
    assert not torch.equal(stale, fresh)
    fast.repack()
    assert torch.equal(fast(*inputs), fresh)


@torch.no_grad()
def test_no_other_weight_takes_the_place_of_the_one_that_was_packed() -> None:
    x = torch.randn(1, 64, 4, 4).contiguous(memory_format=LAST)
    for _ in range(20):
        weights = [torch.randn(64, 64, 3, 3).contiguous(memory_format=LAST) for _ in range(3)]
        conv = PackedConv(torch.nn.Parameter(weights.pop(), requires_grad=False))
        conv(x)
        while weights:
            conv.weight.data = weights.pop().clone(memory_format=torch.preserve_format)
        torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, padding=1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_network_it_is_made_from_is_not_changed_and_not_shared() -> None:
    net, inputs = networks("scale-shift")
    before = net(*inputs)
    fast = net.fast()
    got = fast(*inputs)
    assert torch.equal(net(*inputs), before)
    for parameter in net.parameters():
        parameter.zero_()
    assert torch.equal(fast(*inputs), got)


@torch.no_grad()
def test_the_network_it_is_made_from_is_not_kept() -> None:
    """Only its clock's buffers are shared: the memory of the weights is free once the caller lets go of them."""
    net = UNet.from_diffusers(random_peer(CONFIGS["ddpm-cifar"]))
    weights = [weakref.ref(weight) for weight in net.parameters()]
    fast = net.fast()
    del net
    gc.collect()
    assert [weight for weight in weights if weight() is not None] == []
    assert fast.config.in_channels == 3


def test_blocks_that_are_not_covered_run_as_they_were() -> None:
    net, inputs = networks("classes")
    assert set(net.fast().fallbacks) == {f"mid_block.{kind}" for kind in ("resnets.0", "attentions.0", "resnets.1")}
    assert all("divides its sum by 1.41" in reason for reason in net.fast().fallbacks.values())

    class Louder(type(net.up_blocks[0].resnets[0])):  # type: ignore[misc]
        def forward(self, x: torch.Tensor, act_time: torch.Tensor) -> torch.Tensor:
            return 1.5 * super().forward(x, act_time)

    net.up_blocks[0].resnets[1].__class__ = Louder  # type: ignore[union-attr]
    net.down_blocks[0].attentions[0].register_forward_hook(lambda module, given, output: 2 * output)  # type: ignore[union-attr]
    fast = net.fast()
    assert "is a Louder" in fast.fallbacks["up_blocks.0.resnets.1"]
    assert "has hooks" in fast.fallbacks["down_blocks.0.attentions.0"]
    expected = net(*inputs)
    torch.testing.assert_close(fast(*inputs), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


# -- times


@pytest.mark.parametrize("name", ["ddpm-cifar", "scale-shift", "fourier"])
@torch.no_grad()
def test_prepared_times_give_the_same_and_others_nothing(name: str) -> None:
    net, (x, t) = networks(name)
    fast = net.fast()
    prepared = fast.prepare_times(torch.tensor([901.5, 0.37, 17.0, 17.0]))
    assert torch.equal(prepared(x, t), fast(x, t))
    assert torch.equal(prepared(x, 17.0), fast(x, 17.0))
    t = t.clone()
    t[1] = torch.nextafter(t[1], torch.tensor(0.0))
    got = prepared(x, t)
    assert got[1].isnan().all() and got[0].isfinite().all() and got[2].isfinite().all()


def test_a_network_with_classes_prepares_nothing() -> None:
    fast = networks("classes")[0].fast()
    assert fast.prepare_times(torch.tensor([1.0])) is fast


@pytest.mark.parametrize("time_dtype", [torch.float32, torch.long])
def test_the_sampler_prepares_every_row(time_dtype: torch.dtype) -> None:
    net, (x, _) = networks("ddpm-cifar")
    draw: dict[str, Any] = {"shape": x.shape, "solver": "dpmpp_2m", "steps": 4, "grid": "trailing", "seed": 3}
    expected = fd.sample(fd.Denoiser(net, "linear", "eps", time_dtype=time_dtype), **draw)
    model = fd.Denoiser(net.fast(), "linear", "eps", time_dtype=time_dtype)
    plan = fd.plan("dpmpp_2m", "linear", 4, "trailing")
    sampler = fd.Sampler(plan, model)
    assert isinstance(sampler.model.net, PreparedUNet)
    got = sampler.sample(x.shape, seed=3)
    assert got.isfinite().all()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def test_a_sampler_prepares_again_after_a_change_of_the_weights() -> None:
    config = CONFIGS["ddpm-cifar"]
    mine, others = (UNet.from_diffusers(random_peer(config, seed)).fast() for seed in (0, 1))
    shape, plan = random_inputs(config)[0].shape, fd.plan("ddim", "linear", 3)
    model = fd.Denoiser(mine, "linear", "eps")
    before = fd.Sampler(plan, model)
    assert fd.Sampler(plan, model).model is before.model
    first = before.sample(shape)
    mine.load_state_dict(others.state_dict())
    expected = fd.Sampler(plan, fd.Denoiser(others, "linear", "eps")).sample(shape)
    assert not torch.equal(expected, first)
    for sampler in (before, fd.Sampler(plan, model)):
        assert torch.equal(sampler.sample(shape), expected)


# -- torch.compile


@torch.no_grad()
def test_compiles_without_a_break() -> None:
    net, inputs = networks("no-middle")
    fast = net.fast()
    compiled = torch.compile(fast.run, fullgraph=True, backend="aot_eager")
    rows = fast.project(inputs[1])
    expected = fast(*inputs)
    got = compiled(inputs[0], inputs[1], rows)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


# -- training


@pytest.mark.parametrize("name", ["ddpm-cifar", "scale-shift"])
def test_a_network_that_trains_with_the_norm_op_has_the_same_gradients(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In channels_last, as against torch's own functions."""
    net, (x, *rest) = networks(name)
    x = x.contiguous(memory_format=LAST)

    def gradients() -> dict[str, torch.Tensor]:
        net.zero_grad()
        net(x, *rest).square().mean().backward()
        return {key: p.grad for key, p in net.named_parameters() if p.grad is not None}

    calls: list[bool] = []
    real = unet_blocks.norm_act
    monkeypatch.setattr(
        unet_blocks, "norm_act", lambda *given, **options: calls.append(True) or real(*given, **options)
    )
    got = gradients()
    with monkeypatch.context() as patch:
        patch.setattr(unet_blocks, "choose", lambda *given: "reference")
        expected = gradients()
    norms = sum(isinstance(module, torch.nn.GroupNorm) for module in net.modules())
    assert len(calls) == norms
    # a bias before a norm of one channel has no gradient but its rounding
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in expected.items():
        torch.testing.assert_close(
            got[key], gradient, rtol=1e-4, atol=1e-6 * largest, msg=lambda text, at=key: f"{at}: {text}"
        )


# -- cost


def test_node_budgets() -> None:
    """What a CUDA graph of one forward pass at batch 1 holds. One kernel for each convolution, GEMM, attention and
    normalisation of the DDPM network would be 128."""
    nodes = {name: cost(config, 1).nodes for name, config in PRESETS.items()}
    assert nodes == {"ddpm-cifar10": 137, "edm-cifar10": 186, "adm-64": 302}
    assert nodes["ddpm-cifar10"] < cost(PRESETS["ddpm-cifar10"], 1, fast=False).nodes / 3.5


def test_bytes_are_counted_once_per_operand() -> None:
    config = small_config(sample_size=8)
    one, two = (cost(config, batch, torch.float32) for batch in (1, 2))
    weights = sum(p.numel() * p.element_size() for p in UNet(config).fast().parameters())
    assert one.kernels == two.kernels
    images = two.bytes - one.bytes
    assert 0 < images < two.bytes
    assert 0 < one.bytes - images < 1.05 * weights, "what does not grow with the batch is the weights"
    assert cost(config, 1, torch.bfloat16).bytes < 0.62 * one.bytes


def test_cost_refuses() -> None:
    with pytest.raises(ValueError, match="does not say the size"):
        cost(small_config(), 1)
    with pytest.raises(ValueError, match="batch must be >= 1, got 0"):
        cost(PRESETS["adm-64"], 0)
    with pytest.raises(ValueError, match="multiples of 8"):
        cost(PRESETS["ddpm-cifar10"], 1, size=20)
    with pytest.raises(ValueError, match="Unknown UNet 'ddpm'.*Did you mean 'ddpm-cifar10'"):
        config_of("ddpm")
    with pytest.raises(FileNotFoundError):
        config_of("absent.json")


def test_info_prints_the_cost(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    from fastdiff.cli import main

    path = tmp_path / "net.safetensors"
    UNet(small_config(sample_size=16, mid_block_scale_factor=2.0)).save(path)
    assert main(["info", "--unet", str(path), "--batch", "3", "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    assert "batch 3, float32" in printed and "mid_block.resnets.0 runs as it is: it divides its sum by 2" in printed
    assert main(["info", "--unet", "none"]) == 2
    assert "Unknown UNet 'none'" in capsys.readouterr().err


# -- refusals


def test_refuses_what_the_plain_network_refuses() -> None:
    net = UNet(small_config(num_class_embeds=5)).eval()
    fast = net.fast()
    assert isinstance(fast, FastUNet)
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected \[B, 1, H, W\].*multiples of 2"):
        fast(torch.randn(2, 1, 7, 8), 0.0, labels)
    with pytest.raises(ValueError, match="got no class_labels"):
        fast(torch.randn(2, 1, 8, 8), 0.0)
    with pytest.raises(ValueError, match="got t of shape"):
        fast(torch.randn(2, 1, 8, 8), torch.zeros(3), labels)
    with pytest.raises(TypeError, match="dtype must be float32, float16 or bfloat16, got torch.float64"):
        net.double().fast()
