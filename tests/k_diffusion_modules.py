"""k-diffusion's modules of samplers and of model wrappers, from where it is installed, without its training imports."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from peers import stub_scipy


def load(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """(k_diffusion.sampling, k_diffusion.external), its own code; skips where k-diffusion is not installed.

    The package's `__init__` and `utils` import torchvision, skimage and more, which no sampler uses: of `utils` only
    append_dims is there. torchsde is the real one; torchdiffeq, for log-likelihoods, is a stub if it is missing.
    """
    found = importlib.util.find_spec("k_diffusion")
    if found is None or not found.submodule_search_locations:
        pytest.skip("k-diffusion is not installed: pip install --no-deps k-diffusion")
    stub_scipy(monkeypatch)
    if importlib.util.find_spec("torchdiffeq") is None:
        stub = types.ModuleType("torchdiffeq")
        stub.odeint = None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torchdiffeq", stub)
    folder = Path(found.submodule_search_locations[0])
    package, utils = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
    package.__path__ = [str(folder)]
    utils.append_dims = lambda x, count: x.reshape(*x.shape, *(1 for _ in range(count - x.ndim)))  # type: ignore[attr-defined]
    package.utils = utils  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "k_diffusion", package)
    monkeypatch.setitem(sys.modules, "k_diffusion.utils", utils)
    return tuple(copy_of(name, monkeypatch) for name in ("sampling", "external"))  # type: ignore[return-value]


def copy_of(name: str, monkeypatch: pytest.MonkeyPatch, as_name: str | None = None) -> Any:
    """k_diffusion.{name}, executed anew; as_name: under another name, as a program's own copy is."""
    full = as_name or f"k_diffusion.{name}"
    path = Path(sys.modules["k_diffusion"].__path__[0]) / f"{name}.py"
    spec = importlib.util.spec_from_file_location(full, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__package__ = "k_diffusion"
    monkeypatch.setitem(sys.modules, full, module)
    if as_name is None:
        setattr(sys.modules["k_diffusion"], name, module)
    spec.loader.exec_module(module)
    return module
