"""Schedulers for the tests of `fast(SchedulerClass)`: the original and its twin, with their timesteps set."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import scheduler_loops as loops
import torch
from capture_cases import make

from fastdiff.integrations.diffusers import fast

pytest.importorskip("diffusers")

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(loops.SHAPE)
_MADE: dict[tuple[str, str, Any], Any] = {}


def plain(kind: type) -> type:
    return kind


def made(name: str, config: dict[str, Any], steps: int | None, wrap: Any = plain, **kw: Any) -> Any:
    """A scheduler of that class, or of what `wrap` makes of it, with its timesteps set; a copy, as in `make`."""
    key = name, str(config), wrap
    if key not in _MADE:
        original = make(name, config)
        _MADE[key] = wrap(type(original)).from_config(original.config)
    scheduler = copy.deepcopy(_MADE[key])
    if name == "SCM":
        kw["intermediate_timesteps"] = 1.3 if steps == 2 else None
    scheduler.set_timesteps(*(() if steps is None else (steps,)), **kw)
    return scheduler


def both(name: str, config: dict[str, Any], steps: int | None = None, **kw: Any) -> tuple[Any, Any]:
    """(the original, its fast twin), with their timesteps set."""
    return made(name, config, steps, **kw), made(name, config, steps, fast, **kw)


def ready(name: str, steps: int = 6, **config: Any) -> Any:
    scheduler = fast(type(make(name, config)))(**config)
    scheduler.set_timesteps(steps)
    return scheduler
