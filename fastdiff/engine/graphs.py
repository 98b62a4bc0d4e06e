"""One CUDA graph for model + row: the table, the row counter and the seeds live in device memory, so a captured
graph replays for any sampler, step count, guidance and seed with the same shapes and registers.

May import: buffers. Only used on a CUDA device.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastdiff.engine.buffers import Buffers
from fastdiff.models.denoiser import Condition, Denoiser

_WARM_UP = 3


class StepGraph:
    """A captured `model + row`; conditions are copied into its own buffers at each run."""

    def __init__(self, buffers: Buffers, model: Denoiser, cond: Condition, executor: str) -> None:
        self._cond = _clone(cond)
        self._graph = torch.cuda.CUDAGraph()
        t = buffers.tensors
        saved = [(live, live.clone()) for live in (t.row, t.status, t.state, buffers.model_in, buffers.model_time)]

        def step() -> None:
            output = buffers.as_stored(model(buffers.model_in, buffers.model_time, self._cond))
            buffers.bind(executor, output)(output)

        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    step()
                    t.row.zero_()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self._graph):
                step()
        finally:
            for live, before in saved:
                live.copy_(before)

    @staticmethod
    def of(buffers: Buffers, model: Denoiser, cond: Condition, executor: str) -> StepGraph:
        """The graph captured for these buffers, with this run's conditions loaded."""
        if buffers.graph is None or not buffers.graph.accepts(cond):
            buffers.graph = StepGraph(buffers, model, cond, executor)
        buffers.graph.load(cond)
        return buffers.graph

    def accepts(self, cond: Condition) -> bool:
        """True when `cond` has the shapes and dtypes this graph was captured with."""
        return _signature(cond) == _signature(self._cond)

    def load(self, cond: Condition) -> None:
        """Copy this run's conditions to where the graph reads them."""
        if isinstance(cond, Tensor) and isinstance(self._cond, Tensor):
            self._cond.copy_(cond)
        elif isinstance(cond, Mapping) and isinstance(self._cond, Mapping):
            for key, value in cond.items():
                if isinstance(value, Tensor):
                    self._cond[key].copy_(value)

    def replay(self) -> None:
        """Evaluate the model and run the next row of every sample."""
        self._graph.replay()


def _clone(cond: Condition) -> Condition:
    if isinstance(cond, Mapping):
        return {key: value.clone() if isinstance(value, Tensor) else value for key, value in cond.items()}
    return None if cond is None else cond.clone()


def _signature(cond: Condition) -> object:
    if isinstance(cond, Mapping):
        return tuple(sorted((k, _signature(v) if isinstance(v, Tensor) else repr(v)) for k, v in cond.items()))
    return None if cond is None else (tuple(cond.shape), cond.dtype)
