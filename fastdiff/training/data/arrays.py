"""Sets stored as arrays: IDX, .npy and .npz; uint8 pixels, or float latents and pictures in [-1, 1].

May import: source, idx, pictures.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .idx import load_idx, pad_square
from .pictures import Fit
from .source import Faults, Source, check_labels, check_not_empty

_PICTURES = ("images", "latents", "x", "data", "arr_0")
_LABELS = ("labels", "y", "label", "classes", "arr_1")
_LAST = (1, 3, 4)  # channels, where they come last


class Arrays(Source):
    """Pictures of one array [N, C, H, W], which may be a memory map, and labels [N] or None."""

    def __init__(
        self,
        pictures: NDArray[np.uint8] | NDArray[np.floating],
        labels: NDArray[np.integer] | None,
        where: str,
        fit: Fit,
        classes: int | None = None,
    ) -> None:
        check_not_empty(len(pictures), where, "an array [N, C, H, W] with N at least 1")
        if pictures.dtype != np.uint8 and not np.issubdtype(pictures.dtype, np.floating):
            raise ValueError(f"{where}: got values of {pictures.dtype}, expected uint8 pixels or float values")
        self.pictures, self.where, self.fit = _channels_first(pictures, where), where, fit
        self.faults = Faults(len(pictures))
        channels, height, width = self.pictures.shape[1:]
        if fit.channels not in (None, channels) and (fit.channels, channels) not in ((1, 3), (3, 1)):
            raise ValueError(f"{where} has {channels} channels, expected {fit.channels}; use channels={channels}")
        self.shape = (fit.channels or channels, fit.size or height, fit.size or width)
        self._check_size(height, width)
        self.labels = None
        if labels is not None and classes != 0:
            if len(labels) != len(pictures):
                raise ValueError(f"{where}: got {len(pictures)} pictures but {len(labels)} labels, expected as many")
            self.num_classes = check_labels(np.asarray(labels), classes, where)
            self.labels = np.asarray(labels, np.int64)

    def __len__(self) -> int:
        return len(self.pictures)

    def fetch(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        # A memory map is read in the order of the file, whatever the order asked for.
        order = np.argsort(indices, kind="stable")
        taken = np.empty((len(indices), *self.pictures.shape[1:]), self.pictures.dtype)
        taken[order] = self.pictures[indices[order]]
        labels = None if self.labels is None else torch.from_numpy(self.labels[indices])
        return self._fitted(taken), labels

    def describe(self) -> str:
        return f"{len(self)} pictures in {self.where}"

    def _check_size(self, height: int, width: int) -> None:
        if (height, width) == self.shape[1:]:
            return
        wanted = f"{self.shape[1]}x{self.shape[2]}"
        if self.pictures.dtype != np.uint8:
            fix = f"; use size={height}" * (height == width)
            raise ValueError(
                f"{self.where} has float values at {height}x{width}, expected {wanted}: only pixels resize{fix}"
            )
        if self.fit.resize == "none":
            raise ValueError(f"{self.where} has {height}x{width}, expected {wanted}; use resize=crop or resize=pad")
        if self.fit.resize == "pad" and (height > self.shape[1] or width > self.shape[2]):
            raise ValueError(f"{self.where} has {height}x{width}, more than {wanted}; use resize=crop")

    def _fitted(self, taken: NDArray[np.uint8] | NDArray[np.floating]) -> Tensor:
        channels, height, width = self.shape
        if taken.dtype != np.uint8:
            return torch.from_numpy(np.ascontiguousarray(taken, np.float32))
        pictures = torch.from_numpy(taken)
        if pictures.shape[1] != channels:
            weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
            grey = pictures if channels == 3 else (pictures * weights).sum(1, keepdim=True).round().byte()
            pictures = grey.expand(-1, channels, -1, -1).contiguous()
        if pictures.shape[2:] == (height, width):
            return pictures
        if self.fit.resize == "pad":
            top, left = (height - pictures.shape[2]) // 2, (width - pictures.shape[3]) // 2
            margins = (left, width - pictures.shape[3] - left, top, height - pictures.shape[2] - top)
            return functional.pad(pictures, margins)
        scale = max(height / pictures.shape[2], width / pictures.shape[3])
        size = [max(height, round(pictures.shape[2] * scale)), max(width, round(pictures.shape[3] * scale))]
        grown = functional.interpolate(pictures.float(), size, mode="bicubic", antialias=True)
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        return grown[:, :, top : top + height, left : left + width].round().clamp(0, 255).byte()


def read_numpy(path: Path, fit: Fit, classes: int | None) -> Arrays:
    """A .npy (labels beside it in NAME_labels.npy or labels.npy) or an .npz with `images` and perhaps `labels`.

    Raises: ValueError for files that are damaged, hold no array of pictures, or hold Python objects.
    """
    try:
        if path.suffix == ".npy":
            beside = [path.with_name(f"{path.stem}_labels.npy"), path.with_name("labels.npy")]
            found = next((place for place in beside if place.is_file() and place != path), None)
            return Arrays(
                np.load(path, mmap_mode="r"), None if found is None else np.load(found), str(path), fit, classes
            )
        with np.load(path) as archive:
            pictures = next((name for name in _PICTURES if name in archive.files), None)
            labels = next((name for name in _LABELS if name in archive.files), None)
            if pictures is None:
                raise ValueError(f"{path} holds {archive.files}, expected one of {', '.join(_PICTURES)}")
            return Arrays(archive[pictures], None if labels is None else archive[labels], str(path), fit, classes)
    except (EOFError, zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path}: damaged or cut short ({error}); write or fetch it again") from error
    except ValueError as error:
        if "allow_pickle" not in str(error) and "Python objects" not in str(error):
            raise
        raise ValueError(
            f"{path} holds Python objects, such as pictures of mixed sizes; expected one array [N, C, H, W]"
        ) from None


def read_idx_folder(folder: Path, fit: Fit, classes: int | None, split: str) -> Arrays:
    """The IDX files of one split, {train,t10k}-images-idx3-ubyte and their labels."""
    pictures, labels = load_idx(folder, split, size=None)
    if fit.resize == "pad" and fit.size is not None:
        pictures = pad_square(pictures[:, 0], fit.size)[:, None]
    return Arrays(pictures, labels.astype(np.int64), str(folder), fit, classes)


def _channels_first(
    pictures: NDArray[np.uint8] | NDArray[np.floating], where: str
) -> NDArray[np.uint8] | NDArray[np.floating]:
    if pictures.ndim == 3:
        return pictures[:, None]
    if pictures.ndim != 4:
        raise ValueError(f"{where}: got shape {list(pictures.shape)}, expected [N, C, H, W], [N, H, W, C] or [N, H, W]")
    last = pictures.dtype == np.uint8 and pictures.shape[3] in _LAST and pictures.shape[1] not in _LAST
    return pictures.transpose(0, 3, 1, 2) if last else pictures
