"""score_sde's continuous models (VP, sub-VP and VE) as Denoisers.

May import: models, process. Their models are model(x, labels): for VP and sub-VP the labels are 999 t and
score = -model/std, so the model's output is the unit noise; for VE the labels are sigma and the output is the score.
What is equal, and what differs: docs/score_sde.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import unknown_name
from fastdiff.models.denoiser import Denoiser, ask
from fastdiff.process import schedules
from fastdiff.process.clocks import Schedule, VESchedule

_NAMES: dict[str, Callable[[], Schedule]] = {"vp": schedules.vp, "subvp": schedules.sub_vp, "ve": schedules.ve}
_OUTPUTS = ("eps", "score")


class Network(nn.Module):
    """`model(x, labels)` shown the schedule's time t: labels = 999 t, or sigma(t) of a VE schedule."""

    def __init__(self, model: Callable[..., Any], schedule: Schedule) -> None:
        super().__init__()
        self.model = model
        self.ends = (schedule.sigma_min, schedule.sigma_max) if isinstance(schedule, VESchedule) else None

    def forward(self, x: Tensor, t: Tensor, *given: Any, **conditions: Any) -> Tensor:
        """The model's output [B, *S] at x [B, *S] and t [B]."""
        output: Tensor = ask(self.model, x, self.labels(t), *given, **conditions)
        return output

    def labels(self, t: Tensor) -> Tensor:
        """What their `get_score_fn` shows the model at these times."""
        if self.ends is None:
            return 999.0 * t
        low, high = self.ends
        return low * torch.exp(t * math.log(high / low))


def schedule(sde: Any) -> Schedule:
    """The schedule of "vp", "subvp" or "ve" with the paper's constants, or of an object of score_sde's SDE classes."""
    if isinstance(sde, Schedule):
        if sde.name not in ("vp", "sub_vp", "ve"):
            raise ValueError(f"score_sde models are of vp, sub_vp or ve schedules, got {sde!r}; use fd.Denoiser itself")
        return sde
    if isinstance(sde, str):
        if sde not in _NAMES:
            raise unknown_name("SDE of score_sde", sde, _NAMES)
        return _NAMES[sde]()
    kind = type(sde).__name__
    if kind == "VESDE":
        return schedules.ve(float(sde.sigma_min), float(sde.sigma_max))
    if kind in ("VPSDE", "subVPSDE"):
        make = schedules.vp if kind == "VPSDE" else schedules.sub_vp
        return make(float(sde.beta_0), float(sde.beta_1) - float(sde.beta_0))
    raise TypeError(
        f"expected 'vp', 'subvp', 've', a schedule, or a VPSDE, subVPSDE or VESDE object of score_sde, got {sde!r}"
    )


def wrap(model: nn.Module | Callable[..., Any], sde: Any, *, output: str | None = None) -> Denoiser:
    """A Denoiser of `model(x, labels)` that was trained with continuous=True on this SDE.

    sde: as `schedule` takes it. output: "eps", where score = -model/std, theirs for VP and sub-VP; "score", theirs for
    VE. A score function of (x, t), as their `get_score_fn` returns it, needs no wrapping:
    fd.Denoiser(score_fn, schedule, "score"). Raises ValueError or TypeError for what does not fit.
    """
    if not callable(model):
        raise TypeError(f"score_sde.wrap needs a model(x, labels), got {type(model).__name__}")
    process = schedule(sde)
    chosen = output or ("score" if isinstance(process, VESchedule) else "eps")
    if chosen not in _OUTPUTS:
        raise unknown_name("output of a score_sde model", chosen, _OUTPUTS)
    return Denoiser(
        Network(model, process),
        process,
        chosen,
    )
