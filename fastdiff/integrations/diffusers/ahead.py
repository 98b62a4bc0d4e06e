"""The normals of a loop drawn at once before it, where that gives the same bits and leaves the generator the same.

May import: torch, engine. After a network has emptied the caches a draw of a few numbers takes as long as a thousand.
Torch draws number by number and pairs them by sixteens, so draws of a multiple of that are one draw in parts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdiff.engine import torch_normals

MOST_AHEAD = 1 << 16  # numbers of one loop; of more the drawing itself is what takes the time
TOGETHER = 16


class Ahead:
    """Normals of rows to come, drawn already: [count, *S]."""

    def __init__(self, normals: Tensor, source: torch.Generator) -> None:
        self._flat, self._each, self._source = normals.view(-1), normals[0].numel(), source
        self._before = source.get_state()
        torch_normals.fill(self._flat, source)

    def keep(self, count: int) -> None:
        """Leave the generator where it is after this many."""
        if count * self._each < len(self._flat):
            self._source.set_state(self._before)
            if count:
                torch_normals.fill(self._flat[: count * self._each], self._source)


def source_of(generator: object, noise: Sequence[Tensor]) -> torch.Generator | None:
    """The generator, where normals like these may be drawn from it ahead.

    Not the default one, from which the network may draw in between.
    """
    if not isinstance(generator, torch.Generator) or generator is torch.default_generator:
        return None
    if generator.device.type != "cpu" or not noise[0].is_cpu:
        return None
    return generator if noise[0].numel() % TOGETHER == 0 and joins() else None


@functools.cache
def joins() -> bool:
    """Whether this machine's torch draws in parts what it draws at once."""

    def drawn(parts: Callable[[Tensor], Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
        source, normals = torch.Generator("cpu").manual_seed(1), torch.empty(8 * TOGETHER, device="cpu")
        for part in parts(normals):
            part.normal_(generator=source)
        return normals, source.get_state()

    with torch.inference_mode(False):
        together, apart = drawn(lambda normals: [normals]), drawn(lambda normals: normals.split(TOGETHER))
    return all(torch.equal(one, other) for one, other in zip(together, apart, strict=True))
