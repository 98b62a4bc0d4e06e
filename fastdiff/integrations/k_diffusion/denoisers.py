"""k-diffusion's model wrappers as networks of fastdiff's own samplers: `denoiser(wrapper)`.

May import: torch, models, process. For `sample_*` here no wrapper needs this: they call it as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.models.denoiser import Denoiser
from fastdiff.process import schedules

RAW = {"get_eps": "eps", "get_v": "v"}  # a discrete wrapper's method that calls its network, and what that predicts
SAID_BY_THE_CLASS = ("forward", "get_scalings", "sigma_to_t")  # k-diffusion's own, or the wrapper is taken as it is
OF_K_DIFFUSION = "k_diffusion.external"  # also in a program's copy of the package, comfy.k_diffusion.external


def denoiser(
    model: Callable[..., Tensor],
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    dtype: torch.dtype | None = None,
) -> Denoiser:
    """A Denoiser of `model(x, sigma, **cond) -> denoised x`, x = x0 + sigma n, for fd.sample and fd.Sampler.

    A wrapper with a discrete schedule (DiscreteEpsDDPMDenoiser, DiscreteVDDPMDenoiser, OpenAIDenoiser, CompVisDenoiser,
    CompVisVDenoiser) is opened: its sigmas are the schedule, alpha_bar = 1 / (1 + sigma^2), its network is called with
    what `sigma_to_t` gives (whole times if it quantizes), and its scalings become part of the row. Anything else, a
    subclass that does one of these otherwise too, is called as it stands, in dtype (float32 if None), on levels from
    sigma_min to sigma_max: its own `sigma_min` and `sigma_max` if it has them, else those of EDM, 0.002 and 80.
    Raises TypeError for what cannot be called, ValueError for ends that a wrapper with a schedule has already.
    """
    if not callable(model):
        raise TypeError(
            f"denoiser: expected model(x, sigma, **cond), got {type(model).__name__}, which is not callable"
        )
    kind = _raw(model)
    if kind is None:
        low, high = (_end(model, name, given) for name, given in (("sigma_min", sigma_min), ("sigma_max", sigma_max)))
        ends = {name: value for name, value in (("sigma_min", low), ("sigma_max", high)) if value is not None}
        device = _parameter(model).device if _parameter(model) is not None else None
        return Denoiser(model, schedules.edm(**ends), "x0", device=device, dtype=dtype or torch.float32)
    if sigma_min is not None or sigma_max is not None:
        raise ValueError(
            f"denoiser: {type(model).__name__} has its own sigmas; leave sigma_min and sigma_max out, and choose the "
            'levels with grid_options={"sigma_min": ..., "sigma_max": ...}'
        )
    wrapper: Any = model
    sigmas = wrapper.sigmas.detach().double().cpu().numpy()
    return Denoiser(
        getattr(wrapper, kind),
        schedules.from_alpha_bar(1.0 / (1.0 + np.square(sigmas))),
        RAW[kind],
        time_dtype=torch.long if wrapper.quantize else torch.float32,
        device=wrapper.sigmas.device,
        dtype=dtype or (torch.float32 if _parameter(model) is None else _parameter(model).dtype),
    )


def _raw(model: Any) -> str | None:
    """The method by which k-diffusion's own discrete wrapper calls its network; None for any other model."""
    if not isinstance(model, nn.Module) or not isinstance(getattr(model, "sigmas", None), Tensor):
        return None
    if not isinstance(getattr(model, "quantize", None), bool) or getattr(model, "sigma_data", None) != 1.0:
        return None
    for name in SAID_BY_THE_CLASS:
        module = getattr(getattr(type(model), name, None), "__module__", "")
        if module != OF_K_DIFFUSION and not module.endswith("." + OF_K_DIFFUSION):
            return None
    return next((name for name in RAW if hasattr(type(model), name)), None)


def _end(model: Any, name: str, given: float | None) -> float | None:
    own = getattr(model, name, None)
    return given if given is not None or own is None else float(own)


def _parameter(model: Any) -> Any:
    return next(iter(model.parameters()), None) if isinstance(model, nn.Module) else None
