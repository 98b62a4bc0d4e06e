"""The convolution that trains on a CPU against float64, what must not change a bit of it, where torch's is taken."""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import INSTRUCTION_SETS, every_instruction_set  # noqa: F401
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastdiff.engine import backends, eager, native, native_blocks
from fastdiff.engine import winograd_train as module
from fastdiff.engine.winograd_train import conv3x3
from fastdiff.models.unet import UNet
from fastdiff.models.unet_config import UNetConfig

pytestmark = pytest.mark.skipif(not backends.probe()["cpp"].ok, reason="the extension is not built")

LAST = torch.channels_last
SHAPES = [  # B, C_in, C_out, H, W: few tiles and many, tiles in part, blocks in part
    (1, 16, 32, 16, 16),
    (3, 80, 48, 7, 10),
    (16, 32, 16, 8, 8),
    (2, 16, 48, 32, 31),
    (5, 112, 144, 21, 18),
]
# of the largest output, entry of dx, of dw and of db; the bound of the convolution for inference, and half of it
BOUNDS = (6e-6, 6e-6, 3e-6, 3e-6)


def given(shape: tuple[int, ...], mean: float = 0.0) -> list[Tensor]:
    """x, weight, bias and the gradient of the result."""
    batch, inputs, outputs, height, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(batch, inputs, height, width, generator=generator) + mean
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator) / (9 * inputs) ** 0.5
    grad = torch.randn(batch, outputs, height, width, generator=generator) + mean
    return [
        x.contiguous(memory_format=LAST), weight.contiguous(memory_format=LAST),
        torch.randn(outputs, generator=generator), grad.contiguous(memory_format=LAST),
    ]  # fmt: skip


def by_torch(tensors: list[Tensor], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors[:3]]
    out = F.conv2d(*leaves, padding=1)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3].to(dtype))]


def by_us(tensors: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    out = conv3x3(*leaves)
    assert is_ours(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


def is_ours(out: Tensor) -> bool:
    return type(out.grad_fn).__name__ == "_Conv3x3Backward"


@pytest.mark.usefixtures("every_instruction_set")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_against_float64(shape: tuple[int, ...], mean: float) -> None:
    tensors = given(shape, mean)
    exact = by_torch(tensors)
    for contiguous in (False, True):
        tensors[1] = tensors[1].contiguous() if contiguous else tensors[1]
        found = by_us(tensors)
        assert found[2].stride() == tensors[1].stride(), "the weight's own memory format, so that it need not be copied"
        for name, own, best, bound in zip(("out", "dx", "dw", "db"), found, exact, BOUNDS, strict=True):
            assert float((own - best).abs().max()) <= bound * float(best.abs().max()), name


def test_the_gradient_of_many_pixels_and_of_wide_layers() -> None:
    """4096 tiles, added up in 32 blocks, and 512 channels: as long as the sums of a training step get."""
    for shape in ((16, 16, 16, 64, 64), (2, 512, 256, 16, 16)):
        tensors = given(shape)
        for own, best, bound in zip(by_us(tensors), by_torch(tensors), BOUNDS, strict=True):
            assert float((own - best).abs().max()) <= bound * float(best.abs().max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    library, found = native.load(), []
    monkeypatch.setattr(eager, "_there", lambda: True)
    best = library.fastdiff_cpu_isa(-1)
    try:
        for number in INSTRUCTION_SETS:
            library.fastdiff_cpu_isa(number)
            found.append(by_us(given(shape))[:3])
    finally:
        library.fastdiff_cpu_isa(best)
    assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("shape", [(8, 64, 64, 32, 32), (8, 128, 80, 8, 8), (2, 64, 48, 10, 16)], ids=str)
def test_threads_and_blocks_of_the_convolution_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    tensors, threads = given(shape), torch.get_num_threads()
    found = []
    try:
        for number, block in ((1, 48), (2, 48), (3, 7)):
            torch.set_num_threads(number)
            monkeypatch.setattr(module, "_BLOCK", block)
            found.append(by_us(tensors))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))


def test_an_image_does_not_see_its_batch() -> None:
    x, weight, bias, grad = given((8, 48, 64, 16, 16))
    whole = by_us([x, weight, bias, grad])
    alone = by_us([x[3:4], weight, bias, grad[3:4]])
    assert all(torch.equal(a[3:4], b) for a, b in zip(whole[:2], alone[:2], strict=True))


def test_the_weights_gradient_comes_from_few_tiles_and_the_rest_from_more() -> None:
    tensors = given((4, 32, 32, 4, 4))
    assert module.FEWEST_OF_GRADIENT <= module.tiles(4, 4, 4) < module.FEWEST
    found, plain, exact = by_us(tensors), by_torch(tensors, torch.float32), by_torch(tensors)
    assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1]) and not torch.equal(found[2], plain[2])
    assert float((found[2] - exact[2]).abs().max()) <= BOUNDS[2] * float(exact[2].abs().max())


def test_images_that_do_not_fill_their_tiles_have_none() -> None:
    assert [module.tiles(2, *size) for size in ((8, 8), (9, 8), (5, 5), (6, 6), (1, 64), (2, 2))] == [8, 12, 0, 8, 0, 0]


