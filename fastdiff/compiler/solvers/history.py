"""What a multistep sampler remembers. May import: lin, run, process."""

from __future__ import annotations

from fastdiff.compiler.lin import Lin
from fastdiff.compiler.run import Run
from fastdiff.process.schedules import Level


class History:
    """Model values, newest first, and the order they allow.

    wanted: the order asked for. lower_final: come down to order 1 over the last steps, min(order, steps left).
    to_zero: keep the order in the step to sigma = 0, which otherwise has order 1.
    A level without signal (alpha = 0) has no finite lambda and no finite rho: its value serves the step that leaves
    it and enters no polynomial afterwards, unless without_signal says that the polynomial is in another variable.
    """

    def __init__(
        self,
        run: Run,
        wanted: int,
        *,
        lower_final: bool = False,
        to_zero: bool = False,
        without_signal: bool = False,
    ) -> None:
        self._run = run
        self._wanted = wanted
        self._lower_final = lower_final
        self._to_zero = to_zero
        self._without_signal = without_signal
        self.levels: list[Level] = []
        self.values: list[Lin] = []

    def add(self, level: Level, value: Lin) -> None:
        """Remember the value at a level, and forget what no step of the wanted order will read."""
        before = zip(self.levels, self.values, strict=True)
        kept = [(known, old) for known, old in before if known.alpha > 0.0 or self._without_signal]
        kept = [(level, value), *kept][: self._wanted]
        self.levels = [known for known, _ in kept]
        self.values = [old for _, old in kept]

    def order(self, i: int, t: Level) -> int:
        """The order of step i, which ends at level t; noted on the plan where it is lower than the wanted one."""
        order, why = self._wanted, ""
        if t.sigma == 0.0 and not self._to_zero:
            order, why = 1, "the step to sigma = 0"
        if self._lower_final and self._run.steps - i < order:
            order, why = self._run.steps - i, "the last steps come down to order 1"
        if len(self.values) < order:
            order, why = len(self.values), f"{len(self.values)} model evaluations are known"
        if order < self._wanted:
            self._run.note(f"step {i} has order {order} instead of {self._wanted}: {why}")
        return order


def check_order(solver: str, order: object, highest: int, name: str = "order") -> int:
    """`order` as an integer of 1 .. highest; ValueError naming the option otherwise."""
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= highest:
        raise ValueError(f"{solver}: {name} must be an integer of 1..{highest}, got {order!r}")
    return order


def check_choice(solver: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    """ValueError unless the option's value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{solver}: {name} must be {' or '.join(map(repr, choices))}, got {value!r}")
