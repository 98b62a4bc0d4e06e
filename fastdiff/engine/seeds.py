"""Seeds as a user gives them, to one 64-bit integer per sample. May import: nothing of the package."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch
from torch import Tensor


def per_sample(seed: int | Sequence[int] | Tensor, batch: int) -> Tensor:
    """int64 [B]: the seeds as given, one per sample, or s, s+1, ... for an integer s."""
    given = seed.tolist() if isinstance(seed, Tensor | np.ndarray) else seed
    if isinstance(given, Integral) and not isinstance(given, bool):
        values = [int(given) + i for i in range(batch)]
    elif isinstance(given, Sequence) and not isinstance(given, str | bytes) and all(map(_is_integer, given)):
        values = [int(value) for value in given]
    else:
        raise TypeError(f"seed must be an integer or one integer per sample, got {seed!r}")
    if len(values) != batch:
        raise ValueError(f"seed must hold one integer per sample: the batch is {batch}, got {len(values)}")
    for value in values:
        if not -(2**63) <= value < 2**64:
            counted = f" ({given} counted up over the batch)" if isinstance(given, Integral) else ""
            raise ValueError(f"a seed is a 64-bit integer, got {value}{counted}")
    return torch.tensor([value - 2**64 if value >= 2**63 else value for value in values], dtype=torch.int64)


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
