"""Which executors this install has, and why not when it has not.

May import: errors, and probes of the extension and of Triton; nothing here runs a kernel.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import NamedTuple

import torch

from fastdiff.errors import BackendUnavailable, unknown_name

EXECUTORS = ("reference", "cpp", "triton", "cuda")


class Backend(NamedTuple):
    """One executor: whether it can run here, on which device types, and if not the reason and the fix."""

    ok: bool
    devices: tuple[str, ...]
    reason: str = ""
    fix: str = ""


@functools.cache
def probe() -> dict[str, Backend]:
    """Every executor's state on this machine, found once per process."""
    return {"reference": Backend(True, ("cpu", "cuda")), "cpp": _cpp(), "triton": _triton(), "cuda": _cuda()}


def require(executor: str, device: torch.device) -> None:
    """Raise BackendUnavailable unless `executor` can run on `device`."""
    if executor not in EXECUTORS:
        raise unknown_name("backend", executor, ("auto", *EXECUTORS))
    backend = probe()[executor]
    if not backend.ok:
        raise BackendUnavailable(backend.reason, backend.fix)
    if device.type not in backend.devices:
        raise BackendUnavailable(
            f"executor {executor!r} runs on {' or '.join(backend.devices)}, the tensors are on {device}",
            "choose backend='auto', or move the model to that device",
        )


def choose(device: torch.device) -> str:
    """The executor `backend="auto"` means on `device`: the fastest that is there."""
    order = ("cuda", "triton", "reference") if device.type == "cuda" else ("cpp", "reference")
    for executor in order:
        backend = probe()[executor]
        if backend.ok and device.type in backend.devices:
            return executor
    raise BackendUnavailable(f"no executor runs on {device}", "use a CPU or a CUDA device")


def interpreting() -> bool:
    """True when Triton runs its kernels on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _cpp() -> Backend:
    from fastdiff.engine import native

    try:
        native.load()
    except BackendUnavailable as missing:
        return Backend(False, ("cpu",), missing.reason, missing.fix)
    return Backend(True, ("cpu",))


def _triton() -> Backend:
    if importlib.util.find_spec("triton") is None:
        return Backend(False, ("cuda",), "the package triton is not installed", "pip install triton")
    if interpreting():
        return Backend(True, ("cpu",))
    if not torch.cuda.is_available():
        return Backend(
            False, ("cuda",), "torch sees no CUDA device", "run on a machine with a GPU and a CUDA build of torch"
        )
    return Backend(True, ("cuda",))


def _cuda() -> Backend:
    from fastdiff.engine import native

    if not torch.cuda.is_available():
        return Backend(
            False, ("cuda",), "torch sees no CUDA device", "run on a machine with a GPU and a CUDA build of torch"
        )
    try:
        library = native.load()
    except BackendUnavailable as missing:
        return Backend(False, ("cuda",), missing.reason, missing.fix)
    if not hasattr(library, "fastdiff_affine_step_cuda"):
        return Backend(
            False,
            ("cuda",),
            "the extension was built without CUDA",
            "install the CUDA toolkit, set CUDA_HOME, and reinstall fastdiff from source",
        )
    return Backend(True, ("cuda",))
