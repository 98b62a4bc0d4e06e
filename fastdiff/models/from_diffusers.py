"""What a diffusers scheduler says of the network it steps, read off its config: schedule, prediction, call.

May import: torch, process. Nothing of diffusers is imported: a pipeline, a network and a scheduler are told by what
they have.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.process import schedules
from fastdiff.process.schedules import Schedule

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}
TRAINED = 1000  # times of a flow: its networks are shown t * 1000, Flux's are shown t


@dataclass(frozen=True)
class Description:
    """A network's schedule and prediction, what multiplies its clock, and what is known of its samples.

    call: what takes (x, t, **cond) as a Denoiser's network does.
    """

    call: Callable[..., Any]
    schedule: Schedule
    prediction: str
    sigma_data: float | None
    shape: tuple[int, ...] | None
    learned_variance: bool


class ByName(nn.Module):
    """A network that takes its state and time by name: `net(hidden_states=x, timestep=scale t, **cond)`."""

    def __init__(self, net: nn.Module, scale: float) -> None:
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Any:
        """x: [B, *S]; t: [B], on the schedule's clock."""
        return self.net(hidden_states=x, timestep=t * self.scale if self.scale != 1.0 else t, **cond)


def describe(source: Any, scheduler: Any = None) -> Description:
    """What is known of the network of `source`, a pipeline or the network itself, from `scheduler` or the pipeline's.

    Raises TypeError for objects that are neither and ValueError, naming the entry, for a config that says what
    fastdiff has no schedule or prediction for.
    """
    network = source if isinstance(source, nn.Module) else _component(source)
    scheduler = getattr(source, "scheduler", None) if scheduler is None else scheduler
    if getattr(scheduler, "config", None) is None:
        raise TypeError(
            f"from_diffusers needs a scheduler with a config, got {type(scheduler).__name__}; give the pipeline's, "
            "Denoiser.from_diffusers(unet, pipe.scheduler)"
        )
    schedule, prediction, sigma_data = trained_with(scheduler)
    config: Any = getattr(network, "config", {})
    channels, size = image_channels(network), _entry(config, "sample_size")
    flux = type(network).__name__.startswith("Flux")
    call: nn.Module = network
    if "timestep" not in list(inspect.signature(getattr(network, "_orig_mod", network).forward).parameters)[:2]:
        call = ByName(network, float(TRAINED) if schedule.kind == "flow" and not flux else 1.0)
    taken, given = _entry(config, "in_channels"), _entry(config, "out_channels")
    return Description(
        call,
        schedule,
        prediction,
        sigma_data,
        None if not isinstance(size, int) or channels is None else (channels, size, size),
        learned_variance=taken is not None and not flux and given == 2 * taken,
    )


def image_channels(network: Any) -> int | None:
    """C of a network of images [B, C, H, W] that is given the sample alone, by its config; None where it may not be.

    So of networks of ours and of diffusers' two-dimensional ones, unless their outputs have other channels (their
    input has a condition beside the sample then), or something stands before their forward.
    """
    network = getattr(network, "_orig_mod", network)  # of a compiled one
    own = type(network)
    known = own.__module__.startswith("fastdiff.") or (own.__module__.startswith("diffusers.") and "2D" in own.__name__)
    if not known or "forward" in vars(network) or network._forward_pre_hooks:
        return None
    config = getattr(network, "config", {})
    taken, given = _entry(config, "in_channels"), _entry(config, "out_channels")
    return taken if isinstance(taken, int) and given in (taken, 2 * taken, None) else None


def trained_with(scheduler: Any) -> tuple[Schedule, str, float | None]:
    """(schedule, prediction, sigma_data) of the networks this scheduler steps; ValueError where it has none of ours."""
    name, config = type(scheduler).__name__, scheduler.config
    if hasattr(scheduler, "precondition_outputs"):
        schedule: Schedule = schedules.edm(float(config["sigma_min"]), float(config["sigma_max"]))
        return schedule, "edm", float(config["sigma_data"])
    said = _entry(config, "prediction_type")
    if said == "flow_prediction" or _entry(config, "use_flow_sigmas") or (said is None and "Flow" in name):
        return schedules.rectified_flow(), "flow", None
    if said not in PREDICTIONS:
        raise ValueError(
            f"{name}: prediction_type {said!r} has no counterpart; known: {', '.join(PREDICTIONS)}. Give the network "
            "to fd.Denoiser with a schedule and prediction of its own"
        )
    return _discrete(name, config, scheduler), PREDICTIONS[said], None


def _discrete(name: str, config: Any, scheduler: Any) -> Schedule:
    steps, kind = int(_entry(config, "num_train_timesteps") or TRAINED), _entry(config, "beta_schedule")
    ends = _entry(config, "beta_start"), _entry(config, "beta_end")
    bars = getattr(scheduler, "alphas_cumprod", None)
    schedule: Schedule
    if _entry(config, "trained_betas") is not None:
        schedule = schedules.from_betas(torch.as_tensor(config["trained_betas"]).double().numpy())
    elif kind == "linear":
        schedule = schedules.linear(steps, *ends)
    elif kind == "scaled_linear":
        schedule = schedules.scaled_linear(steps, *ends)
    elif kind == "squaredcos_cap_v2":
        schedule = schedules.cosine(steps)
    elif isinstance(bars, Tensor):
        return schedules.from_alpha_bar(bars.double().cpu().numpy())
    else:
        raise ValueError(
            f"{name}: neither its config says how its betas were made, nor has it alphas_cumprod; give the network to "
            "fd.Denoiser with fd.schedules.from_betas(betas)"
        )
    return schedules.rescale_zero_terminal_snr(schedule) if _entry(config, "rescale_betas_zero_snr") else schedule


def _component(pipe: Any) -> nn.Module:
    for name in ("unet", "transformer"):
        network = getattr(pipe, name, None)
        if isinstance(network, nn.Module):
            return network
    raise TypeError(
        f"from_diffusers takes a pipeline with a unet or transformer, or that network itself, got {type(pipe).__name__}"
    )


def _entry(config: Any, key: str) -> Any:
    return config.get(key) if hasattr(config, "get") else getattr(config, key, None)
