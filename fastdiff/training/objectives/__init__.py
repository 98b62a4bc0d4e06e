"""Training objectives by name: (schedule, prediction, distribution of times, weighting, target).

    objective = objectives.get("edm", flip=True)
    loss = objective.loss(network, x0, labels, seeds, step)       # loss.mean.backward()
    model = objective.denoiser(net)
May import: process, engine, models.denoiser.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from fastdiff.errors import unknown_name
from fastdiff.process import elsewhere, schedules

from . import pairing, times, weightings
from .base import Draw, Loss, Network, Objective
from .classifier import Classifier
from .interpolants import Interpolant
from .log_variance import WithLogVariance
from .regression import Regression, SquaredError
from .score_matching import Implicit, explicit_score_matching
from .variational import Bound, Hybrid, bound

__all__ = [
    "Bound",
    "Classifier",
    "Draw",
    "Hybrid",
    "Implicit",
    "Interpolant",
    "Loss",
    "Network",
    "Objective",
    "Regression",
    "SquaredError",
    "WithLogVariance",
    "bound",
    "explicit_score_matching",
    "from_dict",
    "get",
    "names",
    "pairing",
    "times",
    "weightings",
]

_NCSN = tuple(np.geomspace(0.01, 1.0, 10).tolist())  # Song & Ermon 2019, section 5
_LEVEL = 0.1

# name -> class, and the options that make it what the name says
_KNOWN: dict[str, tuple[type[Objective], dict[str, Any]]] = {
    "ddpm": (Regression, {}),  # Ho et al. 2020, eq. 14
    "x0": (Regression, {"prediction": "x0"}),
    "v": (Regression, {"prediction": "v", "schedule": "cosine"}),  # Salimans & Ho 2022
    "min_snr": (Regression, {"weighting": "min_snr"}),  # Hang et al. 2023
    "edm": (Regression, {"prediction": "edm", "schedule": "edm", "times": "lognormal"}),  # Karras et al. 2022
    "elbo": (Regression, {"weighting": "elbo"}),  # Ho et al. 2020, eq. 5
    "hybrid": (Hybrid, {"schedule": "cosine"}),  # Nichol & Dhariwal 2021
    "flow": (Regression, {"prediction": "flow", "schedule": "rectified_flow"}),  # Liu et al. 2023
    "iadb": (
        Regression,
        {"prediction": "flow", "schedule": "rectified_flow"},
    ),  # Heitz et al. 2023: alpha = 1 - t, D = -F
    "cfm": (Interpolant, {"sigma_min": 1e-4}),  # Lipman et al. 2023
    "transport_cfm": (Interpolant, {"pairing": "transport"}),  # Pooladian et al. 2023; Tong et al. 2024
    "vp_flow": (Interpolant, {"path": "trigonometric"}),  # Albergo & Vanden-Eijnden 2023
    "interpolant": (  # Albergo et al. 2023
        Interpolant,
        {"gamma": 1.0, "times": times.Uniform(low=1e-3, high=1 - 1e-3)},
    ),
    "implicit": (Implicit, {}),  # Hyvarinen 2005; Song et al. 2019
    "classifier": (Classifier, {}),  # Dhariwal & Nichol 2021
    "dsm": (  # Vincent 2011: one level
        Regression,
        {"prediction": "score", "schedule": "edm", "times": times.Discrete((_LEVEL,))},
    ),
    "ncsn": (  # Song & Ermon 2019: many, lambda = sigma^2
        Regression,
        {
            "prediction": "score",
            "schedule": schedules.edm(_NCSN[0], _NCSN[-1]),
            "times": times.Discrete(_NCSN),
            "weighting": "eps",
        },
    ),
}


def names() -> list[str]:
    """Names that `get` knows."""
    return list(_KNOWN)


def get(name: str, /, **options: Any) -> Objective:
    """The objective of this name, with options of its class.

    Raises ValueError for an unknown option or name, saying what another library's name is called here.
    """
    if name not in _KNOWN:
        raise unknown_name("objective", name, names(), elsewhere.objective(name))
    kind, usual = _KNOWN[name]
    known = [entry.name for entry in fields(kind) if entry.name != "name"]
    for option in options:
        if option not in known:
            raise unknown_name(f"option of objective {name!r}", option, known)
    return kind(name, **(usual | options))


def from_dict(data: Mapping[str, Any]) -> Objective:
    """The objective that `to_dict` wrote. Raises ValueError on anything else."""
    if not isinstance(data, Mapping) or "name" not in data:
        raise ValueError(f"An objective's JSON is a mapping with its name, got {repr(data)[:200]}")
    return get(data["name"], **{key: value for key, value in data.items() if key != "name"})
