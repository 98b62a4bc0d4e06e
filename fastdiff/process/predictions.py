"""What a network predicts, as x0 = P x + Q F.

Every prediction is a combination of x0 and the unit noise n: x0 = (1, 0), eps = (0, 1), v = (-sigma, alpha),
score = (0, -1/sigma), flow = (-1, 1); and so is the state, x = (alpha, sigma). Two of them give all the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import unknown_name
from . import elsewhere
from .clocks import Level, Schedule

SIGMA_DATA = 0.5  # Karras et al. 2022, section 5: images scaled to [-1, 1]
SAME = 1e-12  # relative; levels this close are in the same coordinates
_KINDS = ("eps", "x0", "v", "score", "flow")


@dataclass(frozen=True)
class Prediction:
    """How to call a network at a level and read its output F: x0 = P x + Q F, F = network(c_in x, time).

    P, Q: scalars. c_in: what multiplies the plan's x to make the network's input. time: what the network is shown.
    """

    P: float
    Q: float
    c_in: float
    time: float


def names() -> list[str]:
    """Prediction kinds that `coefficients` knows."""
    return [*_KINDS, "edm"]


def unknown(kind: object, known: Iterable[str] | None = None) -> ValueError:
    """The error for a name that is none of ours, or of those `known`; it says what another library's stands for."""
    return unknown_name("prediction", kind, names() if known is None else known, elsewhere.prediction(kind))


def coefficients(kind: str, level: Level, schedule: Schedule | None, sigma_data: float | None = None) -> Prediction:
    """P, Q, c_in and the model time of one level.

    eps 1/alpha, -sigma/alpha; x0 0, 1; score 1/alpha, sigma^2/alpha; v (alpha, -sigma)/(alpha^2 + sigma^2);
    flow (1, -sigma)/(alpha + sigma); edm: Karras et al. 2022, Table 1, in x/alpha.

    kind: eps, x0, v (= alpha n - sigma x0), score, flow (= n - x0) or edm.
    level: in the plan's coordinates. schedule: the one the network was trained on. Where the two differ in scale
    (a plan with alpha = 1 and a network trained with "vp"), c_in takes x to the schedule's coordinates, in which
    F is defined, and P contains it. None: the network lives in the plan's coordinates and is shown level.time.
    The "edm" network is always shown x/alpha, whatever the schedule.
    sigma_data: of "edm" only, 0.5 if not given.
    Raises ValueError for an unknown kind, and where F does not determine x0.
    """
    if kind == "edm":
        if schedule is not None and schedule.shared is not None:
            raise ValueError(
                f"An 'edm' network is shown log(sigma/alpha)/4, so {schedule!r} has no time to share. Use the schedule "
                "without time_shared, or another prediction."
            )
        return _edm(level, data_scale(sigma_data))
    if kind not in _KINDS:
        raise unknown(kind)
    if sigma_data is not None:
        raise ValueError(f"sigma_data belongs to prediction 'edm', got it with {kind!r}. Leave it out.")
    own, c_in = (level, 1.0) if schedule is None else _own_level(level, schedule)
    p, q = _combination(own, kind, "x0")
    return Prediction(p * c_in, q, c_in, level.time if schedule is None else _model_time(level, schedule))


def convert(value: Any, x: Any, level: Level, source: str, target: str) -> Any:
    """The same prediction in another form: `value` of kind `source` at state `x` and `level`, as kind `target`.

    value, x: arrays of one shape, or anything that can be added and multiplied by a float.
    Raises ValueError where `source` does not determine `target` at this level.
    """
    for kind in (source, target):
        if kind not in _KINDS:
            raise unknown(kind, _KINDS)
    p, q = _combination(level, source, target)
    return p * x + q * value


def data_scale(sigma_data: float | None) -> float:
    """The standard deviation that an "edm" network takes its data to have."""
    return SIGMA_DATA if sigma_data is None else sigma_data


