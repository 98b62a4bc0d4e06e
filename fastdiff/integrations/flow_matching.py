"""Velocity networks of flow_matching, torchcfm and their like, in either direction of time, as Denoisers.

May import: models, process. On the straight path between noise n and data x0 a velocity network returns
E[x0 - n | x] where its time leads to the data, E[n - x0 | x] where it leads to the noise; ours is the latter, on
rectified_flow, where time 1 is noise. What is equal, and what differs: docs/flow_matching.md.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastdiff.models.denoiser import Denoiser, Misfit, ask
from fastdiff.process import schedules

CALLS = ("x, t", "t, x", "x=, t=")
TIMES = ("t", "time", "times", "timestep", "timesteps")


class Network(nn.Module):
    """A velocity network shown its own time, its output turned towards the noise."""

    def __init__(self, model: Callable[..., Any], call: str, data_at: int, time_scale: float) -> None:
        super().__init__()
        self.model, self.call, self.data_at, self.time_scale = model, call, data_at, time_scale

    def forward(self, x: Tensor, t: Tensor, *given: Any, **conditions: Any) -> Tensor:
        """E[n - x0 | x], [B, *S], at x [B, *S] and time t [B], 1 at the noise."""
        own = self.time_scale * (1.0 - t if self.data_at else t)
        try:
            return self._ask(x, own, given, conditions)
        except Misfit as error:
            hint = f"it was called as {self.call!r}; flow_matching.wrap(model, call=...) has " + ", ".join(
                repr(call) for call in CALLS if call != self.call
            )
            raise Misfit(f"{error} ({hint})") from error

    def _ask(self, x: Tensor, own: Tensor, given: tuple[Any, ...], conditions: dict[str, Any]) -> Tensor:
        if self.call == "x, t":
            velocity: Tensor = ask(self.model, x, own, *given, **conditions)
        elif self.call == "t, x":
            velocity = ask(self.model, own, x, *given, **conditions)
        elif given:
            raise TypeError("a network called model(x=x, t=t) takes its conditions by name: cond={name: tensor}")
        else:
            velocity = ask(self.model, x=x, t=own, **conditions)
        return -velocity if self.data_at else velocity


def wrap(
    model: nn.Module | Callable[..., Any], *, call: str = "x=, t=", data_at: int = 1, time_scale: float = 1.0
) -> Denoiser:
    """A Denoiser of a velocity network on the straight path (CondOT; rectified flow; OT-CFM with sigma = 0).

    call: how it is called: "x=, t=" by name, as flow_matching's ModelWrapper is; "t, x", as torchcfm's models are; or
    "x, t". data_at: at which end of its clock, 1 or 0, the data are; both libraries have them at 1. time_scale:
    multiplies the time it is shown, 999 in the first code of rectified flow. Raises ValueError or TypeError for
    what does not fit.
    """
    if not callable(model):
        raise TypeError(f"flow_matching.wrap needs a velocity network, got {type(model).__name__}")
    if type(model).__name__ == "ScheduleTransformedModel":
        raise ValueError(
            "a ScheduleTransformedModel takes one time for the whole batch, and would broadcast one per sample over "
            "the wrong axis; give wrap(lambda x, t: model(x=x, t=t[0]))"
        )
    if call not in CALLS:
        raise ValueError(f"call must be one of {', '.join(map(repr, CALLS))}: how the network is called; got {call!r}")
    _check_order(model, call)
    if data_at not in (0, 1):
        raise ValueError(f"data_at must be 0 or 1, the time at which the path is at the data, got {data_at!r}")
    if not (isinstance(time_scale, int | float) and math.isfinite(time_scale) and time_scale > 0):
        raise ValueError(f"time_scale must be finite and above 0, got {time_scale!r}")
    return Denoiser(
        Network(model, call, int(data_at), float(time_scale)),
        schedules.rectified_flow(),
        "flow",
    )


def _check_order(model: Callable[..., Any], call: str) -> None:
    """ValueError where the network's first parameter bears the name of what `call` gives second."""
    try:
        names = [*inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters]
    except (TypeError, ValueError):
        return
    first = names[0] if names else ""
    if (call == "x, t" and first in TIMES) or (call == "t, x" and first in ("x", "xt", "x_t")):
        other = "t, x" if call == "x, t" else "x, t"
        raise ValueError(
            f"call={call!r} gives the network state and time in the wrong order, it takes ({', '.join(names)}): write "
            f"flow_matching.wrap(model, call={other!r})"
        )
