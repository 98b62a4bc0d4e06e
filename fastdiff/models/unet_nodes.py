"""Kernels and bytes of one forward pass of a UNet, counted on meta tensors: no GPU, no weights.

May import: engine.norm, the UNet. A CUDA graph of the pass holds one node for each kernel: views and allocations launch
none, and what torch launches for an operator is known from its source. Libraries may split a convolution or a GEMM.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastdiff.engine import norm
from fastdiff.models.unet import UNet
from fastdiff.models.unet_config import UNetConfig

_ALLOCATES = ("empty", "new_empty", "detach", "lift_fresh", "scalar_tensor", "_unsafe_view", "_reshape_alias")
# launches that are not one: a fill and a copy; three kernels for the statistics, their use and the map
_SAME = {torch.ops.aten.addmm_: torch.ops.aten.addmm}  # as torch counts their operations
_LAUNCHES = {"constant_pad_nd": 2, "native_group_norm": 3}


@dataclass
class Cost:
    """kernels: launches by operator. work: of each operator, its multiplications and additions in matrices, and bytes.

    Bytes: every operand read once and every result written once.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    work: list[tuple[int, int]] = field(default_factory=list)
    fallbacks: dict[str, str] = field(default_factory=dict)

    @property
    def nodes(self) -> int:
        """Of a CUDA graph of one forward pass."""
        return sum(self.kernels.values())

    @property
    def flops(self) -> int:
        """Of convolutions, matrix products and attention; a product and its sum are two."""
        return sum(flops for flops, _ in self.work)

    @property
    def bytes(self) -> int:
        """That all operators move."""
        return sum(moved for _, moved in self.work)

    def floor(self, flops: float, bandwidth: float) -> float:
        """Seconds that the operators need at these rates per second, each at the slower of the two, without gaps."""
        return sum(max(work / flops, moved / bandwidth) for work, moved in self.work)


def cost(
    config: UNetConfig, batch: int, dtype: torch.dtype = torch.bfloat16, size: int | None = None, fast: bool = True
) -> Cost:
    """The cost of a forward pass of this UNet, in its fast form with the rows of the time prepared, or as it is.

    size: pixels of a side; None is the configuration's own. Raises ValueError where there is none, or where it does
    not fit the network.
    """
    if batch < 1:
        raise ValueError(f"batch must be >= 1, got {batch}")
    side = size or config.sample_size
    if side is None:
        raise ValueError("the configuration does not say the size of its images; give size=")
    height, width = side if isinstance(side, tuple) else (side, side)
    with torch.device("meta"), torch.no_grad():
        plain = UNet.outline(config).eval().to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        found = Cost()
        net: nn.Module = plain
        if fast:
            made = plain.fast(dtype)
            found.fallbacks = made.fallbacks
            net = made
        x = torch.empty(batch, config.in_channels, height, width, dtype=dtype).to(memory_format=torch.channels_last)
        time = torch.empty(batch)
        labels = torch.empty(batch, dtype=torch.int64) if config.num_class_embeds else None
        if fast and labels is None:
            net = made.prepare_times(torch.zeros(1, device="cpu"))
        with _Attention(found), _Log(found):
            net(x, time, labels)
    return found


class _Log(TorchDispatchMode):
    """Every operator that launches something."""

    def __init__(self, found: Cost) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if name.startswith(_ALLOCATES) or function.is_view:
            return output
        launches = _LAUNCHES.get(name, 1)
        if name == "convolution":
            launches += args[2] is not None  # the bias is a kernel of its own
            output = output.contiguous(memory_format=torch.channels_last)  # as cuDNN has it; meta tensors lose it
        if name == "norm_act":
            y, groups = output[0], args[8]
            launches = norm.launches(y.shape[0], y[0, 0].numel(), y.shape[1], groups, y.element_size())
        self.found.kernels[name] += launches
        counted = flop_registry.get(_SAME.get(function._overloadpacket, function._overloadpacket))
        flops = counted(*args, **(kwargs or {}), out_val=output) if counted else 0
        self.found.work.append((int(flops), _bytes((args, kwargs)) + _bytes(output)))
        return output


class _Attention(TorchFunctionMode):
    """Attention is one kernel; on meta tensors torch would take it apart."""

    def __init__(self, found: Cost) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not functional.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query, value = args[0], args[2]
        self.found.kernels["scaled_dot_product_attention"] += 1
        batch, heads, tokens, width = query.shape
        written = batch * heads * tokens * value.shape[-1]
        flops = 2 * batch * heads * tokens * value.shape[-2] * (width + value.shape[-1])
        self.found.work.append((flops, _bytes(args[:3]) + written * value.element_size()))
        return torch.empty(batch, tokens, heads, value.shape[-1], dtype=value.dtype).transpose(1, 2)


def _bytes(values: Any) -> int:
    if isinstance(values, Tensor):
        # an expanded dimension is one in memory
        sizes = [size for size, stride in zip(values.shape, values.stride(), strict=True) if stride]
        return torch.Size(sizes).numel() * values.element_size()
    if isinstance(values, dict):
        values = values.values()
    return sum(map(_bytes, values)) if isinstance(values, list | tuple | type({}.values())) else 0
