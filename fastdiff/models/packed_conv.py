"""A convolution for inference: on a CPU its weights are put into oneDNN's order once, not at each call.

May import: torch. The order is that of torch's own compiler for CPUs; where this torch has no such operator, or traces
or counts, it is torch's plain convolution of the same weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedConv(nn.Module):
    """conv(x) without bias, x channels_last. weight: [C_out, C_in, k, k]; a second copy of it is kept for a CPU.

    Deterministic; capturable on a GPU. The copy follows the weight: it is made again after a change of it.
    """

    def __init__(self, weight: nn.Parameter, stride: int = 1, padding: int = 1) -> None:
        super().__init__()
        self.weight = weight
        self.stride, self.padding = stride, padding
        self._packed: Tensor | None = None
        self._of: tuple[int, int] = (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C_in, H, W] -> [B, C_out, H', W'], in channels_last where the library keeps it."""
        if torch.compiler.is_compiling() or not self._packs(x):
            return F.conv2d(x, self.weight, stride=self.stride, padding=self.padding)
        of = self.weight.data_ptr(), self.weight._version
        if self._packed is None or self._of != of:
            self._packed, self._of = self._pack(x), of
        both = [self.padding] * 2, [self.stride] * 2, [1, 1]
        found: Tensor = torch.ops.mkldnn._convolution_pointwise(x, self._packed, None, *both, 1, "none", [], "")
        return found

    def _packs(self, x: Tensor) -> bool:
        plain = x.device.type == "cpu" and x.dtype == torch.float32 and type(x) is Tensor
        return plain and x.numel() > 0 and not torch.is_grad_enabled() and _has_operators()

    def _pack(self, x: Tensor) -> Tensor:
        both = [self.padding] * 2, [self.stride] * 2, [1, 1]
        with torch.inference_mode(False):
            weight = self.weight.detach().to_mkldnn()
            reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
            packed: Tensor = reorder(weight, *both, 1, list(x.shape))
        return packed

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}  # it is neither copied nor stored


def _has_operators() -> bool:
    return bool(
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )
