"""What a run says while it runs: a progress bar, metrics.jsonl, and TensorBoard files if asked.

May import: files.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastdiff.files import write_atomically

NAME = "metrics.jsonl"


class Records:
    """One run's records, written by its first process only.

    run: folder; images: how far the run is, later lines of an earlier try are removed; total: where it ends.
    """

    def __init__(self, run: Path, images: int, total: int, tensorboard: bool, active: bool = True) -> None:
        self.path, self.active = run / NAME, active
        self.board = _board(run, images) if tensorboard and active else None
        if active:
            forget_after(self.path, images)
        self.bar = tqdm(
            total=total, initial=min(images, total), unit="image", unit_scale=True, smoothing=0.05, disable=not active,
            mininterval=1.0, file=sys.stderr,
        )  # fmt: skip

    def advance(self, images: int) -> None:
        """Move the bar."""
        self.bar.update(min(images, self.bar.total - self.bar.n))

    def write(self, kind: str, images: int, **values: Any) -> None:
        """Append one line {"kind": ..., "images": ..., ...}; numbers also go to TensorBoard."""
        if not self.active:
            return
        self._append(json.dumps({"kind": kind, "images": images, **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(f"{kind}/{name}", value, images)
            self.board.flush()

    def _append(self, line: str) -> None:
        """Write a line whole or not at all: a disk that is full does not end a run that its checkpoints outlive."""
        size: int | None = None
        try:
            size = self.path.stat().st_size if self.path.is_file() else 0
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            with contextlib.suppress(OSError):
                if size is not None:
                    os.truncate(self.path, size)
            self.say(f"fastdiff: warning: a line of {self.path} is lost: {error}")

    def show(self, **values: str) -> None:
        """Facts beside the bar."""
        self.bar.set_postfix(values, refresh=False)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.active:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """End the bar and the files."""
        self.bar.close()
        if self.board is not None:
            self.board.close()


def forget_after(path: Path, images: int) -> None:
    """Remove the lines of metrics.jsonl that are of more images than this, and one that was cut short by a kill."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["images"] <= images:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    write_atomically(path, lambda temporary: temporary.write_text("".join(kept), encoding="utf-8"))


def memory(device: torch.device) -> int:
    """Most bytes this process has used: of GPU memory on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _board(run: Path, images: int) -> Any:
    """A writer of TensorBoard files, which hides what an earlier try wrote after this many images."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "tensorboard=true needs the package tensorboard, which is not installed: pip install tensorboard, or leave "
            "the option out; metrics.jsonl has the same numbers"
        ) from error
    return SummaryWriter(str(run / "tensorboard"), purge_step=images + 1)
