"""oneDNN's convolution on a CPU with a weight in the library's own order, as torch's own compiler for CPUs calls it.

May import: torch. A sample's output did not depend on its batch or on the number of threads wherever it was measured,
unlike that of torch's plain convolution, which for small batches and one thread is another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class How(NamedTuple):
    """Padding and stride in both directions, and groups."""

    padding: int
    stride: int
    groups: int = 1

    def arguments(self) -> tuple[list[int], list[int], list[int], int]:
        """Padding, stride, dilation, groups, as the library takes them."""
        return [self.padding] * 2, [self.stride] * 2, [1, 1], self.groups


def available() -> bool:
    """Whether this torch has the operators."""
    return bool(
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


def pack(weight: Tensor, how: How, shape: Sequence[int]) -> Tensor:
    """A copy of the weight in the order that is the fastest for images of this shape."""
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    packed: Tensor = reorder(weight.to_mkldnn(), *how.arguments(), list(shape))
    return packed


def conv(x: Tensor, packed: Tensor, how: How) -> Tensor:
    """The convolution, without bias; x of any shape, channels_last."""
    found: Tensor = torch.ops.mkldnn._convolution_pointwise(x, packed, None, *how.arguments(), "none", [], "")
    return found
