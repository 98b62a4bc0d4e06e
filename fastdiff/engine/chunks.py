"""A request that is larger than what runs at once: how large a batch fits, and the same run in parts.

May import: memory, conditions, buffers, branches, room, loop (what a run says of itself), compiler.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.compiler.assemble import Row
from fastdiff.engine import conditions, memory
from fastdiff.engine.adaptive import Counts
from fastdiff.engine.branches import Branches
from fastdiff.engine.buffers import Buffers
from fastdiff.engine.loop import RunStats
from fastdiff.engine.room import Room
from fastdiff.errors import BatchTooLarge

CONDITIONS = ("cond", "uncond", "perturbed_cond")
NUMBERS = ("guidance", "perturbed_scale")


def largest(room: Room, branches_of: Callable[[int], Branches], row: Row) -> int:
    """The largest batch of a room that fits in the memory there is now, by estimate; 0 where not even one does.

    Buffers are counted; the network is measured on one and on two samples, and taken to need in proportion.
    """
    free = memory.HEADROOM * memory.available(room.device)
    one, two = (_buffers(room, n) for n in (1, 2))
    if one > free:
        return 0
    try:
        network = [_network(room, branches_of(n), row) for n in range(1, min(room.batch, 2) + 1)]
    except Exception as error:
        if not memory.ran_out(error):
            raise
        memory.let_go(error, room.device)
        return 0
    each = network[-1] - network[0] if len(network) > 1 else network[0]
    fixed = max(0, network[0] - each) + one - (two - one)
    return max(0, int((free - fixed) // (each + two - one)))


def too_large(room: Room, fits: int, why: str) -> BatchTooLarge:
    """The error that a batch does not fit, and what does."""
    need = _buffers(room, room.batch)
    hint = (
        f"the largest batch that fits is {fits} by estimate: draw that many at once, or let max_batch='auto' split it"
        if fits
        else "not even one sample of this shape fits by estimate: take a smaller shape or network, or half precision"
    )
    return BatchTooLarge(
        f"out of memory on {room.device} with a batch of {room.batch}, whose buffers alone take "
        f"{need / 2**20:,.0f} MiB; {hint} ({why.splitlines()[0] if why else 'no reason given'})",
        fits,
    )


def together(runs: Sequence[RunStats]) -> RunStats:
    """What a run in parts says of itself: the most evaluations of a sample, and all the time."""
    inside = [run.model_seconds for run in runs if run.model_seconds is not None]
    return RunStats(
        max(run.nfe for run in runs),
        sum(run.seconds for run in runs),
        sum(inside) if len(inside) == len(runs) else None,
        runs[0].backend,
        _counts([run.adaptive for run in runs if run.adaptive is not None]),
        runs[0].graph,
        tuple(itertools.chain.from_iterable(run.nfe_of for run in runs)),
        len(runs),
    )


def _counts(found: Sequence[Counts]) -> Counts | None:
    if not found:
        return None
    names = [field.name for field in dataclasses.fields(Counts)]
    joined = (tuple(itertools.chain.from_iterable(getattr(counts, name) for counts in found)) for name in names)
    return Counts(*joined)


def parts(batch: int, size: int, arguments: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(batch, arguments) of each part of a run of `Sampler.sample`, none above `size`; seeds are one per sample."""
    entries = {f"given[{name!r}]": [image] for name, image in arguments["given"].items()}
    entries |= {name: conditions.tensors(arguments[name]) for name in ("init", *CONDITIONS)}
    for name, tensors in entries.items():
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.dim() and len(tensor) != batch:
                raise ValueError(f"{name} must have one entry per sample ({batch}), got {tuple(tensor.shape)}")
    noise = arguments["noise"]
    if isinstance(noise, Tensor) and noise.shape[1:2] != (batch,):
        raise ValueError(f"noise must have one entry per sample ({batch}) after the draws, got {tuple(noise.shape)}")
    if callable(noise) and not isinstance(noise, Tensor):
        arguments = {**arguments, "noise": _Once(noise, batch)}
    for first in range(0, batch, size):
        place = slice(first, min(first + size, batch))
        yield place.stop - first, {name: _part(name, value, place) for name, value in arguments.items()}


def _part(name: str, value: Any, place: slice) -> Any:
    if value is None:
        return None
    if name in CONDITIONS:
        return conditions.part(value, place)
    if name == "given":
        return {key: image[place] for key, image in value.items()}
    if name == "noise":
        if isinstance(value, _Once):
            return value.part(place)
        return value[:, place] if isinstance(value, Tensor) else value
    return value[place] if name in ("seed", "init", *NUMBERS) else value


class _Once:
    """A caller's noise function, asked once for each draw of the whole batch."""

    def __init__(self, draw: Callable[[int, torch.Size], Tensor], batch: int) -> None:
        self._draw, self._batch = draw, batch
        self._drawn: dict[int, Any] = {}

    def part(self, place: slice) -> Callable[[int, torch.Size], Any]:
        """The function for some of the samples."""

        def draw(index: int, shape: torch.Size) -> Any:
            if index not in self._drawn:
                self._drawn[index] = self._draw(index, torch.Size((self._batch, *shape[1:])))
            drawn = self._drawn[index]
            return drawn[place] if isinstance(drawn, Tensor) else drawn

        return draw


def _buffers(room: Room, batch: int) -> int:
    meta = torch.device("meta")
    return Buffers(dataclasses.replace(room, shape=torch.Size((batch, *room.shape[1:])), device=meta)).bytes


def _network(room: Room, branches: Branches, row: Row) -> int:
    count = len(branches.names) * branches.batch
    x = torch.zeros(count, *room.shape[1:], dtype=room.dtype, device=room.device).to(memory_format=room.memory_format)
    time = torch.ones(count, device=room.device)
    return memory.peak(lambda: branches.evaluate(row, x, time, room.memory_format), room.device)
