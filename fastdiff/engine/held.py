"""Buffers and captured graphs of a model's runs, kept for its later runs, whatever the sampler.

May import: kept, buffers, graphs, room, models.denoiser.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from fastdiff.engine.buffers import Buffers
from fastdiff.engine.graphs import Graphs
from fastdiff.engine.kept import Kept
from fastdiff.engine.room import Room
from fastdiff.models.denoiser import Denoiser


@dataclass(frozen=True)
class Memory:
    """Bytes on the device that a model's samplers keep for their next runs, and at most keep. graphs: how many."""

    buffers: int
    graphs: int
    captured: int
    limit: int


class Held:
    """The buffers of one run, and the graphs captured on them."""

    def __init__(self, room: Room) -> None:
        self.buffers = Buffers(room)
        self.graphs: Graphs | None = None

    @property
    def bytes(self) -> int:
        """Of both."""
        return self.buffers.bytes + (0 if self.graphs is None else self.graphs.bytes)


_kept: weakref.WeakKeyDictionary[Denoiser, Kept[Held]] = weakref.WeakKeyDictionary()


def shelf(model: Denoiser) -> Kept[Held]:
    """What is kept for this model; it goes with the model."""
    return _kept.setdefault(model, Kept())


def memory(model: Denoiser, limit: int) -> Memory:
    """What is kept for this model now, in bytes."""
    held = shelf(model).entries
    captured = [entry.graphs for entry in held if entry.graphs is not None]
    buffers = sum(entry.buffers.bytes for entry in held)
    return Memory(buffers, sum(graphs.bytes for graphs in captured), sum(map(len, captured)), limit)