def targets(
    kind: str, alpha: ArrayLike, sigma: ArrayLike, sigma_data: float | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(a, b) with F = a x0 + b n: what a network of this kind is trained to answer about x = alpha x0 + sigma n.

    kind, sigma_data: as in `coefficients`. alpha, sigma: one shape, which a and b have too.
    Raises ValueError for an unknown kind and where F is not finite.
    """
    alpha, sigma = np.asarray(alpha, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
    if kind not in names():
        raise unknown(kind)
    if (kind == "edm" and not (alpha * sigma > 0).all()) or (kind == "score" and not (sigma > 0).all()):
        raise ValueError(
            f"A {kind!r} network has no finite target at {'sigma = 0' if (sigma <= 0).any() else 'alpha = 0'}. "
            "Draw times away from that end of the schedule."
        )
    if kind == "edm":
        scale = data_scale(sigma_data)
        spread = np.hypot(sigma, scale * alpha)
        return sigma / (scale * spread), -scale * alpha / spread
    if kind == "v":
        return -sigma, alpha
    if kind == "score":
        return np.zeros_like(alpha), -1 / sigma
    parts = {"eps": (0.0, 1.0), "x0": (1.0, 0.0), "flow": (-1.0, 1.0)}[kind]
    return np.full_like(alpha, parts[0]), np.full_like(alpha, parts[1])


def gradient_gain(
    kind: str, alpha: ArrayLike, sigma: ArrayLike, sigma_data: float | None = None
) -> NDArray[np.float64]:
    """k with F + k g the same network's answer where x0 is moved by (sigma^2/alpha) g, at the same x.

    With g = grad_x log p(y | x) that is the answer given y (Dhariwal & Nichol 2021, Algorithm 2: k = -sigma for eps).
    Of F = a x0 + b n and n = (x - alpha x0)/sigma: k = a sigma^2/alpha - b sigma. 0 at sigma = 0, and at alpha = 0,
    where x says nothing of y. kind, sigma_data: as in `coefficients`. alpha, sigma: one shape, which k has too.
    """
    alpha, sigma = np.asarray(alpha, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
    noisy = alpha * sigma > 0
    a, b = targets(kind, alpha[noisy], sigma[noisy], sigma_data)
    gain = np.zeros_like(alpha)
    gain[noisy] = a * sigma[noisy] ** 2 / alpha[noisy] - b * sigma[noisy]
    return gain


def _combination(level: Level, source: str, target: str) -> tuple[float, float]:
    """(p, q) with target = p x + q source: Cramer's rule in the basis (x0, n)."""
    if source == target:
        return 0.0, 1.0
    alpha, sigma = level.alpha, level.sigma
    a, b = _parts(source, level)
    c, d = _parts(target, level)
    determinant = alpha * b - sigma * a
    if determinant == 0 or (target == "score" and sigma == 0):
        raise ValueError(_undetermined(level, source, target))
    p = (c * b - d * a) / determinant
    q = (alpha * d - sigma * c) / determinant
    if source == "score":
        q *= -sigma
    if target == "score":
        p, q = p / -sigma, q / -sigma
    return p + 0.0, q + 0.0  # no negative zeros


def _parts(kind: str, level: Level) -> tuple[float, float]:
    """(x0, n) parts of a prediction; of the score, those of eps = -sigma score, which stay finite at sigma = 0."""
    if kind == "x0":
        return 1.0, 0.0
    if kind == "v":
        return -level.sigma, level.alpha
    return (-1.0, 1.0) if kind == "flow" else (0.0, 1.0)


def _own_level(level: Level, schedule: Schedule) -> tuple[Level, float]:
    """The level in the schedule's own coordinates, and the scale that leads there."""
    alpha, sigma = (float(scale) for scale in schedule.scales(level.rho))
    c_in = math.hypot(alpha, sigma) / math.hypot(level.alpha, level.sigma)
    if not math.isfinite(c_in):
        raise ValueError(f"{schedule!r} has no level with alpha = 0 ({level}). Start the grid at a finite sigma/alpha.")
    if abs(c_in - 1) < SAME:
        return level, 1.0
    return Level(alpha, sigma, level.time), c_in


def _model_time(level: Level, schedule: Schedule) -> float:
    if level.sigma == 0:
        return schedule.time_range[0]
    if schedule.open_top and level.time > schedule.time_range[1]:
        return level.time
    has_time = not math.isnan(level.time)
    return float(schedule.model_time(level.time if has_time else schedule.time_from_rho(level.rho, clip=True)))


def _edm(level: Level, sigma_data: float) -> Prediction:
    """c_skip, c_out, c_in, c_noise of Karras et al. 2022, Table 1, for x/alpha at rho = sigma/alpha."""
    if not (math.isfinite(sigma_data) and sigma_data > 0):
        raise ValueError(f"sigma_data must be finite and above 0, got {sigma_data!r}.")
    if level.alpha == 0 or level.sigma == 0:
        raise ValueError(
            f"An 'edm' network is shown log(sigma/alpha)/4, which is not finite at {level}. "
            "Use a grid with 0 < sigma/alpha < inf."
        )
    alpha, sigma = level.alpha, level.sigma
    spread = math.hypot(sigma, sigma_data * alpha)
    return Prediction(
        P=sigma_data**2 * alpha / spread**2,
        Q=sigma * sigma_data / spread,
        c_in=1 / spread,
        time=float(np.log(level.rho)) / 4,
    )


def _undetermined(level: Level, source: str, target: str) -> str:
    if level.alpha == 0:
        return (
            f"At alpha = 0 (zero signal-to-noise ratio) {source!r} says nothing about {target!r}. Use a network that "
            "predicts 'v' or 'x0', or a grid that does not start at zero SNR."
        )
    return f"At sigma = 0 {source!r} does not determine {target!r} ({level}). Convert at a level with sigma > 0."
