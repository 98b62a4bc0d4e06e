"""What a diffusers-style scheduler says of its levels and of its network's output, read off its attributes.

May import: process. Nothing here changes a table: a reading only chooses the form D = P x + Q F in which a captured
row is written, so that callbacks see the denoised estimate and clamps apply to it.
"""

from __future__ import annotations

import math
from typing import Any

from fastdiff.process import predictions
from fastdiff.process.schedules import CLEAN, Level

KINDS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}
LARGEST = 1e3  # of P and Q: beyond, alpha is nearly 0 and fp32 would lose the sum


def kind(scheduler: Any) -> str | None:
    """The network's prediction type by our names; None where the scheduler does not say."""
    if hasattr(scheduler, "precondition_outputs"):
        return "edm"
    name = _config(scheduler, "prediction_type")
    if name is None and any(part in type(scheduler).__name__ for part in ("Flow", "AncestralRF")):
        return "flow"
    return KINDS.get(name) if isinstance(name, str) else None


def level(scheduler: Any, i: int, time: float) -> Level | None:
    """The level of evaluation i, from `sigmas` or `alphas_cumprod`; None where there is neither."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) > i:
        return _level_of_sigma(scheduler, sigmas[i], time)
    bars = getattr(scheduler, "alphas_cumprod", None)
    if bars is not None and float(time).is_integer() and 0 <= time < len(bars):
        return _level_of_bar(float(bars[int(time)]), time)
    return None


def last_level(scheduler: Any) -> Level:
    """Where the sample ends."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas):
        return CLEAN if float(sigmas[-1]) == 0.0 else _level_of_sigma(scheduler, sigmas[-1], 0.0)
    bar = getattr(scheduler, "final_alpha_cumprod", None)
    return CLEAN if bar is None or float(bar) == 1.0 else _level_of_bar(float(bar), 0.0)


def level_of(kind: str | None, P: float, Q: float, c_in: float) -> Level | None:
    """The level at which a network of this kind is read as D = P x + Q F; None where P and Q do not tell."""
    if kind == "eps" and P > 0:
        return Level(1.0 / P, -Q / P)
    if kind == "flow" and P == 1.0:
        return Level(1.0 + Q, -Q)
    if kind == "v" and c_in == 1.0:
        return Level(P, -Q)
    if kind == "v" and P > 0:  # a network in unit-variance coordinates, a state with alpha = 1
        return Level(1.0, -Q / math.sqrt(P))
    return None


def fold(scheduler: Any, where: Level | None, c_in: float) -> tuple[float, float]:
    """(P, Q) of D = P x + Q F from the scheduler's prediction type; (0, 1), D = F, where it does not say."""
    name = kind(scheduler)
    if name is None or where is None or name == "x0":
        return 0.0, 1.0
    try:
        if name == "edm":
            read = predictions.coefficients("edm", where, None, float(_config(scheduler, "sigma_data") or 0.5))
            return _bounded(read.P, read.Q)
        if name in ("eps", "v") and c_in != 1.0:
            unit = math.hypot(where.alpha, where.sigma)
            read = predictions.coefficients(name, Level(where.alpha / unit, where.sigma / unit), None)
            return _bounded(read.P / unit, read.Q)
        read = predictions.coefficients(name, where, None)
    except ValueError:
        return 0.0, 1.0
    return _bounded(read.P, read.Q)


def _bounded(P: float, Q: float) -> tuple[float, float]:
    usable = math.isfinite(P) and math.isfinite(Q) and Q != 0.0 and max(abs(P), abs(Q)) <= LARGEST
    return (P, Q) if usable else (0.0, 1.0)


def _level_of_sigma(scheduler: Any, sigma: Any, time: float) -> Level:
    split = getattr(scheduler, "_sigma_to_alpha_sigma_t", None)
    if split is not None:
        alpha, scaled = split(sigma)
        return Level(float(alpha), float(scaled), time)
    if kind(scheduler) == "flow":
        return Level(1.0 - float(sigma), float(sigma), time)
    if kind(scheduler) is None and float(getattr(scheduler, "init_noise_sigma", 1.0)) == 1.0:
        return Level(1.0, math.nan, time)  # sigmas of an unknown path: they need not be noise levels
    return Level(1.0, float(sigma), time)


def _level_of_bar(bar: float, time: float) -> Level:
    return Level(math.sqrt(bar), math.sqrt(max(1.0 - bar, 0.0)), time)


def _config(scheduler: Any, key: str) -> Any:
    config: Any = getattr(scheduler, "config", {})
    return config.get(key) if hasattr(config, "get") else getattr(config, key, None)
