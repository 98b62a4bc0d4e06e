"""The Winograd convolution against float64, what must not change a bit of it, when it is chosen, and in the UNet."""

from __future__ import annotations

import copy
import ctypes

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import INSTRUCTION_SETS, best_instruction_set  # noqa: F401
from test_unet import CONFIGS, random_inputs, random_peer
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fastdiff.engine import native, native_blocks, onednn, winograd
from fastdiff.models.packed_conv import PackedConv
from fastdiff.models.unet import UNet

LAST = torch.channels_last
SHAPES = [  # B, C_in, C_out, H, W: tiles in part, registers of channels in part
    (1, 64, 32, 32, 32),
    (2, 256, 128, 16, 16),
    (3, 13, 7, 5, 9),
    (1, 1, 1, 1, 1),
    (2, 40, 24, 6, 3),
    (1, 512, 80, 8, 8),
    (3, 17, 33, 1, 14),
]
# of the largest output
BOUND = {2: 2e-6, 4: 6e-6}


def given(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, bias of such a convolution."""
    batch, inputs, outputs, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, inputs, height, width, generator=generator).contiguous(memory_format=LAST)
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator) / (9 * inputs) ** 0.5
    return x, weight, torch.randn(outputs, generator=generator)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, size: int) -> Tensor:
    return winograd.conv(x, weight, winograd.expand(weight, size), bias)


@pytest.mark.parametrize("size", winograd.TAPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_against_float64(instruction_set: int, shape: tuple[int, ...], size: int) -> None:
    assert native.load().fastdiff_cpu_isa(instruction_set) == instruction_set
    x, weight, bias = given(shape)
    for added in (None, bias):
        expected = F.conv2d(x.double(), weight.double(), None if added is None else added.double(), padding=1)
        got = conv(x, weight, added, size)
        assert got.shape == expected.shape and got.is_contiguous(memory_format=LAST)
        assert float((got - expected).abs().max()) <= BOUND[size] * float(expected.abs().max())


@pytest.mark.parametrize("size", winograd.TAPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_gives_the_same_bits(shape: tuple[int, ...], size: int) -> None:
    found = []
    for instruction_set in INSTRUCTION_SETS:
        native.load().fastdiff_cpu_isa(instruction_set)
        found.append(conv(*given(shape), size))
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("size", winograd.TAPS)
@pytest.mark.parametrize("shape", [(5, 64, 48, 16, 16), (4, 256, 256, 8, 8), (7, 9, 5, 7, 10), (3, 96, 96, 32, 32)])
def test_a_sample_is_the_same_in_any_batch_on_any_threads_and_in_any_groups(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], size: int
) -> None:
    x, weight, bias = given(shape)
    expected = torch.cat([conv(one[None].contiguous(memory_format=LAST), weight, bias, size) for one in x])
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(conv(x, weight, bias, size), expected), f"{number} threads"
    finally:
        torch.set_num_threads(threads)
    for group in (1, 7 * winograd.TAPS[size] * (shape[1] + shape[2])):
        monkeypatch.setattr(winograd, "_GROUP", group)
        assert torch.equal(conv(x, weight, bias, size), expected), f"groups of {group} numbers"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", winograd.TAPS)
def test_a_pixel_that_is_not_finite_spoils_the_tiles_that_see_it_alone(size: int, bad: float) -> None:
    x, weight, bias = given((2, 20, 12, 13, 14))
    clean = conv(x, weight, bias, size)
    for row, column in ((0, 0), (4, 4), (7, 8), (12, 13)):
        spoilt = x.clone(memory_format=torch.preserve_format)
        spoilt[1, 5, row, column] = bad
        got, torchs = conv(spoilt, weight, bias, size), F.conv2d(spoilt, weight, bias, padding=1)
        sees = torch.zeros(2, 1, 13, 14, dtype=torch.bool)
        for top in range(0, 13, size):
            for left in range(0, 14, size):
                near = -1 <= row - top <= size and -1 <= column - left <= size
                sees[1, :, top : top + size, left : left + size] = near
        sees = sees.expand_as(got)
        assert torch.equal(got[~sees], clean[~sees])
        assert not torch.isfinite(got[~torch.isfinite(torchs)]).any()


@pytest.mark.parametrize("executor", ["reference", "cpp"])
def test_opcheck(executor: str) -> None:
    x, weight, bias = given((2, 16, 8, 6, 5))
    for size, added in ((2, None), (4, bias)):
        arguments = x, weight, winograd.expand(weight, size), added
        torch.library.opcheck(torch.ops.fastdiff.winograd_conv.default, arguments, {"executor": executor})
    assert torch.equal(
        winograd.conv(*arguments, executor="reference"), F.conv2d(x, weight, bias, padding=1)
    )  # fmt: skip


def test_an_empty_batch_gives_an_empty_batch() -> None:
    x, weight, bias = given((1, 16, 8, 6, 5))
    assert conv(x[:0].contiguous(memory_format=LAST), weight, bias, 4).shape == (0, 8, 6, 5)


def test_what_does_not_fit_is_refused() -> None:
    x, weight, bias = given((1, 16, 8, 6, 5))
    expanded = winograd.expand(weight, 4)
    assert expanded.shape == (36 * 8, 16, 1, 1)
    refused = [
        ((x.contiguous(), weight, expanded, bias), ValueError, r"channels_last, got \(1, 16, 6, 5\) with strides"),
        ((x, weight[:, :8], expanded, bias), ValueError, r"weight has shape \(8, 8, 3, 3\), expected \(8, 16, 3, 3\)"),
        ((x, weight, expanded[:100], bias), ValueError, r"expected \(128, 16, 1, 1\) or \(288, 16, 1, 1\)"),
        ((x, weight, expanded, bias[:3]), ValueError, r"bias has shape \(3,\), expected \(8,\)"),
        ((x, weight, expanded, bias.repeat(2)[::2]), ValueError, r"bias must be contiguous; call \.contiguous"),
        ((x, weight, expanded.double(), bias), TypeError, "expanded is torch.float64 on cpu, expected torch.float32"),
    ]
    for arguments, error, words in refused:
        for executor in ("reference", "cpp"):
            with pytest.raises(error, match=words):
                winograd.conv(*arguments, executor=executor)
    with pytest.raises(ValueError, match="executor must be 'reference' or 'cpp', got 'triton'"):
        winograd.conv(x, weight, expanded, bias, executor="triton")


def test_the_c_functions_refuse_what_they_cannot_read() -> None:
    library, room = native.load(), torch.zeros(36 * 16)
    fields = {"B": 1, "C": 1, "H": 4, "W": 4, "first": 0, "count": 1, "size": 4}
    addresses = dict.fromkeys(("x", "v", "products", "y"), room.data_ptr())
    for change, code in (
        ({}, 0), ({"x": None, "y": None}, 1), ({"size": 3}, 2), ({"count": 2}, 2), ({"first": 1}, 2), ({"C": 0}, 2),
    ):  # fmt: skip
        args = native_blocks.WinogradArgs(**(addresses | fields | change))
        for which in ("into", "out"):
            assert getattr(library, f"fastdiff_winograd_{which}_cpu")(ctypes.addressof(args)) == code


# -- when it is chosen


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((128, 128, 32, 32), 4), ((256, 256, 16, 16), 4), ((192, 384, 64, 64), 4), ((64, 64, 32, 32), 4),
        ((256, 256, 8, 8), 2), ((768, 768, 8, 8), 2),
        ((128, 128, 8, 8), 0), ((256, 256, 4, 4), 0), ((512, 512, 4, 4), 0), ((32, 32, 16, 16), 0),
        ((3, 128, 32, 32), 0), ((128, 6, 32, 32), 0), ((120, 128, 32, 32), 0),
    ],
)  # fmt: skip
def test_the_tile_size_that_was_the_fastest(shape: tuple[int, int, int, int], size: int) -> None:
    """Measured on a CPU with AVX2, at one sample; widths that fill no registers were not, and stay direct."""
    assert winograd.tile_size(*shape) == size


def test_a_weight_whose_changes_torch_does_not_count_is_not_packed() -> None:
    """Made in inference mode: there is no telling a stale copy of it."""
    x = torch.randn(1, 48, 32, 32).contiguous(memory_format=LAST)
    with torch.inference_mode():
        conv = PackedConv(torch.nn.Parameter(torch.randn(64, 48, 3, 3), requires_grad=False))
        conv.winograd = True
        first = conv(x)
        conv.weight.mul_(2.0)
        torch.testing.assert_close(conv(x), 2.0 * first)
    with torch.no_grad():
        torch.testing.assert_close(conv(x), 2.0 * first)


@torch.no_grad()
def test_images_of_many_sizes_do_not_keep_a_copy_of_the_weight_each() -> None:
    conv = PackedConv(torch.nn.Parameter(torch.randn(64, 48, 3, 3), requires_grad=False))
    conv.winograd = True
    for side in (16, 20, 24, 28, 32):
        conv(torch.randn(1, 48, side, side).contiguous(memory_format=LAST))
    assert [tiles for _, tiles in conv._packed] == [36, 49, 64]
    conv.weight.mul_(2.0)
    conv(torch.randn(1, 48, 28, 28).contiguous(memory_format=LAST))
    assert [tiles for _, tiles in conv._packed] == [49], "what was packed of the former weight is gone"


@torch.no_grad()
@pytest.mark.parametrize(("size", "side"), [(4, 32), (2, 8)])
def test_where_new_tensors_are_made_by_default_does_not_matter(size: int, side: int) -> None:
    conv = PackedConv(torch.nn.Parameter(torch.randn(256, 256, 3, 3), requires_grad=False))
    conv.winograd = True
    x = torch.randn(1, 256, side, side).contiguous(memory_format=LAST)
    with torch.device("meta"):
        found = conv(x)
    assert [kept[0] for kept in conv._packed] == [size]
    assert torch.equal(found, conv(x))


@torch.no_grad()
def test_a_packed_convolution_follows_its_weight_and_its_image(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.nn.Parameter(torch.randn(64, 48, 3, 3).contiguous(memory_format=LAST), requires_grad=False)
    conv = PackedConv(weight)
    conv.winograd = True
    for size, x in ((4, torch.randn(2, 48, 31, 32)), (0, torch.randn(3, 48, 4, 4)), (4, torch.randn(1, 48, 32, 32))):
        x = x.contiguous(memory_format=LAST)
        assert winograd.tile_size(48, 64, *x.shape[2:]) == size
        for module in (conv, copy.deepcopy(conv)):
            expected = F.conv2d(x.double(), weight.double(), padding=1)
            error = (module(x) - expected).abs().max()
            assert error <= 5e-6 * expected.abs().max()
            assert size in {kind for kind, _ in module._packed}
        weight.mul_(1.5)
    expected = conv(x)
    assert torch.equal(conv(x.contiguous()), expected), "the memory format of the input does not matter"
    assert torch.equal(torch.compile(conv.forward, fullgraph=True, backend="aot_eager")(x), expected)
    other = copy.deepcopy(conv)
    with torch.inference_mode():
        assert torch.equal(other(x), expected)
    assert torch.equal(other(x), expected), "what was packed in inference mode serves outside of it"
    weight.data = torch.zeros_like(weight)
    assert not conv(x).any()
    monkeypatch.setattr(onednn, "available", lambda: False)
    conv.weight.data = torch.ones_like(weight)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, padding=1))


@torch.no_grad()
def test_other_convolutions_stay_the_librarys() -> None:
    x = torch.randn(1, 64, 32, 32).contiguous(memory_format=LAST)
    for taps, stride, padding, wanted in ((3, 2, 1, True), (3, 1, 0, True), (1, 1, 0, True), (3, 1, 1, False)):
        conv = PackedConv(torch.nn.Parameter(torch.randn(64, 64, taps, taps), requires_grad=False), stride, padding)
        conv.winograd = wanted
        conv(x)
        assert list(conv._packed) == [(0, 0)]


@torch.no_grad()
def test_under_transforms_and_tracers_it_is_torchs_operator() -> None:
    x = torch.randn(2, 64, 32, 32).contiguous(memory_format=LAST)
    conv = PackedConv(torch.nn.Parameter(torch.randn(64, 64, 3, 3) / 24, requires_grad=False))
    conv.winograd = True
    expected = conv(x)
    assert list(conv._packed) == [(4, 64)]
    close = {"rtol": 0, "atol": 1e-5 * float(expected.abs().max())}
    mapped = torch.func.vmap(lambda one: conv(one[None])[0])(x)
    torch.testing.assert_close(mapped, expected, **close)
    _, tangent = torch.func.jvp(conv, (x,), (x,))
    torch.testing.assert_close(tangent, expected, **close)
    traced = make_fx(conv)(torch.zeros_like(x))
    assert torch.equal(traced(x), expected), "the values of the trace's own input are not baked in"
    assert torch.equal(conv(torch._neg_view(x)), conv(-x))


def test_the_library_sees_one_number_of_tiles_whatever_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, seen = given((3, 16, 16, 20, 20))[0], set()

    def multiply(v: Tensor) -> Tensor:
        seen.add(tuple(v.shape))
        return v

    for group, tiles in ((1 << 22, 25), (12 * 36 * 32, 9)):
        monkeypatch.setattr(winograd, "_GROUP", group)
        for batch in (1, 3):
            winograd.run(x[:batch], 4, 16, multiply)
        assert seen == {(1, 36 * 16, tiles, 1)}
        seen.clear()


# -- in the UNet


@torch.no_grad()
def test_the_fast_network_uses_it_unless_told_not_to() -> None:
    config = CONFIGS["ddpm-cifar"] | {"block_out_channels": (64, 64, 64, 64)}
    net, rest = UNet.from_diffusers(random_peer(config)), random_inputs(config)[1:]
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    expected, outputs = net(x, *rest), {}
    for wanted in (True, False):
        fast = net.fast(winograd=wanted)
        outputs[wanted] = fast(x, *rest)
        prepared = fast.prepare_times(*rest)
        assert torch.equal(prepared(x[:1], rest[0][:1]), prepared(x, *rest)[:1]), "no batch changes a sample"
        packed = {size for module in fast.modules() if isinstance(module, PackedConv) for size, _ in module._packed}
        assert packed == ({0, 4} if wanted else {0})
        torch.testing.assert_close(outputs[wanted], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert not torch.equal(outputs[True], outputs[False])
    half = net.fast(torch.bfloat16)
    half(x, *rest)
    assert not any(module._packed for module in half.modules() if isinstance(module, PackedConv))
