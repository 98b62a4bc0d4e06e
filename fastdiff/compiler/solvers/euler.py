"""Runge-Kutta samplers on the probability-flow ODE in x / alpha against rho (Karras et al. 2022)."""

from __future__ import annotations

import math

from fastdiff.compiler.lin import Lin
from fastdiff.compiler.run import Run
from fastdiff.compiler.solvers.registry import solver
from fastdiff.compiler.solvers.steps import churn, ode_step


@solver("euler", order=1, exact_marginal={"s_noise": 1.0})
def euler(
    run: Run, x: Lin, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> Lin:
    """Euler with optional churn (Karras et al. 2022, Alg. 2, first order): x' = r x + (1 - r) D, r = rho_t/rho_s."""
    for _, s, t in run.intervals():
        x, s = churn(run, x, s, s_churn, s_tmin, s_tmax, s_noise)
        x = ode_step(x, run.denoise(x, s), s, t)
    return x


@solver("heun", order=2, exact_marginal={"s_noise": 1.0})
def heun(
    run: Run, x: Lin, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> Lin:
    """Heun's second-order method with optional churn (Karras et al. 2022, Alg. 2): two evaluations per step.

    With d = (x/alpha - D) / rho the slope at both ends, x'/alpha_t = x/alpha_s + (rho_t - rho_s) (d_s + d_t) / 2. Seen
    from Euler's end x_e, on the line from x to D_s, that is x' = x_e + alpha_t (rho_s/rho_t - 1) (D_t - D_s) / 2:
    one register less, and less rounding. The step to sigma = 0, and one from alpha = 0, is Euler's.
    """
    for _, s, t in run.intervals():
        x, s = churn(run, x, s, s_churn, s_tmin, s_tmax, s_noise)
        denoised = run.denoise(x, s)
        ahead = ode_step(x, denoised, s, t)
        if t.sigma > 0.0 and s.alpha > 0.0:
            denoised_ahead = run.denoise(ahead, t)
            ahead = ahead + (0.5 * t.alpha * (s.rho / t.rho - 1.0)) * (denoised_ahead - denoised)
        x = ahead
    return x
