"""A scheduler as it stands: a plain copy on the host, what tells it from another, and how it is stepped from there.

May import: torch, compiler.capture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.compiler.capture.source import Source

OURS = "_fastdiff"  # the attribute of a fast scheduler that holds its run; the original has none
# What says where a run stands or how it draws, but not what its steps are.
PASSING = (OURS, "_step_index", "_begin_index", "is_scale_input_called", "noise_sampler")

Looked = dict[str, "tuple[Any, int | None]"]


class Hosted:
    """What was seen of a scheduler's attributes: host copies and marks, so that looking again costs no transfer."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, int | None, Tensor | None, Hashable]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """The tensor on the host; the copy that is there already where it is the same tensor."""
        host = self._seen(tensor)[2]
        assert host is not None
        return host

    def mark(self, value: Any) -> Hashable:
        """What tells a tensor or a frozen config from another by its contents."""
        return self._seen(value)[3]

    def keep(self, scheduler: Any) -> Hosted:
        """This, without what the scheduler no longer has."""
        held = {id(value) for value in vars(scheduler).values()}
        held |= {id(host) for key, (_, _, host, _) in self._known.items() if key in held}
        self._known = {key: value for key, value in self._known.items() if key in held}
        return self

    def _seen(self, value: Any) -> tuple[Any, int | None, Tensor | None, Hashable]:
        found = self._known.get(id(value))
        if found is None or found[0] is not value or found[1] != _version(value):
            if isinstance(value, Tensor):
                host = value.detach().cpu()
                raw = host.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if host.numel() else b""
                found = value, _version(value), host, (str(value.dtype), tuple(value.shape), raw)
            else:
                found = value, None, None, repr(sorted(value.items(), key=lambda item: str(item[0])))
            self._known[id(value)] = found
        return found


def counts_writes(value: Any) -> bool:
    """Whether this is a tensor whose `_version` says how often it was written to."""
    return isinstance(value, Tensor) and not value.is_inference()


def _version(value: Any) -> int | None:
    return value._version if counts_writes(value) else None


def look(scheduler: Any) -> Looked:
    """The attributes that a step's table depends on, and how often their tensors were written to, where that counts."""
    return {key: (value, _version(value)) for key, value in vars(scheduler).items() if key not in PASSING}


def unchanged(before: Looked, scheduler: Any) -> bool:
    """Whether the scheduler still is as `look` saw it."""
    now = look(scheduler)
    return now.keys() == before.keys() and all(_same(before[key], now[key]) for key in now)


def _same(before: tuple[Any, int | None], now: tuple[Any, int | None]) -> bool:
    if before[0] is now[0]:
        return before[1] == now[1]
    return type(before[0]) is type(now[0]) and isinstance(now[0], bool | int | float | str) and before[0] == now[0]


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
        elif getattr(plain, "_begin_index", None) is not None:
            plain._step_index = plain._begin_index
        elif hasattr(plain, "index_for_timestep"):
            plain._step_index = plain.index_for_timestep(timestep)
        else:
            raise TypeError(
                f"{type(plain).__name__} counts in _step_index and says with neither _init_step_index nor "
                "index_for_timestep where a run begins; call its set_begin_index, or use the class itself"
            )
    index: int = vars(plain)["_step_index"]
    return index


def fingerprint(plain: Any, hosted: Hosted) -> Hashable:
    """What tells the tables of two schedulers apart: class, config and every attribute, tensors by their contents."""
    own = vars(plain)
    return type(plain), tuple((key, _mark(own[key], hosted)) for key in own if key not in PASSING)


def _mark(value: Any, hosted: Hosted) -> Hashable:
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return type(value), repr(value)
    if isinstance(value, Tensor):
        return hosted.mark(value)
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if type(value).__name__ == "FrozenDict":
        return hosted.mark(value)
    if isinstance(value, Mapping):
        return type(value), tuple((repr(key), _mark(part, hosted)) for key, part in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(_mark(part, hosted) for part in value)
    if isinstance(value, FunctionType) and value.__closure__ is None and value.__defaults__ is None:
        return value.__code__
    if hasattr(value, "__dict__") and not callable(value):
        return type(value), _mark(vars(value), hosted)
    # told apart by identity: the key keeps it alive
    return value if isinstance(value, Hashable) else (type(value), repr(value))


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
