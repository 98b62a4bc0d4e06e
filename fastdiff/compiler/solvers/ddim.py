"""Denoising diffusion implicit models."""

from __future__ import annotations

import math

from fastdiff.compiler.lin import Lin
from fastdiff.compiler.run import Run
from fastdiff.compiler.solvers.registry import solver
from fastdiff.compiler.solvers.steps import noise_estimate, ode_step


@solver("ddim", order=1)
def ddim(run: Run, x: Lin, eta: float = 0.0) -> Lin:
    """DDIM (Song et al. 2021, eq. 12): x_t = alpha_t D + sqrt(sigma_t^2 - c^2) eps + c z.

    c = eta (sigma_t/sigma_s) sqrt(sigma_s^2 - (alpha_s/alpha_t)^2 sigma_t^2), eps = (x - alpha_s D) / sigma_s;
    eta = 0 deterministic, eta = 1 the DDPM posterior.
    """
    for _, s, t in run.intervals():
        denoised = run.denoise(x, s)
        if eta == 0.0 or t.sigma == 0.0:
            x = ode_step(x, denoised, s, t)
            continue
        added = eta * t.sigma / s.sigma * math.sqrt(max(0.0, s.sigma**2 - (s.alpha / t.alpha * t.sigma) ** 2))
        if added > t.sigma:
            raise ValueError(f"ddim: eta={eta} adds more noise than level sigma={t.sigma:.4g} holds; use eta <= 1")
        keep = math.sqrt(t.sigma**2 - added**2) / s.sigma
        x = keep * x + (t.alpha - s.alpha * keep) * denoised + added * run.noise()
    return x


@solver("ddim_inverse", order=1, exact_marginal=False, upward=True)
def ddim_inverse(run: Run, x: Lin) -> Lin:
    """DDIM inversion (Song et al. 2021, section 4.3; Mokady et al. 2023): from an image to its noise, levels ascending.

    x_t = alpha_t D + sigma_t E with both from the state at s, s < t. At sigma = 0 there is no E to read: the image,
    scaled by alpha, is evaluated at the first noisy level. The plan starts from the image as it is.
    """
    for _, s, t in run.intervals():
        at = s if s.sigma > 0.0 else t
        x = (at.alpha / s.alpha) * x
        denoised = run.denoise(x, at)
        x = x + t.sigma * noise_estimate(x, denoised, t) if at is t else ode_step(x, denoised, s, t)
    return x
