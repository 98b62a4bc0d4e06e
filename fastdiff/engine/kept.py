"""What a run needs and the next one can use again, kept up to a number of bytes: buffers, and graphs captured on them.

May import: nothing of the package. An entry is lent to one run at a time, so threads do not meet in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """Something that knows the memory it holds."""

    @property
    def bytes(self) -> int:
        """Of device memory."""


V = TypeVar("V", bound=Sized)


class Kept(Generic[V]):
    """Entries by key; those that wait for their next run, least recently used first."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Hashable, V]] = []
        self._lock = threading.Lock()

    def lend(self, key: Hashable, make: Callable[[], V]) -> V:
        """The entry of this key that was used last, or a new one; nobody else has it until it is given back."""
        with self._lock:
            for place in reversed(range(len(self._waiting))):
                if self._waiting[place][0] == key:
                    return self._waiting.pop(place)[1]
        return make()

    def give_back(self, key: Hashable, entry: V, limit: int) -> None:
        """Keep an entry for its next run; the least recently used ones go while all together exceed `limit` bytes.

        The entry given back stays, whatever its size: it is the likeliest to be used again.
        """
        with self._lock:
            self._waiting.append((key, entry))
            while len(self._waiting) > 1 and sum(waiting.bytes for _, waiting in self._waiting) > limit:
                del self._waiting[0]

    def clear(self) -> None:
        """Drop all that waits."""
        with self._lock:
            self._waiting.clear()

    @property
    def entries(self) -> tuple[V, ...]:
        """What waits, least recently used first."""
        with self._lock:
            return tuple(entry for _, entry in self._waiting)
