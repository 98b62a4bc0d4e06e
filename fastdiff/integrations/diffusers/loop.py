"""The rows of one call of an accelerated pipeline, and what is made ready so that little is left to do between two.

May import: torch, engine, and the other files of this folder. A network leaves next to nothing of the loop in the
caches, so a row costs by how many functions and objects it touches: what is the same for each is settled before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdiff.engine import torch_normals
from fastdiff.integrations.diffusers.ahead import Ahead, source_of
from fastdiff.integrations.diffusers.asking import Asked, Asking, Direct
from fastdiff.integrations.diffusers.desk import Desk
from fastdiff.integrations.diffusers.pipelines import interruption
from fastdiff.integrations.diffusers.program import Draw, Like, Start

if TYPE_CHECKING:
    from fastdiff.integrations.diffusers.call import Call


class Loop:
    """The rows of one call."""

    def __init__(self, call: Call, desk: Desk, start: Start, shape: torch.Size, generator: Any) -> None:
        self.call, self.desk, self.start = call, desk, start
        self.program = start.program
        last = len(self.program) if call.solving is not None else start.first + call.iterations
        self.rows = range(start.first, last)
        self.next = start.first
        self._shape, self._generator = shape, generator
        self._asked: tuple[Any, Sequence[Asked]] | None = None  # with its mark, and kept so that the mark holds
        self._given: tuple[Tensor, int] | None = None
        self._asking: Asking
        self._times: Sequence[Tensor] = ()
        self._step: Callable[[int], None] | None = None
        self._direct: Direct | None = None
        self._draws: list[tuple[Callable[[], Any], ...]] | None = None

    def open(self, latents: Tensor) -> None:
        """The first state and network input, and the seeds of a solver that draws."""
        self.desk.open(self.start, latents)
        if self.program.stochastic:
            self.desk.tensors.seed.copy_(seeds(self._generator, self.desk.batch))

    def changed(self, sample: Tensor) -> bool:
        """Whether this is another state than the last step gave."""
        assert self._given is not None
        tensor, version = self._given
        return sample is not tensor or sample.is_inference() or sample._version != version

    def put(self, latents: Tensor) -> None:
        """Another state for the next row."""
        self.desk.put(self.program, self.next, latents)

    def ask(self, asked: Sequence[Asked], scale: float | None, rescale: float) -> None:
        """What the rows from here on ask of the network, and their guidance."""
        rescaled = scale is not None and rescale > 0.0
        network = self.call.own(self.call.kind.network)
        # where one step runs all rows there is no other to tell it from
        conditions = None if self.call.hoists else [_mark(one.cond) for one in asked]
        mark = conditions, scale is not None, rescaled, id(network)
        if self._asked is None or mark != self._asked[0]:
            self._asked = mark, asked
            self._prepare(Asking(self.call.kind, network, asked, scale is not None, rescaled, self.desk))
        self.desk.guide(1.0 if scale is None else 1.0 - scale if self._swapped else scale, rescale)

    def _prepare(self, asking: Asking) -> None:
        """How a row runs that asks so: the first one as any does, the next ones directly where they can."""
        self._swapped, self._direct = asking.swapped, None
        first = asking.asked[0].time
        like = Like(asking.time_shape, first.dtype, first.device)
        times = self.program.shown(self.call.kind, self.desk.needs.dtype, like)
        self.call.engine.check_time(first, times[self.next])
        replay = self.call.engine.replay(asking)
        if replay is not None:

            def recorded(i: int) -> None:
                self._draw(i)
                replay()

            self._step = recorded
            return
        self._asking, self._times, self._direct = asking, times, asking.direct(times)
        if self._direct is not None:
            return
        evaluate, settle = asking.on(), asking.settle

        def step(i: int) -> None:
            conditional, unguided = evaluate(times[i])
            self._draw(i)
            settle(conditional, unguided)
            self._direct = asking.direct(times)

        self._step = step

    def run(self, count: int) -> None:
        """This many rows, fewer where the pipeline is interrupted."""
        ahead = self._ahead()
        if ahead is None:
            self._draws = self._draws or self._drawing()
        try:
            self._run(count)
        finally:
            if ahead is not None:
                drawn = self.program.drawn
                ahead.keep(drawn[self.next] - drawn[self.rows.start])

    def _run(self, count: int) -> None:
        rows, draws, bar, total = self.rows, self._draws, self.call.bar, len(self.rows)
        interrupted, asked = interruption(self.call.base, self.call.pipe)
        ticks = self.call.hoists and not getattr(bar, "disable", False)
        direct, i, last = self._direct, self.next, min(self.next + count, rows.stop)
        while i < last:
            if interrupted is not None and i > rows.start and interrupted(asked):
                break
            if direct is None:
                self._step(i)  # type: ignore[misc]
                direct = self._direct
            else:
                network, (args, kw, times), apart, pick, row = direct
                if times is not None:
                    kw["timestep"] = times[i]
                returned, other = network(*args[i], **kw), None
                if apart is not None:
                    args, kw, times = apart
                    if times is not None:
                        kw["timestep"] = times[i]
                    other = network(*args[i], **kw)
                if draws is not None:
                    for draw in draws[i]:  # after the network, which may draw too
                        draw()
                try:
                    fits = row(pick(returned)) if apart is None else row(pick(returned), pick(other))
                except (ValueError, TypeError, AttributeError):
                    fits = False
                if fits is False:  # outputs that are not like the last ones
                    output = self._asking.output
                    self._asking.settle(output(returned), None if apart is None else output(other))
                    direct = self._direct = self._asking.direct(self._times)
            i = self.next = i + 1
            if ticks:
                done = i - rows.start
                due = done * bar.total // total - (done - 1) * bar.total // total
                if due:
                    bar.update(due)
        if self.call.solving is None and self.start.counted is not None:
            self.call.own("scheduler")._step_index = self.start.counted + i - rows.start

    def state(self, doubled: bool) -> Tensor:
        """The state that the rows so far have left, as a tensor of its own."""
        state = self.desk.state(self.program.states[self.next - 1])
        dtype = self.program.dtype
        state = state.clone() if state.dtype is dtype else state.to(dtype)
        if doubled:
            state = torch.cat([state, state])
        if not self.call.hoists:
            self._given = state, 0 if state.is_inference() else state._version
        return state

    def _draw(self, i: int) -> None:
        """This row's normals, where they are not drawn yet."""
        for draw in self._draws[i] if self._draws is not None else ():
            draw()

    def _drawing(self) -> list[tuple[Callable[[], Any], ...]] | None:
        """Per row, what draws each of its normals, as the scheduler draws them; None where no row draws."""
        drawn, slots, made = self.program.drawn, self.desk.noise, dict[tuple[Draw, int], Callable[[], Any]]()
        if not drawn[-1]:
            return None

        def drawer(draw: Draw, number: int) -> Callable[[], Any]:
            key = draw, number % len(slots)
            if key not in made:
                made[key] = self._drawer(draw, slots[key[1]])
            return made[key]

        return [
            tuple(drawer(draw, first + k) for k, draw in enumerate(draws))
            for draws, first in zip(self.program.draws, drawn, strict=False)
        ]

    def _ahead(self) -> Ahead | None:
        """All of the loop's normals, where they are drawn at once."""
        drawn, slots, rows = self.program.drawn, self.desk.noise, self.rows
        first, last = drawn[rows.start], drawn[rows.stop]
        if not self.call.hoists or first == last or drawn[-1] > len(slots) or slots[0].shape != self._shape:
            return None
        source = source_of(self._generator, slots)
        if source is None or not self.program.draws_plainly:
            return None
        noise = self.desk.tensors.noise
        assert noise is not None
        return Ahead(noise[first:last], source)

    def _drawer(self, draw: Draw, noise: Tensor) -> Callable[[], Any]:
        source = self._generator if draw.by_generator else None
        alone = source is None or (isinstance(source, torch.Generator) and source.device.type == noise.device.type)
        if alone and draw.dtype == torch.float32 and noise.shape == self._shape:
            return torch_normals.filler(noise, source)

        def drawn() -> None:
            from diffusers.utils.torch_utils import randn_tensor

            normals = randn_tensor(self._shape, source, device=noise.device, dtype=draw.dtype)
            noise.copy_(normals[: len(noise)])

        return drawn


def seeds(generator: Any, batch: int) -> Tensor:
    """int64 [B], drawn from the caller's generator or generators."""
    given = generator if isinstance(generator, list) else [generator]
    each = batch if len(given) == 1 else 1
    drawn = [
        torch.randint(2**63 - 1, (each,), generator=one, device="cpu" if one is None else one.device) for one in given
    ]
    return torch.cat([one.cpu() for one in drawn])


def _mark(value: Any) -> Any:
    """What tells one condition from another while both live: which tensors they are, and how often written to.

    An inference tensor does not count, so it is always another.
    """
    if isinstance(value, Tensor):
        return object() if value.is_inference() else (id(value), value._version)
    if isinstance(value, dict):
        return tuple((key, _mark(part)) for key, part in value.items())
    if isinstance(value, list | tuple):
        return tuple(_mark(part) for part in value)
    return id(value)
