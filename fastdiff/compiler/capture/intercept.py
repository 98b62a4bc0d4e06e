"""What is seen of the torch calls of foreign code: draws, clamps, casts and quantiles.

May import: torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Array = np.ndarray[Any, np.dtype[np.float64]]


@contextmanager
def without_draws() -> Iterator[None]:
    """Raises RuntimeError where torch's generator was drawn from or another mode may answer draws.

    The generator is not put back: another thread may have drawn from it.
    """
    if torch._C._len_torch_function_stack():
        raise RuntimeError("runs under a mode that sees torch's calls")
    before = torch.get_rng_state()
    yield
    if not torch.equal(before, torch.get_rng_state()):
        raise RuntimeError("draws from torch's generator")


def has_generator(value: Any) -> bool:
    """Whether a torch.Generator is among the values of nested dicts, lists and tuples."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, torch.Generator) or any(map(has_generator, inner))


class Watched(Tensor):
    """A tensor whose torch calls, and those of every tensor computed from it, one `Intercept` sees.

    RuntimeError for draws and where its numbers are read or written into another tensor: only `every_call` follows.
    """

    intercept: Intercept

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _LEAVES or func in _DRAWS or (kwargs and "out" in kwargs):
            raise RuntimeError(f"draws, or takes the numbers of a tensor out of it: {func}")
        if writes(func) and not isinstance(args[0], cls):
            raise RuntimeError(f"writes into a tensor of another type: {func}")
        if func not in _WATCHED:
            return super().__torch_function__(func, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return cls.intercept.__torch_function__(func, types, args, kwargs).as_subclass(cls)


class Intercept(TorchFunctionMode):
    """Sees the torch calls of the scheduler; normals of the state's size are ours.

    every_call: all of them, also those that take none of our tensors, torch.randn(shape) say, which makes each several
    times as long. Else those on tensors of `watched`, and a step may not draw.
    single: it computes in float32, because it casts or draws so. quantile: it looks at the values of a sample.
    """

    def __init__(self, numel: int, every_call: bool = True) -> None:
        super().__init__()
        self.numel = numel
        self.quantile = False
        self.single = False
        self._every_call = every_call
        self._kind = type("Watched", (Watched,), {"intercept": self})

    def watched(self, value: Tensor) -> Tensor:
        """The same tensor, such that what happens to it is seen."""
        return value if self._every_call else value.as_subclass(self._kind)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A step of the scheduler; raises RuntimeError where it draws and not every call is seen."""
        with self if self._every_call else without_draws():
            yield

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next draw of the scheduler."""
        raise NotImplementedError

    def clamp(self, value: Tensor, low: float, high: float) -> Tensor:
        """`value` clipped to constant bounds."""
        return torch.clamp(value, low, high)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kw: Mapping[str, Any] = kwargs or {}
        if func not in _WATCHED:
            return func(*args, **kw)
        if func is torch.randn:
            shape = kw.get("size", args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
            if math.prod(shape) == self.numel:
                out = kw.get("out")
                return _into(out, self._drawn(tuple(shape), kw.get("dtype") if out is None else out.dtype))
        elif func is torch.randn_like and args[0].numel() == self.numel:
            return self._drawn(tuple(args[0].shape), kw.get("dtype") or args[0].dtype)
        elif func is Tensor.normal_ and args[0].numel() == self.numel:
            mean, std = _moments(*args[1:], **kw)
            return args[0].copy_(self._drawn(tuple(args[0].shape), args[0].dtype) * std + mean)
        elif func in _CLAMPS and isinstance(args[0], Tensor) and args[0].numel() == self.numel:
            bounds = _bounds(*args[1:], **kw)
            if bounds is not None:
                clipped = self.clamp(args[0], *bounds)
                return _into(args[0] if writes(func) else kw.get("out"), clipped)
        elif func is torch.quantile and args[0].numel() == self.numel:
            self.quantile = True
        result = func(*args, **kw)
        if func in _CASTS and args[0].dtype == torch.float64 and args[0].numel() == self.numel:
            self.single = self.single or result.dtype != torch.float64
        return result

    def _drawn(self, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        self.single = self.single or dtype != torch.float64
        return self.draw(shape, dtype or torch.float32)


class Random(Intercept):
    """Draws for a run on random tensors; `normals` are they."""

    def __init__(self, generator: np.random.Generator, shape: tuple[int, ...]) -> None:
        super().__init__(math.prod(shape))
        self._generator = generator
        self.normals: list[Tensor] = []

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        normal = torch.from_numpy(self._generator.standard_normal(shape)).to(dtype)
        self.normals.append(normal)
        return normal


_CASTS = (Tensor.to, Tensor.float, Tensor.type, Tensor.type_as)
_CLAMPS = (torch.clamp, torch.clip, Tensor.clamp, Tensor.clip, Tensor.clamp_, Tensor.clip_)
_DRAWS = frozenset((torch.randn, torch.randn_like, Tensor.normal_))
_WATCHED = frozenset((torch.quantile, *_DRAWS, *_CASTS, *_CLAMPS))
_LEAVES = frozenset((Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.item, Tensor.__float__))


@functools.cache
def writes(func: Any) -> bool:
    """Whether a torch function writes into its first argument."""
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.startswith("__"))


def _into(target: Tensor | None, value: Tensor) -> Tensor:
    return value if target is None else target.copy_(value)


def _moments(mean: Any = 0.0, std: Any = 1.0, **_: Any) -> tuple[Any, Any]:
    return mean, std


def _bounds(min: Any = None, max: Any = None, **_: Any) -> tuple[float, float] | None:
    """Constant bounds of a clamp, or None where they are tensors with different elements."""
    low, high = (_constant(bound) for bound in (min, max))
    if (low is None and min is not None) or (high is None and max is not None):
        return None
    return -math.inf if low is None else low, math.inf if high is None else high


def _constant(bound: Any) -> float | None:
    if isinstance(bound, Tensor):
        values = bound.detach().reshape(-1)
        return float(values[0]) if bool((values == values[0]).all()) else None
    return None if bound is None else float(bound)


def relative(ours: Array, theirs: Array) -> float:
    """The largest difference within a sample, over the sample's largest element; of all samples, the largest."""
    size, off = (np.abs(values).reshape(len(values), -1).max(axis=1) for values in (theirs, ours - theirs))
    worst = float((off / np.where(size > 0.0, size, 1.0)).max())
    return worst if math.isfinite(worst) else math.inf
