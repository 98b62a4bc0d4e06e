"""One CUDA graph for model + row: the table, the row counter and the seeds live in device memory, so a captured
graph replays for any sampler, step count, guidance and seed with the same shapes and registers.

May import: buffers, conditions. Only used on a CUDA device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastdiff.engine import conditions
from fastdiff.engine.buffers import Buffers
from fastdiff.models.denoiser import Denoiser

_WARM_UP = 3


class StepGraph:
    """A captured `model + row`; conditions are copied into its own buffers at each run."""

    def __init__(self, buffers: Buffers, model: Denoiser, cond: Any, executor: str) -> None:
        self._cond = conditions.clone(cond)
        self._signature = _signature(model, cond)
        self._graph = torch.cuda.CUDAGraph()
        t = buffers.tensors
        saved = [(live, live.clone()) for live in (t.row, t.status, t.state, buffers.model_in, buffers.model_time)]

        def step() -> None:
            output = buffers.as_stored(model(buffers.model_in, buffers.model_time, self._cond))
            buffers.bind(executor, output)(output)

        try:
            side = torch.cuda.Stream(model.device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    step()
                    t.row.zero_()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self._graph, stream=side):
                step()
        finally:
            for live, before in saved:
                live.copy_(before)

    @staticmethod
    def of(buffers: Buffers, model: Denoiser, cond: Any, executor: str) -> StepGraph:
        """The graph captured for these buffers, with this run's conditions loaded."""
        if buffers.graph is None or buffers.graph._signature != _signature(model, cond):
            buffers.graph = StepGraph(buffers, model, cond, executor)
        conditions.load(buffers.graph._cond, cond)
        return buffers.graph

    def replay(self) -> None:
        """Evaluate the model and run the next row of every sample."""
        self._graph.replay()


def _signature(model: Denoiser, cond: Any) -> tuple[Any, ...]:
    """What the captured addresses depend on: the conditions' structure and where the network's weights live."""
    net = model.net
    weights = [*net.parameters(), *net.buffers()] if isinstance(net, nn.Module) else []
    return conditions.signature(cond), tuple(weight.data_ptr() for weight in weights)
