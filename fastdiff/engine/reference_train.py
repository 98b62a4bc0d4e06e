"""The ops of a training step in plain torch: slow, obvious, and what the other executors are tested against.

May import: the table's layout and the NumPy noise. Equations and columns: engine.train_ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.compiler import layout as at
from fastdiff.engine import noise as counter_noise


def noise_images(images: Tensor, table: Tensor, key: Tensor, out: Tensor) -> None:
    """x_in of every sample; see `fastdiff.engine.train_ops.noise_images`."""
    for b, (p, q, r, _, _, _, flip, _) in enumerate(table.tolist()):
        out[b] = _combine(_image(images[b], flip), int(key[b]), p, q, r).to(out.dtype)


def loss(
    images: Tensor,
    table: Tensor,
    key: Tensor,
    gradient: Tensor | None,
    model_out: Tensor,
    weight: Tensor,
    partial: Tensor,
    *,
    factor: float,
) -> None:
    """The sum of squares and the gradient of every sample; see `fastdiff.engine.train_ops.loss`."""
    partial.zero_()
    for b, (_, _, _, a, by, c, flip, _) in enumerate(table.tolist()):
        rest = model_out[b].float() - _combine(_image(images[b], flip), int(key[b]), a, by, c)
        partial[b, 0] = rest.double().square().sum()
        if gradient is not None:
            gradient[b] = ((weight[b] * factor) * rest).to(gradient.dtype)


def _image(image: Tensor, flip: float) -> Tensor:
    """x0 of one sample in fp32, mirrored where asked."""
    pixels = image.flip(-1) if flip else image
    return (pixels.float() - 127.5) * (1 / 127.5) if pixels.dtype == torch.uint8 else pixels.float()


def _combine(x0: Tensor, key: int, image: float, first: float, second: float) -> Tensor:
    """image x0 + first z + second y, as fused multiply-adds; a factor of 0 reads and draws nothing."""
    total = torch.zeros_like(x0)
    if first:
        total = first * _normal(x0, key, at.NOISE_Z)
    if second:
        total = _fma(second, _normal(x0, key, at.NOISE_Y), total)
    return _fma(image, x0, total) if image else total


def _fma(a: float, b: Tensor, c: Tensor) -> Tensor:
    # the product of two fp32 numbers is exact in float64, so only the sum rounds
    return (a * b.double() + c.double()).float()


def _normal(like: Tensor, key: int, number: int) -> Tensor:
    values = counter_noise.normal(key, like.numel(), number, at.STREAM_TRAINING)
    return torch.from_numpy(values).to(like.device).view(like.shape)
