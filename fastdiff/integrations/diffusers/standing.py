"""A scheduler as it stands: a plain copy on the host, what tells it from another, and how it is stepped from there.

May import: torch, compiler.capture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.compiler.capture.source import Source

OURS = "_fastdiff"  # the attribute of a fast scheduler that holds its run; the original has none


@dataclass
class Hosted:
    """Host copies of a scheduler's tensors, kept so that looking at them again costs no transfer and no sync."""

    known: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def of(self, tensor: Tensor) -> Tensor:
        """The tensor on the host; the copy that is there already where it is the same tensor."""
        found = self.known.get(id(tensor))
        if found is None or found[0] is not tensor:
            value = tensor.detach()
            found = self.known[id(tensor)] = tensor, value if value.device.type == "cpu" else value.cpu()
        return found[1]


def plain_copy(scheduler: Any, kind: type, hosted: Hosted) -> Any:
    """An object of the user's own class with the same attributes, its tensors on the host; they are shared there."""
    plain: Any = object.__new__(kind)
    plain.__dict__.update({key: _host(value, hosted) for key, value in vars(scheduler).items() if key != OURS})
    return plain


def _host(value: Any, hosted: Hosted) -> Any:
    if isinstance(value, Tensor):
        return hosted.of(value)
    if type(value) in (list, tuple):
        return type(value)(_host(part, hosted) for part in value)
    if type(value) is dict:
        return {key: _host(part, hosted) for key, part in value.items()}
    return value


def first_index(plain: Any, timestep: Any) -> int:
    """Where a scheduler that counts in `_step_index` begins, by its own rules; IndexError where it has no such time."""
    if plain._step_index is None:
        if hasattr(plain, "_init_step_index"):
            plain._init_step_index(timestep)
        else:
            begin = getattr(plain, "_begin_index", None)
            plain._step_index = plain.index_for_timestep(timestep) if begin is None else begin
    index: int = vars(plain)["_step_index"]
    return index


def fingerprint(plain: Any) -> Hashable:
    """What tells the tables of two schedulers apart: class, config and every attribute, tensors by their contents."""
    return type(plain), _mark(vars(plain))


def _mark(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return "tensor", str(value.dtype), tuple(value.shape), raw
    if isinstance(value, np.ndarray):
        return "array", str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, Mapping):
        return "mapping", tuple((repr(key), _mark(part)) for key, part in value.items() if key != "noise_sampler")
    if isinstance(value, list | tuple):
        return type(value), tuple(_mark(part) for part in value)
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return type(value), repr(value)
    return ("object", value) if _by_identity(value) else ("state", type(value), _mark(vars(value)))


def _by_identity(value: Any) -> bool:
    """Functions, types and what has no attributes are told apart by identity; the key keeps them alive."""
    return callable(value) or isinstance(value, type) or not hasattr(value, "__dict__")


@dataclass(frozen=True)
class Standing(Source):
    """A scheduler whose timesteps are set already, stepped on from where it stands.

    first: where in its timesteps it stands. follows: whether a `prev_timestep` is the timestep after this one.
    """

    follows: bool = True

    def fresh(self, draw: Callable[..., Tensor]) -> Any:
        """A copy as it stands; a Brownian noise sampler, if it has one, replaced by `draw`."""
        own = vars(self.scheduler)
        scheduler = object.__new__(type(self.scheduler))
        kept = {key: own[key] for key in ("_internal_dict", "noise_sampler") if key in own}
        scheduler.__dict__.update(kept)
        scheduler.__dict__.update(copy.deepcopy({key: value for key, value in own.items() if key not in kept}))
        if "noise_sampler" in own:
            scheduler.noise_sampler = draw
        return scheduler

    def times(self, scheduler: Any) -> list[Any]:
        """The timesteps from where it stands on."""
        return super().times(scheduler)[self.first :]

    def step(self, scheduler: Any, i: int, output: Tensor, time: Any, x: Tensor, following: Any) -> tuple[Tensor, Any]:
        """(the next state, everything `step` returned)."""
        return super().step(scheduler, i, output, time, x, following if self.follows else None)
