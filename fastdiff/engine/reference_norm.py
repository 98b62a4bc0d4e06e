"""The norm op in plain torch: what the other executors are held against, and the backward pass where Triton is not.

May import: norm_checks. Deterministic. Forward in float64 inside, backward in fp32 (float64 for float64 images).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.engine.norm_checks import Inputs


def total_of(x: Tensor, before: Tensor | None, residual: Tensor | None, skip: Tensor | None) -> Tensor:
    """The sum that is normalised, [B, C, *S], in fp32 or float64."""
    total = _wide(x)
    if residual is not None:
        total = total + _wide(residual)
    if skip is not None:
        total = torch.cat((total.expand(x.shape), _wide(skip)), dim=1)
    return total if before is None else total + _over(before, x).to(total.dtype)


def forward(given: Inputs, groups: int, eps: float, act: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y and the sum in x's dtype, and the statistics [B, groups, 2]; see fastdiff.engine.norm."""
    x, weight, bias, before, scale, shift, residual, skip = given
    total = total_of(x.double(), before, residual, skip)
    in_groups = total.flatten(2).unflatten(1, (groups, -1)).flatten(2)
    mean = in_groups.mean(2)
    stats = torch.stack((mean, torch.rsqrt((in_groups - mean[:, :, None]).square().mean(2) + eps)), dim=2)
    mean, rstd = _of_channels(stats, total)
    y = (total - mean) * rstd * _over(weight[None], x).to(total.dtype) + _over(bias[None], x).to(total.dtype)
    if scale is not None:
        y = y * (1 + _over(scale, x).to(y.dtype))
    if shift is not None:
        y = y + _over(shift, x).to(y.dtype)
    y = F.silu(y) if act else y
    return y.to(x.dtype), total.to(x.dtype), stats if x.dtype == torch.float64 else stats.float()


def backward(grad: Tensor, given: Inputs, stats: Tensor, groups: int, act: bool) -> tuple[Tensor, Tensor]:
    """The gradient of the sum, and [B, 3, C]: see fastdiff.engine.norm.norm_act_backward."""
    total, weight, bias, before, scale, shift, *_ = given
    u = total_of(total, before, None, None)
    g = _wide(grad)
    each = u.shape[1] // groups
    mean, rstd = _of_channels(stats, u)
    n = (u - mean) * rstd
    more = torch.ones_like(n[:1, :, :1]) if scale is None else 1 + _over(scale, u).to(n.dtype)
    gamma = _over(weight[None], u).to(n.dtype) * more
    if act:
        v = n * gamma + _over(bias[None], u).to(n.dtype) * more
        v = v if shift is None else v + _over(shift, u).to(n.dtype)
        sigmoid = torch.sigmoid(v)
        g = g * sigmoid * (1 + v * (1 - sigmoid))
    pixels = tuple(range(2, u.dim()))
    dn = g * gamma

    def mean_of_group(values: Tensor) -> Tensor:
        means = values.mean(pixels).unflatten(1, (groups, each)).mean(2)
        return _over(means.repeat_interleave(each, 1), u)

    du = rstd * (dn - mean_of_group(dn) - n * mean_of_group(dn * n))
    sums = torch.stack((g.sum(pixels), (g * n).sum(pixels), du.sum(pixels)), dim=1)
    return du.to(total.dtype), sums


def _wide(image: Tensor) -> Tensor:
    return image if image.dtype == torch.float64 else image.float()


def _of_channels(stats: Tensor, image: Tensor) -> list[Tensor]:
    """Mean and rstd of each channel's group."""
    each = image.shape[1] // stats.shape[1]
    return [_over(column.repeat_interleave(each, 1), image) for column in stats.unbind(2)]


def _over(vector: Tensor, image: Tensor) -> Tensor:
    """[B, C] beside [B, C, *S]."""
    return vector.reshape(*vector.shape, *[1] * (image.dim() - 2))
