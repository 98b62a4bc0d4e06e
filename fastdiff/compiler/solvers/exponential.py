"""What exponential integrators share: which model value is held, and the step with a known combination of it.

May import: lin, run, process, steps. k = 1 holds the data prediction D (the "++" solvers), k = -1 the noise prediction
E; every weight of one is the other's with k h in place of h.
"""

from __future__ import annotations

import math

from fastdiff.compiler.lin import Lin
from fastdiff.compiler.run import Run
from fastdiff.compiler.solvers.steps import noise_estimate
from fastdiff.process.schedules import Level


def model_value(run: Run, x: Lin, denoised: Lin, s: Level, k: float) -> Lin:
    """D itself (k > 0), or E = (x - alpha D) / sigma in a register of its own (k < 0)."""
    return denoised if k > 0.0 else run.keep(noise_estimate(x, denoised, s))


def exponential_step(x: Lin, combined: Lin, s: Level, t: Level, k: float, eta: float = 0.0) -> Lin:
    """The solution at t without its noise, `combined` = sum_j w_j m_j with w = int k' e^{k' u} L_j(u) du.

    k = 1: (sigma_t/sigma_s) e^{-eta h} x + alpha_t combined, k' = 1 + eta.
    k = -1: (alpha_t/alpha_s) x + sigma_t combined, k' = -1.
    """
    if k < 0.0:
        return (t.alpha / s.alpha) * x + t.sigma * combined
    decay = math.exp(-eta * (t.lam - s.lam)) if eta > 0.0 else 1.0
    return (t.sigma / s.sigma * decay) * x + t.alpha * combined


def noise_scale(t: Level, h: float, eta: float) -> float:
    """sigma_t sqrt(1 - e^{-2 eta h}): the noise an SDE of strength eta adds over h, seen at t."""
    return t.sigma * math.sqrt(-math.expm1(-2.0 * eta * h)) if eta > 0.0 else 0.0


def phi(z: float) -> float:
    """1 - e^{-z}: the weight of a constant."""
    return -math.expm1(-z)


def phi_slope(z: float) -> float:
    """1 - (1 - e^{-z}) / z: the weight of a line that is 0 at s and 1 at t; 1 for z = inf."""
    return 1.0 - phi(z) / z if abs(z) > 1e-4 else z * (0.5 - z / 6.0 + z * z / 24.0)


def phi_curve(z: float) -> float:
    """(1 - (1 - e^{-z}) / z) / z - 1/2, the published weight of the second difference, up to sign."""
    return phi_slope(z) / z - 0.5 if abs(z) > 1e-3 else z * (-1.0 / 6.0 + z / 24.0 - z * z / 120.0)
