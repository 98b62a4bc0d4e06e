"""Where in its schedule a step stands, found on the host.

May import: torch, and the other files of this folder. A timestep is recognised as an element of the scheduler's own
`timesteps` by where it lies in memory, so that one on a GPU is not read; only a tensor from elsewhere is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdiff.integrations.diffusers.standing import Hosted, first_index, plain_copy
from fastdiff.integrations.diffusers.table import Table


class Place:
    """The timesteps of a scheduler, its own tensor of them and its copy on the host."""

    def __init__(self, scheduler: Any, name: str, hosted: Hosted) -> None:
        self.name = name
        self.timesteps = scheduler.timesteps
        self._hosted = hosted
        self._look()

    def _look(self) -> None:
        self._base, self._stride, self._count = 0, 1, 0
        if isinstance(self.timesteps, Tensor) and self.timesteps.dim() == 1:
            self._base, self._count = self.timesteps.data_ptr(), len(self.timesteps)
            self._stride = self.timesteps.stride(0) * self.timesteps.element_size()

    def start(self, scheduler: Any, kind: type, timestep: Any, table: Table) -> int:
        """The position of a run's first step, by the original's own rules."""
        self.timesteps = scheduler.timesteps
        self._look()
        if table.keeps_time == "value":
            return 0
        if table.keeps_time == "order":
            found = self._own(timestep)
            if found is None:
                values = [float(time) for time in self.on_host()]
                if _number(timestep) not in values:
                    raise self._absent(timestep, values)
                found = values.index(_number(timestep))
            return found
        if scheduler._step_index is None:
            plain = plain_copy(scheduler, kind, self._hosted)
            found = self._own(timestep)
            wanted = self.on_host()[found] if found is not None else _on_host(timestep)
            try:
                scheduler._step_index = first_index(plain, wanted)
            except (IndexError, RuntimeError):
                raise self._absent(timestep, [float(time) for time in self.on_host()]) from None
        return int(scheduler._step_index)

    def by_value(self, table: Table, timestep: Any) -> int:
        """The row of a timestep, whenever it comes."""
        if isinstance(timestep, Tensor):  # `_own`, without the call
            found = (timestep.data_ptr() - self._base) // self._stride
            if 0 <= found < self._count and found < len(table.times):
                return found
        row = table.rows_at.get(_number(timestep))
        if row is None:
            raise self._absent(timestep, list(table.times))
        return row

    def counted(self, table: Table, scheduler: Any, timestep: Any, following: int) -> int:
        """The row of a scheduler that counts its steps; `following` where it counts in attributes of its own."""
        row = following
        if table.keeps_time == "index":
            position = scheduler._step_index
            if position is None:
                raise RuntimeError(
                    f"{self.name}: _step_index was taken back to None within a run; call set_timesteps to begin again"
                )
            row = position - table.first
        if not 0 <= row < len(table):
            raise IndexError(
                f"{self.name}: step called at position {table.first + row}, and the schedule has steps {table.first} "
                f"to {table.first + len(table) - 1}; call set_timesteps before another run"
            )
        if (table.reads_time or table.keeps_time == "order") and not self.is_at(table, row, timestep):
            raise ValueError(
                f"{self.name}: step called out of order: got timestep {self._value(timestep):g}, this is step "
                f"{table.first + row}, whose timestep is {table.times[row]:g}; call set_timesteps to start anew"
            )
        return row

    def is_at(self, table: Table, row: int, timestep: Any) -> bool:
        """Whether this is the timestep of a row; False beyond the last one."""
        if row >= len(table):
            return False
        return self._own(timestep) == table.first + row or self._value(timestep) == table.times[row]

    def _value(self, timestep: Any) -> float:
        found = self._own(timestep)
        return float(self.on_host()[found]) if found is not None else _number(timestep)

    def follows(self, table: Table, timestep: Any, previous: Any, so_far: bool) -> bool:
        """Whether `prev_timestep` is the timestep after this one in the schedule; None leaves it to the scheduler.

        so_far: what it was before, and stays in the last row, which has none after it.
        """
        row = self.by_value(table, timestep)
        if previous is None:
            return so_far and row + 1 == len(table)
        following = table.times[row + 1] if row + 1 < len(table) else None
        own = self._own(previous)
        if following is None or (own != row + 1 and _number(previous) != following):
            raise ValueError(
                f"{self.name}.step: prev_timestep must be the timestep after this one in the schedule, "
                f"{following}, or None; got {_number(previous):g}"
            )
        return True

    def on_host(self) -> Any:
        """The timesteps on the host."""
        return self._hosted.of(self.timesteps) if isinstance(self.timesteps, Tensor) else self.timesteps

    def _own(self, timestep: Any) -> int | None:
        """The index of an element of the scheduler's own timesteps; None for a value from elsewhere."""
        if not isinstance(timestep, Tensor):
            return None
        found = (timestep.data_ptr() - self._base) // self._stride
        return found if 0 <= found < self._count else None

    def _absent(self, timestep: Any, times: list[float]) -> IndexError:
        shown = ", ".join(f"{time:g}" for time in times[:4]) + (", ..." if len(times) > 4 else "")
        return IndexError(
            f"{self.name}: timestep {_number(timestep):g} is not in the schedule of this set_timesteps ({shown}); step "
            f"with an element of scheduler.timesteps, or use {self.name} itself at other times"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "timesteps": self.timesteps, "_hosted": Hosted()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._look()


def _number(timestep: Any) -> float:
    return float(timestep.reshape(-1)[0]) if isinstance(timestep, Tensor) else float(timestep)


def _on_host(timestep: Any) -> Any:
    return timestep.cpu() if isinstance(timestep, Tensor) else timestep
