"""What other libraries call our predictions and schedules, for the error an unknown name gets. May import: nothing.

Their names are diffusers' prediction_type, beta_schedule and the methods of its schedulers, guided-diffusion's model
means, score_sde's classes and what papers say; compared in small letters without punctuation.
"""

from __future__ import annotations

import re

_PREDICTIONS = {
    "eps": ("epsilon", "noise", "prednoise", "prednoises", "epsprediction", "epsilonprediction", "noiseprediction"),
    "x0": ("sample", "startx", "xstart", "predx0", "x0prediction", "dataprediction", "denoised"),
    "v": ("vprediction", "vpred", "predv"),
    "flow": ("flowprediction", "flowmatching", "flowvelocity", "rectifiedflow", "velocity"),
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
