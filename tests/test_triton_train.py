"""The two training ops on the Triton executor, on a GPU or interpreted: against the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from interpreted import DEVICE, interpreted, train  # noqa: F401
from train_cases import TABLES, Case, fresh

from fastdiff.engine import reference_train
from fastdiff.engine.train_ops import IMAGE_DTYPES, TrainTensors, check

FACTOR = 0.125
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def run(t: TrainTensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_in, the gradient and the sums by Triton, in buffers that held NaN."""
    noised, taught = fresh(t, DEVICE), fresh(t, DEVICE)
    check("loss", taught)
    train.bind(*noised.arguments()[:4], factor=0.0)()
    train.bind(*taught.arguments(), factor=FACTOR)()
    assert noised.out is not None and taught.out is not None and taught.partial is not None
    return noised.out.cpu(), taught.out.cpu(), taught.partial.cpu()


def assert_equal(t: TrainTensors) -> None:
    x, gradient, sums = run(t)
    noised, taught = fresh(t), fresh(t)
    reference_train.noise_images(*noised.arguments()[:4])  # type: ignore[arg-type]
    reference_train.loss(*taught.arguments(), factor=FACTOR)  # type: ignore[arg-type]
    assert taught.partial is not None
    assert torch.equal(x, noised.out)
    assert torch.equal(gradient, taught.out)
    torch.testing.assert_close(sums.double().sum(1), taught.partial.double().sum(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "batch"), [((3, 5, 7), 3), ((3, 8, 12), 2), ((3, 24, 20), 2)])
def test_shapes(shape: tuple[int, ...], batch: int, layout: torch.memory_format) -> None:
    assert_equal(Case(shape, batch, layout).tensors())


@pytest.mark.parametrize("table", TABLES)
def test_tables(table: str) -> None:
    assert_equal(Case((2, 6, 4), table=table, image_dtype=torch.float32).tensors())


@pytest.mark.parametrize("model_dtype", DTYPES)
@pytest.mark.parametrize("image_dtype", IMAGE_DTYPES)
def test_dtypes(image_dtype: torch.dtype, model_dtype: torch.dtype) -> None:
    assert_equal(Case((3, 4, 4), 2, image_dtype=image_dtype, model_dtype=model_dtype, table="v").tensors())


def test_one_element_and_vectors() -> None:
    assert_equal(Case((1,), batch=1).tensors())
    assert_equal(Case((6,), batch=2, flip=True).tensors())


def test_more_tiles_than_parts() -> None:
    assert_equal(Case((1, 30, 1101), batch=1, table="clean").tensors())


def test_the_loss_without_a_gradient() -> None:
    t = Case((2, 4, 4), table="eps").tensors()
    _, _, sums = run(t)
    alone = fresh(t, DEVICE)
    train.bind(alone.images, alone.table, alone.key, None, alone.model_out, alone.weight, alone.partial, factor=1.0)()
    assert alone.partial is not None
    assert torch.equal(alone.partial.cpu(), sums)
