"""What the norm op's tensors must be, before their memory is read as it stands. May import: torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Inputs(NamedTuple):
    """What is normalised and how, as `fastdiff.engine.norm.norm_act` says; vectors have a row for each sample."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    before: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    skip: Tensor | None = None


def row(vector: Tensor | None, batch: int) -> Tensor | None:
    """[B, C] of a vector [C] too, without a copy."""
    return vector.expand(batch, -1) if vector is not None and vector.dim() == 1 else vector


def in_rows(given: Inputs) -> Inputs:
    """A row of each vector for each sample, without a copy."""
    before, scale, shift = (row(vector, given.x.shape[0]) for vector in (given.before, given.scale, given.shift))
    return given._replace(before=before, scale=scale, shift=shift)


def lies_last(x: Tensor, *others: Tensor | None) -> bool | None:
    """Whether all images are channels_last (True) or all contiguous (False); None where they are neither."""
    images = [x, *(image for image in others if image is not None)]
    if all(image.is_contiguous() for image in images):
        return False
    if x.dim() == 4 and all(image.is_contiguous(memory_format=torch.channels_last) for image in images):
        return True
    return None


def check(given: Inputs, groups: int, executor: str) -> bool:
    """Raise ValueError or TypeError unless `norm_act` can run; returns whether the images are channels_last."""
    check_sizes(given, groups, executor)
    x = given.x
    last = lies_last(x, given.residual, given.skip)
    if last is None:
        raise ValueError(
            f"norm_act: the images must be all contiguous or all channels_last, got x with strides {x.stride()} for "
            f"shape {tuple(x.shape)}; call .contiguous(memory_format=...) on each"
        )
    return last


def check_sizes(given: Inputs, groups: int, executor: str) -> None:
    """The same for images of any layout."""
    x = given.x
    _images("norm_act", x, given.residual, given.skip, executor)
    channels = x.shape[1] + (0 if given.skip is None else given.skip.shape[1])
    if groups < 1 or channels % groups:
        raise ValueError(
            f"norm_act: {channels} channels do not divide into {groups} groups; choose a divisor of {channels}"
        )
    for name in ("weight", "bias"):
        _vector("norm_act", name, getattr(given, name), (channels,), x)
    for name in ("before", "scale", "shift"):
        if getattr(given, name) is not None:
            _vector("norm_act", name, getattr(given, name), (x.shape[0], channels), x)


def check_add(x: Tensor, before: Tensor | None, residual: Tensor | None, executor: str) -> None:
    """The same for `channel_add`."""
    _images("channel_add", x, residual, None, executor)
    if before is not None:
        _vector("channel_add", "before", before, (x.shape[0], x.shape[1]), x)


def _images(op: str, x: Tensor, residual: Tensor | None, skip: Tensor | None, executor: str) -> None:
    if x.dim() < 3:
        raise ValueError(f"{op}: x must be [batch, channels, *pixels], got {tuple(x.shape)}")
    if x.dtype not in (*DTYPES, *((torch.float64,) if executor in ("reference", "auto") else ())):
        raise TypeError(f"{op}: x has dtype {x.dtype}, expected float32, float16 or bfloat16; cast it first")
    for name, image in (("residual", residual), ("skip", skip)):
        if image is None:
            continue
        shapes: tuple[tuple[int, ...], ...] = (tuple(x.shape), (1, *x.shape[1:]))
        if name == "skip":
            shapes = ((x.shape[0], image.shape[1] if image.dim() > 1 else 0, *x.shape[2:]),)
        if tuple(image.shape) not in shapes:
            raise ValueError(f"{op}: {name} has shape {tuple(image.shape)}, expected {shapes[0]} like x")
        if image.dtype != x.dtype or image.device != x.device:
            raise TypeError(f"{op}: {name} is {image.dtype} on {image.device}, expected {x.dtype} on {x.device} like x")


def _vector(op: str, name: str, vector: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if tuple(vector.shape) != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(vector.shape)}, expected {shape}")
    if vector.device != x.device:
        raise ValueError(f"{op}: {name} is on {vector.device}, x on {x.device}; move one of them")
    if not vector.is_floating_point():
        raise TypeError(f"{op}: {name} has dtype {vector.dtype}, expected a floating-point one")
    if shape[-1] > 1 and vector.stride(-1) != 1:
        raise ValueError(f"{op}: {name} must have consecutive channels, got strides {vector.stride()}")
