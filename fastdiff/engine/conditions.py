"""A network's conditions: tensors, and mappings or sequences of them, batch first, as one tree.

May import: models.denoiser (the type). Anything that is not a tensor is handed to the network as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.models.denoiser import Condition


def stacks(conditions: Mapping[str, Condition], batch: int, device: torch.device) -> list[Any]:
    """For n = 1, 2, ...: the conditions of a network batch of n branches, the first n of these, on `device`.

    Raises ValueError where a tensor does not have one entry per sample, and where two trees differ in anything but the
    values of their tensors.
    """

    def moved(name: str, tensor: Tensor) -> Tensor:
        if tensor.dim() and tensor.shape[0] != batch:
            raise ValueError(
                f"condition {name} must have one entry per sample ({batch}, the first number of shape), "
                f"got {tuple(tensor.shape)}"
            )
        return tensor.to(device)

    (first, own), *others = [(name, _each(name, cond, moved)) for name, cond in conditions.items()]
    found = [own]
    for _, other in others:
        found.append(_stack(first, found[-1], other))
    return found


def clone(cond: Any) -> Any:
    """A copy whose tensors have memory of their own."""
    return _each("cond", cond, lambda name, tensor: tensor.clone())


def load(target: Any, source: Any) -> None:
    """Copy the values of `source`'s tensors into `target`'s; both have the same signature."""
    for into, value in zip(tensors(target), tensors(source), strict=True):
        into.copy_(value)


def tensors(cond: Any) -> list[Tensor]:
    """Every tensor of the tree, in order."""
    found: list[Tensor] = []
    _each("cond", cond, lambda name, tensor: found.append(tensor))
    return found


def select(cond: Any, index: Tensor) -> Any:
    """The entries `index` [n] of every tensor of the tree."""
    return _each("cond", cond, lambda name, tensor: tensor.index_select(0, index) if tensor.dim() else tensor)


def part(cond: Any, place: slice) -> Any:
    """These entries of every tensor of the tree, in its own memory."""
    return _each("cond", cond, lambda name, tensor: tensor[place] if tensor.dim() else tensor)


def stretched(cond: Any, count: int) -> Any:
    """The tree with `count` entries, the first ones those it has, the others 0."""

    def stretch(name: str, tensor: Tensor) -> Tensor:
        if not tensor.dim():
            return tensor
        longer = tensor.new_zeros(count, *tensor.shape[1:])
        longer[: len(tensor)] = tensor
        return longer

    return _each("cond", cond, stretch)


def of_an_entry(cond: Any) -> Any:
    """What must be equal for two trees' entries to run in one batch: structure, an entry's shape, dtypes, values."""

    def entry(name: str, tensor: Tensor) -> Any:
        return ("entries", tuple(tensor.shape[1:]), tensor.dtype) if tensor.dim() else ("number", tensor.item())

    return signature(_each("cond", cond, entry))


def described(cond: Any) -> str:
    """An entry of a tree, for an error to show: {'label': int64 []}."""
    if isinstance(cond, Tensor):
        return f"{str(cond.dtype).removeprefix('torch.')} {list(cond.shape[1:])}"
    if isinstance(cond, Mapping):
        return "{" + ", ".join(f"{key!r}: {described(value)}" for key, value in cond.items()) + "}"
    if isinstance(cond, list | tuple):
        return "[" + ", ".join(map(described, cond)) + "]"
    return repr(cond) if cond is None or isinstance(cond, bool | int | float | str) else type(cond).__name__


def signature(cond: Any) -> Any:
    """What must be equal for a captured graph to serve: structure, shapes, dtypes, and every value not a tensor."""
    if isinstance(cond, Tensor):
        return ("tensor", tuple(cond.shape), cond.dtype, tuple(cond.stride()))
    if isinstance(cond, Mapping):
        return ("mapping", tuple((key, signature(value)) for key, value in cond.items()))
    if isinstance(cond, list | tuple):
        return ("sequence", tuple(signature(value) for value in cond))
    plain = cond is None or isinstance(cond, bool | int | float | str)
    return ("value", cond) if plain else ("object", id(cond))


def _each(name: str, cond: Any, visit: Callable[[str, Tensor], Any]) -> Any:
    if isinstance(cond, Tensor):
        return visit(name, cond)
    if isinstance(cond, Mapping):
        return {key: _each(f"{name}[{key!r}]", value, visit) for key, value in cond.items()}
    if isinstance(cond, list | tuple):
        return type(cond)(_each(f"{name}[{i}]", value, visit) for i, value in enumerate(cond))
    return cond


def _stack(name: str, own: Any, other: Any) -> Any:
    if isinstance(own, Tensor) and isinstance(other, Tensor):
        if own.dim() and own.shape[1:] == other.shape[1:] and other.dim():
            return torch.cat([own, other])
        if not own.dim() and not other.dim() and bool(own == other):
            return own
    elif isinstance(own, Mapping) and isinstance(other, Mapping) and own.keys() == other.keys():
        return {key: _stack(f"{name}[{key!r}]", own[key], other[key]) for key in own}
    elif isinstance(own, list | tuple) and isinstance(other, list | tuple) and len(own) == len(other):
        return type(own)(_stack(f"{name}[{i}]", a, b) for i, (a, b) in enumerate(zip(own, other, strict=True)))
    elif type(own) is type(other) and not isinstance(own, Tensor | Mapping | list | tuple) and own == other:
        return own
    raise ValueError(
        f"{name} and its counterpart in another branch cannot run as one batch: got {_told(own)} and {_told(other)}. "
        "They must be tensors of one shape, mappings with the same keys, or equal values; encode text to tensors first"
    )


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return f"keys {sorted(value)}" if isinstance(value, Mapping) else repr(value)
