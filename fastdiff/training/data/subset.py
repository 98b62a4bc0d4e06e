"""Some pictures of a set as a set. May import: source."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .source import Source


class Subset(Source):
    """The pictures at `indices` of another set, in that order."""

    def __init__(self, source: Source, indices: NDArray[np.int64]) -> None:
        self.source, self.indices = source, indices
        self.shape, self.num_classes, self.class_names = source.shape, source.num_classes, source.class_names
        self.faults = source.faults

    def __len__(self) -> int:
        return len(self.indices)

    def fetch(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        return self.source.fetch(self.indices[indices])

    def describe(self) -> str:
        return f"{len(self)} of {self.source.describe()}"
