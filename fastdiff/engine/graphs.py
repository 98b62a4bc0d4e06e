"""One CUDA graph for model + row: the table, the row counter and the seeds live in device memory, so a captured
graph replays for any sampler, step count, guidance and seed with the same shapes and registers.

May import: buffers, branches, conditions, compiler. Only used on a CUDA device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastdiff.compiler.assemble import Row
from fastdiff.engine import conditions
from fastdiff.engine.branches import Branches
from fastdiff.engine.buffers import Buffers

_WARM_UP = 3


class StepGraph:
    """A captured `networks + row`; conditions are copied into its own buffers at each run."""

    def __init__(self, buffers: Buffers, branches: Branches, row: Row, executor: str) -> None:
        self._signature = _signature(branches, row)
        branches = branches.with_own_conditions()
        self._conditions = _conditions(branches)
        self._graph = torch.cuda.CUDAGraph()
        t = buffers.tensors
        changed = (t.row, t.status, t.state, t.mix, t.momentum, buffers.model_in, buffers.model_time)
        saved = [(live, live.clone()) for live in changed if live is not None]

        def step() -> None:
            buffers.advance(
                executor, branches.evaluate(row, buffers.model_in, buffers.model_time, buffers.memory_format)
            )

        try:
            side = torch.cuda.Stream(branches.model.device)
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
    def of(buffers: Buffers, branches: Branches, row: Row, executor: str) -> StepGraph:
        """The graph captured for these buffers, with this run's conditions loaded; every row is like `row`."""
        with torch.inference_mode(False), torch.no_grad():  # its memory is written in and out of inference mode
            if buffers.graph is None or buffers.graph._signature != _signature(branches, row):
                buffers.graph = StepGraph(buffers, branches, row, executor)
            conditions.load(buffers.graph._conditions, _conditions(branches))
        return buffers.graph

    def replay(self) -> None:
        """Evaluate the model and run the next row of every sample."""
        self._graph.replay()


def _conditions(branches: Branches) -> list[Any]:
    return [branches.conditions, [condition for _, condition in branches.apart.values()]]


def _signature(branches: Branches, row: Row) -> tuple[Any, ...]:
    """What the captured addresses depend on: the branches, their conditions' structure, where weights live."""
    networks = [branches.model.net, *(network.net for network, _ in branches.apart.values())]
    modules = [net for net in networks if isinstance(net, nn.Module)]
    weights = [weight for net in modules for weight in (*net.parameters(), *net.buffers())]
    needed = (branches.stack, tuple(branches.apart), branches.needed(row))
    return needed, conditions.signature(_conditions(branches)), tuple(weight.data_ptr() for weight in weights)
