"""Multistep DPM-Solvers (Lu et al. 2022): exponential integrators in lambda = log(alpha/sigma) with a memory."""

from __future__ import annotations

from collections.abc import Callable

from fastdiff.compiler.lin import Lin
from fastdiff.compiler.run import Run
from fastdiff.compiler.solvers.exponential import (
    exponential_step,
    model_value,
    noise_scale,
    phi,
    phi_curve,
    phi_slope,
)
from fastdiff.compiler.solvers.history import History, check_choice
from fastdiff.compiler.solvers.registry import solver
from fastdiff.compiler.solvers.steps import ancestral_target, half_log_snr_step, ode_step
from fastdiff.process.schedules import Level

CORRECTIONS = ("midpoint", "heun")
CURVATURES = ("published", "exact", "diffusers")


@solver("dpmpp_3m", order=2)
def dpmpp_3m(
    run: Run, x: Lin, correction: str = "midpoint", curvature: str = "published", flavor: str | None = None
) -> Lin:
    """DPM-Solver++(3M) (code of Lu et al. 2022): x' = (sigma_t/sigma_s) x + alpha_t (phi_1 D + phi_2 D1 - phi_3 D2).

    D1, D2: first and second difference of D in units of h. correction: the form of its second-order step, as in
    dpmpp_2m_sde. curvature: "published" weighs D2 by half of what integrates a parabola, and so stays of order 2;
    "exact" is of order 3. flavor "diffusers": fewer than 15 steps come down to order 1 at the end.
    """
    check_choice("dpmpp_3m", "correction", correction, CORRECTIONS)
    check_choice("dpmpp_3m", "curvature", curvature, CURVATURES[:2])
    return multistep(
        run, x, 3, correction=correction, curvature=curvature, lower_final=_lowers("dpmpp_3m", flavor, run)
    )


@solver("dpmpp_3m_sde", order=2, exact_marginal={"s_noise": 1.0})
def dpmpp_3m_sde(
    run: Run,
    x: Lin,
    eta: float = 1.0,
    s_noise: float = 1.0,
    curvature: str = "published",
    flavor: str | None = None,
) -> Lin:
    """DPM-Solver++(3M) for the SDE (k-diffusion's sample_dpmpp_3m_sde): dpmpp_3m with (1 + eta) h for h, and noise.

    x' = (sigma_t/sigma_s) e^(-eta h) x + alpha_t (phi_1 D + phi_2 D1 - phi_3 D2)
    + sigma_t sqrt(1 - e^(-2 eta h)) s_noise z.
    curvature: as in dpmpp_3m. flavor "diffusers": D2 has the weight (1 - e^-z - z)/z^2 - 1/2 (its sign of 1/2 is wrong,
    an error of order h^2), the second-order step is "midpoint", and fewer than 15 steps come down to order 1.
    """
    check_choice("dpmpp_3m_sde", "curvature", curvature, CURVATURES[:2])
    lowers = _lowers("dpmpp_3m_sde", flavor, run)
    return multistep(
        run,
        x,
        3,
        eta=eta,
        s_noise=s_noise,
        correction="heun" if flavor is None else "midpoint",
        curvature=curvature if flavor is None else "diffusers",
        lower_final=lowers,
    )


def multistep(
    run: Run,
    x: Lin,
    order: int,
    *,
    k: float = 1.0,
    eta: float = 0.0,
    s_noise: float = 1.0,
    correction: str = "midpoint",
    curvature: str = "published",
    lower_final: bool = False,
    evaluate: Callable[[Lin, Level], tuple[Lin, Lin]] | None = None,
) -> Lin:
    """The multistep loop of order 1, 2 or 3 for either prediction (k) and any strength of noise (eta, k = 1 only).

    evaluate(x, level): x again and D, for a solver whose x is not the state the network sees.
    """
    history = History(run, order, lower_final=lower_final)
    for i, s, t in run.intervals():
        x, denoised = (x, run.denoise(x, s)) if evaluate is None else evaluate(x, s)
        if t.sigma == 0.0:
            history.order(i, t)
            return t.alpha * denoised
        history.add(s, model_value(run, x, denoised, s, k))
        now = history.order(i, t)
        if k < 0.0 and now == 1:  # the same step, without large terms that cancel
            x = ode_step(x, denoised, s, t)
            continue
        combined = combine(history, now, t, k + eta, correction, curvature)
        ahead = exponential_step(x, combined, s, t, k, eta)
        added = s_noise * noise_scale(t, half_log_snr_step(s, t), eta)
        x = ahead + added * run.noise() if added > 0.0 else ahead
    return x


