"""Class labels given to a network, checked. May import: nothing of the package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_labels(owner: str, name: str, labels: Any, batch: int, count: int | None, last: str = "") -> None:
    """ValueError or TypeError unless `labels` are what a network with `count` classes (None: without) must be given.

    owner: whose labels, and name: of the argument, for the message. labels: [batch] integers from 0 to count - 1, on
    any device; on a GPU their values are not looked at, so that nothing waits for it. last: what count - 1 stands for,
    where it is no class like the others.
    """
    if count is None:
        if labels is not None:
            raise ValueError(f"{owner}: got {name} for a network without classes; leave them out")
        return
    if labels is None:
        raise ValueError(f"{owner}: got no {name}, expected [B] integers below {count}")
    if not isinstance(labels, Tensor):
        raise TypeError(f"{owner}: got {name} {labels!r}, expected a tensor [B] of integers below {count}")
    if labels.shape != (batch,):
        raise ValueError(f"{owner}: got {name} of shape {tuple(labels.shape)}, expected one per sample, ({batch},)")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{owner}: got {name} of dtype {labels.dtype}, expected integers (torch.long)")
    if labels.device.type == "cpu" and not bool(((labels >= 0) & (labels < count)).all()):
        null = f"; {count - 1} is {last}" if last else ""
        raise ValueError(f"{owner}: got {name} {labels.tolist()}, expected integers from 0 to {count - 1}{null}")
