"""The two training ops on every executor of a CPU: against float64, against each other bit for bit, and as autograd."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from instruction_sets import INSTRUCTION_SETS, best_instruction_set  # noqa: F401
from train_cases import TABLES, Case, expected, fresh

import fastdiff as fd
from fastdiff.engine import native, train_ops
from fastdiff.engine.train_ops import TrainTensors

EXECUTORS = [name for name in ("reference", "cpp") if fd.backends()[name].ok]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FACTOR = 0.125
SHAPES = [
    ((1,), torch.contiguous_format),
    ((5,), torch.contiguous_format),
    ((3, 5, 7), torch.contiguous_format),
    ((3, 5, 7), torch.channels_last),
    ((20, 3, 3), torch.channels_last),
    ((3, 32, 32), torch.contiguous_format),
    ((4, 34, 30), torch.channels_last),
    ((1, 2, 40000), torch.contiguous_format),  # more blocks than parts
]


def run(t: TrainTensors, executor: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_in, the gradient and the sums, each in a buffer that held NaN."""
    noised, taught = fresh(t), fresh(t)
    assert noised.out is not None and taught.out is not None and taught.partial is not None
    train_ops.noise_images(noised.images, noised.table, noised.key, noised.out, executor=executor)
    train_ops.loss(taught, FACTOR, executor)
    return noised.out, taught.out, taught.partial


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("shape", "layout"), SHAPES)
def test_against_float64(shape: tuple[int, ...], layout: torch.memory_format, executor: str) -> None:
    t = Case(shape, layout=layout).tensors()
    x, gradient, sums = run(t, executor)
    want_x, want_sums, want_gradient = expected(t, FACTOR)
    np.testing.assert_allclose(x, want_x, rtol=0, atol=4e-7 * np.abs(want_x).max())
    np.testing.assert_allclose(gradient, want_gradient, rtol=0, atol=6e-7 * np.abs(want_gradient).max())
    np.testing.assert_allclose(sums.double().sum(1), want_sums, rtol=1e-6)
    assert x.stride() == t.images.stride() == gradient.stride()


@pytest.mark.skipif("cpp" not in EXECUTORS, reason="the extension is not built")
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("model_dtype", DTYPES)
def test_executors_agree_to_the_bit(model_dtype: torch.dtype, table: str) -> None:
    for image_dtype in train_ops.IMAGE_DTYPES:
        for layout in (torch.contiguous_format, torch.channels_last):
            t = Case((3, 9, 11), 4, layout, image_dtype, model_dtype, table, seed=len(table)).tensors()
            for one, other in zip(run(t, "reference")[:2], run(t, "cpp")[:2], strict=True):
                assert torch.equal(one, other), (image_dtype, layout)


