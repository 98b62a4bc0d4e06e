"""The networks of a batch whose samples need different ones, each asked about the entries that need it and no others.

May import: branches, buffers, conditions, models.denoiser. Branch p of slot b is entry p B + b of the network's input,
time and output, p = 0, 1, 2 for the conditional, the unguided and the perturbed branch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.engine import conditions
from fastdiff.engine.branches import CONDITIONAL, PERTURBED, UNGUIDED, Branches, Outputs, ask
from fastdiff.engine.buffers import Buffers, upload
from fastdiff.models.denoiser import Denoiser

POSITIONS = {CONDITIONAL: 0, UNGUIDED: 1, PERTURBED: 2}


class Lane:
    """One network, the conditions of its entries, and which of them it is asked about next."""

    def __init__(self, network: Denoiser, names: tuple[str, ...]) -> None:
        self.network, self.names = network, names
        self.positions = tuple(POSITIONS[name] for name in names)
        self.signature: Hashable = None
        self.described = ""
        self.conditions: Any = None
        self.index: Tensor | None = None  # None: the first `count` entries
        self.count = 0
        self._all: Tensor | None = None
        self._asked: list[int] = []

    @property
    def ready(self) -> bool:
        """Whether it has had a request."""
        return self._all is not None

    def grow(self, entries: int) -> None:
        """Memory for so many entries."""
        stretched = conditions.stretched(self.conditions, entries)
        self._all = torch.zeros(entries, dtype=torch.int64, device=self.network.device)
        self.conditions, self._asked = stretched, []

    def write(self, tree: Any, places: Sequence[int], entries: int) -> None:
        """The k-th entry of every tensor of a request's conditions goes to places[k]."""
        if self._all is None:
            self.conditions = conditions.stretched(conditions.part(tree, slice(0)), entries)
            self.grow(entries)
        for into, values in zip(conditions.tensors(self.conditions), conditions.tensors(tree), strict=True):
            if into.dim():
                for k, place in enumerate(places):
                    into[place].copy_(values[k], non_blocking=True)

    def choose(self, asked: list[int], padded_to: int) -> None:
        """Ask about these entries next; idle ones make up the number, each once."""
        self.count = padded_to
        if asked == list(range(padded_to)):
            self.index = None
            return
        assert self._all is not None
        if len(asked) < padded_to:
            taken = set(asked)
            idle = (i for i in range(len(self._all)) if i not in taken)
            asked = asked + [next(idle) for _ in range(padded_to - len(asked))]
        self.index = self._all[:padded_to]
        if asked != self._asked:
            upload(self.index, np.array(asked, dtype=np.int64))
            self._asked = asked


class Crowd:
    """All networks that a batch is asked of."""

    def __init__(self, model: Denoiser, guide: Denoiser | None, perturbed: Denoiser | None) -> None:
        apart = {UNGUIDED: guide, PERTURBED: perturbed}
        own = tuple(name for name in POSITIONS if apart.get(name) is None)
        self.lanes = [Lane(model, own), *(Lane(net, (name,)) for name, net in apart.items() if net is not None)]
        self._out: Tensor | None = None
        self._variance: Tensor | None = None

    @staticmethod
    def of(branches: Branches, entries: int) -> Crowd:
        """The networks of a run, with its conditions for so many entries."""
        apart = {name: network for name, (network, _) in branches.apart.items()}
        crowd = Crowd(branches.model, apart.get(UNGUIDED), apart.get(PERTURBED))
        for lane, positions, tree in crowd.check(branches):
            lane.write(tree, [p * branches.batch + b for p in positions for b in range(branches.batch)], entries)
        return crowd

    def check(self, branches: Branches) -> list[tuple[Lane, tuple[int, ...], Any]]:
        """A request's conditions by lane, the k-th entry for the branch at the k-th position.

        Raises ValueError where they cannot run in one batch with those of the requests before.
        """
        parts = [(self.lanes[0], branches.stack, branches.conditions[-1])]
        for name, (_, tree) in branches.apart.items():
            parts.append((next(lane for lane in self.lanes[1:] if name in lane.names), (name,), tree))
        for lane, _, tree in parts:
            if lane.signature not in (None, conditions.of_an_entry(tree)):
                raise ValueError(
                    f"the conditions of this request ({conditions.described(tree)}) have another structure than those "
                    f"of the stream's first ({lane.described}), so the two cannot run in one batch; pad or encode them "
                    "to one shape, or open another stream"
                )
        for lane, _, tree in parts:
            lane.signature, lane.described = conditions.of_an_entry(tree), conditions.described(tree)
        return [(lane, tuple(POSITIONS[name] for name in names), tree) for lane, names, tree in parts]

    def grow(self, entries: int) -> None:
        """Memory for so many entries."""
        self._out = self._variance = None
        for lane in self.lanes:
            if lane.ready:
                lane.grow(entries)

    def ask(self, entries: Sequence[int], slots: int, padded: Callable[[int], int] = int) -> None:
        """Choose the entries of the next evaluation, of `slots` slots; padded: how many are asked about for so many."""
        for lane in self.lanes:
            chosen = [entry for entry in entries if entry // slots in lane.positions]
            lane.choose(chosen, padded(len(chosen)))

    def advance(self, buffers: Buffers, executor: str) -> None:
        """Ask every lane about what was chosen for it, and run every sample's row."""
        asked = [lane for lane in self.lanes if lane.count]
        for lane in asked:
            self._evaluate(lane, buffers)
        if asked:
            assert self._out is not None
            buffers.advance(executor, Outputs(self._out, variance=self._variance))
        else:
            buffers.reuse(executor)

    def _evaluate(self, lane: Lane, buffers: Buffers) -> None:
        index, count = lane.index, lane.count
        if index is None:
            x, time = buffers.model_in[:count], buffers.model_time[:count]
            tree = conditions.part(lane.conditions, slice(count))
        else:
            x, time = buffers.model_in.index_select(0, index), buffers.model_time.index_select(0, index)
            tree = conditions.select(lane.conditions, index)
            x = x.contiguous(memory_format=buffers.memory_format)
        found, variance = ask(lane.network, x, time, tree, buffers.memory_format)
        if self._out is None:
            self._out = torch.zeros_like(buffers.model_in, dtype=found.dtype)
        if lane is self.lanes[0] and self._out.dtype != found.dtype:
            self._out = self._out.to(found.dtype)
        _put(self._out, found, index)
        if variance is not None and lane is self.lanes[0]:
            if self._variance is None or self._variance.dtype != variance.dtype:
                self._variance = torch.zeros_like(self._out)
            _put(self._variance, variance, index)


def _put(into: Tensor, values: Tensor, index: Tensor | None) -> None:
    values = values.to(into.dtype)
    if index is None:
        into[: len(values)].copy_(values)
    else:
        into.index_copy_(0, index, values)
