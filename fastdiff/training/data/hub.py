"""Sets of the Hugging Face `datasets` package, from local files only. May import: source, pictures, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .files import Files
from .pictures import Fit
from .source import Faults, UnreadableFile, check_labels, check_not_empty

_PICTURES = ("image", "img", "images", "pixels")
_LABELS = ("label", "labels", "fine_label", "class")


class Hub(Files):
    """An image and a label column of a saved set (a folder), of parquet files in one, or of a .parquet or .arrow file.

    `datasets` finds the splits of parquet files by their names and keeps a copy of them in its cache.
    """

    def __init__(self, path: Path, fit: Fit, classes: int | None = None, split: str = "train") -> None:
        datasets = _package()
        self.path, self.fit = path, fit
        if path.is_dir():
            table = (datasets.load_from_disk if is_saved(path) else datasets.load_dataset)(str(path))
        else:
            read = datasets.Dataset.from_parquet if path.suffix == ".parquet" else datasets.Dataset.from_file
            table = read(str(path))
        if isinstance(table, dict):
            if split not in table:
                raise ValueError(f"{path} has the splits {', '.join(table)}, not {split!r}")
            table = table[split]
        column = next((name for name in _PICTURES if name in table.column_names), None)
        if column is None:
            raise ValueError(f"{path} has the columns {table.column_names}, expected one of {', '.join(_PICTURES)}")
        self.column = column
        self.table = table.cast_column(column, datasets.Image(decode=False))
        check_not_empty(len(table), str(path), "at least one row")
        self.faults = Faults(len(table))
        label = next((name for name in _LABELS if name in table.column_names), None)
        if label is not None and classes != 0:
            self._labels = np.asarray(table[label][:], np.int64)
            self.num_classes = check_labels(self._labels, classes, str(path))
            names = getattr(table.features[label], "names", None) or ()
            self.class_names = tuple(names) if len(names) == self.num_classes else ()
        self.shape = self.first_shape()
        self.read_some()

    def __len__(self) -> int:
        return len(self.table)

    def name_of(self, index: int) -> str:
        return f"{self.path}:{index}"

    def label_of(self, index: int) -> int:
        return int(self._labels[index])

    def describe(self) -> str:
        return f"{len(self)} rows of {self.path}"

    def encoded(self, index: int) -> bytes | Path:
        cell = self.table[index][self.column]
        if cell is None or (not cell.get("bytes") and not cell.get("path")):
            raise UnreadableFile("the row holds no picture")
        return cell["bytes"] or Path(cell["path"])


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of the package wrote this folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _package() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "this set needs the package datasets, which is not installed: pip install datasets, or export the pictures "
            "to a folder"
        ) from error
    return datasets
