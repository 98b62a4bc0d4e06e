"""The two ops of a training step: noising images, and the squared error with its gradient, noise drawn again.

May import: the table's layout, backends, checks, dispatch, the reference, fastdiff.kernels and the extension (through
engine.native).
One row of scalars per sample, with x0 the image, z and y unit normals named by the sample's key:
    x_in = INPUT_X0 x0 + INPUT_Z z + INPUT_Y y,  F* = TARGET_X0 x0 + TARGET_Z z + TARGET_Y y,  error = mean (F - F*)^2
so eps, x0, v, score, flow and edm targets at any level, input perturbation and interpolants are tables, not kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdiff.compiler import layout as at
from fastdiff.engine import backends, native, reference_train
from fastdiff.engine.checks import MODEL_DTYPES, channels_of
from fastdiff.engine.dispatch import dispatches, intercepted, transformed
from fastdiff.engine.ops import on_device

IMAGE_DTYPES = (torch.uint8, *MODEL_DTYPES)

_library = torch.library.Library("fastdiff", "FRAGMENT")
_library.define("noise_images(Tensor images, Tensor table, Tensor key, Tensor(a!) out, *, str executor) -> ()")
_library.define(
    "loss(Tensor images, Tensor table, Tensor key, Tensor(a!)? gradient, Tensor model_out, Tensor weight, "
    "Tensor(b!) partial, *, float factor, str executor) -> ()"
)


@dataclass
class TrainTensors:
    """What an op reads and writes; B samples of shape S, all images in one memory format, contiguous or channels_last.

    images: [B, *S] uint8 (0 .. 255 become -1 .. 1), fp32, fp16 or bf16. table: fp32 [B, 8], the columns of
    compiler.layout: what a factor of 0 stands before is neither read nor drawn; FLIP not 0 mirrors the image's rows.
    key: int64 [B], the seed of the sample's noises. out: [B, *S] fp32, fp16 or bf16, written: x_in, or the gradient
    factor weight (F - F*), which may be None.
    Of the loss only: model_out: F, like out. weight: fp32 [B]. partial: fp32 [B, 64], written: sums of (F - F*)^2 over
    parts of the sample that its size alone decides, then zeros.
    """

    images: Tensor
    table: Tensor
    key: Tensor
    out: Tensor | None
    model_out: Tensor | None = None
    weight: Tensor | None = None
    partial: Tensor | None = None

    def arguments(self) -> tuple[Tensor | None, ...]:
        """The tensors in the order of the loss's schema; the first four are those of noise_images."""
        return self.images, self.table, self.key, self.out, self.model_out, self.weight, self.partial


def noise_images(images: Tensor, table: Tensor, key: Tensor, out: Tensor, *, executor: str) -> None:
    """Write the network's input x_in into `out`; the tensors are those of `TrainTensors`.

    Deterministic; capturable on executors "triton" and "cuda". Raises ValueError, TypeError, BackendUnavailable.
    """
    tensors = TrainTensors(images, table, key, out)
    if executor == "cpp" and _at_once("noise_images", tensors, 0.0):
        return
    if _is_operator(tensors):
        torch.ops.fastdiff.noise_images(images, table, key, out, executor=executor)
    else:
        _run("noise_images", tensors, 0.0, executor)


def loss(tensors: TrainTensors, factor: float, executor: str) -> None:
    """Write each sample's sums of squares and its gradient, drawing the noise again. Otherwise as noise_images."""
    if _is_operator(tensors):
        torch.ops.fastdiff.loss(*tensors.arguments(), factor=factor, executor=executor)
    else:
        _run("loss", tensors, factor, executor)


def _is_operator(tensors: TrainTensors) -> bool:
    like = tensors.images if tensors.model_out is None else tensors.model_out
    return type(like) is not Tensor or dispatches(tensors.arguments()) or transformed()


