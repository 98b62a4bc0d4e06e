"""The measure op in plain torch: what the other executors are tested against.

May import: the table's layout. Formulas: fastdiff.engine.measure.measure.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.compiler import layout as at


def measure(
    value: Tensor,
    before: Tensor,
    found: Tensor,
    partial: Tensor,
    ticket: Tensor,
    after: Tensor | None = None,
    status: Tensor | None = None,
    *,
    quantity: int,
    rtol: float,
    atol: float,
) -> None:
    """Write every sample's number and status; see `fastdiff.engine.measure.measure`. Deterministic."""
    del partial, ticket  # only executors that sum in parts need them
    if quantity == at.ERROR:
        assert after is not None
        size = torch.where(before.abs() > after.abs(), before.abs(), after.abs())  # a NaN of `after` stays
        allowed = (rtol * size).clamp_(min=atol)
        terms = (value / allowed).square_()
    else:
        terms = (value - before).abs_()
        before.copy_(value)
    for b, term in enumerate(terms):  # one by one: a sum along an axis depends on the batch
        mean = term.double().sum() / term.numel()
        found[b, 0] = mean.sqrt() if quantity == at.ERROR else mean
    found[:, 1] = -1.0 if status is None else status
