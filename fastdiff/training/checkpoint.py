"""Checkpoints of a run: torch's distributed format under a temporary name, then renamed; the newest whole one counts.

    RUN/checkpoints/000000012800/   .metadata and shards of tensors, progress.json with the size of each file
May import: ranks, files. A folder without a dot in front of its name is whole, whenever the process was killed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from fastdiff.files import sync

from .ranks import Ranks

PROGRESS = "progress.json"


@dataclass
class Progress:
    """How far a run is. images: seen so far; step: batches; skips: those left out, their gradient not finite.

    updates: of the weights, kept for the optimizer; seconds: of training; scaler: the state of the fp16 loss scale;
    times: that of a distribution of times that follows the loss; loss_sum, loss_count: over the steps since the last
    line of the log, of all processes. pictures, fingerprint: of the training set (data.identity); 0, "": not said.
    """

    images: int = 0
    step: int = 0
    skips: int = 0
    updates: int = 0
    seconds: float = 0.0
    scaler: dict[str, Any] = field(default_factory=dict)
    times: dict[str, Any] = field(default_factory=dict)
    loss_sum: float = 0.0
    loss_count: int = 0
    pictures: int = 0
    fingerprint: str = ""

    def add(self, loss: float) -> None:
        """Count the loss of a step in the mean of the next line of the log."""
        self.loss_sum += loss
        self.loss_count += 1

    def mean_loss(self) -> float:
        """The mean since the last call, not a number where no step was counted; the next one begins anew."""
        mean = self.loss_sum / self.loss_count if self.loss_count else math.nan
        self.loss_sum, self.loss_count = 0.0, 0
        return mean


class Checkpoints:
    """Writes, finds and reads the checkpoints of one run.

    keep: how many whole ones stay. in_background: `save` returns when the tensors are copied, and a thread writes.
    log: a file of the run that survives a power cut as far as any checkpoint does.
    All processes call `save`, `load`, `poll` and `finish` together; an error of one is raised in all.
    """

    def __init__(
        self, run: Path, ranks: Ranks, keep: int = 2, in_background: bool = False, log: Path | None = None
    ) -> None:
        self.folder, self.ranks, self.keep, self.in_background = run / "checkpoints", ranks, keep, in_background
        self.log = log
        self._pending: tuple[Future[Any], Path, Progress] | None = None
        if ranks.first and self.folder.is_dir():
            for left in self.folder.glob(".*"):
                shutil.rmtree(left, ignore_errors=True)
        ranks.wait()

    def latest(self) -> Path | None:
        """The newest checkpoint whose files are all there in full."""
        return next((path for path in sorted(self._names(), reverse=True) if _is_whole(path)), None)

    def save(self, tensors: dict[str, Any], progress: Progress) -> None:
        """Store the state after `progress.images`. Raises: OSError, with the earlier checkpoints as they were.

        Of a save in the background the error comes with the next `save` or `finish`.
        """
        self.finish()
        target = self.folder / f"{progress.images:012d}"
        if self.ranks.any(_is_whole(target)):
            return
        staging = self.folder / f".{target.name}"
        place = self._place(staging)
        progress = Progress(**asdict(progress))
        if self.in_background:
            future = dcp.async_save(tensors, **place)
            assert isinstance(future, Future)
            self._pending = future, staging, progress
            return
        self._end(lambda: dcp.save(tensors, **place), staging, progress)

    def poll(self) -> None:
        """Put the save in the background in its place, if the threads of all are done; without waiting."""
        if self._pending is not None and not self.ranks.any(not self._pending[0].done()):
            self.finish()

    def finish(self, together: bool = True) -> None:
        """Wait for the save in the background, if there is one, and put it in its place.

        together: False where the other processes may be elsewhere, after an error; nothing is said to them then.
        """
        if self._pending is None:
            return
        future, staging, progress = self._pending
        self._pending = None
        self._end(future.result, staging, progress, together)

    def load(self, tensors: dict[str, Any], path: Path) -> Progress:
        """Fill the tensors, however they are sharded now, and return how far the run was.

        Raises: ValueError when the checkpoint is damaged or of another network.
        """
        try:
            dcp.load(tensors, **self._place(path))
            content = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        except (dcp.api.CheckpointException, RuntimeError, KeyError, ValueError, EOFError) as error:
            reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[-1].split())[:500]
            before = max((each.name for each in self._names() if each < path and _is_whole(each)), default="")
            raise ValueError(
                f"{path} cannot be read into this network: {reason}. If it is damaged, remove it; the one before is "
                f"{before or 'none'}"
            ) from error
        content.pop("files")
        return Progress(**content)

    def _place(self, path: Path) -> dict[str, Any]:
        """Where torch reads or writes, and over which group."""
        alone = self.ranks.storage is None
        if alone:  # which torch warns of, perhaps in a thread of its own, where `catch_warnings` would not hold
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, .* in a single process")
        return {"checkpoint_id": path, "no_dist": alone} | ({} if alone else {"process_group": self.ranks.storage})

    def _end(self, written: Callable[[], Any], staging: Path, progress: Progress, together: bool = True) -> None:
        """Put a checkpoint in its place once `written` returns; `together`, all learn whether any process failed."""
        failure: BaseException | None = None
        try:
            written()
            self._commit(staging, progress)
        except (Exception, dcp.api.CheckpointException) as error:
            failure = error
        except BaseException:  # Ctrl-C
            shutil.rmtree(staging, ignore_errors=True)
            raise
        failed = failure is not None
        if self.ranks.any(failed) if together else failed:
            self._fail(staging, failure)

    def _commit(self, staging: Path, progress: Progress) -> None:
        """Rename what all processes have written: the first one's save ends when all have ended theirs."""
        if not self.ranks.first:
            return
        files = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
        with (staging / PROGRESS).open("w", encoding="utf-8") as file:
            json.dump(asdict(progress) | {"files": files}, file)
        sync(staging / PROGRESS)
        sync(staging)
        if self.log is not None and self.log.is_file():
            sync(self.log)
            sync(self.log.parent)
        target = staging.with_name(staging.name[1:])
        shutil.rmtree(target, ignore_errors=True)  # one that was damaged, or the save would not have begun
        os.replace(staging, target)
        sync(self.folder)
        kept = [path for path in sorted(self._names(), reverse=True) if _is_whole(path)][: self.keep]
        for old in [path for path in self._names() if path < kept[-1]]:
            # Renamed first, so that one half removed is not taken for a whole one.
            gone = old.with_name(f".{old.name}.old")
            os.replace(old, gone)
            shutil.rmtree(gone, ignore_errors=True)

    def _fail(self, staging: Path, error: BaseException | None) -> None:
        shutil.rmtree(staging, ignore_errors=True)
        good = self.latest()
        reason = "another process failed"
        if error is not None:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise OSError(
            f"could not write checkpoint {staging.name[1:]} in {self.folder}: {reason}; "
            f"the last good one is {good.name if good else 'none'}. Make room there and start again with --resume auto"
        ) from error

    def _names(self) -> list[Path]:
        return [path for path in self.folder.glob("[0-9]*") if path.is_dir()]


def _is_whole(path: Path) -> bool:
    try:
        files = json.loads((path / PROGRESS).read_text(encoding="utf-8"))["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def tensors_of(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Nested dictionaries of tensors as one level of dotted names, so that nothing but tensors is stored."""
    flat: dict[str, Any] = {}
    for name, part in parts.items():
        if isinstance(part, torch.Tensor):
            flat[name] = part
        else:
            flat |= {f"{name}/{key}": value for key, value in tensors_of(part).items()}
    return flat
