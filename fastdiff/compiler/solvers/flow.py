"""Samplers of flow-matching models, on the clock of the straight path x = (1 - s) x0 + s n."""

from __future__ import annotations

import math

from fastdiff.compiler.lin import Lin
from fastdiff.compiler.run import Run
from fastdiff.compiler.solvers.history import check_choice
from fastdiff.compiler.solvers.registry import solver
from fastdiff.compiler.solvers.steps import half_log_snr_step, noise_estimate, ode_step
from fastdiff.process.schedules import Level


@solver("flow_euler", order=1, flow_only=True)
def flow_euler(run: Run, x: Lin) -> Lin:
    """Euler on dx/ds = u = E[n - x0 | x] (Liu et al. 2023, Lipman et al. 2023): x' = x + (t - s) u, u = (x - D)/s."""
    for _, s, t in run.intervals():
        x = ode_step(x, run.denoise(x, s), s, t)
    return x


@solver("flow_heun", order=2, flow_only=True)
def flow_heun(run: Run, x: Lin) -> Lin:
    """Heun on dx/ds = u (as diffusers' FlowMatchHeun): x' = x + (t - s) (u_s + u_t)/2; the last step is Euler's."""
    for _, s, t in run.intervals():
        denoised = run.denoise(x, s)
        ahead = ode_step(x, denoised, s, t)
        if t.sigma > 0.0:
            slope = (x - denoised) / s.sigma + (ahead - run.denoise(ahead, t)) / t.sigma
            ahead = x + (0.5 * (t.sigma - s.sigma)) * slope
        x = ahead
    return x


@solver("flow_midpoint", order=2, denoises={"denoise": True}, flow_only=True)
def flow_midpoint(run: Run, x: Lin, denoise: bool = True) -> Lin:
    """Midpoint rule on dx/ds = u: x' = x + (t - s) u_m, m = (s + t)/2, x_m = x + (m - s) u_s; the last step is x' = D.

    denoise=False: the last step is like the others, as torchdiffeq's midpoint has it: u_m is known there too.
    """
    for _, s, t in run.intervals():
        denoised = run.denoise(x, s)
        if t.sigma == 0.0 and denoise:
            return ode_step(x, denoised, s, t)
        middle = Level(0.5 * (s.alpha + t.alpha), 0.5 * (s.sigma + t.sigma), 0.5 * (s.time + t.time))
        ahead = ode_step(x, denoised, s, middle)
        x = x + ((t.sigma - s.sigma) / middle.sigma) * (ahead - run.denoise(ahead, middle))
    return x


@solver("flow_sde", order=1, exact_marginal={"s_noise": 1.0}, refines={"flavor": None}, flow_only=True)
def flow_sde(run: Run, x: Lin, eta: float = 1.0, s_noise: float = 1.0, flavor: str | None = None) -> Lin:
    """The reverse SDE of a flow model with D held over the step: x' = a x + (alpha_t - alpha_s a) D + c z.

    With h = lambda_t - lambda_s: a = (sigma_t/sigma_s) e^(-eta^2 h), c = sigma_t sqrt(1 - e^(-2 eta^2 h)); eta = 0 is
    the ODE, 1 the time reversal, and from pure noise (h = inf) x' = alpha_t D + sigma_t z. flavor "diffusers": all
    noise is drawn anew in every step, x' = (1 - t) D + t z, its stochastic_sampling; a consistency sampler, not an SDE.
    """
    check_choice("flow_sde", "flavor", flavor, (None, "diffusers"))
    if not eta >= 0.0:
        raise ValueError(f"flow_sde: eta must be >= 0, got {eta}")
    for _, s, t in run.intervals():
        denoised = run.denoise(x, s)
        strength = math.inf if flavor == "diffusers" else eta**2
        decay = math.exp(-strength * half_log_snr_step(s, t)) if strength > 0.0 else 1.0
        carried = t.sigma / s.sigma * decay
        added = s_noise * t.sigma * math.sqrt(1.0 - decay**2)
        x = carried * x + (t.alpha - s.alpha * carried) * denoised
        if added > 0.0:
            x = x + added * run.noise()
    return x


@solver("overshoot", order=1, exact_marginal=True, flow_only=True)
def overshoot(run: Run, x: Lin, c: float = 1.0) -> Lin:
    """Overshooting (Hu et al. 2024, AMO sampler): Euler past the next level, then noise back to it.

    In signal alpha = 1 - s: o = min(1, alpha_t + c (alpha_t - alpha_s)(1 - alpha_t)), x_o by Euler, a = alpha_t/o,
    x' = a x_o + sqrt(sigma_t^2 - a^2 (1 - o)^2) z. c = 0 is Euler.
    """
    if not c >= 0.0:
        raise ValueError(f"overshoot: c must be >= 0, got {c}")
    for _, s, t in run.intervals():
        over = min(1.0, t.alpha + c * (t.alpha - s.alpha) * t.sigma)
        ratio = t.alpha / over
        x = ratio * ode_step(x, run.denoise(x, s), s, Level(over, 1.0 - over))
        added = math.sqrt(max(0.0, t.sigma**2 - (ratio * (1.0 - over)) ** 2))
        if added > 0.0:
            x = x + added * run.noise()
    return x


@solver("iadb", order=1, flow_only=True)
def iadb(run: Run, x: Lin) -> Lin:
    """Iterative alpha-deblending (Heitz et al. 2023, Alg. 4): x' = x + (alpha_t - alpha_s) (D - E), E the other end."""
    for _, s, t in run.intervals():
        denoised = run.denoise(x, s)
        x = x + (t.alpha - s.alpha) * (denoised - noise_estimate(x, denoised, s))
    return x


@solver("interpolant", order=1, exact_marginal=False, flow_only=True)
def interpolant(run: Run, x: Lin, epsilon: float = 0.0, profile: str = "sigma") -> Lin:
    """Stochastic interpolants (Albergo et al. 2023): dX = (b + e(t) score) dt + sqrt(2 e(t)) dW, Euler's.

    b = D - E and score = -E/sigma of the straight path; dt = s_s - s_t. e(t) = epsilon times 1 ("constant"), sigma
    ("sigma") or alpha sigma ("bridge"); epsilon = 0 is the ODE. The step to sigma = 0 is x' = D.
    """
    check_choice("interpolant", "profile", profile, ("constant", "sigma", "bridge"))
    if not epsilon >= 0.0:
        raise ValueError(f"interpolant: epsilon must be >= 0, got {epsilon}")
    for _, s, t in run.intervals():
        denoised = run.denoise(x, s)
        if t.sigma == 0.0:
            return t.alpha * denoised
        shape = {"constant": 1.0, "sigma": s.sigma, "bridge": s.alpha * s.sigma}[profile]
        dt, strength = s.sigma - t.sigma, epsilon * shape
        noise = noise_estimate(x, denoised, s)
        x = x + dt * (denoised - noise) - (dt * strength / s.sigma) * noise
        if strength > 0.0:
            x = x + math.sqrt(2.0 * strength * dt) * run.noise()
    return x
