"""The IDX reader: good files, missing files, damaged files."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fastdiff.training.data.idx import load_idx, pad_square, read_idx

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def encode(array: NDArray[np.uint8]) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def arrays() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    return rng.integers(1, 256, (7, 28, 28), dtype=np.uint8), rng.integers(0, 10, 7, dtype=np.uint8)


def write(folder: Path, arrays: tuple[NDArray[np.uint8], NDArray[np.uint8]], zipped: bool, stem: str = "train") -> None:
    for kind, array in zip(("images-idx3-ubyte", "labels-idx1-ubyte"), arrays, strict=True):
        data = encode(array)
        name = f"{stem}-{kind}"
        (folder / (f"{name}.gz" if zipped else name)).write_bytes(gzip.compress(data) if zipped else data)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("split", "stem"), [("train", "train"), ("test", "t10k")])
def test_reads_images_and_labels(
    tmp_path: Path, arrays: tuple[NDArray[np.uint8], NDArray[np.uint8]], zipped: bool, split: str, stem: str
) -> None:
    write(tmp_path, arrays, zipped, stem)
    images, labels = load_idx(tmp_path, split)
    assert images.shape == (7, 1, 32, 32) and images.dtype == np.uint8 and labels.dtype == np.uint8
    np.testing.assert_array_equal(images[:, 0, 2:30, 2:30], arrays[0])
    np.testing.assert_array_equal(labels, arrays[1])
    assert images.sum() == arrays[0].sum(dtype=np.int64)
    assert images.flags.writeable and labels.flags.writeable


def test_missing_files_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_idx(tmp_path)
    for word in ("dataset-fashion-mnist", str(tmp_path), f"{IMAGES}.gz", f"{LABELS}.gz", "t10k-images-idx3-ubyte.gz"):
        assert word in str(caught.value)


def test_missing_labels_only(tmp_path: Path, arrays: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> None:
    write(tmp_path, arrays, zipped=True)
    (tmp_path / f"{LABELS}.gz").unlink()
    with pytest.raises(FileNotFoundError, match=LABELS):
        load_idx(tmp_path)


def test_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got split 'val'"):
        load_idx(tmp_path, "val")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "magic number nothing"),
        (bytes((0, 0, 8, 1)) + bytes(4), "magic number 00000801, expected 00000803"),
        (bytes((0, 0, 13, 3)) + bytes(12), "magic number 00000d03"),
        (bytes((0, 0, 8, 3)) + bytes(5), "header of 16; the file is cut short"),
        (encode(np.zeros((3, 4, 4), np.uint8))[:-1], r"got 47 bytes of data, expected 48 for shape \(3, 4, 4\)"),
        (encode(np.zeros((3, 4, 4), np.uint8)) + b"x", "got 49 bytes of data, expected 48"),
        (bytes((0, 0, 8, 3)) + b"\xff" * 12, "bytes of data, expected"),
    ],
)
def test_damaged_files(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / IMAGES
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words) as caught:
        read_idx(path, dims=3)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_gzip(tmp_path: Path, arrays: tuple[NDArray[np.uint8], NDArray[np.uint8]], damage: str) -> None:
    data = bytearray(gzip.compress(encode(arrays[0])))
    if damage == "cut":
        del data[len(data) // 2 :]
    else:
        data[-6] ^= 0xFF
    path = tmp_path / f"{IMAGES}.gz"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged or cut short"):
        read_idx(path, dims=3)


def test_counts_must_agree(tmp_path: Path, arrays: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> None:
    write(tmp_path, (arrays[0], arrays[1][:-1]), zipped=True)
    with pytest.raises(ValueError, match="got 7 images but 6 labels"):
        load_idx(tmp_path)


def test_padding_must_fit(arrays: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> None:
    assert pad_square(arrays[0], 29).shape == (7, 29, 29)
    with pytest.raises(ValueError, match="got images of 28x28, expected at most 16x16"):
        pad_square(arrays[0], 16)
