"""Ancestral samplers: each step draws from a posterior of the next state."""

from __future__ import annotations

import math

from fastdiff.compiler.lin import Lin
from fastdiff.compiler.run import Run
from fastdiff.compiler.solvers.registry import solver
from fastdiff.compiler.solvers.steps import ancestral_target, ode_step

VARIANCES = ("fixed_small", "fixed_large", "learned_range")


@solver("ddpm", order=1, exact_marginal={"variance": "fixed_small"})
def ddpm(run: Run, x: Lin, variance: str = "fixed_small") -> Lin:
    """DDPM (Ho et al. 2020, eq. 7): x_t ~ N(posterior mean given x and D, C^2), no noise in the last step.

    With a = alpha_s/alpha_t and beta = sigma_s^2 - a^2 sigma_t^2: mean = (a sigma_t^2 x + alpha_t beta D) / sigma_s^2,
    C^2 = beta sigma_t^2 / sigma_s^2 ("fixed_small") or beta ("fixed_large"), or between the two, element by element on
    a logarithmic scale, as the network says ("learned_range", Nichol and Dhariwal 2021, eq. 15).
    """
    if variance not in VARIANCES:
        raise ValueError(f"ddpm: variance must be one of {', '.join(VARIANCES)}, got {variance!r}")
    for _, s, t in run.intervals():
        denoised = run.denoise(x, s)
        a = s.alpha / t.alpha
        beta = s.sigma**2 - (a * t.sigma) ** 2
        x = (a * t.sigma**2 / s.sigma**2) * x + (t.alpha * beta / s.sigma**2) * denoised
        if t.sigma > 0.0:
            added = beta if variance == "fixed_large" else beta * t.sigma**2 / s.sigma**2
            if variance == "learned_range":
                run.spread_noise(0.0, math.log(s.sigma / t.sigma))
            x = x + math.sqrt(added) * run.noise()
    return x


@solver("euler_ancestral", order=1, exact_marginal={"s_noise": 1.0})
def euler_ancestral(run: Run, x: Lin, eta: float = 1.0, s_noise: float = 1.0) -> Lin:
    """Euler with ancestral noise (k-diffusion's sample_euler_ancestral), in x / alpha against rho = sigma / alpha.

    Step to rho_down with D held constant, then add rho_up of noise; on a flow schedule the noise is split in s
    (`ancestral_target`).
    """
    for _, s, t in run.intervals():
        down, scale, added = ancestral_target(run, s, t, eta)
        x = scale * ode_step(x, run.denoise(x, s), s, down)
        if added * s_noise > 0.0:
            x = x + (s_noise * added) * run.noise()
    return x
