"""Other projects' packages, imported without what only their training needs."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import pytest


def installed(module: str) -> Any:
    """A module of a package that only tests need; skips where the package is not installed."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install --no-deps {package}")
    return importlib.import_module(module)


def torchcfm(monkeypatch: pytest.MonkeyPatch, module: str) -> Any:
    """A module of torchcfm; its optimal transport package, which only couples batches in training, is a stub."""
    if "ot" not in sys.modules:
        monkeypatch.setitem(sys.modules, "ot", types.ModuleType("ot"))
    return installed(f"torchcfm.{module}")


def guided_unet(monkeypatch: pytest.MonkeyPatch) -> Any:
    """guided-diffusion's UNetModel, from the file of it that torchcfm ships; called (t, x, y) there."""
    return torchcfm(monkeypatch, "models.unet").UNetModel
