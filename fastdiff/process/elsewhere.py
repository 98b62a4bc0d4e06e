"""What other libraries call our predictions, objectives, schedules and arguments, for the error an unknown name gets.

Their names are diffusers' prediction_type, beta_schedule and the methods of its schedulers, guided-diffusion's model
means, score_sde's classes and what papers say; compared in small letters without punctuation. May import: nothing.
"""

from __future__ import annotations

import re

_PREDICTIONS = {
    "eps": ("epsilon", "noise", "prednoise", "prednoises", "epsprediction", "epsilonprediction", "noiseprediction"),
    "x0": ("sample", "startx", "xstart", "predx0", "x0prediction", "dataprediction", "denoised"),
    "v": ("vprediction", "vpred", "predv"),
    "flow": ("flowprediction", "flowmatching", "flowvelocity", "rectifiedflow", "velocity"),
}
# of the objectives that are not called like what their network predicts
_OBJECTIVES = {
    "ddpm": ("eps", *_PREDICTIONS["eps"], "simple", "mse"),
    "x0": _PREDICTIONS["x0"],
    "v": _PREDICTIONS["v"],
    "flow": ("reflow", *_PREDICTIONS["flow"]),
    "cfm": ("conditionalflowmatching",),
    "transport_cfm": ("otcfm", "minibatchot"),
    "interpolant": ("stochasticinterpolant", "stochasticinterpolants"),
    "min_snr": ("minsnrgamma",),
    "hybrid": ("iddpm", "improveddiffusion", "learnedvariance", "rescaledkl"),
    "elbo": ("vlb", "kl"),
    "dsm": ("denoisingscorematching",),
    "implicit": ("slicedscorematching", "implicitscorematching"),
}
_SCHEDULES = {
    "cosine": ("squaredcoscapv2", "squaredcos", "cosinebeta"),
    "linear": ("ddpm", "linearbeta"),
    "scaled_linear": ("stablediffusion", "sd", "sdxl", "latentdiffusion", "sqrtlinear"),
    "rectified_flow": ("flow", "flowmatching", "flowmatch", "rf", "sd3", "flux"),
    "vp": ("vpsde",),
    "sub_vp": ("subvpsde",),
    "ve": ("vesde",),
}


_ARGUMENTS = {
    "levels": "write grid=[...], descending times on the schedule's clock",
    "num_inference_steps": "write steps=",
    "num_steps": "write steps=",
    "sigmas": "write grid=[...], grid_options={'unit': 'rho'}, descending sigma/alpha; those of a flow, where sigma is "
    "the time, are grid=[...] alone",
    "timesteps": "write grid=[...], descending times on the schedule's clock: 0 .. 999 of a discrete one of 1000 "
    "steps, 0 to 1 of a flow",
}


def argument(name: str) -> str:
    """What to write instead of another library's argument of a plan; "" where none is known."""
    return _ARGUMENTS.get(name, "")


def objective(name: object) -> str:
    """A sentence that says which of our objectives another library's name stands for; "" where none is known."""
    return _meant("objective", name, _OBJECTIVES)


def prediction(name: object) -> str:
    """A sentence that says which of our predictions another library's name stands for; "" where none is known."""
    return _meant("prediction", name, _PREDICTIONS)


def schedule(name: object) -> str:
    """The same of a schedule."""
    return _meant("schedule", name, _SCHEDULES)


def _meant(kind: str, name: object, theirs: dict[str, tuple[str, ...]]) -> str:
    plain = re.sub(r"[^a-z0-9]", "", str(name).lower())
    known = {their: ours for ours, names in theirs.items() for their in (*names, ours.replace("_", ""))}
    return f" Did you mean {kind}={known[plain]!r}?" if plain in known else ""
