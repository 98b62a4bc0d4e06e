"""DPM-Solver++ (Lu et al. 2022): exponential integrators in lambda = log(alpha/sigma) on the denoised estimate."""

from __future__ import annotations

import math

from fastdiff.compiler.lin import Lin
from fastdiff.compiler.run import Run
from fastdiff.compiler.solvers.registry import solver
from fastdiff.compiler.solvers.steps import half_log_snr_step


@solver("dpmpp_2m", order=2)
def dpmpp_2m(run: Run, x: Lin) -> Lin:
    """DPM-Solver++(2M) (Lu et al. 2022, Alg. 2): x' = (sigma_t/sigma_s) x + alpha_t (1 - e^-h) (D + (D - D_old)/(2r)).

    h = lambda_t - lambda_s, r = h_old / h. First order in the first step and in the step to sigma = 0.
    """
    previous: tuple[Lin, float] | None = None
    for _, s, t in run.intervals():
        denoised = run.denoise(x, s)
        h = half_log_snr_step(s, t)
        estimate = denoised
        if previous is not None and t.sigma > 0.0:
            old, h_old = previous
            estimate = denoised + (0.5 * h / h_old) * (denoised - old)
        x = (t.sigma / s.sigma) * x + (t.alpha * -math.expm1(-h)) * estimate
        previous = denoised, h
    return x


@solver("dpmpp_2m_sde", order=2, exact_marginal={"s_noise": 1.0})
def dpmpp_2m_sde(run: Run, x: Lin, eta: float = 1.0, correction: str = "midpoint", s_noise: float = 1.0) -> Lin:
    """DPM-Solver++(2M) for the SDE (Lu et al. 2022, section 5; k-diffusion's sample_dpmpp_2m_sde).

    x' = (sigma_t/sigma_s) e^(-eta h) x + alpha_t phi D + correction + sigma_t sqrt(1 - e^(-2 eta h)) s_noise z with
    phi = 1 - e^(-(1+eta) h); the correction is (phi/2) (D - D_old) / r ("midpoint") or
    (1 - phi / ((1+eta) h)) (D - D_old) / r ("heun"), times alpha_t.
    """
    if correction not in ("midpoint", "heun"):
        raise ValueError(f"dpmpp_2m_sde: correction must be 'midpoint' or 'heun', got {correction!r}")
    previous: tuple[Lin, float] | None = None
    for _, s, t in run.intervals():
        denoised = run.denoise(x, s)
        h = half_log_snr_step(s, t)
        if t.sigma == 0.0:
            return t.alpha * denoised
        phi = -math.expm1(-(1.0 + eta) * h)
        decay = math.exp(-eta * h) if eta else 1.0
        ahead = (t.sigma / s.sigma * decay) * x + (t.alpha * phi) * denoised
        if previous is not None:
            old, h_old = previous
            weight = 0.5 * phi if correction == "midpoint" else 1.0 - phi / ((1.0 + eta) * h)
            ahead = ahead + (t.alpha * weight * h / h_old) * (denoised - old)
        if eta * s_noise > 0.0:
            ahead = ahead + (s_noise * t.sigma * math.sqrt(-math.expm1(-2.0 * eta * h))) * run.noise()
        x, previous = ahead, (denoised, h)
    return x
