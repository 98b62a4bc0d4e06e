"""When a CPU kernel with its own gradient may stand for torch's operators. May import: backends, dispatch, native."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch._C import _is_tracing, _len_torch_dispatch_stack, _len_torch_function_stack
from torch.compiler import is_dynamo_compiling

from fastdiff.engine import backends, native
from fastdiff.engine.dispatch import transformed


def trains(tensors: tuple[Tensor, ...]) -> bool:
    """Whether these plain fp32 tensors on a CPU want a gradient and no transform, mode or compiler torch's operator."""
    return (
        tensors[0].is_cpu
        and not is_dynamo_compiling()  # before what it cannot trace
        and torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in tensors)
        and all(type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32 for tensor in tensors)
        and all(tensor.numel() > 0 and not tensor.is_neg() for tensor in tensors)
        and not (_is_tracing() or _len_torch_dispatch_stack() or _len_torch_function_stack())
        and not transformed()
        and _there()
    )


@functools.cache
def _there() -> bool:
    return backends.probe()["cpp"].ok and native.cpu_instruction_set() != "scalar"
