"""Reader of IDX files, the format MNIST and Fashion-MNIST are distributed in (yann.lecun.com/exdb/mnist).

May import: nothing of the package.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip

_STEMS = {"train": "train", "test": "t10k"}
_UINT8 = 0x08


def load_idx(
    folder: str | os.PathLike[str] = FASHION_FOLDER, split: str = "train", size: int | None = 32
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images and labels of one split, the images centred on a black square of `size` pixels (None: as they are).

    folder: holds `{train,t10k}-images-idx3-ubyte` and `{train,t10k}-labels-idx1-ubyte`, gzipped (.gz) or not;
    split: "train" or "test". Returns ([N, 1, H, W] uint8, [N] uint8).
    Raises: FileNotFoundError saying how to get the files; ValueError for damaged or mismatched files.
    """
    if split not in _STEMS:
        raise ValueError(f"load_idx: got split {split!r}, expected one of {sorted(_STEMS)}")
    stem = _STEMS[split]
    images = read_idx(_find(Path(folder), f"{stem}-images-idx3-ubyte"), dims=3)
    labels = read_idx(_find(Path(folder), f"{stem}-labels-idx1-ubyte"), dims=1)
    if len(images) != len(labels):
        raise ValueError(f"load_idx: got {len(images)} images but {len(labels)} labels in {folder}, expected as many")
    return (images.copy() if size is None else pad_square(images, size))[:, None], labels.copy()


def read_idx(path: str | os.PathLike[str], dims: int) -> NDArray[np.uint8]:
    """The array of bytes in one IDX file, gzipped or not.

    Header: 0, 0, type (8 = uint8), number of dimensions, then each dimension as a big-endian uint32.
    Raises: ValueError for a wrong magic number or a length other than the header promises.
    """
    path = Path(path)
    raw = _read_bytes(path)
    expected = bytes((0, 0, _UINT8, dims))
    if raw[:4] != expected:
        raise ValueError(
            f"{path}: got magic number {raw[:4].hex() or 'nothing'}, expected {expected.hex()} (IDX, {dims}D, uint8)"
        )
    start = 4 + 4 * dims
    if len(raw) < start:
        raise ValueError(f"{path}: got {len(raw)} bytes, expected a header of {start}; the file is cut short")
    shape = struct.unpack(f">{dims}I", raw[4:start])
    if len(raw) - start != math.prod(shape):
        raise ValueError(
            f"{path}: got {len(raw) - start} bytes of data, expected {math.prod(shape)} for shape {shape}; "
            "the file is damaged, fetch it again"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def pad_square(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Centres [N, H, W] images on black [N, size, size]. Raises: ValueError when they do not fit."""
    height, width = images.shape[1:]
    if height > size or width > size:
        raise ValueError(f"pad_square: got images of {height}x{width}, expected at most {size}x{size}; raise size")
    top, left = (size - height) // 2, (size - width) // 2
    padding = ((0, 0), (top, size - height - top), (left, size - width - left))
    return np.pad(images, padding)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    wanted = ", ".join(
        f"{stem}-{kind}.gz" for stem in _STEMS.values() for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    raise FileNotFoundError(
        f"no {name} or {name}.gz in {folder}. Fashion-MNIST is the Debian package dataset-fashion-mnist "
        f"(apt-get install dataset-fashion-mnist), which puts it in {FASHION_FOLDER}; elsewhere, name a folder "
        f"that holds {wanted}"
    )


def _read_bytes(path: Path) -> bytes:
    raw = path.read_bytes()
    if raw[:2] != b"\x1f\x8b":
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: gzip data damaged or cut short ({error}); fetch it again") from error
