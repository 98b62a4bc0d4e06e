"""Weights read from files. The one place that decides what may be unpickled: tensors always, anything else on trust.

May import: nothing of the package. A pickle is a program that runs when it is read, so a file of tensors is read with
safetensors or with torch's reader of tensors only, and a pickled object only for a caller who says trust=True.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The strings stored in a safetensors file. Raises: FileNotFoundError, ValueError if it is not one."""
    path = _existing(path, "expected safetensors weights")
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file or cut short ({error}); write or fetch it again") from error


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises: FileNotFoundError, ValueError if it is not one."""
    path = _existing(path, "pickles (.bin, .pt) are not read, save the model with safe_serialization=True")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file or cut short ({error}); write or fetch it again") from error


def read_tensors(path: str | os.PathLike[str], key: str | None = None) -> dict[str, Tensor]:
    """The state dict of a .safetensors file, or of one that torch.save wrote; never runs code from the file.

    key: where the file holds a mapping of several things ("ema", "state_dict"), which of them.
    Raises: FileNotFoundError; ValueError for a file that holds more than tensors, another kind of file, or a `key`
    that is missing or not there.
    """
    path = _existing(path, "expected a state dict: .safetensors, or what torch.save(net.state_dict()) wrote")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        refused = re.search(r"(?:GLOBAL|global) (\w[\w.]*)", str(error))
        if refused is None:
            raise ValueError(
                f"{path}: neither safetensors nor a whole file of tensors that torch.save wrote; pickles of another "
                "kind are not opened, what is cut short is to be fetched again"
            ) from error
        raise ValueError(
            f"{path}: not a file of tensors alone, it holds {refused[1]}, and reading that runs code from the file. "
            "Where you trust it, load it yourself and write net.state_dict() with safetensors.torch.save_file"
        ) from error
    if key is not None:
        if not isinstance(found, Mapping) or key not in found:
            raise ValueError(f"{path}: has no entry {key!r}, it holds {_described(found)}")
        found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(
            f"{path}: expected a mapping of names to tensors, it holds {_described(found)}; "
            "say which of them (key=), or give the state dict itself"
        )
    return dict(found)


def unpickle(path: str | os.PathLike[str], trust: bool, needs: str) -> Any:
    """What a pickle, or a file that torch.save wrote, holds, code and all, if `trust` is True.

    needs: what must be importable for it, for the message where it is not. Raises: FileNotFoundError; ValueError
    without trust or for another kind of file; ModuleNotFoundError.
    """
    path = _existing(path, "expected a pickled network such as NVlabs' network-*.pkl")
    if trust is not True:
        raise ValueError(
            f"{path} is a pickle: reading it runs whatever code is in it, with your rights. If you know where it comes "
            "from, say trust=True; to be rid of the question, save its network's state_dict() as safetensors"
        )
    try:
        if zipfile.is_zipfile(path):
            return torch.load(path, map_location="cpu", weights_only=False)
        with path.open("rb") as file:
            return pickle.load(file)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path} needs the module {error.name!r}: {needs}", name=error.name) from error
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path}: not a pickle or cut short ({error}); fetch it again") from error


def _existing(path: str | os.PathLike[str], expected: str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {expected}")
    return path


def _described(found: Any) -> str:
    if isinstance(found, Mapping):
        return f"a mapping with entries {[str(key) for key in list(found)[:6]]}"
    return f"a {type(found).__name__}"
