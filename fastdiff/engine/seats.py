"""The device's side of a stream: the slots of a running batch, who sits in them, and one row of each at a time.

May import: buffers, room, table, crowd, graphs, guidance, request, ops, models.denoiser. The host knows how many rows
each sample has, so it never asks the device who is done; what changes is uploaded between two rows and nothing else is.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdiff.compiler import layout as at
from fastdiff.engine import ops
from fastdiff.engine.buffers import Buffers, upload
from fastdiff.engine.crowd import Crowd
from fastdiff.engine.graphs import Recorder, record
from fastdiff.engine.guidance import Reduction
from fastdiff.engine.request import Request, Work
from fastdiff.engine.room import Room, rounded_up
from fastdiff.engine.table import PlanTable
from fastdiff.models.denoiser import Denoiser

KEPT_GRAPHS = 32  # one for each number of entries the networks are asked about


@dataclass
class Seat:
    """A sample in a slot: the place of its rows in the table, and how many of them have run."""

    request: Request
    slot: int
    place: int
    run: int = 0

    @property
    def work(self) -> Work:
        """What was asked."""
        return self.request.work


@dataclass(frozen=True)
class Left:
    """A sample that leaves: its image and, to be read when the device is there, [status, all finite]."""

    seat: Seat
    image: Tensor
    flags: Tensor


class Seats:
    """`slots` samples of shape [*S] at rows of their own. in_order: networks see them oldest first, and no others."""

    def __init__(
        self,
        model: Denoiser,
        shape: torch.Size,
        slots: int,
        executor: str,
        recorder: Recorder | None,
        memory_format: torch.memory_format,
        crowd: Crowd,
        reduces: Reduction | None,
        table_rows: int,
        in_order: bool = False,
    ) -> None:
        self.slots, self.in_order, self.recorder = slots, in_order, recorder
        self.evaluated = 0  # entries the networks were asked about
        self._executor, self._crowd, self._reduces = executor, crowd, reduces
        self._room = Room(
            shape=torch.Size((slots, *shape)),
            registers=1,
            rows=table_rows,
            terms=1,
            opening_terms=1,
            copies=1,
            dtype=model.dtype,
            device=model.device,
            memory_format=memory_format if len(shape) == 3 else torch.contiguous_format,
            work=None if reduces is None else reduces.work,
        )
        self._row = np.full(slots, -1, dtype=np.int32)  # what the device's rows are, or must become
        self._stale = True
        self._seats: dict[int, Seat] = {}  # by slot; in the order they joined
        self._joined: list[Seat] = []
        self._moved, self._asking = True, 0  # somebody joined or left since entries were chosen, and how many they were
        self._replays: OrderedDict[Hashable, Callable[[], None]] = OrderedDict()
        self._use(Buffers(self._room))
        self._table = PlanTable(self._buffers.tensors.coef, self._buffers.tensors.ids)

    def __len__(self) -> int:
        return len(self._seats)

    def __iter__(self) -> Iterator[Seat]:
        return iter(tuple(self._seats.values()))

    @property
    def capacity(self) -> int:
        """The most rows a plan may have, its opening row included."""
        return self._table.capacity

    @property
    def bytes(self) -> int:
        """Of the buffers and the graphs."""
        return self._buffers.bytes + (0 if self.recorder is None else self.recorder.bytes)

    @property
    def plans(self) -> int:
        """How many plans are in the table."""
        return len(self._table.plans)

    def join(self, request: Request) -> bool:
        """Give a sample a slot from the next row on; False where no slot is free or no room in the table."""
        if len(self._seats) == self.slots:
            return False
        work = request.work
        self._make_room(work)
        place = self._table.take(work.key, work.packed)
        if place is None:
            return False
        slot = int(np.flatnonzero(self._row < 0)[0])
        seat = self._seats[slot] = Seat(request, slot, place)
        self._row[slot] = place + 1
        self._stale = self._moved = True
        self._joined.append(seat)
        return True

    def leave(self, seat: Seat) -> None:
        """Free a slot; what it holds is left as it is."""
        self._row[seat.slot] = -1
        self._stale = self._moved = True
        del self._seats[seat.slot]
        self._joined = [joined for joined in self._joined if joined is not seat]
        self._table.release(seat.work.key)

    def run(self) -> list[Left]:
        """Open who joined, ask the networks what the samples need, run a row of each; those that are done leave."""
        self._open()
        self._choose()
        if self._stale:
            upload(self._buffers.tensors.row, self._row)
            self._stale = False
        self._replay() if self.recorder is not None else self._advance()
        self.evaluated += self._asking
        done = []
        for seat in self:
            seat.run += 1
            self._row[seat.slot] += 1
            if seat.run == len(seat.work.needed):
                done.append(self._left(seat))
        return done

    def failed(self) -> list[Seat]:
        """On a CPU, whose memory is at hand: the samples whose network output was inf or nan."""
        if self._room.device.type != "cpu":
            return []
        status = self._buffers.tensors.status.numpy()
        return [seat for seat in self if status[seat.slot] >= 0]

    def status(self, seat: Seat) -> int:
        """On a CPU: the row of the table in which a sample failed, or negative."""
        return int(self._buffers.tensors.status[seat.slot])

    def _left(self, seat: Seat) -> Left:
        t = self._buffers.tensors
        image = t.state[seat.work.plan.result, seat.slot].clone()
        flags = torch.stack((t.status[seat.slot], image.isfinite().all().to(torch.int32)))
        self.leave(seat)
        return Left(seat, image, flags.to("cpu", non_blocking=True))

    def _open(self) -> None:
        """The opening row of those who joined, on whatever they bring; the others stay as they are."""
        if not self._joined:
            return
        t, opening = self._buffers.tensors, np.full(self.slots, -1, dtype=np.int32)
        entries = len(self._buffers.model_in)
        for seat in self._joined:
            work, slot = seat.work, seat.slot
            opening[slot] = seat.place
            t.seed[slot].fill_(work.seed)
            t.guidance[slot].fill_(work.guidance)
            t.status[slot].fill_(-1)
            if t.mix is not None:
                upload(t.mix[slot], np.array((*at.PLAIN_MIX[: at.MIX_S], work.scale), dtype=np.float32))
            if t.momentum is not None:
                t.momentum[slot].zero_()
            if work.init is not None:
                t.state[work.plan.rows[0].x, slot].copy_(work.init)
            for name, image in work.given.items():
                t.state[work.plan.given[name], slot].copy_(image)
            for lane, positions, tree in work.conditions:
                lane.write(tree, [position * self.slots + slot for position in positions], entries)
        self._joined = []
        upload(self._opening, opening)
        self._open_step(self._buffers.model_in)

    def _choose(self) -> None:
        """Tell each network which entries to work on next, where they are not those of the row before."""
        rows = ((seat.work.needed, seat.run) for seat in self)
        if not self._moved and all(needed[i] == needed[i - 1] for needed, i in rows):
            return
        self._moved = False
        needed: dict[int, list[int]] = {}  # by branch the slots, in the order the networks see them
        for seat in self if self.in_order else sorted(self, key=lambda seat: seat.slot):
            for position in seat.work.needed[seat.run]:
                needed.setdefault(position, []).append(seat.slot)
        asked = [position * self.slots + slot for position in sorted(needed) for slot in needed[position]]
        entries = len(self._buffers.model_in)
        exact = self.recorder is None or self.in_order
        self._crowd.ask(asked, self.slots, int if exact else lambda count: batch_size(count, entries))
        self._asking = len(asked)

    def _advance(self) -> None:
        self._crowd.advance(self._buffers, self._executor)

    def _replay(self) -> None:
        """Replay what is captured for as many entries, or capture it; RuntimeError where that cannot be."""
        assert self.recorder is not None
        key = tuple((lane.count, lane.index is None) for lane in self._crowd.lanes)
        if key not in self._replays:
            self._replays[key] = record(self.recorder, self._buffers, self._advance)
            if len(self._replays) > KEPT_GRAPHS:
                self._replays.popitem(last=False)
        self._replays.move_to_end(key)
        self._replays[key]()

    def _make_room(self, work: Work) -> None:
        """Larger buffers, with all that the running samples have in them, where this sample needs larger ones."""
        room, plan = self._room, work.plan
        terms = (work.packed.coef.shape[1] - at.COEF_FIXED) // at.NOISE_STRIDE
        wanted = dataclasses.replace(
            room,
            registers=max(room.registers, plan.registers),
            terms=max(room.terms, rounded_up(terms)),
            copies=max(room.copies, work.copies),
            second=room.second or plan.uses_second_estimate,
            learns_spread=room.learns_spread or plan.learns_spread,
            perturbed=room.perturbed or work.scale != 0.0,
        )
        if wanted == room:
            return
        old, new = self._buffers, Buffers(wanted)
        before, after = old.tensors, new.tensors
        after.state[: room.registers] = before.state
        pairs = [(old.model_in, new.model_in), (old.model_time, new.model_time), (before.momentum, after.momentum)]
        pairs += [(getattr(before, name), getattr(after, name)) for name in ("seed", "guidance", "status", "mix")]
        for source, into in pairs:
            if source is not None and into is not None:
                into[: len(source)] = source
        if before.mix is None and after.mix is not None:
            upload(after.mix, np.tile(np.array(at.PLAIN_MIX, dtype=np.float32), (self.slots, 1)))
        self._table.moved(after.coef, after.ids)
        self._room, self._stale, self._moved = wanted, True, True
        self._replays.clear()
        if wanted.copies != room.copies:
            self._crowd.grow(wanted.copies * self.slots)
        self._use(new)

    def _use(self, buffers: Buffers) -> None:
        t = buffers.tensors
        self._buffers = buffers
        if self._reduces is not None:
            buffers.set_reduction(self._reduces)
        self._opening = torch.full_like(t.row, -1)
        opening = dataclasses.replace(t, row=self._opening, variance=None, momentum=None)
        self._open_step = ops.bind(opening, self._executor, uses_e=False)


def batch_size(count: int, most: int) -> int:
    """`count` rounded up to 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: few graphs, and at most a third of a batch idle."""
    size = rounded_up(count)
    return min(most, 3 * size // 4 if count <= 3 * size // 4 and size >= 4 else size)
