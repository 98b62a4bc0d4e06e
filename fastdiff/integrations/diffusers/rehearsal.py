"""What a scheduler's steps do besides the arithmetic: draws, fields and dtypes of the output, plain attributes.

May import: torch, compiler.capture. Found by running the scheduler itself, once, on small random tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastdiff.compiler.capture.source import Source

SHAPE = (2, 3, 4, 4)
SEED = 11


@dataclass(frozen=True)
class Draw:
    """One draw of a step: its dtype, whether the caller's generator makes it, and where on a Brownian path it is."""

    dtype: torch.dtype
    by_generator: bool = False
    interval: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Rehearsed:
    """One step: its draws, its output by field, and the plain attributes it left changed."""

    draws: tuple[Draw, ...]
    output: Mapping[str, Any]
    changed: Mapping[str, Any]
    sample: Tensor
    model_output: Tensor
    normals: tuple[Tensor, ...]


@dataclass(frozen=True)
class Rehearsal:
    """All steps; kind: the class of the output; tuple_fields: what a tuple holds instead, return_dict=False."""

    steps: tuple[Rehearsed, ...]
    kind: type
    tuple_fields: tuple[str, ...]


class _Draws(TorchFunctionMode):
    """Answers the normals that a step draws, and remembers how they were asked for."""

    def __init__(self, generator: torch.Generator, path_dtype: torch.dtype) -> None:
        super().__init__()
        self.generator = generator
        self._path_dtype = path_dtype
        self.restart()
        self.draws: list[Draw] = []
        self.normals: list[Tensor] = []

    def restart(self) -> None:
        """Draw from the beginning again."""
        self._rng = np.random.default_rng(SEED)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kw: Mapping[str, Any] = kwargs or {}
        if func is torch.randn:
            size = kw.get("size", args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
            return self._draw(tuple(size), kw.get("dtype") or torch.get_default_dtype(), kw)
        if func is torch.randn_like:
            return self._draw(tuple(args[0].shape), kw.get("dtype") or args[0].dtype, kw)
        if func is Tensor.normal_:
            return args[0].copy_(self._draw(tuple(args[0].shape), args[0].dtype, kw))
        return func(*args, **kw)

    def on_path(self, *interval: Any) -> Tensor:
        """What a Brownian noise sampler is asked for."""
        return self._draw(SHAPE, self._path_dtype, {}, interval)

    def _draw(
        self, shape: tuple[int, ...], dtype: torch.dtype, kw: Mapping[str, Any], interval: tuple[Any, ...] | None = None
    ) -> Tensor:
        self.draws.append(Draw(dtype, kw.get("generator") is self.generator, interval))
        normal = torch.from_numpy(self._rng.standard_normal(shape)).to(dtype)
        self.normals.append(normal)
        return normal


def rehearse(source: Source, model_dtype: torch.dtype, sample_dtype: torch.dtype) -> Rehearsal:
    """Run every step from where the source stands, on tensors of these dtypes."""
    generator = torch.Generator()
    mode = _Draws(generator, sample_dtype)
    scheduler = source.fresh(mode.on_path)
    times = source.times(scheduler)
    rng = np.random.default_rng(SEED + 1)
    known = inspect.signature(scheduler.step).parameters
    asked = {"generator": generator} if "generator" in known else {}
    steps: list[Rehearsed] = []
    kind: type = tuple
    tuple_fields: tuple[str, ...] = ()
    x = _normal(rng, sample_dtype)
    for i, time in enumerate(times):
        output = _normal(rng, model_dtype)
        following = times[i + 1] if i + 1 < len(times) else None
        before = _plain(scheduler)
        again = source.fresh(mode.on_path) if i == 0 and "return_dict" in known else None
        first = len(mode.draws)
        given = type(source)(**{**vars(source), "options": {**source.options, **asked}})
        with torch.no_grad(), mode:
            given.scaled(scheduler, i, x, time)
            state, result = given.step(scheduler, i, output.clone(), time, x.clone(), following)
        count = len(mode.draws)
        found = _fields(source.name, result)
        steps.append(
            Rehearsed(
                draws=tuple(mode.draws[first:count]),
                output=found,
                changed={key: value for key, value in _plain(scheduler).items() if before.get(key, given) != value},
                sample=x,
                model_output=output,
                normals=tuple(mode.normals[first:count]),
            )
        )
        if again is not None:
            replayed = type(source)(**{**vars(given), "options": {**given.options, "return_dict": False}})
            mode.restart()
            with torch.no_grad(), mode:
                replayed.scaled(again, i, x, time)
                _, short = replayed.step(again, i, output.clone(), time, x.clone(), following)
            tuple_fields = _matched(source.name, short, found)
            del mode.draws[count:], mode.normals[count:]
        kind = type(result)
        x = state.to(sample_dtype)
    return Rehearsal(tuple(steps), kind, tuple_fields)


def reads_time(source: Source) -> bool:
    """Whether a step that counts gives something else for another timestep."""
    rng = np.random.default_rng(SEED)
    output, x = _normal(rng, torch.float64), _normal(rng, torch.float64)
    found = []
    for shift in (0, 1):
        mode = _Draws(torch.Generator(), torch.float64)
        scheduler = source.fresh(mode.on_path)
        times = source.times(scheduler)
        following = times[1] if len(times) > 1 else None
        try:
            with torch.no_grad(), mode:
                found.append(source.step(scheduler, 0, output.clone(), times[0] + shift, x.clone(), following)[0])
        except (RuntimeError, TypeError):  # it is particular about its timesteps
            return True
    return not torch.allclose(found[0], found[1])


def _normal(rng: np.random.Generator, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(rng.standard_normal(SHAPE)).to(dtype)


def _plain(scheduler: Any) -> dict[str, Any]:
    """The attributes that are numbers, names or nothing."""
    return {key: value for key, value in vars(scheduler).items() if isinstance(value, bool | int | float | str | None)}


def _fields(name: str, result: Any) -> dict[str, Any]:
    """A step's output by field; "0", "1", ... for a tuple or a bare tensor."""
    if isinstance(result, Tensor):
        return {"0": result}
    if type(result) in (tuple, list):
        return {str(i): part for i, part in enumerate(result)}
    if is_dataclass(result):
        return {one.name: getattr(result, one.name) for one in fields(result)}
    raise TypeError(f"{name}.step returns {type(result).__name__}, expected a tensor, a tuple or a dataclass")


def _matched(name: str, short: Any, found: Mapping[str, Any]) -> tuple[str, ...]:
    """Which field each element of the tuple is."""
    left = dict(found)
    matched = []
    for element in short:
        key = next((key for key, value in left.items() if _same(value, element)), None)
        if key is None:
            raise TypeError(
                f"{name}.step returns a tuple with return_dict=False that holds something else than its output"
            )
        matched.append(key)
        del left[key]
    return tuple(matched)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and not isinstance(one, Tensor | list | tuple | dict) and bool(one == other)
