"""The loop of an adaptive sampler: rows of the next trial step, model, row, ..., the norm of its error, decide.

May import: buffers, measure, ops, compiler, models.denoiser. Each sample has steps of its own, so a sample depends on
its seed alone, not on the batch: the table has a row per sample. The host reads back once after each trial step, the
error of every sample and whether its network failed; without it no next row is known. The tables are uploaded right
after, when the device has nothing to do yet. Everything on a state is done by the row op and the measure op.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.compiler import brownian
from fastdiff.compiler import layout as at
from fastdiff.compiler.adaptive import AdaptivePlan
from fastdiff.compiler.assemble import Row
from fastdiff.compiler.walk import Walk
from fastdiff.engine import ops
from fastdiff.engine.buffers import Buffers, upload
from fastdiff.engine.measure import MeasureTensors, scratch
from fastdiff.engine.measure import bind as bind_measure
from fastdiff.models.denoiser import Denoiser
from fastdiff.process.schedules import Level

Advance = Callable[[Row], None]  # evaluate the branches that a row like this needs, and run every sample's own row
Report = Callable[[int, tuple[Level | None, ...], Tensor], None]  # row, level of each sample, state


@dataclass(frozen=True)
class Counts:
    """Of each sample: model evaluations (those of rejected steps included), steps accepted and rejected."""

    nfe: tuple[int, ...]
    accepted: tuple[int, ...]
    rejected: tuple[int, ...]


def solve(
    plan: AdaptivePlan, buffers: Buffers, model: Denoiser, executor: str, path: bool, advance: Advance, report: Report
) -> Counts:
    """Run an opened plan to its end, the sample in register `plan.result`.

    path: noise from one Brownian path per seed. Raises FloatingPointError, naming the sample and its level, where the
    network returns inf or nan and where the steps become too small or too many.
    """
    walks = [Walk(plan, sample, path) for sample in range(buffers.batch)]
    tables = _Tables(plan, buffers, model, executor, path, advance, report)
    end, error, *carried = plan.example.results
    state, scale = buffers.tensors.state, plan.method.scale
    errors = MeasureTensors(
        value=state[error],
        before=state[scale],
        after=state[(end, *carried)[scale]],
        status=buffers.tensors.status,
        **scratch(buffers.batch, state.device),
    )
    find = bind_measure(errors, at.ERROR, executor, plan.method.rtol, plan.method.atol)
    if len(plan.start.rows) > 1:
        tables.run(dict.fromkeys(range(buffers.batch), plan.start.rows), opened=True)
    while active := [sample for sample, walk in enumerate(walks) if not walk.done]:
        tables.run({sample: walks[sample].trial() for sample in active})
        find()
        found = errors.found.tolist()
        if max(status for _, status in found) >= 0.0:
            tables.check_finite()
        for sample in active:
            walks[sample].judge(found[sample][0])
    tables.run({sample: walk.finish() for sample, walk in enumerate(walks)})
    tables.check_finite()
    nfe, accepted, rejected = zip(*((w.evaluations, w.accepted, w.rejected) for w in walks), strict=True)
    return Counts(nfe, accepted, rejected)


class _Tables:
    """Two tables with rows of each sample's own: one row that evaluates nothing, and the evaluations that follow it."""

    def __init__(
        self,
        plan: AdaptivePlan,
        buffers: Buffers,
        model: Denoiser,
        executor: str,
        path: bool,
        advance: Advance,
        report: Report,
    ) -> None:
        self._plan, self._buffers, self._model = plan, buffers, model
        self._advance, self._report = advance, report
        tensors, device = buffers.tensors, buffers.tensors.state.device
        terms = (brownian.MOST_NODES if path else 1) if plan.stochastic else 0
        columns = at.COEF_FIXED + at.NOISE_STRIDE * terms, at.IDS_FIXED + at.TERM_IDS_STRIDE * terms
        self._deciding = dataclasses.replace(
            tensors,
            coef=torch.zeros(buffers.batch, columns[0], dtype=torch.float32, device=device),
            ids=torch.zeros(buffers.batch, columns[1], dtype=torch.int32, device=device),
            row=torch.zeros_like(tensors.row),
            denoised=None,
        )
        self._decide = ops.bind(self._deciding, executor, uses_e=False)
        self._hosts = [_Host(self._deciding), _Host(tensors)]
        self._evaluations: dict[int, tuple[Row, ...]] = {}
        self._stride = self._seen = 0

    def run(self, rows: dict[int, tuple[Row, ...]], opened: bool = False) -> None:
        """Run each sample's rows, as many for every one; samples without rows stay as they are.

        opened: the first row, which evaluates nothing, has run already.
        """
        self._evaluations = {sample: own[1:] for sample, own in rows.items()}
        self._stride = len(next(iter(self._evaluations.values())))
        for sample, own in rows.items():
            packed = dataclasses.replace(self._plan, rows=own).pack(
                self._model.prediction, self._model.sigma_data, opening="state"
            )
            self._hosts[0].put(sample, sample, packed.coef[:1], packed.ids[:1])
            self._hosts[1].put(sample, sample * self._stride, packed.coef[1:], packed.ids[1:])
        if not opened:
            self._hosts[0].upload()
            self._decide(self._buffers.model_in)
        self._hosts[1].upload()
        for stage in range(self._stride):
            self._evaluate({sample: own[stage] for sample, own in self._evaluations.items()})

    def check_finite(self) -> None:
        """FloatingPointError for the first network output that was inf or nan."""
        failure = self._buffers.first_failure()
        if failure is None:
            return
        sample, row = failure
        level = self._evaluations[sample][row % self._stride].level
        assert level is not None
        raise FloatingPointError(
            f"the network returned inf or nan after {self._seen} evaluations (sample {sample}, time={level.time:.6g}, "
            f"sigma/alpha={level.rho:.4g}); no image was made. Check its weights, its input range and dtype (float16 "
            "overflows before bfloat16)"
        )

    def _evaluate(self, rows: dict[int, Row]) -> None:
        gain, perturb = (max(abs(getattr(row, name)) for row in rows.values()) for name in ("gain", "perturb"))
        self._advance(dataclasses.replace(next(iter(rows.values())), gain=gain, perturb=perturb))
        self._seen += 1
        state = self._buffers.tensors.state
        if state.device.type == "cpu":
            self.check_finite()
        levels = tuple(rows[b].level if b in rows else None for b in range(self._buffers.batch))
        self._report(self._seen - 1, levels, state[next(iter(rows.values())).outputs[0].dest])


class _Host:
    """A table as it is being written, and where each sample's next row is; uploaded in three copies."""

    def __init__(self, tensors: ops.StepTensors) -> None:
        self._device = tensors
        self._coef = np.zeros(tensors.coef.shape, dtype=np.float32)
        self._ids = np.zeros(tensors.ids.shape, dtype=np.int32)
        self._row = np.full(tensors.row.shape, -1, dtype=np.int32)

    def put(self, sample: int, place: int, coef: NDArray[np.float32], ids: NDArray[np.int32]) -> None:
        """Rows of a sample, from row `place` on; `pack` may have made them wider than the table, with zeros."""
        for host, values in ((self._coef, coef), (self._ids, ids)):
            width = min(host.shape[1], values.shape[1])
            host[place : place + len(values)] = 0
            host[place : place + len(values), :width] = values[:, :width]
        self._row[sample] = place

    def upload(self) -> None:
        """Copy the table to the device and forget which samples take part."""
        for tensor, host in ((self._device.coef, self._coef), (self._device.ids, self._ids)):
            upload(tensor, host)
        upload(self._device.row, self._row)
        self._row.fill(-1)
