"""What a caller gives a Sampler, checked: that plan and networks fit each other, shapes, numbers per sample.

May import: compiler, models.denoiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fastdiff.compiler.plan import Plan
from fastdiff.models.denoiser import Condition, Denoiser


def check_fits(plan: Plan, model: Denoiser) -> None:
    """TypeError or ValueError unless this is a plan and a network that can be asked at its levels and times."""
    if not isinstance(plan, Plan):
        raise TypeError(
            f"Sampler needs a plan first, got {type(plan).__name__}; make it with fd.plan(solver, model.schedule, ...)"
        )
    if not isinstance(model, Denoiser):
        raise TypeError(f"Sampler needs a Denoiser second, got {type(model).__name__}; wrap the network: fd.Denoiser")
    if plan.schedule is not None and plan.schedule != model.schedule:
        raise ValueError(
            f"the plan is made for schedule {plan.schedule!r}, the model was trained on {model.schedule!r}; "
            "make the plan with schedule=model.schedule"
        )
    unread = any(row.level is not None and row.reading is None for row in plan.rows)
    if plan.schedule is None and unread and model.schedule.name != "edm":
        raise ValueError(
            f"the plan has bare levels, at which the network is shown sigma, the model was trained on "
            f"{model.schedule!r}; give trace(...) schedule=model.schedule"
        )
    if model.schedule.shared is not None and any(row.reading is not None for row in plan.rows):
        raise ValueError(
            f"the plan shows the network the times of the scheduler it was captured from, the model shares times: "
            f"{model.schedule!r}; use a plan made with schedule=model.schedule"
        )


def batch_shape(shape: Sequence[int]) -> torch.Size:
    """`shape` if it is [batch, *sample]. Raises TypeError or ValueError otherwise."""
    if isinstance(shape, int):
        raise TypeError(f"shape must be [batch, *sample], for example (4, 3, 32, 32), got {shape}")
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"shape must be [batch, *sample] with every size >= 1, got {tuple(shape)}")
    if not all(isinstance(size, Integral) for size in shape):
        raise TypeError(f"shape must hold integers, got {tuple(shape)}")
    return torch.Size(shape)


def check_channels(model: Denoiser, shape: Sequence[int], batched: bool) -> None:
    """ValueError where the network is known to take images of some channels and `shape` is not of such images.

    shape: [B, *S] of a batch, or [*S] of one sample.
    """
    channels, sample = model.channels, shape[1:] if batched else shape
    if channels is None or (len(sample) == 3 and sample[0] == channels):
        return
    expected = f"(batch, {channels}, height, width)" if batched else f"({channels}, height, width), without a batch"
    alone = f"; one sample is {(1, *shape)}" if batched and len(shape) == 3 and shape[0] == channels else ""
    raise ValueError(f"shape must be {expected}: the network takes {channels} channels; got {tuple(shape)}{alone}")


def settle_guidance(
    guidance: float | Sequence[float] | Tensor | None,
    uncond: Condition,
    reads_unguided: bool,
    guide: Denoiser | None = None,
) -> float | Sequence[float] | Tensor:
    """`guidance`, 1.0 where it was not given; then ValueError for what only a branch that nobody asks for has.

    uncond, guide: its condition, and its network where one run asks for it alone.
    """
    if guidance is not None:
        return guidance
    if not reads_unguided:
        _refuse_unasked("unguided", "guidance", "2.0 say (1.0 says that it is off)", uncond=uncond, guide=guide)
    return 1.0


def settle_perturbation(
    scale: float | Sequence[float] | Tensor | None, perturbed_cond: Condition, perturbed: Denoiser | None = None
) -> float | Sequence[float] | Tensor:
    """`scale`, 0.0 where it was not given; then ValueError as `settle_guidance`."""
    if scale is not None:
        return scale
    _refuse_unasked(
        "perturbed", "perturbed_scale", "1.0 say (0.0 says that it is off)", perturbed_cond=perturbed_cond,
        perturbed=perturbed,
    )  # fmt: skip
    return 0.0


def _refuse_unasked(branch: str, amount: str, values: str, **given: Condition | Denoiser) -> None:
    for name, value in given.items():
        if value is not None:
            what = "network" if isinstance(value, Denoiser) else "condition"
            raise ValueError(
                f"{name}= is the {what} of the {branch} branch, which is evaluated with {amount} only: give {amount}= "
                f"too, {values}, or leave {name}= out"
            )


def check_alike(name: str, other: Denoiser, model: Denoiser) -> None:
    """TypeError or ValueError unless the outputs of the two networks may be added up."""
    if not isinstance(other, Denoiser):
        raise TypeError(f"{name} must be a Denoiser, got {type(other).__name__}; wrap the network as the model is")
    for what in ("schedule", "prediction", "sigma_data", "device"):
        if _comparable(getattr(other, what)) != _comparable(getattr(model, what)):
            raise ValueError(
                f"{name} has {what} {getattr(other, what)!r}, the model {getattr(model, what)!r}: outputs of the two "
                "are combined, so they must mean the same"
            )


def _comparable(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda" and value.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return value


def number_per_sample(name: str, given: float | Sequence[float] | Tensor, batch: int) -> list[float]:
    """One finite number per sample, from one for all or one for each. Raises ValueError otherwise."""
    try:
        found = torch.as_tensor(given, dtype=torch.float64).flatten()
        values = [] if found.is_meta else found.tolist()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number or one per sample, got {given!r}") from None
    if isinstance(given, Tensor) and given.is_meta:
        raise ValueError(
            f"{name} is a tensor on 'meta', which has no values to draw with: give a number, or a tensor made on "
            "another device"
        )
    if found.is_meta:
        raise ValueError(
            "torch makes tensors on 'meta' here, which have no values to draw with: call this outside "
            "torch.device('meta') (or after torch.set_default_device('cpu'))"
        )
    if len(values) not in (1, batch):
        raise ValueError(f"{name} must be one number or one per sample ({batch}), got {len(values)}")
    if not all(abs(v) <= torch.finfo(torch.float32).max for v in values):
        raise ValueError(f"{name} must be finite in float32, got {given}")
    return values * batch if len(values) == 1 else values
