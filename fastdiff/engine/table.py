"""One table in device memory with the rows of many plans, each at a place of its own.

May import: buffers. Plans stay in it after their last run, so that the next one with the same rows costs no upload, and
those used longest ago make room when it is full.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from fastdiff.compiler.plan import Packed
from fastdiff.engine.buffers import write_rows


@dataclass
class _Entry:
    place: int
    rows: int
    users: int = 0


class PlanTable:
    """Rows of packed plans in `coef` [R, *] and `ids` [R, *] (fastdiff.compiler.layout)."""

    def __init__(self, coef: Tensor, ids: Tensor) -> None:
        self.coef, self.ids = coef, ids
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()  # least recently used first

    @property
    def capacity(self) -> int:
        """R."""
        return self.coef.shape[0]

    @property
    def plans(self) -> tuple[Hashable, ...]:
        """The keys of all plans that are there, least recently used first."""
        return tuple(self._entries)

    def take(self, key: Hashable, packed: Packed) -> int | None:
        """The place of the first row of this plan, which stays until `release`; None where there is no room now.

        key: equal for plans with equal rows. Plans that nobody uses are dropped, those used longest ago first.
        """
        entry = self._entries.get(key)
        if entry is None:
            place = self._place(len(packed.coef))
            if place is None:
                return None
            entry = self._entries[key] = _Entry(place, len(packed.coef))
            write_rows(self.coef, self.ids, packed.coef, packed.ids, place)
        entry.users += 1
        self._entries.move_to_end(key)
        return entry.place

    def release(self, key: Hashable) -> None:
        """One use less of a plan; it stays in the table."""
        self._entries[key].users -= 1

    def moved(self, coef: Tensor, ids: Tensor) -> None:
        """The same rows, at the same places, in larger tensors."""
        for old, new in ((self.coef, coef), (self.ids, ids)):
            new[: old.shape[0], : old.shape[1]] = old
        self.coef, self.ids = coef, ids

    def _place(self, rows: int) -> int | None:
        while (place := self._gap(rows)) is None:
            unused = next((key for key, entry in self._entries.items() if not entry.users), None)
            if unused is None:
                return None
            del self._entries[unused]
        return place

    def _gap(self, rows: int) -> int | None:
        """The first place with so many free rows after it."""
        end = 0
        for entry in sorted(self._entries.values(), key=lambda entry: entry.place):
            if entry.place - end >= rows:
                return end
            end = entry.place + entry.rows
        return end if self.capacity - end >= rows else None
