"""fastdiff.kernels for tests: compiled where there is a GPU, else interpreted on the CPU.

Triton decides whether a function is compiled or interpreted when it is decorated, so without a GPU this file loads a
second copy of fastdiff.kernels with interpretation on, and leaves the installed copy and the environment alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fastdiff.kernels
import pytest
import quick_interpreter  # noqa: F401
import torch
import triton
import triton.language as tl

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def interpretation() -> Iterator[None]:
    """TRITON_INTERPRET=1 unless a GPU runs the kernels."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0" if DEVICE.type == "cuda" else "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def load(name: str, path: Path) -> ModuleType:
    search = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=search)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def jit(function: Callable[..., None]) -> Any:
    with interpretation():
        return triton.jit(function)


KERNELS = Path(fastdiff.kernels.__path__[0]) / "__init__.py"
with interpretation():
    load("kernels_under_test", KERNELS)
    affine = importlib.import_module("kernels_under_test.affine")
    layout = importlib.import_module("kernels_under_test.layout")
    philox_module = importlib.import_module("kernels_under_test.philox")
    guide = importlib.import_module("kernels_under_test.guide")
    measure = importlib.import_module("kernels_under_test.measure")
    train = importlib.import_module("kernels_under_test.train")
    norm = importlib.import_module("kernels_under_test.norm")
    norm_backward = importlib.import_module("kernels_under_test.norm_backward")
    channel_add = importlib.import_module("kernels_under_test.channel_add")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment at launch; and Triton's own functions (tl.sum), which were decorated when it was imported."""
    monkeypatch.setenv("TRITON_INTERPRET", "0" if DEVICE.type == "cuda" else "1")
    if DEVICE.type == "cuda":
        return
    for name, function in vars(tl.standard).copy().items():
        if isinstance(function, triton.JITFunction):
            again = triton.jit(function.fn)
            for module in (tl.standard, tl):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, again)
