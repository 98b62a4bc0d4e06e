"""What folders, shards and tables of encoded pictures share. May import: source, pictures."""

from __future__ import annotations

from abc import abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .pictures import Fit, decode, shape_of
from .source import Source, UnreadableFile, evenly


class Files(Source):
    """A set of separately stored pictures; where one cannot be read, the next in the order of the set takes its place.

    workers: threads that read and decode.
    """

    fit: Fit
    workers = 4

    @abstractmethod
    def encoded(self, index: int) -> bytes | Path:
        """The file of one picture, or what is in it. Raises: UnreadableFile."""

    @abstractmethod
    def name_of(self, index: int) -> str:
        """Path or key of one picture, for messages."""

    @abstractmethod
    def label_of(self, index: int) -> int:
        """Label of one picture, asked only where num_classes > 0."""

    def read(self, index: int) -> NDArray[np.uint8] | NDArray[np.float32]:
        """One picture [C, H, W]. Raises: UnreadableFile, or ValueError where its size does not fit."""
        return decode(self.encoded(index), self.name_of(index), self.fit, self.shape)

    def first_shape(self) -> tuple[int, ...]:
        """Shape of the first readable picture. Raises: ValueError when none is."""
        for index in range(len(self)):
            try:
                return shape_of(self.encoded(index), self.fit)
            except UnreadableFile as error:
                self.faults.record(self.name_of(index), error)
        raise ValueError(f"no file of {self.describe()} can be read")

    def read_some(self, most: int = 16) -> None:
        """Read the first, the last and some between: where sizes are mixed, that mostly shows now, not in mid-epoch.

        Raises: ValueError naming the first whose size does not fit.
        """
        for index in evenly(len(self), most).tolist():
            try:
                self.read(index)
            except UnreadableFile as error:
                self.faults.record(self.name_of(index), error)

    def fetch(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        if not hasattr(self, "_pool"):
            self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="fastdiff-data")
        found = list(self._pool.map(self._readable, indices.tolist()))
        pictures = torch.from_numpy(np.stack([picture for picture, _ in found]))
        labels = torch.tensor([self.label_of(i) for _, i in found]) if self.num_classes else None
        return pictures, labels

    def _readable(self, index: int) -> tuple[NDArray[np.uint8] | NDArray[np.float32], int]:
        for step in range(len(self)):
            place = (index + step) % len(self)
            try:
                return self.read(place), place
            except UnreadableFile as error:
                self.faults.record(self.name_of(place), error)
        raise ValueError(f"no file of {self.describe()} can be read")