def test_torch_is_asked_where_it_must_be() -> None:
    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return function(*args, **(kwargs or {}))

    x, weight, bias, _ = given((2, 32, 16, 16, 16))
    parameter = torch.nn.Parameter(weight)
    assert is_ours(conv3x3(x, parameter, bias)) and is_ours(conv3x3(x, parameter, None))
    assert not is_ours(conv3x3(x, weight, bias)), "no gradient is wanted"
    with torch.no_grad():
        assert torch.equal(conv3x3(x, parameter, bias), F.conv2d(x, weight, bias, padding=1))
    with Watch():
        assert not is_ours(conv3x3(x, parameter, bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert conv3x3(x, parameter, bias).dtype == torch.bfloat16
    others = [
        (x.contiguous(), weight), (x[:, :24].contiguous(memory_format=LAST), weight[:, :24]), (x, weight[:15]),
        (x[:1, :, :4, :8].contiguous(memory_format=LAST), weight), (x.double(), weight.double()), (x[:0], weight),
    ]  # fmt: skip
    for image, other in others:
        other = other.detach().requires_grad_()
        found = conv3x3(image, other, None)
        assert not is_ours(found) and torch.equal(found, F.conv2d(image, other, padding=1))
    with pytest.raises(RuntimeError, match="channels"):
        conv3x3(x, torch.nn.Parameter(weight[:, :16]), None)


def test_only_the_gradients_that_are_wanted_are_found() -> None:
    x, weight, bias, grad = given((2, 32, 16, 16, 16))
    whole = by_us([x, weight, bias, grad])
    for i in range(3):
        leaves = [tensor.detach().requires_grad_(k == i) for k, tensor in enumerate((x, weight, bias))]
        out = conv3x3(*leaves)
        out.backward(grad)
        assert [leaf.grad is not None for leaf in leaves] == [k == i for k in range(3)]
        assert torch.equal(leaves[i].grad, whole[1 + i])  # type: ignore[arg-type]


def test_a_gradient_of_any_strides() -> None:
    x, weight, bias, grad = given((2, 32, 16, 16, 16))
    expected = by_us([x, weight, bias, grad])
    for other in (grad.contiguous(), torch._neg_view(-grad)):
        assert all(torch.equal(a, b) for a, b in zip(by_us([x, weight, bias, other]), expected, strict=True))
    ones = by_us([x, weight, bias, torch.ones(()).expand_as(grad)])
    assert all(torch.equal(a, b) for a, b in zip(ones, by_us([x, weight, bias, torch.ones_like(grad)]), strict=True))


def test_the_second_derivative_is_that_of_torch() -> None:
    x, weight, bias, _ = given((2, 16, 32, 16, 16))
    found = []
    for dtype, conv in ((torch.float32, conv3x3), (torch.float64, lambda *of: F.conv2d(*of, padding=1))):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, weight, bias)]
        first = torch.autograd.grad(conv(*leaves).square().sum(), leaves[:2], create_graph=True)
        found.append(torch.autograd.grad(sum(one.square().sum() for one in first), leaves))
    for own, best in zip(*found, strict=True):
        torch.testing.assert_close(own.double(), best, rtol=0, atol=2e-5 * float(best.abs().max()))


def test_gradients_in_a_batch_and_under_a_compiler() -> None:
    x, weight, bias, grad = given((2, 16, 32, 16, 16))
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    out, grads = conv3x3(*leaves), torch.stack([grad, -2.0 * grad])
    found = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(out, leaves, one, retain_graph=True) for one in grads]
    for own, expected in zip(found, map(torch.stack, zip(*one_by_one, strict=True)), strict=True):
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    compiled = torch.compile(conv3x3, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), out, rtol=0, atol=1e-5 * float(out.detach().abs().max()))


def test_the_c_functions_refuse_what_they_cannot_read() -> None:
    library, room = native.load(), torch.zeros(9 * 16 * 16)
    fields = {"B": 1, "C": 16, "N": 16, "H": 4, "W": 4, "row": 1, "column": 144, "tap": 16, "block": 1}
    addresses = dict.fromkeys(("x", "y", "weight"), room.data_ptr())
    for change, code in (
        ({}, 0), ({"x": None}, 1), ({"y": None}, 1), ({"weight": None}, 1), ({"C": 24}, 2), ({"N": 8}, 2),
        ({"B": 0}, 2), ({"block": 0}, 2),
    ):  # fmt: skip
        args = native_blocks.WinogradTrainArgs(**(addresses | fields | change))
        for which in ("convolution", "gradient"):
            assert getattr(library, f"fastdiff_winograd_{which}_cpu")(ctypes.addressof(args)) == code


def test_a_network_trains_with_it_as_without_and_keeps_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    config = UNetConfig(
        block_out_channels=(16, 32), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    net = UNet(config).to(memory_format=LAST)
    for parameter in net.parameters():
        parameter.data.normal_(0.0, 0.2)
    x, time = torch.randn(2, 3, 16, 16).contiguous(memory_format=LAST), torch.tensor([1.0, 500.0])
    gradients, kept = [], []
    for fewest in (module.FEWEST_OF_GRADIENT, 10**9):
        monkeypatch.setattr(module, "FEWEST_OF_GRADIENT", fewest)
        net.zero_grad()
        storages: dict[int, int] = {}

        def note(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = net(x, time).square().mean()
        kept.append(sum(storages.values()))
        loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in net.named_parameters()})
    assert kept[0] == kept[1]
    ours, plain = gradients
    assert not torch.equal(ours["mid_block.resnets.0.conv1.weight"], plain["mid_block.resnets.0.conv1.weight"])
    largest = max(float(gradient.abs().max()) for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=3e-6 * largest, msg=name)
