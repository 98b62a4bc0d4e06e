"""One sample that a stream draws: what was asked, where it is, and what came of it.

May import: branches, compiler, models.denoiser. Made by `Stream.submit`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastdiff.compiler.plan import Packed, Plan
from fastdiff.engine.branches import CONDITIONAL, PERTURBED, UNGUIDED, Branches
from fastdiff.engine.crowd import POSITIONS, Lane
from fastdiff.errors import RequestCancelled

WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"


@dataclass(frozen=True)
class Work:
    """A checked request, ready to join: its rows, and what goes into its slot.

    key: of its rows in the table. needed: for each row the positions of the branches it reads. branches: with its
    conditions. conditions: the same by lane, the positions of branches and a tree with an entry for each.
    """

    plan: Plan
    packed: Packed
    key: Hashable
    seed: int
    guidance: float
    scale: float
    needed: tuple[tuple[int, ...], ...]
    branches: Branches
    init: Tensor | None
    given: dict[str, Tensor]
    conditions: list[tuple[Lane, tuple[int, ...], Any]] = field(default_factory=list)

    @property
    def copies(self) -> int:
        """How many branches its buffers must have."""
        return 1 + max((position for row in self.needed for position in row), default=0)


@dataclass(eq=False)
class Request:
    """A sample on its way. state: "waiting", "running", "done", "failed" or "cancelled". nfe: its evaluations."""

    work: Work = field(repr=False)
    drive: Callable[[Request], None] = field(repr=False)
    withdraw: Callable[[Request], bool] = field(repr=False)
    state: str = WAITING
    submitted: float = field(default_factory=time.perf_counter)
    joined: float | None = None
    finished: float | None = None
    image: Tensor | None = field(default=None, repr=False)
    error: Exception | None = None

    @property
    def nfe(self) -> int:
        """Evaluations of the network, each of as many branches as its row reads."""
        return self.work.plan.nfe

    @property
    def done(self) -> bool:
        """Whether nothing more will come: done, failed or cancelled."""
        return self.state in (DONE, FAILED, CANCELLED)

    @property
    def waited(self) -> float | None:
        """Seconds from submit until it joined the batch; None before."""
        return None if self.joined is None else self.joined - self.submitted

    @property
    def latency(self) -> float | None:
        """Seconds from submit until its sample was there; None before."""
        return None if self.finished is None else self.finished - self.submitted

    def result(self) -> Tensor:
        """The sample, fp32 [*S]; runs the stream until it is there, unless another thread does.

        Raises FloatingPointError, naming the row, where the network returned inf or nan for this sample, and
        RequestCancelled.
        """
        while not self.done:
            self.drive(self)
        if self.state == CANCELLED:
            raise RequestCancelled("this request was cancelled and has no sample; submit it again")
        if self.error is not None:
            raise self.error
        assert self.image is not None
        return self.image

    def cancel(self) -> bool:
        """Leave the queue or the batch, whose other samples go on. False where it was done already."""
        return self.withdraw(self)


def needed_by(plan: Plan, guided: bool, perturbed: bool) -> tuple[tuple[int, ...], ...]:
    """For each row after the opening one the positions of the branches it reads (fastdiff.engine.crowd)."""
    rows = []
    for row in plan.rows[1:]:
        names = [CONDITIONAL]
        if row.estimate == "unguided" or (row.gain != 0.0 and guided):
            names.append(UNGUIDED)
        if row.perturb != 0.0 and perturbed:
            names.append(PERTURBED)
        rows.append(() if row.reused else tuple(POSITIONS[name] for name in names))
    return tuple(rows)
