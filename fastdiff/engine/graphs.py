"""CUDA graphs of networks + row: the table, the row counter and the seeds live in device memory, so what was captured
replays for any sampler, step count, guidance and seed that needs the same room.

May import: buffers, branches, conditions, memory, compiler. One graph for each kind of row (which branches it
evaluates), or one of a whole run. How a device records is a `Recorder`, so that all else here runs and is tested on a
CPU.
"""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from fastdiff.compiler.assemble import Row
from fastdiff.engine import conditions, memory
from fastdiff.engine.branches import Branches
from fastdiff.engine.buffers import Buffers

WARM_UP = 3
_OURS = str(Path(__file__).resolve().parent)
_TORCH = str(Path(torch.__file__).resolve().parent)

Work = Callable[[], None]


class NotCaptured(RuntimeError):
    """What ran in the warm-up failed while it was captured; nothing was changed by it."""


class Recorder(Protocol):
    """Records what a function launches, and replays it."""

    @property
    def bytes(self) -> int:
        """Of device memory that the records hold."""

    def record(self, work: Work, warm_up: int) -> Work:
        """Run `work` warm_up times, record it, and return what replays it; RuntimeError where it cannot be recorded."""


class CudaRecorder:
    """CUDA graphs that share one memory pool: they never run at the same time, and nothing in it outlives a replay."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self.bytes = 0

    def record(self, work: Work, warm_up: int) -> Work:
        """Warm up on a side stream, as torch asks for, then capture there."""
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm_up):
                work()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, pool=self._pool, stream=side):
            work()
        self._pool = graph.pool()
        self.bytes = sum(
            segment["total_size"]
            for segment in torch.cuda.memory_snapshot()
            if tuple(segment.get("segment_pool_id", ())) == tuple(self._pool)
        )
        return graph.replay


def recorder_for(device: torch.device, executor: str) -> Recorder | None:
    """What records rows of this executor on this device; None where nothing does."""
    return CudaRecorder(device) if device.type == "cuda" and executor in ("triton", "cuda") else None


class Graphs:
    """The graphs captured on one set of buffers, for networks and conditions of one signature.

    Conditions are copied into buffers of their own at each run.
    """

    def __init__(self, buffers: Buffers, branches: Branches, recorder: Recorder) -> None:
        self._buffers, self._recorder = buffers, recorder
        self._own = conditions.clone(branches.conditions_of_all())
        self._captured = buffers.captured
        self._networks = [network.net for network, _ in branches.apart.values()]  # they must outlive the graphs
        self._replays: dict[Hashable, Work] = {}

    @property
    def bytes(self) -> int:
        """Of the graphs' memory pool, and of the conditions."""
        return self._recorder.bytes + sum(t.numel() * t.element_size() for t in conditions.tensors(self._own))

    def __len__(self) -> int:
        return len(self._replays)

    def load(self, branches: Branches) -> None:
        """This run's conditions; graphs whose addresses no longer hold are dropped."""
        with torch.inference_mode(False), torch.no_grad():  # its memory is written in and out of inference mode
            conditions.load(self._own, branches.conditions_of_all())
        if self._captured != self._buffers.captured:
            self._replays.clear()

    def steps(self, branches: Branches, rows: Sequence[Row], executor: str) -> list[Work]:
        """For each row of a run what replays its evaluation and itself, captured where its kind was not yet."""
        pairs = list(zip(rows, branches.modes(rows), strict=True))
        return [self._replay(branches, [pair], executor) for pair in pairs]

    def loop(self, branches: Branches, rows: Sequence[Row], executor: str) -> Work:
        """What replays all rows of an opened run."""
        return self._replay(branches, list(zip(rows, branches.modes(rows), strict=True)), executor)

    def _replay(self, branches: Branches, rows: Sequence[tuple[Row, Any]], executor: str) -> Work:
        kinds = tuple(branches.kind(row, mode) for row, mode in rows)
        if kinds not in self._replays:
            self._replays[kinds] = self._record(branches.with_conditions(self._own), rows, executor)
            self._captured = self._buffers.captured
        return self._replays[kinds]

    def _record(self, branches: Branches, rows: Sequence[tuple[Row, Any]], executor: str) -> Work:
        buffers = self._buffers

        def work() -> None:
            for row, mode in rows:
                outputs = branches.evaluate(row, buffers.model_in, buffers.model_time, buffers.memory_format, mode)
                if outputs is None:
                    buffers.reuse(executor)
                else:
                    buffers.advance(executor, outputs)

        return record(self._recorder, buffers, work, WARM_UP if len(rows) == 1 else 1)


def record(recorder: Recorder, buffers: Buffers, work: Work, warm_up: int = WARM_UP) -> Work:
    """What replays `work`, and the buffers as they were before.

    Raises NotCaptured where `work` runs and cannot be captured, and what `work` itself raises as it is. A caller in
    inference mode has NotCaptured of both: nothing is captured in it, and outside it a network may fail that does not
    in it.
    """
    finished, inferring = 0, torch.is_inference_mode_enabled()

    def counted() -> None:
        nonlocal finished
        work()
        finished += 1

    t = buffers.tensors
    changed = (t.row, t.status, t.state, t.mix, t.momentum, t.denoised, buffers.model_in, buffers.model_time)
    saved = [(live, live.clone()) for live in changed if live is not None]
    try:
        with torch.inference_mode(False), torch.no_grad():
            return recorder.record(counted, warm_up)
    except RuntimeError as error:
        if memory.ran_out(error) or (finished < warm_up and not inferring):
            raise
        raise NotCaptured(str(error)) from error
    finally:
        for live, before in saved:
            live.copy_(before)


def signature(branches: Branches) -> tuple[Hashable, ...]:
    """What captured addresses depend on beside the buffers: branches, structure of conditions, where weights live."""
    networks = [branches.model.net, *(network.net for network, _ in branches.apart.values())]
    modules = [net for net in networks if isinstance(net, nn.Module)]
    weights = tuple(weight.data_ptr() for net in modules for weight in (*net.parameters(), *net.buffers()))
    which = (branches.stack, tuple(branches.apart), tuple(id(net) for net in networks))
    return which, conditions.signature(branches.conditions_of_all()), weights


def cannot_capture(error: RuntimeError) -> str:
    """The warning that a network cannot be captured: what in it, and what to do."""
    return (
        f"the network cannot be captured in a CUDA graph, running eagerly: {culprit(error)} failed with: {error}. "
        "graph=False silences this; the usual causes are a host sync (.item(), a branch on a value) or a CPU tensor "
        "in its forward"
    )


def culprit(error: BaseException) -> str:
    """The operation that an error came from, as the innermost line outside torch and this package says it.

    A failed capture raises once more when it ends, so the error that began it is looked for first. What a caller was
    handling when it came here is none of ours.
    """
    first = error
    while (before := first.__cause__ or first.__context__) is not None and _through_here(before):
        first = before
    frames = traceback.extract_tb(first.__traceback__)
    ours = (_OURS, _TORCH, "<")
    theirs = [f for f in frames if not f.filename.startswith(ours) and f.name != "__torch_dispatch__"]
    frame = (theirs or frames)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0)
    begin, end = getattr(frame, "colno", None), getattr(frame, "end_colno", None)
    same_line = getattr(frame, "end_lineno", None) == frame.lineno
    text = line[begin:end] if begin is not None and same_line else line
    return f"`{text.strip()}` in {frame.name} ({Path(frame.filename).name}:{frame.lineno})"


def _through_here(error: BaseException) -> bool:
    return any(frame.filename.startswith(_OURS) for frame in traceback.extract_tb(error.__traceback__))
