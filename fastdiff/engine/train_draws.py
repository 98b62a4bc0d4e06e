"""What the samples of a training step draw on the host, by the extension; fastdiff/training/objectives says what it is.

May import: the table's layout, backends, dispatch, and the extension (through engine.native).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.compiler import layout as at
from fastdiff.engine import backends, native
from fastdiff.engine.dispatch import watched

_CPU = torch.device("cpu")  # said, since torch's default may be another device


@dataclass(frozen=True)
class Rows:
    """What an objective says of T times, each as likely as another; on the CPU, contiguous.

    time: float64 [T]. shown: fp32 [T], the network's time. table: fp32 [T, 8], see train_ops. weight: fp32 [T].
    """

    time: Tensor
    shown: Tensor
    table: Tensor
    weight: Tensor


def ready() -> bool:
    """Whether there is the extension, and what torch makes is memory that it may write to without torch's knowledge."""
    return backends.probe()["cpp"].ok and not watched()


def uniforms(seeds: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Keys int64 [B] and uniforms float64 [B, 4] of training.objectives.counters, where `ready`.

    seeds: int64 [B] on the CPU.
    """
    seeds = seeds.contiguous()
    key, uniform = _made(torch.int64, len(seeds)), _made(torch.float64, len(seeds), 4)
    native.load().fastdiff_training_draws(len(seeds), seeds.data_ptr(), step, key.data_ptr(), uniform.data_ptr())
    return key, uniform


def rows(given: Rows, seeds: Tensor, step: int, flip: bool, drop_label: float) -> tuple[Tensor, ...]:
    """key, time, shown, table, weight and dropped [B] of these seeds, where `ready`, as the uniforms choose.

    The first uniform is a quantile of the times; of flip, those whose third is below 1/2 are mirrored; those whose
    fourth is below drop_label drop their label.
    """
    seeds, batch = seeds.contiguous(), len(seeds)
    made = (
        _made(torch.int64, batch),
        _made(torch.float64, batch),
        _made(torch.float32, batch),
        _made(torch.float32, batch, at.TRAIN_COLUMNS),
        _made(torch.float32, batch),
        _made(torch.bool, batch),
    )
    read = seeds, given.time, given.shown, given.table, given.weight
    native.python().train_rows(batch, step, len(given.time), bool(flip), drop_label, *read, *made)
    return made


def _made(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=_CPU)
