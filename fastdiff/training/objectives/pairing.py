"""Which noise goes with which image of a batch. May import: the table's layout, engine.train_ops; SciPy on use."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.compiler import layout as at
from fastdiff.engine import train_ops
from fastdiff.errors import unknown_name

PAIRINGS = ("independent", "transport")


def check(name: str) -> None:
    """Raise ValueError for a name that is no pairing, ImportError where it needs what is not installed."""
    if name not in PAIRINGS:
        raise unknown_name("pairing", name, PAIRINGS)
    if name == "transport":
        _assignment()


def transport(x0: Tensor, table: Tensor, key: Tensor) -> Tensor:
    """The permutation p, int64 [B], with the least sum_i |x0_i - z_p(i)|^2: exact optimal transport of the batch.

    x0, table, key: what the noising op is given; images count mirrored where they are. z: the normals of the keys.
    Needs SciPy, waits for the device and takes O(B^3) at worst (B = 256: milliseconds): not capturable.
    """
    rows = torch.zeros(2, *table.shape, dtype=table.dtype, device=table.device)
    rows[0, :, at.INPUT_X0], rows[0, :, at.FLIP] = 1.0, table[:, at.FLIP]
    rows[1, :, at.INPUT_Z] = 1.0
    images, noises = (train_ops.noised(x0, row, key).flatten(1) for row in rows)
    cost = -(images @ noises.T)  # |x0|^2 and |z|^2 are the same in every pairing
    _, columns = _assignment()(cost.double().cpu().numpy())
    return torch.from_numpy(columns).to(key.device)


def _assignment():  # type: ignore[no-untyped-def]
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("pairing 'transport' needs SciPy: pip install scipy, or leave pairing out") from error
    return linear_sum_assignment
