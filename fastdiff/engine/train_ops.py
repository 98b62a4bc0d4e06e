"""The two ops of a training step: noising images, and the squared error with its gradient, noise drawn again.

May import: backends, checks, the reference, fastdiff.kernels and the compiled extension (through engine.native).
One row of scalars per sample, with x0 the image, z and y unit normals named by the sample's key:
    x_in = P x0 + Q z + R y        F* = A x0 + B z + C y        error = mean over elements of (F - F*)^2
so eps, x0, v, score, flow and edm targets at any level, input perturbation and interpolants are tables, not kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.engine import backends, reference_train
from fastdiff.engine.checks import MODEL_DTYPES, channels_of

COLUMNS = 8
P, Q, R, A, B, C, FLIP = range(COLUMNS - 1)  # FLIP: mirror the image's last axis where not 0; the last is unused
IMAGE_DTYPES = (torch.uint8, *MODEL_DTYPES)

_library = torch.library.Library("fastdiff", "FRAGMENT")
_library.define(
    "noise_images(Tensor images, Tensor table, Tensor key, Tensor(a!) out, *, str executor) -> ()",
)
_library.define(
    "loss(Tensor images, Tensor model_out, Tensor table, Tensor weight, Tensor key, Tensor(a!) error, "
    "Tensor(b!)? gradient, *, float factor, str executor) -> ()",
)


def noise_images(images: Tensor, table: Tensor, key: Tensor, out: Tensor, *, executor: str) -> None:
    """Write the network's input x_in into `out`.

    images: [B, *S] uint8 (0 .. 255 become -1 .. 1), fp32, fp16 or bf16. table: fp32 [B, 8], the columns above.
    key: int64 [B]. out: [B, *S] fp32, fp16 or bf16, in the memory format of images, contiguous or channels_last.
    Deterministic; capturable on executors "triton" and "cuda". Raises ValueError, TypeError, BackendUnavailable.
    """
    torch.ops.fastdiff.noise_images(images, table, key, out, executor=executor)


def loss(
    images: Tensor,
    model_out: Tensor,
    table: Tensor,
    weight: Tensor,
    key: Tensor,
    error: Tensor,
    gradient: Tensor | None,
    *,
    factor: float,
    executor: str,
) -> None:
    """Write each sample's mean squared error, and gradient = factor weight (F - F*), drawing the noise again.

    images, table, key: what noise_images was given. model_out: F, [B, *S] fp32, fp16 or bf16, in the memory format of
    images. weight, error: fp32 [B]. gradient: like model_out, or None. Otherwise as noise_images.
    """
    torch.ops.fastdiff.loss(images, model_out, table, weight, key, error, gradient, factor=factor, executor=executor)


def noised(images: Tensor, table: Tensor, key: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The network's input, in a new tensor of this dtype and the memory format of images."""
    images = _dense(images)
    out = torch.empty_like(images, dtype=dtype, memory_format=torch.preserve_format)
    noise_images(images, table, key, out, executor=backends.choose(images.device))
    return out


def squared_error(
    model_out: Tensor, weight: Tensor, images: Tensor, table: Tensor, key: Tensor
) -> tuple[Tensor, Tensor]:
    """mean_b(weight_b error_b), differentiable in model_out and weight, and error [B], which is not.

    The gradient is found in the same pass; neither noise nor target is kept. Not twice differentiable.
    """
    mean, error = _SquaredError.apply(model_out, weight, images, table, key)
    return mean, error


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, model_out: Tensor, weight: Tensor, images: Tensor, table: Tensor, key: Tensor
    ) -> tuple[Tensor, Tensor]:
        output, images = _alike(model_out.detach(), images)
        error = torch.empty(len(output), dtype=torch.float32, device=output.device)
        gradient = torch.empty_like(output) if model_out.requires_grad else None
        share = 2.0 / max(output.numel(), 1)
        # a half's range ends near 6e-8, which is where the share of one element may lie: it waits for the loss scale
        factor, ctx.share = (2.0, share / 2.0) if output.dtype == torch.float16 else (share, 1.0)
        loss(
            images,
            output,
            table,
            weight.detach(),
            key,
            error,
            gradient,
            factor=factor,
            executor=backends.choose(output.device),
        )
        ctx.save_for_backward(gradient, error)
        ctx.mark_non_differentiable(error)
        return (weight.detach() * error).mean(), error

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_mean: Tensor, by_error: Tensor) -> tuple[Tensor | None, ...]:
        del by_error
        gradient, error = ctx.saved_tensors
        by_weight = by_mean * error / len(error) if ctx.needs_input_grad[1] else None
        if gradient is not None and (ctx.share != 1.0 or by_mean.is_cuda or float(by_mean) != 1.0):
            scale = (by_mean.float() * ctx.share).reshape(1)
            gradient = torch.mul(gradient, scale, out=torch.empty_like(gradient))  # in fp32, rounded once
        return gradient, by_weight, None, None, None


