"""A stand-in for CUDA graphs on a CPU: what it recorded it runs again, and a host sync cannot be recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.engine import graphs


class _NoSync(TorchDispatchMode):
    """Refuses what a CUDA stream refuses while it is captured."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return func(*args, **(kwargs or {}))


class StandIn:
    """A recorder; `records` counts over all of them, each holds `size` bytes for every record."""

    records = 0
    size = 1000

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0

    def record(self, work: Callable[[], None], warm_up: int) -> Callable[[], None]:
        for _ in range(warm_up):
            work()
        with _NoSync():
            work()
        type(self).records += 1
        self.bytes += self.size
        return work


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """Samplers and streams on the CPU that capture."""
    kind = type("Own", (StandIn,), {"records": 0})
    monkeypatch.setattr(graphs, "recorder_for", lambda device, executor: kind(device))
    return kind
