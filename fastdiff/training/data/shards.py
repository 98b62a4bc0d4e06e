"""WebDataset shards: tar files whose members share a key (`00042.jpg`, `00042.cls`), read at random.

The headers are read once; then any sample is one `pread`, so that the order and the resume are those of every other
set, with no shuffle buffer. May import: source, pictures, files, folder.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .files import Files
from .folder import SUFFIXES
from .pictures import Fit
from .source import Faults, UnreadableFile, check_labels, check_not_empty


@dataclass
class _Member:
    """Where one sample's picture lies, and its label (-1: none)."""

    shard: Path
    key: str
    suffix: str
    offset: int = 0
    size: int = 0
    label: int = -1


class Shards(Files):
    """The samples of some tar files, in the order of shards and members. Latents may be .npy members [C, H, W]."""

    def __init__(self, shards: list[Path], fit: Fit, classes: int | None = None) -> None:
        self.shards, self.fit = shards, fit
        members: list[_Member] = []
        damaged: list[tuple[str, Exception]] = []
        for shard in shards:
            found, error = _index(shard)
            members += found
            damaged += [] if error is None else [(str(shard), error)]
        check_not_empty(
            len(members), ", ".join(map(str, shards[:3])), f"members ending in {', '.join(SUFFIXES)} or .npy"
        )
        self.members, self.faults = members, Faults(len(members))
        for name, error in damaged:
            self.faults.record(name, error)
        labels = np.array([member.label for member in members], np.int64)
        if classes != 0 and (labels >= 0).any():
            self.num_classes = check_labels(labels, classes, f"{shards[0]} and others")
        first = members[0]
        self.shape = _array(self.encoded(0)).shape if first.suffix == ".npy" else self.first_shape()
        self.read_some()

    def __len__(self) -> int:
        return len(self.members)

    def read(self, index: int) -> NDArray[np.uint8] | NDArray[np.float32]:
        if self.members[index].suffix != ".npy":
            return super().read(index)
        array = _array(self.encoded(index))
        if array.shape != self.shape:
            raise ValueError(f"{self.name_of(index)} has shape {list(array.shape)}, expected {list(self.shape)}")
        return array if array.dtype == np.uint8 else array.astype(np.float32)

    def name_of(self, index: int) -> str:
        member = self.members[index]
        return f"{member.shard}:{member.key}{member.suffix}"

    def label_of(self, index: int) -> int:
        return self.members[index].label

    def describe(self) -> str:
        return f"{len(self)} samples in {len(self.shards)} shards of {self.shards[0].parent}"

    def encoded(self, index: int) -> bytes:
        member = self.members[index]
        try:
            handle = os.open(member.shard, os.O_RDONLY)
            try:
                data = os.pread(handle, member.size, member.offset)
            finally:
                os.close(handle)
        except OSError as error:
            raise UnreadableFile(str(error)) from error
        if len(data) != member.size:
            raise UnreadableFile(f"the shard ends after {len(data)} of its {member.size} bytes")
        return data


def expand(pattern: str) -> list[Path]:
    """Files of a name with {000..127} or with * and ?, in order. Raises: FileNotFoundError when there are none."""
    ranges = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if ranges:
        first, last = ranges.groups()
        numbers = (str(i).zfill(len(first)) for i in range(int(first), int(last) + 1))
        found = [Path(pattern[: ranges.start()] + number + pattern[ranges.end() :]) for number in numbers]
        missing = [path for path in found if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"{len(missing)} shards of {pattern} are missing, the first is {missing[0]}")
        return found
    place = Path(pattern)
    found = sorted(place.parent.glob(place.name))
    if not found:
        raise FileNotFoundError(f"no file matches {pattern}")
    return found


def _index(shard: Path) -> tuple[list[_Member], Exception | None]:
    """The samples of one shard that have a picture, and what is wrong with the file's end."""
    samples: dict[str, _Member] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for item in tar:
                if item.isfile():
                    _add(samples, shard, item, tar)
            size = shard.stat().st_size
            error = None if _ends_well(shard, tar.offset, size) else UnreadableFile(f"damaged at byte {tar.offset}")
    except tarfile.TarError as problem:
        error = UnreadableFile(str(problem))
    return [member for member in samples.values() if member.size], error


def _add(samples: dict[str, _Member], shard: Path, item: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
    folder, name = os.path.split(item.name)
    stem, dot, suffix = name.partition(".")
    suffix = (dot + suffix).lower()
    member = samples.setdefault(os.path.join(folder, stem), _Member(shard, os.path.join(folder, stem), ""))
    if suffix == ".npy" or suffix in SUFFIXES:
        member.suffix, member.offset, member.size = suffix, item.offset_data, item.size
    elif suffix in (".cls", ".label", ".json"):
        file = tar.extractfile(item)
        text = file.read().decode("utf-8", "replace") if file else ""
        member.label = _label(text, suffix, f"{shard}:{item.name}")


def _label(text: str, suffix: str, where: str) -> int:
    try:
        if suffix != ".json":
            return int(text)
        value = json.loads(text)
        return int(next((value[name] for name in ("label", "cls", "class") if name in value), -1))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: got {text[:40]!r}, expected an integer label") from error


def _ends_well(shard: Path, offset: int, size: int) -> bool:
    """Whether the archive stops at its end mark (or right at the end of the file), not at a header it cannot read."""
    if offset > size:
        return False
    with shard.open("rb") as file:
        file.seek(offset)
        return not any(file.read(tarfile.BLOCKSIZE))


def _array(data: bytes) -> NDArray[np.uint8] | NDArray[np.float32]:
    try:
        array: NDArray[np.uint8] | NDArray[np.float32] = np.load(io.BytesIO(data))
    except (ValueError, EOFError, OSError) as error:
        raise UnreadableFile(str(error)) from error
    return array