def _dense(images: Tensor) -> Tensor:
    return images if channels_of(images) else images.contiguous()


def _alike(model_out: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the memory format of the model's output: images are fewer bytes to move, and noise knows no format."""
    if model_out.shape != images.shape:
        raise ValueError(
            f"loss: the network returned {tuple(model_out.shape)} for images of {tuple(images.shape)}; expected the "
            "same shape. A network that predicts its variance too needs the objective 'hybrid'"
        )
    model_out = _dense(model_out)
    if model_out.is_contiguous():
        return model_out, images.contiguous()
    return model_out, images.contiguous(memory_format=torch.channels_last)


def check(
    op: str,
    images: Tensor,
    table: Tensor,
    key: Tensor,
    like: tuple[tuple[str, Tensor], ...],
    scalars: dict[str, Tensor],
) -> None:
    """Raise ValueError or TypeError unless every tensor has the shape, dtype, device and layout the op reads.

    like: the images of the model's dtype, by name; scalars: fp32 [B], by name.
    """
    if images.dim() < 2 or images.numel() == 0:
        raise ValueError(f"{op}: images must be [batch, *shape] with elements, got {tuple(images.shape)}")
    if images.dtype not in IMAGE_DTYPES:
        raise TypeError(f"{op}: images have dtype {images.dtype}, expected uint8, float32, float16 or bfloat16")
    channels, batch = channels_of(images), len(images)
    if channels == 0:
        raise ValueError(f"{op}: images must be contiguous or channels_last, got strides {images.stride()}")
    wanted = torch.contiguous_format if channels == 1 else torch.channels_last
    for name, tensor in like:
        if tensor.dtype not in MODEL_DTYPES:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected float32, float16 or bfloat16")
        if tensor.shape != images.shape:
            raise ValueError(f"{op}: {name} is {tuple(tensor.shape)}, the images {tuple(images.shape)}")
        if not tensor.is_contiguous(memory_format=wanted):
            raise ValueError(f"{op}: {name} must be {wanted} like the images, got strides {tensor.stride()}")
    numbers = {"table": (table, torch.float32, (batch, COLUMNS)), "key": (key, torch.int64, (batch,))}
    numbers |= {name: (tensor, torch.float32, (batch,)) for name, tensor in scalars.items()}
    for name, (tensor, dtype, shape) in numbers.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected {dtype}; cast it first")
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} is {tuple(tensor.shape)}, expected {shape}, contiguous")
    for name, tensor in (*like, *((name, entry[0]) for name, entry in numbers.items())):
        if tensor.device != images.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, the images on {images.device}; move one of them")


def _check_noise_images(images: Tensor, table: Tensor, key: Tensor, out: Tensor) -> None:
    check("noise_images", images, table, key, (("out", out),), {})


def _check_loss(
    images: Tensor,
    model_out: Tensor,
    table: Tensor,
    weight: Tensor,
    key: Tensor,
    error: Tensor,
    gradient: Tensor | None,
) -> None:
    like = (("model_out", model_out), *((("gradient", gradient),) if gradient is not None else ()))
    check("loss", images, table, key, like, {"weight": weight, "error": error})
    if gradient is not None and gradient.dtype != model_out.dtype:
        raise TypeError(f"loss: gradient has dtype {gradient.dtype}, the model's output {model_out.dtype}")


def _noise_images(images: Tensor, table: Tensor, key: Tensor, out: Tensor, *, executor: str) -> None:
    _check_noise_images(images, table, key, out)
    backends.require(executor, images.device)
    reference_train.noise_images(images, table, key, out)


def _loss(*tensors: Any, factor: float, executor: str) -> None:
    _check_loss(*tensors)
    backends.require(executor, tensors[0].device)
    reference_train.loss(*tensors, factor=factor)


def _fake_noise_images(images: Tensor, table: Tensor, key: Tensor, out: Tensor, *, executor: str) -> None:
    _check_noise_images(images, table, key, out)


def _fake_loss(*tensors: Any, factor: float, executor: str) -> None:
    _check_loss(*tensors)


for _name, _run, _fake in (("noise_images", _noise_images, _fake_noise_images), ("loss", _loss, _fake_loss)):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastdiff::{_name}", _fake, lib=_library)
