"""The tensors a scheduler keeps between steps, wherever in the object they are.

May import: torch.
"""

from __future__ import annotations

from collections.abc import Callable, MutableSequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

DEPTH = 4  # how deep the walk looks into lists and objects


@dataclass(frozen=True)
class Leaf:
    """A state-sized tensor the scheduler keeps, and how to put another in its place."""

    value: Tensor
    write: Callable[[Tensor], None]


def leaves_of(scheduler: Any, numel: int) -> list[Leaf]:
    """Every tensor with this many elements in the object's attributes, lists, tuples, dicts and inner objects."""
    found: list[Leaf] = []
    seen: set[int] = set()

    def visit(value: Any, write: Callable[[Any], None], depth: int) -> None:
        if isinstance(value, Tensor):
            if value.numel() == numel:
                found.append(Leaf(value, write))
            return
        if depth > DEPTH or id(value) in seen:
            return
        if isinstance(value, tuple) and type(value) is tuple:
            parts = list(value)
            for i, part in enumerate(parts):
                visit(part, _into_tuple(parts, i, write), depth + 1)
            return
        items: list[tuple[Any, Any]] = []
        if isinstance(value, dict):
            items = list(value.items())
        elif isinstance(value, MutableSequence):
            items = list(enumerate(value))
        elif hasattr(value, "__dict__") and not callable(value) and not isinstance(value, type):
            value, items = vars(value), list(vars(value).items())
        if items:
            seen.add(id(value))
        for key, part in items:
            if key not in ("config", "_internal_dict"):
                visit(part, _into(value, key), depth + 1)

    visit(scheduler, _into({}, ""), 0)
    return found


def _into(container: Any, key: Any) -> Callable[[Any], None]:
    def write(value: Any) -> None:
        container[key] = value

    return write


def _into_tuple(parts: list[Any], i: int, write: Callable[[Any], None]) -> Callable[[Any], None]:
    def put(value: Any) -> None:
        parts[i] = value
        write(tuple(parts))

    return put
