"""Self-attention for training on a CPU, where torch's own kernel is slow for small heads.

May import: native, native_blocks, eager.

out_i = sum_j softmax_j(q_i k_j / sqrt(d)) v_j over the tokens of a sample, head by head (Vaswani et al. 2017).
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _has_storage
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdiff.engine import eager, native
from fastdiff.engine.native_blocks import AttentionArgs

SMALL_HEAD = 64  # elements, up to which the extension is faster than torch


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention of every token to every token of its sample, in heads of C / heads elements.

    q, k, v: [B, T, C]. Returns [B, T, C] in their dtype. Differentiable: where a gradient is wanted on a CPU, in fp32
    and with heads of up to SMALL_HEAD elements, by the extension, whose results depend neither on the batch nor on the
    number of threads; else by torch's scaled_dot_product_attention. The second derivative is torch's plain one, and so
    are gradients in batches.
    """
    if _is_ours((q, k, v), heads):
        attended: Tensor = _Attention.apply(q.contiguous(), k.contiguous(), v.contiguous(), heads)
        return attended
    split = (tokens.unflatten(2, (heads, -1)).transpose(1, 2) for tokens in (q, k, v))
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


def _is_ours(tensors: tuple[Tensor, ...], heads: int) -> bool:
    """Whether the extension takes these and `sdpa_kernel` asks for no other kernel."""
    q = tensors[0]
    return (
        eager.trains(tensors)
        and all(tensor.shape == q.shape for tensor in tensors)
        and q.shape[2] <= SMALL_HEAD * heads
        and q.shape[2] % heads == 0
        and torch.backends.cuda.flash_sdp_enabled()  # what sdpa_kernel sets, on a CPU too
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        out, stats = torch.empty_like(q), q.new_empty(len(q), heads, q.shape[1], 2)
        _launch(heads, q=q, k=k, v=v, out=out, stats=stats)
        ctx.save_for_backward(q, k, v, out, stats)
        ctx.heads = heads
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, stats = ctx.saved_tensors
        again = torch.is_grad_enabled()  # the gradient is to be differentiated
        if again or not _has_storage(grad):  # a batch of gradients has none
            with torch.enable_grad(), sdpa_kernel([SDPBackend.MATH]):
                # views, so that none of them is another, nor made of it
                q, k, v = (tensor.view_as(tensor) for tensor in (q, k, v))
                wanted = [tensor for tensor in (q, k, v) if tensor.requires_grad]
                found = iter(torch.autograd.grad(attention(q, k, v, ctx.heads), wanted, grad, create_graph=again))
            return *(next(found) if tensor.requires_grad else None for tensor in (q, k, v)), None
        grad = grad.contiguous().resolve_neg()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _launch(ctx.heads, q=q, k=k, v=v, out=out, stats=stats, grad=grad, dq=dq, dk=dk, dv=dv)
        return dq, dk, dv, None


def _launch(heads: int, **tensors: Tensor) -> None:
    batch, tokens, channels = tensors["q"].shape
    size = channels // heads
    args = AttentionArgs(
        B=batch, T=tokens, H=heads, d=size, scale=size**-0.5,
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )  # fmt: skip
    library = native.load()
    if code := library.fastdiff_attention_cpu(ctypes.addressof(args)):
        raise native.failed("attention on cpp", code)