def noised(images: Tensor, table: Tensor, key: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The network's input, in a new tensor of this dtype and the memory format of images."""
    images = images if channels_of(images) else images.contiguous()
    out = torch.empty_like(images, dtype=dtype)
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
        output, executor = model_out.detach(), backends.choose(model_out.device)
        gradient = torch.empty_like(output) if model_out.requires_grad else None
        partial = torch.empty(len(images), at.PARTS, dtype=torch.float32, device=output.device)
        share = 2.0 / max(output.numel(), 1)
        # a half's range ends near 6e-8, which is where the share of one element may lie: it waits for the loss scale
        factor, ctx.share = (2.0, share / 2.0) if output.dtype == torch.float16 else (share, 1.0)
        tensors = TrainTensors(images, table, key, gradient, output, weight.detach(), partial)
        error, mean = torch.empty_like(weight), weight.new_empty(())
        if executor != "cpp" or not _at_once("loss", tensors, factor, error, mean):
            gradient, error, mean = _in_steps(tensors, factor, executor)
        ctx.save_for_backward(gradient, error)
        ctx.mark_non_differentiable(error)
        ctx.set_materialize_grads(False)
        return mean, error

    @staticmethod
    def backward(ctx: Any, by_mean: Tensor | None, by_error: None) -> tuple[Tensor | None, ...]:
        if by_mean is None or not torch.is_grad_enabled():
            return _gradients(ctx, by_mean)
        # which refuses only what hangs on the gradients it is given, and these hang on model_out too
        return _once_differentiable(ctx, by_mean.detach().requires_grad_())


def _gradients(ctx: Any, by_mean: Tensor | None) -> tuple[Tensor | None, ...]:
    gradient, error = ctx.saved_tensors
    if by_mean is None:
        return None, None, None, None, None
    by_weight = by_mean * error / len(error) if ctx.needs_input_grad[1] else None
    if gradient is not None and (ctx.share != 1.0 or by_mean.is_cuda or float(by_mean) != 1.0):
        scale = (by_mean.float() * ctx.share).reshape(1)
        gradient = torch.mul(gradient, scale, out=torch.empty_like(gradient))  # in fp32, rounded once
    return gradient, by_weight, None, None, None


_once_differentiable = torch.autograd.function.once_differentiable(_gradients)


def _at_once(op: str, t: TrainTensors, factor: float, *results: Tensor) -> bool:
    """Run on the CPU if the tensors can be taken as they are and torch need not see it; results: error and mean."""
    if intercepted() or transformed():
        return False
    given = t.arguments() if results else (*t.arguments(), None, None)
    code = native.python().train(Tensor, factor, *given, *results)
    if code:
        raise native.failed(f"{op} on cpp", code)
    return code is not None


def _in_steps(t: TrainTensors, factor: float, executor: str) -> tuple[Tensor | None, Tensor, Tensor]:
    """Of any tensors: the gradient if one is wanted, error [B], the mean of each sample's squares, and the mean."""
    assert t.model_out is not None and t.weight is not None and t.partial is not None
    output, images = _alike(t.model_out, t.images)
    gradient = None if t.out is None else torch.empty_like(output)
    loss(replace(t, images=images, model_out=output, out=gradient), factor, executor)
    error = t.partial.sum(1) / (output.numel() // max(len(output), 1))
    return gradient, error, torch.dot(t.weight, error) / len(error)


def _alike(model_out: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the memory format of the model's output: images are fewer bytes to move, and noise knows no format."""
    if model_out.shape != images.shape:
        raise ValueError(
            f"loss: the network returned {tuple(model_out.shape)} for images of {tuple(images.shape)}; expected the "
            "same shape. A network that predicts its variance too needs the objective 'hybrid'"
        )
    if channels_of(model_out) > 1:
        return model_out, images.contiguous(memory_format=torch.channels_last)
    return model_out.contiguous(), images.contiguous()


def check(op: str, t: TrainTensors) -> None:
    """Raise ValueError or TypeError unless every tensor has the shape, dtype, device and layout of `TrainTensors`."""
    images = t.images
    if images.dim() < 2 or images.numel() == 0:
        raise ValueError(f"{op}: images must be [batch, *shape] with elements, got {tuple(images.shape)}")
    if images.dtype not in IMAGE_DTYPES:
        raise TypeError(f"{op}: images have dtype {images.dtype}, expected uint8, float32, float16 or bfloat16")
    channels, batch = channels_of(images), len(images)
    if channels == 0:
        raise ValueError(f"{op}: images must be contiguous or channels_last, got strides {images.stride()}")
    wanted = torch.contiguous_format if channels == 1 else torch.channels_last
    model = t.out if t.model_out is None else t.model_out
    assert model is not None
    if model.dtype not in MODEL_DTYPES:
        raise TypeError(f"{op}: the model's tensor has dtype {model.dtype}, expected float32, float16 or bfloat16")
    shape, dense = tuple(images.shape), torch.contiguous_format
    for name, tensor, dtype, size, layout in (
        ("table", t.table, torch.float32, (batch, at.TRAIN_COLUMNS), dense),
        ("key", t.key, torch.int64, (batch,), dense),
        ("out", t.out, model.dtype, shape, wanted),
        ("model_out", t.model_out, model.dtype, shape, wanted),
        ("weight", t.weight, torch.float32, (batch,), dense),
        ("partial", t.partial, torch.float32, (batch, at.PARTS), dense),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected {dtype}; cast it first")
        if tensor.shape != size:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {size}")
        if not tensor.is_contiguous(memory_format=layout):
            raise ValueError(f"{op}: {name} must be {layout}, got strides {tensor.stride()} for shape {size}")
        if tensor.device != images.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, the images on {images.device}; move one of them")


def _run(op: str, t: TrainTensors, factor: float, executor: str) -> None:
    check(op, t)
    backends.require(executor, t.images.device)
    if executor in ("cpp", "cuda"):
        native.train(op, t, factor, executor)
    elif executor == "triton":
        from fastdiff.kernels import train as kernels

        on_device(kernels.bind(*t.arguments(), factor=factor), t.images.device)()
    elif t.model_out is None:
        reference_train.noise_images(*t.arguments()[:4])  # type: ignore[arg-type]
    else:
        reference_train.loss(*t.arguments(), factor=factor)  # type: ignore[arg-type]


def _noise_images(images: Tensor, table: Tensor, key: Tensor, out: Tensor, *, executor: str) -> None:
    _run("noise_images", TrainTensors(images, table, key, out), 0.0, executor)


def _loss(*tensors: Any, factor: float, executor: str) -> None:
    _run("loss", TrainTensors(*tensors), factor, executor)


def _fake_noise_images(images: Tensor, table: Tensor, key: Tensor, out: Tensor, *, executor: str) -> None:
    check("noise_images", TrainTensors(images, table, key, out))


def _fake_loss(*tensors: Any, factor: float, executor: str) -> None:
    check("loss", TrainTensors(*tensors))


for _name, _op, _fake in (("noise_images", _noise_images, _fake_noise_images), ("loss", _loss, _fake_loss)):
    _library.impl(_name, _op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastdiff::{_name}", _fake, lib=_library)
