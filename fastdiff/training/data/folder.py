"""A folder of picture files; subfolders of the top are classes. May import: source, pictures, files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .files import Files
from .pictures import Fit, shape_of
from .source import Faults, UnreadableFile, check_labels, check_not_empty

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class Folder(Files):
    """Every picture below `folder`, in the order of their names; which class it is, its first subfolder says.

    Labels there are where every picture is in a subfolder and there are two or more of these.
    classes: 0 leaves the labels out, None takes as many as there are.
    """

    def __init__(self, folder: Path, fit: Fit, classes: int | None = None) -> None:
        self.folder, self.fit = folder, fit
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        check_not_empty(len(self.paths), str(folder), f"files ending in {', '.join(SUFFIXES)}, in subfolders by class")
        self.faults = Faults(len(self.paths))
        tops = [path.relative_to(folder).parts[0] for path in self.paths]
        names = sorted({top for top, path in zip(tops, self.paths, strict=True) if path.parent != folder})
        labelled = len(names) > 1 and all(path.parent != folder for path in self.paths) and classes != 0
        if labelled:
            place = {name: i for i, name in enumerate(names)}
            self._labels = np.array([place[top] for top in tops], np.int64)
            self.num_classes = check_labels(self._labels, classes, str(folder))
            self.class_names = tuple(names) if self.num_classes == len(names) else ()
        self.shape = self.first_shape()
        if fit.resize != "crop":
            self._check_sizes()

    def __len__(self) -> int:
        return len(self.paths)

    def encoded(self, index: int) -> Path:
        return self.paths[index]

    def name_of(self, index: int) -> str:
        return str(self.paths[index])

    def label_of(self, index: int) -> int:
        return int(self._labels[index])

    def describe(self) -> str:
        return f"{len(self)} pictures in {self.folder}"

    def _check_sizes(self) -> None:
        """All headers before the first step, not the odd picture in mid-epoch."""
        for index, path in enumerate(self.paths):
            try:
                if shape_of(path, Fit(channels=self.shape[0])) != self.shape:
                    self.read(index)
            except UnreadableFile as error:
                self.faults.record(str(path), error)
