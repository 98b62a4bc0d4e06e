"""The network's branches Fc, Fu and Fp as the row and the guide op read and combine them.

May import: Triton.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def where_all(mask, condition):
    """mask and a scalar condition. Widened as an integer: the interpreter splats a comparison as what it compared."""
    return mask & ((tl.full(mask.shape, 0, tl.int32) + condition.to(tl.int32)) != 0)


@triton.jit
def load_float(pointers, mask):
    """Masked load as fp32. bf16 is widened by its bits, which is exact everywhere, the interpreter included."""
    value = tl.load(pointers, mask=mask, other=0.0)
    if value.dtype == tl.bfloat16:
        value = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """fp32 to `dtype`, to nearest even. bf16 by its bits: the interpreter's own cast truncates. NaN stays NaN."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = tl.add(bits, 0x7FFF + ((bits >> 16) & 1), sanitize_overflow=False)
        bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits | 0x00400000, nearest)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def sum_quads(values):
    """The sum of each 4 consecutive elements, [BLOCK] to [BLOCK / 4]; a thread has them all."""
    even, odd = tl.split(tl.reshape(values, [values.shape[0] // 4, 2, 2]))
    first, second = tl.split(even + odd)
    return first + second


@triton.jit
def guided_output(conditional, second, weight, guided):
    """F of the two branches, Fu already scaled: Fu + w (Fc - Fu), or Fc where the row is not guided."""
    return tl.where(guided, tl.math.fma(weight, conditional - second, second), conditional)


@triton.jit
def perturbed_output(raw, conditional, third, strength, perturbs):
    """F moved away from the perturbed branch: F + s (Fc - Fp)."""
    return tl.where(perturbs, tl.math.fma(strength, conditional - third, raw), raw)


def places(model_out: Tensor, unguided: Tensor | None, perturbed: Tensor | None, batch: int) -> tuple[int, int]:
    """Where Fu and Fp begin, in batches after their tensor's start: 0 in a tensor of its own, -1 where absent."""
    count = model_out.shape[0] // batch
    return 0 if unguided is not None else 1 if count > 1 else -1, 0 if perturbed is not None else 2 if count > 2 else -1


def tensors(model_out: Tensor, unguided: Tensor | None, perturbed: Tensor | None, has_perturbed: bool) -> list[Any]:
    """A kernel's three branch arguments: the stack stands in for a branch that lies in it, None for no Fp."""
    third = (model_out if perturbed is None else perturbed) if has_perturbed else None
    return [model_out, model_out if unguided is None else unguided, third]
