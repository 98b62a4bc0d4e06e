"""How much memory there is, how much a network takes, and whether an error says that there was too little.

May import: nothing of the package. What a network takes is measured: on a GPU by torch's own counters, on a CPU by
following every tensor its operations make. What libraries take for themselves is not seen; HEADROOM is for that.
"""

from __future__ import annotations

import gc
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HEADROOM = 0.9  # of what is free is counted on
_CGROUP = Path("/sys/fs/cgroup")


def available(device: torch.device) -> int:
    """Bytes that can be had on a device now, torch's own unused ones included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = _meminfo("MemAvailable")
    try:
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no control group, or "max"
        return free
    return min(free, limit - used)


def peak(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes that `work` holds at most beyond what is there before it; it is run twice."""
    work()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Meter() as meter:
        work()
    return meter.most


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory could not be had."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def let_go(error: BaseException, device: torch.device) -> None:
    """Free what the frames of an error hold."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class _Meter(TorchDispatchMode):
    """Bytes of all storages that operations made and that are still there, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf, given)
        return output

    def _follow(self, tensor: torch.Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        name, size = storage._cdata, storage.nbytes()
        if name not in self._users:
            if name in given:  # made before this was watching
                return
            self._users[name] = 0
            self._now += size
            self.most = max(self.most, self._now)
        self._users[name] += 1
        weakref.finalize(tensor, self._drop, name, size)

    def _drop(self, name: int, size: int) -> None:
        self._users[name] -= 1
        if not self._users[name]:
            del self._users[name]
            self._now -= size


def _meminfo(field: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
    except (OSError, StopIteration):
        return 1 << 62  # not known: nothing is refused for it
