"""How the error of a prediction is weighted by level.

Errors in one prediction are those in another times a number of the level: with F = a x0 + b n, x =
alpha x0 + sigma n and d = alpha b - sigma a, an error e of F is an error (d_k / d_F) e of prediction k at the same x.
So a weighting is the prediction in whose terms the error counts, and perhaps a factor.
May import: process, reverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff.errors import unknown_name
from fastdiff.process import predictions
from fastdiff.process.schedules import Schedule

from . import reverse
from .reverse import VARIANCES

Array = NDArray[np.float64]
PLAIN = "prediction"


@dataclass(frozen=True)
class Weighting:
    """What multiplies |F - F*|^2 at a level.

    kind: "prediction": 1, whatever the network predicts. A prediction (eps, x0, v, score, flow, edm): the error in its
    terms, so "eps" of a score network is lambda = sigma^2 of NCSN, and "edm" Karras et al.'s 1/c_out^2. "min_snr":
    min(SNR, gamma) times the error of x0 (Hang et al. 2023, section 3.4), gamma 5 if not given. "elbo": the mean over
    uniform times is then what a network can gain of the variational bound, in nats per dimension. Of a discrete
    schedule it is T times L_{t-1} of Ho et al. 2020, eq. 8, with sigma_t^2 the `variance` "beta" (usual) or
    "posterior"; of a continuous one g(t)^2/2 of the score (Song et al. 2021, Maximum Likelihood Training), times the
    clock's length.
    """

    kind: str = PLAIN
    gamma: float | None = None
    variance: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in names():
            raise unknown_name("weighting", self.kind, names())
        if self.variance is not None and (self.kind != "elbo" or self.variance not in VARIANCES):
            raise ValueError(
                f"variance belongs to weighting 'elbo' and is one of {VARIANCES}; got {self.variance!r} with "
                f"{self.kind!r}"
            )
        if self.gamma is not None and (self.kind != "min_snr" or not self.gamma > 0):
            raise ValueError(
                f"gamma belongs to weighting 'min_snr' and is above 0; got {self.gamma!r} with {self.kind!r}"
            )

    def at(self, schedule: Schedule, time: Array, prediction: str, sigma_data: float | None) -> Array:
        """The weight of the error of `prediction` at these times, [B] float64."""
        if self.kind in (PLAIN, prediction):
            return np.ones_like(time)
        alpha, sigma = schedule.scales_at(time)
        kind = {"min_snr": "x0", "elbo": "eps" if schedule.steps else "score"}.get(self.kind, self.kind)
        own = _determinant(prediction, alpha, sigma, sigma_data)
        if (own == 0).any():
            raise ValueError(
                f"weighting {self.kind!r} of a {prediction!r} network is infinite at alpha = 0 or sigma = 0. Draw "
                f"times away from that end of {schedule!r}."
            )
        weight = np.square(_determinant(kind, alpha, sigma, sigma_data) / own)
        if self.kind == "min_snr":
            with np.errstate(divide="ignore"):
                snr = np.square(alpha / np.where(sigma > 0, sigma, np.nan))
            weight *= np.fmin(snr, 5.0 if self.gamma is None else self.gamma)
        return weight * self._bound(schedule, time) if self.kind == "elbo" else weight

    def _bound(self, schedule: Schedule, time: Array) -> Array:
        """Of the error of eps on a discrete schedule, of the score on a continuous one."""
        if schedule.steps is None:
            first, last = schedule.time_range
            return 0.5 * (last - first) * np.square(schedule.diffusion(time))
        index = time.astype(np.int64)
        beta, bar = reverse.betas(schedule), schedule.alpha_bar(np.arange(schedule.steps))
        variance = np.exp(reverse.log_variance(schedule, self.variance or "beta"))
        each = np.square(beta) / (2 * (1 - beta) * (1 - bar) * variance)
        return schedule.steps * each[index]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for `get`."""
        return asdict(self)


def names() -> list[str]:
    """Kinds of weighting there are."""
    return [PLAIN, *predictions.names(), "min_snr", "elbo"]


def get(weighting: str | Mapping[str, Any] | Weighting) -> Weighting:
    """The weighting: by its kind, by what `to_dict` wrote, or itself. Raises ValueError for anything else."""
    if isinstance(weighting, Weighting):
        return weighting
    try:
        return Weighting(weighting) if isinstance(weighting, str) else Weighting(**weighting)
    except TypeError as error:
        raise ValueError(f"Weighting: {error}. Its options: kind, gamma, variance.") from None


def _determinant(kind: str, alpha: Array, sigma: Array, sigma_data: float | None) -> Array:
    a, b = predictions.targets(kind, alpha, sigma, sigma_data if kind == "edm" else None)
    return alpha * b - sigma * a
