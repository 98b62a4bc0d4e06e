"""DPM-Solver++ (Lu et al. 2022): exponential integrators in lambda = log(alpha/sigma) on the denoised estimate."""

from __future__ import annotations

from fastdiff.compiler.lin import Lin
from fastdiff.compiler.run import Run
from fastdiff.compiler.solvers.history import check_choice
from fastdiff.compiler.solvers.multistep import CORRECTIONS, multistep
from fastdiff.compiler.solvers.registry import solver


@solver("dpmpp_2m", order=2)
def dpmpp_2m(run: Run, x: Lin) -> Lin:
    """DPM-Solver++(2M) (Lu et al. 2022, Alg. 2): x' = (sigma_t/sigma_s) x + alpha_t (1 - e^-h) (D + (D - D_old)/(2r)).

    h = lambda_t - lambda_s, r = h_old / h. First order in the first step and in the step to sigma = 0.
    """
    return multistep(run, x, 2)


@solver("dpmpp_2m_sde", order=2, exact_marginal={"s_noise": 1.0})
def dpmpp_2m_sde(run: Run, x: Lin, eta: float = 1.0, correction: str = "midpoint", s_noise: float = 1.0) -> Lin:
    """DPM-Solver++(2M) for the SDE (Lu et al. 2022, section 5; k-diffusion's sample_dpmpp_2m_sde).

    x' = (sigma_t/sigma_s) e^(-eta h) x + alpha_t phi D + correction + sigma_t sqrt(1 - e^(-2 eta h)) s_noise z with
    phi = 1 - e^(-(1+eta) h); the correction is (phi/2) (D - D_old) / r ("midpoint") or
    (1 - phi / ((1+eta) h)) (D - D_old) / r ("heun"), times alpha_t.
    """
    check_choice("dpmpp_2m_sde", "correction", correction, CORRECTIONS)
    return multistep(run, x, 2, eta=eta, s_noise=s_noise, correction=correction)
