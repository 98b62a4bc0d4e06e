"""The pipelines whose denoising loop fastdiff can run, and what each of them does in it.

May import: torch. A pipeline is told by the class of diffusers that its `__call__` comes from, so nothing is imported
to look.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

IP_ADAPTER = {
    name: "an IP-adapter's image changes what the network is asked"
    for side in ("", "negative_")
    for name in (f"{side}ip_adapter_image", f"{side}ip_adapter_image_embeds")
}
SKIPPED_LAYERS = {"skip_guidance_layers": "it asks the network a third time in some of the steps"}


@dataclass(frozen=True, eq=False)
class Kind:
    """What a pipeline's loop does between two evaluations of its network.

    network: the attribute the network is in. branches: how it asks for guidance: None, never; "uncond first" and "cond
    first", one batch of both; "apart", one call after the other, the conditional first. scale: where the guidance
    scale is: an argument of the call, or "" for the attributes guidance_scale and guidance_rescale, which a callback
    may change. doubled: while it guides, its state is two equal halves. variance: the network may also predict a
    variance, which is cut off. scales: it scales the network's input as its scheduler says and steps the state itself.
    thousandth: the network is shown time / 1000. refused: arguments, and why.
    """

    network: str = "unet"
    branches: str | None = "uncond first"
    scale: str = ""
    doubled: bool = False
    variance: bool = False
    scales: bool = True
    thousandth: bool = False
    refused: Mapping[str, str] = field(default_factory=lambda: IP_ADAPTER)

    def clock(self, times: Tensor, dtype: torch.dtype) -> Tensor:
        """What the network is shown at these timesteps, in the pipeline's own arithmetic for latents of this dtype."""
        return times.to(dtype) / 1000 if self.thousandth else times


_FLUX = Kind("transformer", branches="apart", scale="true_cfg_scale", thousandth=True)
_SD3 = Kind("transformer", refused=IP_ADAPTER | SKIPPED_LAYERS)
KINDS: Mapping[str, Kind] = {
    "DDPMPipeline": Kind(branches=None, scales=False),
    "DDIMPipeline": Kind(branches=None),
    "DiTPipeline": Kind(
        "transformer", branches="cond first", scale="guidance_scale", doubled=True, variance=True, scales=False
    ),
    "StableDiffusionPipeline": Kind(),
    "StableDiffusionImg2ImgPipeline": Kind(),
    "StableDiffusionXLPipeline": Kind(),
    "StableDiffusionXLImg2ImgPipeline": Kind(),
    "StableDiffusion3Pipeline": _SD3,
    "StableDiffusion3Img2ImgPipeline": _SD3,
    "FluxPipeline": _FLUX,
    "FluxImg2ImgPipeline": _FLUX,
}


def kind_of(own: type) -> Kind:
    """What the loop of this class of pipelines does; TypeError, with its name, where that is not known."""
    for base in own.__mro__:
        if base.__name__ in KINDS and base.__module__.startswith("diffusers."):
            changed = [name for name in ("__call__", "progress_bar") if getattr(own, name) is not getattr(base, name)]
            if changed:
                raise TypeError(
                    f"accelerate: {own.__name__} has a {changed[0]} of its own, and only the loop of {base.__name__} "
                    f"itself is known; use that class, or pipe.scheduler = fast(type(pipe.scheduler)).from_config(...)"
                )
            return KINDS[base.__name__]
    raise TypeError(
        f"accelerate: {own.__name__} is not a pipeline whose loop is known; those are {', '.join(KINDS)}. Its "
        "scheduler can be made fast alone: fast(type(pipe.scheduler)).from_config(pipe.scheduler.config)"
    )


def interruption(base: type, pipe: Any) -> tuple[Callable[[Any], bool] | None, Any]:
    """(f, of what): f(of what) says whether somebody has set `pipe.interrupt`; f is None where there is no such thing.

    diffusers' own property reads an attribute; looking there is a tenth of what the property costs in a cold cache.
    """
    asks, in_attributes = _interruption(base)
    return asks, vars(pipe) if in_attributes else pipe


@functools.cache
def _interruption(base: Any) -> tuple[Callable[[Any], bool] | None, bool]:
    found = getattr(base, "interrupt", None)
    if found is None:
        return None, False
    theirs = found.fget.__module__.startswith("diffusers.")
    return (itemgetter("_interrupt"), True) if theirs else (found.fget, False)


class Arguments:
    """One call's arguments by name, defaults included; `given` are those that the caller wrote."""

    def __init__(self, kind: type, pipe: Any, args: tuple[Any, ...], kw: Mapping[str, Any]) -> None:
        bound = _signature(kind).bind(pipe, *args, **kw)
        self._bound = bound
        self.given = dict(bound.arguments)
        self.more: dict[str, Any] = self.given.pop("kwargs", {})
        bound.apply_defaults()

    def __getitem__(self, name: str) -> Any:
        return self._bound.arguments.get(name, self.more.get(name))

    def __setitem__(self, name: str, value: Any) -> None:
        self._bound.arguments[name] = value

    @property
    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments to call it with, the pipeline left out."""
        return self._bound.args[1:], self._bound.kwargs


@functools.cache
def _signature(kind: Any) -> inspect.Signature:
    return inspect.signature(kind.__call__)


def check(kind: Kind, name: str, arguments: Arguments, network: Any) -> None:
    """ValueError, with its name, for an argument that is not taken over; RuntimeError for a network that is not."""
    for argument, why in kind.refused.items():
        if arguments[argument] is not None:
            raise ValueError(
                f"{name}: accelerate does not take {argument}: {why}. Leave it out, or restore(pipe) before this call"
            )
    if getattr(network, "is_cache_enabled", False):
        raise RuntimeError(
            f"{name}: its {kind.network} has a cache enabled (enable_cache), which leaves evaluations out on its own; "
            f"call pipe.{kind.network}.disable_cache(), or restore(pipe) before this call"
        )
