"""Batches of one process, read ahead in a thread: its share of every global batch, on the device.

May import: order, source.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from .order import image_indices, sample_seeds
from .source import Resident, Source

AHEAD = 2  # batches
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    """pictures: [B, C, H, W] uint8 or fp32; labels: int64 [B] or None; seeds: int64 [B] on the CPU."""

    pictures: Tensor
    labels: Tensor | None
    seeds: Tensor

    def split(self, size: int) -> list[Batch]:
        """The same samples in parts of `size`."""
        parts = zip(
            self.pictures.split(size),
            [None] * -(-len(self.seeds) // size) if self.labels is None else self.labels.split(size),
            self.seeds.split(size),
            strict=True,
        )
        return [Batch(*part) for part in parts]

    def tensors(self) -> dict[str, Tensor]:
        """What there is to store, by name."""
        labels = {} if self.labels is None else {"labels": self.labels}
        return {"pictures": self.pictures, "seeds": self.seeds} | labels


@dataclass(frozen=True)
class Loader:
    """Reads samples first + rank * share .. of every global batch of `batch` samples, share = batch / world.

    scale: what float values are multiplied by. Seeds stay on the CPU, where the objective draws.
    """

    source: Source
    seed: int
    batch: int
    rank: int = 0
    world: int = 1
    scale: float = 1.0
    device: torch.device = CPU

    def read(self, first: int) -> Batch:
        """This process's share of the global batch that starts with sample `first`."""
        share = self.batch // self.world
        start = first + self.rank * share
        pictures, labels = self.source.fetch(image_indices(len(self.source), self.seed, start, share))
        seeds = sample_seeds(self.seed, start, share)
        if pictures.is_floating_point() and self.scale != 1.0:
            pictures = pictures * self.scale
        moved = None if labels is None else self._move(labels)
        return Batch(self._move(pictures), moved, torch.from_numpy(seeds))

    def stream(self, first: int) -> Generator[Batch, None, None]:
        """Batches from sample `first` on, without end; the next ones are read while one is used."""
        if isinstance(self.source, Resident):
            while True:
                yield self.read(first)
                first += self.batch
        pending: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="fastdiff-loader") as thread:
            try:
                while True:
                    while len(pending) < AHEAD:
                        pending.append(thread.submit(self.read, first + len(pending) * self.batch))
                    yield pending.popleft().result()
                    first += self.batch
            finally:
                for future in pending:
                    future.cancel()

    def _move(self, tensor: Tensor) -> Tensor:
        if tensor.device == self.device:
            return tensor
        pinned = tensor.pin_memory() if self.device.type == "cuda" and tensor.device.type == "cpu" else tensor
        return pinned.to(self.device, non_blocking=True)
