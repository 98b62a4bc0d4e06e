"""How an adaptive solver chooses its next step from the error of the last ones. May import: nothing of the package."""

from __future__ import annotations

import math
from dataclasses import dataclass

TINY = 1e-8  # added to an error, so that none is not a division by zero
HUGE = 1e12  # stands for an error that overflowed, so that the step shrinks and is tried again


@dataclass(frozen=True)
class Control:
    """A PID controller of the step (Söderlind 2003) with its smooth limiter and its rule of acceptance.

    With e_n the error in units of the tolerance, over aim, and k the order in which it falls with the step:
        f = e_n^(-(P + I + D)/k) e_{n-1}^((P + 2D)/k) e_{n-2}^(-D/k),   h' = h (1 + atan(f - 1)),
    e_{n-1}, e_{n-2} those of accepted steps. A step is accepted where h'/h >= accept_safety: I = 1, P = D = 0 is the
    textbook rule, P > 0 a PI controller.
    """

    order: float
    h_init: float
    pcoeff: float
    icoeff: float
    dcoeff: float
    accept_safety: float
    aim: float = 1.0


class StepSize:
    """The controller at work on one sample: `h`, and the errors it remembers."""

    def __init__(self, control: Control) -> None:
        self.h = control.h_init
        self._control = control
        self._past: tuple[float, float] | None = None

    def judge(self, error: float) -> bool:
        """Whether a step of this error (in units of the tolerance) is accepted; sets the next `h`."""
        c = self._control
        error = HUGE if math.isnan(error) else min(error, HUGE)
        inverse = 1.0 / (error / c.aim + TINY)
        before, earlier = self._past or (inverse, inverse)
        factor = inverse ** ((c.pcoeff + c.icoeff + c.dcoeff) / c.order)
        factor *= before ** (-(c.pcoeff + 2.0 * c.dcoeff) / c.order) * earlier ** (c.dcoeff / c.order)
        factor = 1.0 + math.atan(factor - 1.0)
        accepted = factor >= c.accept_safety
        if accepted:
            self._past = (inverse, before)
        elif self._past is None:
            self._past = (before, earlier)
        self.h *= factor
        return accepted
