"""Which reader a path is for. May import: the readers of this folder."""

from __future__ import annotations

import os
from pathlib import Path

from .arrays import read_idx_folder, read_numpy
from .folder import SUFFIXES as PICTURES
from .folder import Folder
from .hub import Hub, is_saved
from .pictures import Fit
from .shards import Shards, expand
from .source import Source, check_not_empty

_TABLES = ("*.parquet", "*/*.parquet")  # a set as the hub has it: data/train-00000-of-00002.parquet


def open_data(
    path: str | os.PathLike[str],
    *,
    size: int | None = None,
    resize: str = "crop",
    channels: int | None = None,
    classes: int | None = None,
    split: str = "train",
) -> Source:
    """The data set at `path`, its kind found by looking.

    path: a folder of pictures (subfolders are classes), of IDX files, of tar shards, of parquet files (a set of the
    hub, downloaded), or saved by the `datasets` package; a .npy, .npz, .parquet or .arrow file; one .tar, or several
    by `name-{000..127}.tar` or `*.tar`.
    size, resize, channels: see `Fit`. classes: of the labels, None for what they ask for, 0 to leave them out.
    split: "train" or "test", of kinds that have it.
    Raises: FileNotFoundError, or ValueError for a set that is empty, damaged, of mixed sizes or wrongly labelled.
    """
    fit, place = Fit(size, resize, channels), Path(path)
    if "*" in place.name or "{" in place.name:
        return Shards(expand(str(path)), fit, classes)
    if place.is_file():
        return _open_file(place, fit, classes, split)
    if not place.is_dir():
        raise FileNotFoundError(
            f"no data at {place}: give a folder of pictures, or a .npy, .npz, .tar or .parquet file"
        )
    names = os.listdir(place)
    check_not_empty(len(names), str(place), "pictures, IDX files, tar shards or parquet files")
    if any("-idx3-ubyte" in name for name in names):
        return read_idx_folder(place, fit, classes, split)
    if is_saved(place):
        return Hub(place, fit, classes, split)
    tars = sorted(place / name for name in names if name.endswith(".tar"))
    if tars:
        return Shards(tars, fit, classes)
    return Hub(place, fit, classes, split) if _is_tables(place) else Folder(place, fit, classes)


def _is_tables(folder: Path) -> bool:
    """Whether parquet files hold the set; beside files of pictures they say something of these."""
    tables = any(True for pattern in _TABLES for _ in folder.glob(pattern))
    return tables and not any(path.suffix.lower() in PICTURES for path in folder.rglob("*"))


def _open_file(path: Path, fit: Fit, classes: int | None, split: str) -> Source:
    if path.suffix in (".npy", ".npz"):
        return read_numpy(path, fit, classes)
    if path.suffix == ".tar":
        return Shards([path], fit, classes)
    if path.suffix in (".parquet", ".arrow"):
        return Hub(path, fit, classes, split)
    raise ValueError(
        f"{path} is of no known kind: expected a folder of pictures, or a .npy, .npz, .tar, .parquet or .arrow file"
    )
