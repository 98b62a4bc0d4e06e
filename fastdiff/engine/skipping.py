"""An approximation: samples whose path is smooth skip evaluations of the network, each as it finds.

May import: measure, buffers, branches, crowd, compiler. AdaptiveDiffusion (Ye et al.
2024): with d_i the mean of |x_i - x_{i-1}| over the sample, x_i the state that row i evaluates, row i takes the noise
estimate of the last row that asked where the third difference of the path is small,
    |(d_i + d_{i-2}) / 2 - d_{i-1}| <= delta d_{i-1},
at most `most` rows on end. The table holds every row twice (fastdiff.compiler.skipping.twins). The host reads d back
before each row: without it the next row is not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from fastdiff.compiler import layout as at
from fastdiff.compiler.plan import Plan
from fastdiff.engine.branches import Branches
from fastdiff.engine.buffers import Buffers, upload
from fastdiff.engine.crowd import POSITIONS, Crowd
from fastdiff.engine.measure import MeasureTensors, scratch
from fastdiff.engine.measure import bind as bind_measure

NEEDED = 3  # differences that the rule looks at


@dataclass(frozen=True)
class AdaptiveSkip:
    """Which rows of a sample skip the network; the paper's delta and most by default. delta 0 skips nothing."""

    delta: float = 0.01
    most: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.delta, bool) or not isinstance(self.delta, Real) or not 0.0 <= self.delta < math.inf:
            raise ValueError(f"AdaptiveSkip: delta must be a finite number >= 0, got {self.delta!r}")
        if isinstance(self.most, bool) or not isinstance(self.most, Integral) or self.most < 1:
            raise ValueError(f"AdaptiveSkip: most must be an integer >= 1, got {self.most!r}")


class Rule:
    """The rule for one sample: `skips(d)` for each row after the first, in order."""

    def __init__(self, skip: AdaptiveSkip) -> None:
        self._skip = skip
        self._differences: list[float] = []
        self._in_turn = 0
        self.skipped = 0

    def skips(self, difference: float) -> bool:
        """Whether the row whose state differs from the one before by this much skips the network."""
        self._differences = [*self._differences, difference][-NEEDED:]
        if len(self._differences) == NEEDED and self._in_turn < self._skip.most and self._skip.delta:
            before, middle, now = self._differences
            if abs(0.5 * (now + before) - middle) <= self._skip.delta * middle:
                self._in_turn += 1
                self.skipped += 1
                return True
        self._in_turn = 0
        return False


def check_plan(plan: Plan) -> None:
    """ValueError for a plan whose rows are not one step each."""
    if len(plan.rows) != len(plan.levels) or any(row.reused for row in plan.rows):
        raise ValueError(
            f"adaptive skipping compares the states of successive steps, and {plan.solver} evaluates the network more "
            "or less often than once in each; take a solver that evaluates once: ddim, ddpm, euler, dpmpp_2m"
        )


def solve(
    plan: Plan,
    skip: AdaptiveSkip,
    buffers: Buffers,
    branches: Branches,
    executor: str,
    after: Callable[[int], None],
) -> tuple[int, ...]:
    """Run an opened plan, twice its rows in the table, to its end; evaluations of each sample.

    after: called with the number of each row that has run.
    """
    batch, count = buffers.batch, (len(plan.rows) - 1) // 2
    crowd = Crowd.of(branches, len(buffers.model_in))
    rules = [Rule(skip) for _ in range(batch)]
    state = buffers.tensors.state
    previous, numbers = state[plan.rows[1].x].clone(), scratch(batch, state.device)
    finds = {
        x: bind_measure(MeasureTensors(state[x], previous, **numbers), at.CHANGE, executor)
        for x in {row.x for row in plan.rows[1 : count + 1]}
    }
    for i in range(count):
        row, skips = plan.rows[i + 1], [False] * batch
        if i:
            finds[row.x]()
            differences = numbers["found"][:, 0].tolist()
            skips = [rule.skips(d) for rule, d in zip(rules, differences, strict=True)]
        rows = np.array([i + count * skipped for skipped in skips], dtype=np.int32)
        upload(buffers.tensors.row, rows)
        asking = [b for b in range(batch) if not skips[b]]
        crowd.ask([POSITIONS[name] * batch + b for name in branches.needed(row) for b in asking], batch)
        crowd.advance(buffers, executor)
        after(i)
    return tuple(count - rule.skipped for rule in rules)