def combine(history: History, order: int, t: Level, k: float, correction: str, curvature: str) -> Lin:
    """phi_1 m + phi_2 D1 - phi_3 D2 with the differences of the last `order` values.

    D1 = D1_0 + r0/(r0 + r1) (D1_0 - D1_1), D2 = (D1_0 - D1_1)/(r0 + r1), D1_j = (m_j - m_{j+1})/r_j, r_j = h_{-1-j}/h.
    """
    levels, values = history.levels, history.values
    h = half_log_snr_step(levels[0], t)
    z = k * h
    if order == 1:
        return phi(z) * values[0]
    r0 = half_log_snr_step(levels[1], levels[0]) / h
    first = (values[0] - values[1]) / r0
    if order == 2:
        return phi(z) * values[0] + (0.5 * phi(z) if correction == "midpoint" else phi_slope(z)) * first
    r1 = half_log_snr_step(levels[2], levels[1]) / h
    change = (first - (values[1] - values[2]) / r1) / (r0 + r1)
    weight = {"published": phi_curve(z), "exact": 2.0 * phi_curve(z), "diffusers": phi_curve(z) + 1.0}[curvature]
    return phi(z) * values[0] + phi_slope(z) * (first + r0 * change) - weight * change


@solver("res_multistep", order=2)
def res_multistep(run: Run, x: Lin) -> Lin:
    """RES multistep (Zhang et al. 2023, refined exponential solver): x'/alpha_t = e^-h x/alpha_s + h (b1 D + b2 D_old).

    b2 = phi_2(-h)/c2, b1 = phi_1(-h) - b2, c2 = (lambda_old - lambda_s)/h: the line through the last two D, integrated
    exactly.
    """
    return _res(run, x, 0.0, 1.0)


@solver("res_multistep_ancestral", order=2, exact_marginal={"s_noise": 1.0})
def res_multistep_ancestral(run: Run, x: Lin, eta: float = 1.0, s_noise: float = 1.0) -> Lin:
    """res_multistep to the lower level of an ancestral split, then noise up to t (`ancestral_target`).

    Both lengths of c2 are measured to lower levels: from the step before its old one to its lower level, and from s to
    this one's, since over noisy steps it is their ratio that says how far D has come.
    """
    return _res(run, x, eta, s_noise)


def _res(run: Run, x: Lin, eta: float, s_noise: float) -> Lin:
    history = History(run, 2)
    h_old = 0.0
    for i, s, t in run.intervals():
        denoised = run.denoise(x, s)
        if t.sigma == 0.0:
            history.order(i, t)
            return t.alpha * denoised
        history.add(s, denoised)
        down, scale, added = ancestral_target(run, s, t, eta)
        h = half_log_snr_step(s, down)
        combined = phi(h) * denoised
        if history.order(i, t) == 2:
            combined = combined + (phi_slope(h) * h / h_old) * (denoised - history.values[1])
        x = scale * exponential_step(x, combined, s, down, 1.0)
        if added * s_noise > 0.0:
            x = x + (s_noise * added) * run.noise()
        h_old = h
    return x


def _lowers(name: str, flavor: str | None, run: Run) -> bool:
    """Whether the last steps lose order: diffusers' rule, for fewer than 15 steps."""
    check_choice(name, "flavor", flavor, (None, "diffusers"))
    return flavor == "diffusers" and run.steps < 15
