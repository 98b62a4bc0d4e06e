"""When a call has to be an operator of torch's, not only a kernel on its tensors' memory. May import: torch only."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_tracing, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling


def transformed() -> bool:
    """Whether a function transform or a forward derivative is under way, which need torch's own operators."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def watched() -> bool:
    """Whether what torch makes now may be noted down, or be a tensor without memory."""
    return _is_tracing() or _len_torch_dispatch_stack() > 0


def intercepted() -> bool:
    """Whether torch traces or watches what is called, even on plain tensors."""
    return is_dynamo_compiling() or watched()


def dispatches(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call on these, the image first, has to be an operator of torch's, not only a kernel on their memory."""
    x = tensors[0]
    return (
        type(x) is not Tensor
        or x.device.type == "meta"
        or intercepted()
        or any(tensor is not None and tensor.is_neg() for tensor in tensors)
    )
