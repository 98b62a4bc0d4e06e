"""Moves between two levels that several samplers share, for any (alpha, sigma), alpha = 0 and sigma = 0 included.

May import: lin, process. s is the level left, t the level reached; rho = sigma / alpha.
"""

from __future__ import annotations

import math

from fastdiff.compiler.lin import Lin
from fastdiff.compiler.run import Run
from fastdiff.process.schedules import Level


def ode_step(x: Lin, denoised: Lin, s: Level, t: Level) -> Lin:
    """x_t = (sigma_t/sigma_s) x + (alpha_t - alpha_s sigma_t/sigma_s) D: the ODE solved with D held constant.

    DDIM with eta = 0 (Song et al. 2021, eq. 12), Euler in x/alpha against rho, and Euler on a straight flow.
    """
    ratio = t.sigma / s.sigma
    return ratio * x + (t.alpha - s.alpha * ratio) * denoised


def half_log_snr_step(s: Level, t: Level) -> float:
    """h = lambda_t - lambda_s, lambda = log(alpha/sigma); infinite when s has no signal or t no noise."""
    return t.lam - s.lam


def ancestral_split(s: Level, t: Level, eta: float) -> tuple[float, float]:
    """(rho_down, rho_up): step to rho_down, then add rho_up of noise, so that rho_down^2 + rho_up^2 = rho_t^2.

    rho_up = min(rho_t, eta sqrt(rho_t^2 (rho_s^2 - rho_t^2) / rho_s^2)) (Karras et al. 2022's notation, k-diffusion).
    """
    shrink = 0.0 if math.isinf(s.rho) else t.rho / s.rho
    up = min(t.rho, eta * t.rho * math.sqrt(max(0.0, 1.0 - shrink**2)))
    return math.sqrt(max(0.0, t.rho**2 - up**2)), up


def ancestral_target(run: Run, s: Level, t: Level, eta: float) -> tuple[Level, float, float]:
    """(down, scale, added): step from s to the level down, multiply by scale, add `added` of noise, and be at t.

    down is where rho = rho_down of `ancestral_split`. On a flow schedule, where x = (1 - s) x0 + s n, the noise is
    split in s instead, as flow samplers do: s_down = t (1 + (t/s - 1) eta), scale = (1 - t) / (1 - s_down).
    """
    if run.schedule is not None and run.schedule.kind == "flow":
        sigma = t.sigma * (1.0 + (t.sigma / s.sigma - 1.0) * eta)
        down, scale = Level(1.0 - sigma, sigma, sigma), t.alpha / (1.0 - sigma)
        return down, scale, math.sqrt(max(0.0, t.sigma**2 - (sigma * scale) ** 2))
    rho_down, rho_up = ancestral_split(s, t, eta)
    down = run.level_from_rho(rho_down)
    return down, t.alpha / down.alpha, t.alpha * rho_up


def noise_estimate(x: Lin, denoised: Lin, s: Level) -> Lin:
    """E = (x - alpha D) / sigma: the unit noise in x; the slope of x/alpha against rho."""
    return (x - s.alpha * denoised) / s.sigma


def slope_step(x: Lin, slope: Lin, s: Level, t: Level) -> Lin:
    """x_t/alpha_t = x_s/alpha_s + (rho_t - rho_s) slope; s must have signal."""
    return (t.alpha / s.alpha) * x + (t.sigma - t.alpha * s.rho) * slope


def churn(
    run: Run, x: Lin, s: Level, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> tuple[Lin, Level]:
    """Raise the noise level before a step (Karras et al. 2022, Alg. 2 lines 4-6), levels in rho = sigma / alpha.

    gamma = min(s_churn / steps, sqrt(2) - 1) where s_tmin <= rho <= s_tmax; rho_hat = rho (1 + gamma);
    x/alpha += s_noise sqrt(rho_hat^2 - rho^2) z, white noise since it leads up. A level above the schedule's last is
    shown the last one's time; on edm, where the time is sigma, its own.
    """
    if s_churn <= 0.0 or not s_tmin <= s.rho <= s_tmax or math.isinf(s.rho):
        return x, s
    rho = s.rho * (1.0 + min(s_churn / run.steps, math.sqrt(2.0) - 1.0))
    higher = run.level_from_rho(rho)
    added = s_noise * math.sqrt(rho**2 - s.rho**2)
    return (higher.alpha / s.alpha) * x + (higher.alpha * added) * run.white_noise(), higher
