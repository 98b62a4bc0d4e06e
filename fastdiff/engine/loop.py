"""The loops of a run whose buffers are filled: model, row, model, row; replayed; with steps of its own; with skips.

May import: held, buffers, branches, adaptive, skipping, compiler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor
from tqdm import tqdm

from fastdiff.compiler.adaptive import AdaptivePlan
from fastdiff.compiler.assemble import Row
from fastdiff.compiler.plan import Plan
from fastdiff.engine import adaptive, skipping
from fastdiff.engine.branches import Branches, Outputs, fitted
from fastdiff.engine.held import Held
from fastdiff.engine.skipping import AdaptiveSkip
from fastdiff.process.schedules import Level

T = TypeVar("T")


@dataclass(frozen=True)
class RowInfo:
    """What a callback receives after each row: the row, its level, D and the new state (live buffers: clone them).

    In a row that does not ask the network D is that of the last one that did. Of an adaptive run: rows is 0, since it
    is not known; level is the noisiest of the batch, levels has one for each sample (None where it is finished); the
    state is x / alpha.
    """

    row: int
    rows: int
    level: Level
    denoised: Tensor
    state: Tensor
    levels: tuple[Level | None, ...] = ()


@dataclass(frozen=True)
class RunStats:
    """One finished run: model evaluations, wall seconds, and the part spent in the model (None on a GPU).

    adaptive: of an adaptive run, the evaluations and steps of each sample; nfe is then the most that one needed.
    graph: "step" or "loop" where it replayed CUDA graphs, else "none". nfe_of: of each sample, where they differ.
    parts: in how many batches it was drawn.
    """

    nfe: int
    seconds: float
    model_seconds: float | None
    backend: str
    adaptive: adaptive.Counts | None = None
    graph: str = "none"
    nfe_of: tuple[int, ...] = ()
    parts: int = 1


class Loop:
    """A run of `plan` with the networks of `branches` on buffers that are filled and opened."""

    def __init__(
        self,
        plan: Plan,
        held: Held,
        branches: Branches,
        executor: str,
        callback: Callable[[RowInfo], None] | None,
        progress: bool,
    ) -> None:
        self._plan, self._held, self._branches, self._executor = plan, held, branches, executor
        self._buffers, self._callback, self._progress = held.buffers, callback, progress
        self._on_host = branches.model.device.type == "cpu"
        self._started, self._in_model = time.perf_counter(), 0.0

    def eager(self) -> tuple[Tensor, RunStats]:
        """Row by row: of each kind the first one in full, the next ones with what is the same for them found already.

        A network leaves next to nothing of this loop in the caches, so that what a row touches is what it costs.
        """
        rows, buffers, clock, network = self._plan.rows[1:], self._buffers, time.perf_counter, self._branches.model
        modes = self._branches.modes(rows)
        kinds: dict[Hashable, list[Any]] = {}
        found = [kinds.setdefault(self._branches.kind(*pair), []) for pair in zip(rows, modes, strict=True)]
        for i in self._shown(range(len(rows))):
            if not found[i]:
                self._run(rows[i], modes[i])
                found[i][:] = self._direct(rows[i])
                finite = None
            else:
                step, x, moment, condition = found[i]
                before = clock()
                output = network(x, moment, condition)
                self._in_model += clock() - before
                try:
                    finite = step(output)
                except ValueError:
                    finite, found[i][:] = False, []
                if finite is False:  # an output that is not like the last ones
                    stacked, variance = fitted(network, output, x, buffers.memory_format)
                    buffers.advance(self._executor, Outputs(stacked, variance=variance))
            if not finite and self._on_host:
                self._check_finite()
            if self._callback is not None:
                self._report(i)
        return self._end(self._plan.nfe)

    def _direct(self, row: Row) -> Sequence[Any]:
        """The step and the network's arguments for rows like this one, which has just run; () where it takes more."""
        step = self._buffers.direct
        if step is None:
            return ()
        call = self._branches.direct(row, self._buffers.model_in, self._buffers.model_time)
        return () if call is None else (step, *call)

    def _shown(self, rows: Sequence[T]) -> Iterable[T]:
        return tqdm(rows, desc=self._plan.solver, unit="row") if self._progress else rows

    def replayed(self, replays: Sequence[Callable[[], None]]) -> tuple[Tensor, RunStats]:
        """By what replays each row."""
        for i, replay in enumerate(self._shown(replays)):
            replay()
            self._report(i)
        return self._end(self._plan.nfe, graph="step")

    def whole(self, replay: Callable[[], None]) -> tuple[Tensor, RunStats]:
        """By what replays all rows."""
        replay()
        return self._end(self._plan.nfe, graph="loop")

    def with_own_steps(self, plan: AdaptivePlan, path: bool, capturing: bool) -> tuple[Tensor, RunStats]:
        """Rows that each sample's error decides on. path: noise from one Brownian path per seed."""
        bar = tqdm(disable=not self._progress, desc=plan.solver, unit="row")

        def advance(row: Row) -> None:
            bar.update()
            if capturing and self._held.graphs is not None:
                self._held.graphs.steps(self._branches, (row,), self._executor)[0]()
            else:
                self._run(row, None)

        def report(row: int, levels: tuple[Level | None, ...], state: Tensor) -> None:
            denoised = self._buffers.tensors.denoised
            if self._callback is not None and denoised is not None:
                noisiest = max((level for level in levels if level is not None), key=lambda level: level.rho)
                self._callback(RowInfo(row, 0, noisiest, denoised, state, levels))

        with bar:
            counts = adaptive.solve(
                plan, self._buffers, self._branches.model, self._executor, path, advance, report
            )  # fmt: skip
        return self._end(max(counts.nfe), counts, "step" if capturing else "none", checked=True)

    def with_skips(self, twice: Plan, skip: AdaptiveSkip) -> tuple[Tensor, RunStats]:
        """With the rows of `twice`, every row of the plan in both versions."""
        nfe = skipping.solve(twice, skip, self._buffers, self._branches, self._executor, self._after)
        return self._end(max(nfe), nfe_of=nfe, timed=False)

    def _run(self, row: Row, mode: object) -> None:
        buffers, before = self._buffers, time.perf_counter()
        outputs = self._branches.evaluate(row, buffers.model_in, buffers.model_time, buffers.memory_format, mode)
        self._in_model += time.perf_counter() - before
        if outputs is None:
            buffers.reuse(self._executor)
        else:
            buffers.advance(self._executor, outputs)

    def _after(self, i: int) -> None:
        if self._on_host:
            self._check_finite()
        self._report(i)

    def _report(self, i: int) -> None:
        if self._callback is None:
            return
        row, tensors = self._plan.rows[i + 1], self._buffers.tensors
        assert row.level is not None and tensors.denoised is not None
        state = tensors.state[row.outputs[0].dest]
        self._callback(RowInfo(i, len(self._plan.rows) - 1, row.level, tensors.denoised, state))

    def _end(
        self,
        nfe: int,
        counts: adaptive.Counts | None = None,
        graph: str = "none",
        nfe_of: tuple[int, ...] = (),
        checked: bool = False,
        timed: bool = True,
    ) -> tuple[Tensor, RunStats]:
        if not checked:
            self._check_finite()
        result = self._buffers.tensors.state[self._plan.result].clone()
        if not bool(result.isfinite().all()):
            raise FloatingPointError(
                "the sample is inf or nan although every network output was finite: a weighted sum overflowed float32. "
                "Lower the guidance, or check the scale of the network's output"
            )
        in_model = self._in_model if self._on_host and graph == "none" and timed else None
        seconds = time.perf_counter() - self._started
        return result, RunStats(nfe, seconds, in_model, self._executor, counts, graph, nfe_of)

    def _check_finite(self) -> None:
        worst = self._buffers.first_failure()
        if worst is None:
            return
        sample, row = worst
        level = self._plan.rows[row + 1].level
        where = "" if level is None else f", time={level.time:.6g}, sigma/alpha={level.rho:.4g}"
        raise FloatingPointError(
            f"the network returned inf or nan at row {row} of {len(self._plan.rows) - 1} (sample {sample}{where}); "
            "no image was made. Check its weights, its input range and dtype (float16 overflows before bfloat16)"
        )
