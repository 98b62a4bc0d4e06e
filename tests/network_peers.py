"""Other projects' packages, imported without what only their training needs."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import pytest


def torchcfm(monkeypatch: pytest.MonkeyPatch, module: str) -> Any:
    """A module of torchcfm; its optimal transport package, which only couples batches in training, is a stub."""
    if "ot" not in sys.modules:
        monkeypatch.setitem(sys.modules, "ot", types.ModuleType("ot"))
    return importlib.import_module(f"torchcfm.{module}")


def guided_unet(monkeypatch: pytest.MonkeyPatch) -> Any:
    """guided-diffusion's UNetModel, from the file of it that torchcfm ships; called (t, x, y) there."""
    return torchcfm(monkeypatch, "models.unet").UNetModel