@pytest.mark.skipif("cpp" not in EXECUTORS, reason="the extension is not built")
def test_instruction_sets_agree_to_the_bit() -> None:
    for t in (
        Case((3, 33, 31), image_dtype=torch.float16, model_dtype=torch.bfloat16).tensors(),
        Case((5, 16, 18), layout=torch.channels_last, image_dtype=torch.bfloat16).tensors(),
    ):
        results = []
        for number in INSTRUCTION_SETS:
            assert native.load().fastdiff_cpu_isa(number) == number
            results.append(run(t, "cpp"))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_sample_does_not_depend_on_its_batch(executor: str) -> None:
    t = Case((3, 40, 50), batch=5).tensors()
    together = run(t, executor)
    for b in (0, 3):
        alone = TrainTensors(*[None if tensor is None else tensor[b : b + 1] for tensor in t.arguments()])  # type: ignore[arg-type]
        for one, all_of_them in zip(run(alone, executor), together, strict=True):
            assert torch.equal(one[0], all_of_them[b])


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_memory_format_does_not_change_a_sample(executor: str) -> None:
    one, other = (
        Case((3, 12, 16), layout=layout).tensors() for layout in (torch.contiguous_format, torch.channels_last)
    )
    for a, b in zip(run(one, executor)[:2], run(other, executor)[:2], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_what_a_factor_of_0_stands_before_is_not_read(executor: str) -> None:
    t = Case(image_dtype=torch.float32, table="eps").tensors()
    t.images.fill_(float("nan"))  # eps does not ask for the image
    _, want, _ = expected(fresh(t, images=torch.zeros_like(t.images)), FACTOR)
    taught = fresh(t)
    train_ops.loss(taught, FACTOR, executor)
    assert taught.partial is not None
    np.testing.assert_allclose(taught.partial.double().sum(1), want, rtol=1e-6)
    taught.out = None  # nor need anybody want the gradient
    train_ops.loss(taught, FACTOR, executor)
    np.testing.assert_allclose(taught.partial.double().sum(1), want, rtol=1e-6)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_opcheck(executor: str) -> None:
    t = Case((2, 4, 4), image_dtype=torch.float32).tensors()
    filled = fresh(t)
    for written in (filled.out, filled.partial):
        assert written is not None
        written.zero_()  # opcheck compares what is written with what was there, and NaN equals nothing
    arguments = filled.arguments()
    torch.library.opcheck(torch.ops.fastdiff.noise_images.default, arguments[:4], {"executor": executor})
    torch.library.opcheck(torch.ops.fastdiff.loss.default, arguments, {"factor": FACTOR, "executor": executor})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_autograd_is_that_of_the_formula(layout: torch.memory_format, dtype: torch.dtype) -> None:
    t = Case((3, 6, 5), image_dtype=torch.float32, model_dtype=dtype, table="v").tensors()
    assert t.model_out is not None and t.weight is not None
    output = t.model_out.contiguous(memory_format=layout).requires_grad_()
    weight = t.weight.clone().requires_grad_()
    mean, error = train_ops.squared_error(output, weight, t.images, t.table, t.key)
    (1024.0 * mean).backward()

    zero = fresh(t, model_out=torch.zeros_like(t.model_out).float())
    target = torch.from_numpy(-expected(zero, 1.0)[2]) / t.weight.double()[:, None, None, None]
    plain = t.model_out.detach().double().requires_grad_()
    again = t.weight.double().requires_grad_()
    errors = (plain - target).square().flatten(1).mean(1)
    formula = (again * errors).mean()
    (1024.0 * formula).backward()
    torch.testing.assert_close(mean.double(), formula, rtol=1e-6, atol=0)
    torch.testing.assert_close(error.double(), errors, rtol=1e-6, atol=0)
    assert output.grad is not None and output.grad.dtype == dtype and weight.grad is not None
    assert plain.grad is not None and again.grad is not None
    step = {torch.float32: 2e-7, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]  # two roundings of the dtype
    torch.testing.assert_close(output.grad.double(), plain.grad, rtol=step, atol=1e-6 * plain.grad.abs().max().item())
    torch.testing.assert_close(weight.grad.double(), again.grad, rtol=1e-6, atol=0)


def test_a_half_gradient_survives_a_small_share() -> None:
    t = Case((3, 64, 64), batch=4, model_dtype=torch.float16, table="eps").tensors()
    assert t.model_out is not None and t.weight is not None
    output = t.model_out.clone().requires_grad_()
    mean, _ = train_ops.squared_error(output, t.weight, t.images, t.table, t.key)
    (2.0**16 * mean).backward()
    assert output.grad is not None
    _, _, want = expected(t, 2.0**17 / output.numel())
    lost = np.abs(output.grad.double().numpy() - want).max() / np.abs(want).max()
    assert lost < 2**-10  # at 2 / numel alone most of it would be below the smallest half


def test_neither_noise_nor_target_is_kept() -> None:
    t = Case((3, 8, 8)).tensors()
    assert t.model_out is not None and t.weight is not None
    output = t.model_out.requires_grad_()
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mean, _ = train_ops.squared_error(output, t.weight, t.images, t.table, t.key)
    assert sorted(tensor.numel() for tensor in kept) == [3, output.numel()]  # the errors and the gradient
    mean.backward()


def refused(**changes: Any) -> TrainTensors:
    return fresh(Case((2, 3, 4), batch=2).tensors(), **changes)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": torch.zeros(2, 2, 3, 4, dtype=torch.int32)}, TypeError, "images have dtype torch.int32"),
        ({"images": torch.zeros(2, 2, 4, 3).transpose(2, 3)}, ValueError, "contiguous or channels_last"),
        ({"images": torch.zeros(0, 2, 3, 4)}, ValueError, "with elements"),
        ({"images": torch.zeros(2)}, ValueError, r"\[batch, \*shape\]"),
        ({"model_out": torch.zeros(2, 2, 3, 4).double()}, TypeError, "float32, float16 or bfloat16"),
        ({"model_out": torch.zeros(2, 2, 3, 5)}, ValueError, "expected"),
        ({"out": torch.zeros(2, 2, 3, 4).half()}, TypeError, "out has dtype"),
        ({"out": torch.zeros(2, 2, 3, 4).to(memory_format=torch.channels_last)}, ValueError, "must be"),
        ({"table": torch.zeros(2, 7)}, ValueError, r"expected \(2, 8\)"),
        ({"table": torch.zeros(2, 8).double()}, TypeError, "table has dtype"),
        ({"key": torch.zeros(2, dtype=torch.int32)}, TypeError, "key has dtype"),
        ({"weight": torch.zeros(3)}, ValueError, "weight has shape"),
        ({"partial": torch.zeros(2, 8)}, ValueError, "partial has shape"),
    ],
)
def test_refusals(changes: dict[str, Any], error: type[Exception], message: str, executor: str) -> None:
    with pytest.raises(error, match=message):
        train_ops.loss(refused(**changes), 1.0, executor)


def test_an_executor_that_is_not_there() -> None:
    if fd.backends()["cuda"].ok:
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(fd.BackendUnavailable, match="no CUDA device"):
        train_ops.loss(refused(), 1.0, "cuda")


@pytest.mark.skipif("cpp" not in EXECUTORS, reason="the extension is not built")
def test_the_extension_refuses_by_itself() -> None:
    library = native.load()
    for op in (library.fastdiff_noise_images_cpu, library.fastdiff_loss_cpu):
        args = native.TrainArgs(B=1, N=4, width=4, channels=1)
        assert library.fastdiff_error(op(ctypes.addressof(args))) == b"a buffer the row needs was not given"
