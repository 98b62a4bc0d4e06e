"""What the trainer asks of a data set: pictures and labels by index, and a count of the files that cannot be read.

May import: nothing of the package.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAX_FAULTS = 1e-3  # of the files of a set; more unreadable ones than this stop the run
_AT_ONCE = 1024


class Faults:
    """Files that could not be read: skipped, counted and named; too many of them are an error."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.reasons: dict[str, str] = {}
        self._told: set[str] = set()
        self._lock = threading.Lock()

    def record(self, name: str, error: Exception) -> None:
        """Count one unreadable file once. Raises: ValueError when more than 0.1 % of the set are."""
        with self._lock:
            if name in self.reasons:
                return
            self.reasons[name] = " ".join(str(error).split()) or type(error).__name__
            if len(self.reasons) > MAX_FAULTS * self.size:
                first = "; ".join(f"{name}: {reason}" for name, reason in list(self.reasons.items())[:3])
                raise ValueError(
                    f"{len(self.reasons)} of {self.size} files cannot be read, at most {MAX_FAULTS:.1%} may be. "
                    f"The first: {first}. Remove or replace them."
                )

    def take(self) -> list[tuple[str, str]]:
        """Names and reasons since the last call."""
        with self._lock:
            found = [(name, reason) for name, reason in self.reasons.items() if name not in self._told]
            self._told.update(name for name, _ in found)
        return found

    def learn(self, found: Iterable[tuple[str, str]]) -> None:
        """Count what other processes took, so that the limit is that of the run. Raises: as `record`."""
        for name, reason in found:
            self._told.add(name)
            self.record(name, UnreadableFile(reason))


class Source(ABC):
    """A data set of `len()` pictures of one shape [C, H, W], uint8 pixels or float values, with or without labels.

    class_names: of labelled sets whose files say them. num_classes: 0 where there are no labels.
    """

    shape: tuple[int, ...]
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    faults: Faults

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def fetch(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """Pictures [B, C, H, W] uint8 or float32, and labels int64 [B] or None."""

    @abstractmethod
    def describe(self) -> str:
        """What and where, for one line of output."""


class UnreadableFile(ValueError):
    """One damaged picture: the run goes on without it."""


class Resident(Source):
    """A whole set kept as one tensor on one device: fetching is an index, and no loader runs."""

    def __init__(self, source: Source, device: torch.device | str = "cpu") -> None:
        parts = [source.fetch(chunk) for chunk in _chunks(len(source))]
        self.pictures = torch.cat([pictures for pictures, _ in parts]).to(device)
        labels = [part for _, part in parts if part is not None]
        self.labels = torch.cat(labels).to(device) if labels else None
        self.shape, self.num_classes, self.class_names = source.shape, source.num_classes, source.class_names
        self.faults, self._about = source.faults, source.describe()

    def __len__(self) -> int:
        return len(self.pictures)

    def fetch(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        index = torch.from_numpy(indices).to(self.pictures.device)
        return self.pictures[index], None if self.labels is None else self.labels[index]

    def describe(self) -> str:
        return f"{self._about}, kept on {self.pictures.device}"


def check_labels(labels: NDArray[np.int64], num_classes: int | None, where: str) -> int:
    """The number of classes, after checking that every label fits it. None: as many as the largest label asks for.

    Raises: ValueError for labels out of range, naming the first.
    """
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{where}: got labels {labels.dtype} {list(labels.shape)}, expected one integer per picture")
    limit = int(labels.max()) + 1 if num_classes is None else num_classes
    wrong = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(wrong):
        raise ValueError(
            f"{where}: {len(wrong)} labels are out of range, the first is {labels[wrong[0]]} of picture {wrong[0]}; "
            f"expected 0 to {limit - 1}. Correct the labels, or give classes= the right number."
        )
    return limit


def check_not_empty(size: int, where: str, wanted: str) -> None:
    """Raises: ValueError saying what was looked for, when a set has nothing in it."""
    if not size:
        raise ValueError(f"{where} holds no pictures: expected {wanted}")


def root_mean_square(source: Source, most: int = 10_000) -> float:
    """Root mean square of up to `most` pictures, evenly spread over the set, in [-1, 1] for uint8: EDM's sigma_data.

    About zero and not the mean, because it is what makes input and target of the network unit.
    """
    indices = evenly(len(source), most)
    total, count = 0.0, 0
    for start in range(0, len(indices), _AT_ONCE):
        pictures = scaled(source.fetch(indices[start : start + _AT_ONCE])[0])
        total += float(pictures.double().square().sum())
        count += pictures.numel()
    return float((total / count) ** 0.5)


def evenly(size: int, most: int) -> NDArray[np.int64]:
    """Up to `most` places in a set of this size, evenly spread from the first to the last."""
    return np.unique(np.linspace(0, size - 1, min(most, size)).astype(np.int64))


def scaled(pictures: Tensor) -> Tensor:
    """uint8 to [-1, 1] fp32; float values as they are, in fp32."""
    return pictures.float() / 127.5 - 1.0 if pictures.dtype == torch.uint8 else pictures.float()


def _chunks(size: int) -> Sequence[NDArray[np.int64]]:
    return [np.arange(start, min(start + _AT_ONCE, size)) for start in range(0, size, _AT_ONCE)]
