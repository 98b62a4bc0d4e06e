"""The norm op on a CPU: checked and its argument block filled in once for each layout of tensors, then only addresses.

May import: native, native_blocks, norm_checks. A small image takes less time than Python needs to look at its tensors
twice.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from fastdiff.engine import native
from fastdiff.engine.native_blocks import NormArgs
from fastdiff.engine.norm_checks import DTYPES, Inputs, check, check_add, in_rows, lies_last, row

KEPT = 4096  # layouts; more than that come from sizes that do not come again


class Bound(NamedTuple):
    """Calls on tensors of one layout, which were checked: their argument block without addresses, and where it lies."""

    block: NormArgs
    last: bool
    address: int
    casts: bool  # some vector is not fp32


_known: dict[Hashable, Bound | None] = {}


def bound(given: Inputs, groups: int, eps: float, act: bool) -> Bound | None:
    """Calls of `norm_act` on tensors like these; None where one has to be copied, cast, negated or expanded first.

    Raises what `norm_checks.check` raises.
    """
    key = groups, eps, act, *_layouts(given)
    try:
        return _known[key]
    except KeyError:
        if not _fits(given.x, (given.residual, given.skip), given[1:6]):
            return _keep(key, None)
        last = check(in_rows(given), groups, "cpp")
        casts = any(vector is not None and vector.dtype != torch.float32 for vector in given[1:6])
        return _keep(key, _bound(_block(in_rows(_single(given)), groups, eps, act, last), last, casts))


def bound_sum(x: Tensor, before: Tensor | None, residual: Tensor | None) -> Bound | None:
    """Calls of `channel_add` on tensors like these, as `bound`."""
    key = tuple(_layouts((x, before, residual)))
    try:
        return _known[key]
    except KeyError:
        if not _fits(x, (residual,), (before,)) or (before is not None and before.dtype != torch.float32):
            return _keep(key, None)
        before = row(before, x.shape[0])
        check_add(x, before, residual, "cpp")
        last = lies_last(x, residual)
        assert last is not None
        return _keep(key, _bound(_sum_block(x, before, residual, last), last))


def run(known: Bound, given: Inputs, y: Tensor, total: Tensor | None) -> None:
    """Write y and the sum, of tensors that are laid out as those that were bound."""
    if known.casts:
        given = _single(given)
    code = native.python().norm(known.address, *given, y, total)
    if code:
        _raise("norm", code)


def _addressed(args: NormArgs, given: Inputs, y: Tensor, total: Tensor | None, stats: Tensor) -> NormArgs:
    x, weight, bias, before, scale, shift, residual, skip = given
    args.x, args.weight, args.bias = x.data_ptr(), weight.data_ptr(), bias.data_ptr()
    args.y, args.stats = y.data_ptr(), stats.data_ptr()
    if before is not None:
        args.before = before.data_ptr()
    if scale is not None:
        args.scale = scale.data_ptr()
    if shift is not None:
        args.shift = shift.data_ptr()
    if residual is not None:
        args.residual = residual.data_ptr()
    if skip is not None:
        args.skip = skip.data_ptr()
    if total is not None:
        args.total = total.data_ptr()
    return args


def run_sum(known: Bound, x: Tensor, before: Tensor | None, residual: Tensor | None, total: Tensor) -> None:
    """total = x + before + residual, as `run`."""
    code = native.python().norm(known.address, x, None, None, before, None, None, residual, None, None, total)
    if code:
        _raise("channel_add", code)


def forward(
    given: Inputs, groups: int, eps: float, act: bool, y: Tensor, total: Tensor | None, stats: Tensor, last: bool
) -> None:
    """Write y, the sum and the statistics of any tensors that `norm_checks.check` takes. Deterministic."""
    given = _single(given)
    _launch(_addressed(_block(given, groups, eps, act, last), given, y, total, stats), "norm")


def backward(
    grad: Tensor, given: Inputs, stats: Tensor, groups: int, act: bool, du: Tensor, sums: Tensor, last: bool
) -> None:
    """Write the gradient of the sum, which is given.x, and the sums over pixels [B, 3, C]. Deterministic."""
    given = _single(given)
    args = _addressed(_block(given, groups, 0.0, act, last), given, du, None, stats)
    args.grad, args.sums = grad.data_ptr(), sums.data_ptr()
    _launch(args, "norm_backward")


def add(x: Tensor, before: Tensor | None, residual: Tensor | None, total: Tensor, last: bool) -> None:
    """total = x + before + residual, of any tensors that `norm_checks.check_add` takes."""
    before = None if before is None else before.float()
    run_sum(_bound(_sum_block(x, before, residual, last), last), x, before, residual, total)


def _single(given: Inputs) -> Inputs:
    """With every vector in fp32."""
    weight, bias, before, scale, shift = (None if vector is None else vector.float() for vector in given[1:6])
    assert weight is not None and bias is not None
    return Inputs(given.x, weight, bias, before, scale, shift, given.residual, given.skip)


def _layouts(tensors: Sequence[Tensor | None]) -> list[Hashable]:
    return [None if t is None else (t.shape, t.stride(), t.dtype, t.is_cpu, t.is_neg()) for t in tensors]


def _fits(x: Tensor, images: tuple[Tensor | None, ...], vectors: tuple[Tensor | None, ...]) -> bool:
    return (
        x.dtype in DTYPES
        and x.numel() > 0
        and lies_last(x, *images) is not None
        and all(vector is None or vector.dtype in DTYPES for vector in vectors)
        and not any(tensor is not None and tensor.is_neg() for tensor in (x, *images, *vectors))
    )


def _keep(key: Hashable, found: Bound | None) -> Bound | None:
    if len(_known) >= KEPT:
        _known.clear()
    _known[key] = found
    return found


def _bound(block: NormArgs, last: bool, casts: bool = False) -> Bound:
    return Bound(block, last, ctypes.addressof(block), casts)


def _block(given: Inputs, groups: int, eps: float, act: bool, last: bool) -> NormArgs:
    args = _sum_block(given.x, given.before, given.residual, last)
    args.C += 0 if given.skip is None else given.skip.shape[1]
    args.groups, args.eps, args.act = groups, eps, act
    args.scale_stride = 0 if given.scale is None else given.scale.stride(0)
    args.shift_stride = 0 if given.shift is None else given.shift.stride(0)
    return args


def _sum_block(x: Tensor, before: Tensor | None, residual: Tensor | None, last: bool) -> NormArgs:
    batch, channels = x.shape[:2]
    return NormArgs(
        B=batch,
        C=channels,
        C1=channels,
        P=x.shape[2:].numel(),
        residual_stride=0 if residual is None or residual.shape[0] < batch else residual[0].numel(),
        before_stride=0 if before is None else before.stride(0),
        dtype=native.DTYPES[x.dtype],
        channels_last=last,
    )


def _launch(args: NormArgs, op: str) -> None:
    code = getattr(native.load(), f"fastdiff_{op}_cpu")(ctypes.addressof(args))
    if code:
        _raise(op, code)


def _raise(op: str, code: int) -> NoReturn:
    raise native.failed(f"{op} on cpp", code)
