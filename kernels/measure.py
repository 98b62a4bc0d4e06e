"""The measure kernel: one number per sample that the host decides on, the size of an error or of a change.

Bytes moved per element: ERROR 12 read; CHANGE 8 read and 4 written. A sample is summed in at most 64 parts whose size
only its length decides, each by one program; the last program to arrive adds the parts in order. Sums are in double
precision: to the last bits of single precision they are the same in any order, so the number does not depend on how the
sample lies in memory. It must reach 80 % of copy bandwidth where parts times samples fill the GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from . import layout as at
from .guide import REGISTERS, part_shape


@triton.jit(do_not_specialize=["units", "parts", "tiles"])
def measure_kernel(
    value, before, found, partial, ticket, after, status, units, parts, tiles, rtol, atol,
    UNIT: tl.constexpr, QUANTITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One part of one sample per program, of `tiles` tiles; see fastdiff.engine.measure for the tensors."""
    program = tl.program_id(0)
    b = (program // parts).to(tl.int64)
    part = (program % parts).to(tl.int64)
    length = units.to(tl.int64) * UNIT
    begin = part * tiles * BLOCK
    end = tl.minimum(begin + tiles.to(tl.int64) * BLOCK, length)
    local = tl.arange(0, BLOCK)
    value += b * length
    before += b * length
    total = tl.full((BLOCK,), 0.0, tl.float64)
    for start in range(begin, end, BLOCK):
        at_element = start + local
        mask = at_element < length
        mine = tl.load(value + at_element, mask=mask, other=0.0)
        old = tl.load(before + at_element, mask=mask, other=0.0)
        if QUANTITY == at.ERROR:
            new = tl.abs(tl.load(after + b * length + at_element, mask=mask, other=0.0))
            old = tl.abs(old)
            allowed = rtol * tl.where(old > new, old, new)
            relative = tl.math.div_rn(mine, tl.where(allowed < atol, atol, allowed))
            total += (relative * relative).to(tl.float64)
        else:
            tl.store(before + at_element, mine, mask=mask)
            total += tl.abs(mine - old).to(tl.float64)
    partial += b * at.PARTS
    tl.store(partial + part, tl.sum(total, 0))

    # The barrier puts this program's sum before its arrival; the last arrival has acquired everybody's.
    tl.debug_barrier()
    arrived = tl.atomic_add(ticket + b, 1, sem="acq_rel", scope="gpu")
    if arrived == parts - 1:
        tl.atomic_xchg(ticket + b, 0, sem="acquire", scope="gpu")
        which = tl.arange(0, at.PARTS)
        sums = tl.load(partial + which, mask=which < parts, other=0.0, cache_modifier=".cg")
        mean = tl.sum(sums, 0) / length.to(tl.float64)
        if QUANTITY == at.ERROR:
            mean = tl.sqrt(mean)
        tl.store(found + 2 * b, mean.to(tl.float32))
        if status is not None:
            tl.store(found + 2 * b + 1, tl.load(status + b).to(tl.float32))
        else:
            tl.store(found + 2 * b + 1, -1.0)


def bind(
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
) -> Callable[[], None]:
    """`find()` writing every sample's number and status on the tensors given.

    Tensors and equations as in fastdiff.engine.measure, where they are checked. Deterministic; capturable; no
    allocation.
    """
    length = value[0].numel()
    unit = 4 if length % 4 == 0 else 1
    block, tiles, parts = part_shape(length)
    if quantity != at.ERROR.value:
        after = None
    arguments = [value, before, found, partial, ticket, after, status, length // unit, parts, tiles, rtol, atol]
    sum_up = measure_kernel[(value.shape[0] * parts,)]
    warp = 256 if unit == 4 else 128  # elements of a warp; those of an odd sample need an address each
    options = {"UNIT": unit, "QUANTITY": quantity, "BLOCK": block, "num_warps": block // warp}

    def find() -> None:
        sum_up(*arguments, **options, maxnreg=REGISTERS, enable_fp_fusion=False)

    return find
