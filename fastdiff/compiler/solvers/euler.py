"""Runge-Kutta samplers on the probability-flow ODE in x / alpha against rho (Karras et al. 2022)."""

from __future__ import annotations

import math

from fastdiff.compiler.lin import Lin
from fastdiff.compiler.run import Run
from fastdiff.compiler.solvers.registry import solver
from fastdiff.compiler.solvers.steps import ancestral_target, churn, noise_estimate, ode_step, slope_step
from fastdiff.process.schedules import CLEAN, Level


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
        x = _two_slopes(run, x, s, t, 1.0)
    return x


@solver("edm", order=2, exact_marginal={"s_noise": 1.0})
def edm(
    run: Run,
    x: Lin,
    s_churn: float = 40.0,
    s_tmin: float = 0.05,
    s_tmax: float = 50.0,
    s_noise: float = 1.003,
    a: float = 1.0,
) -> Lin:
    """The stochastic sampler of Karras et al. 2022, Alg. 2, with their ImageNet-64 settings, for any second-order rule.

    a: the second slope is taken at rho_s + a (rho_t - rho_s) and weighs 1/(2a) (their appendix D.2); a = 1 is Heun,
    and then `edm` is `heun` with churn on. s_noise = 1.003 makes up for the noise that a network removes too much; with
    an exact one it leaves 0.6% too much variance at any number of steps.
    """
    if not 0.0 < a <= 1.0:
        raise ValueError(f"edm: a, where in the step the second slope is taken, must be in (0, 1], got {a}")
    for _, s, t in run.intervals():
        x, s = churn(run, x, s, s_churn, s_tmin, s_tmax, s_noise)
        x = _two_slopes(run, x, s, t, a)
    return x


def _two_slopes(run: Run, x: Lin, s: Level, t: Level, a: float) -> Lin:
    """Euler's end plus alpha_t (rho_s - rho_t)/(2 a rho_m) (D_m - D_s), m at rho_s + a (rho_t - rho_s).

    The same as weighing the slopes d_s and d_m by 1 - 1/(2a) and 1/(2a).
    """
    denoised = run.denoise(x, s)
    if t.sigma == 0.0 or s.alpha == 0.0:
        return ode_step(x, denoised, s, t)
    end = ode_step(x, denoised, s, t)
    if a == 1.0:
        m, second = t, run.denoise(end, t)
    else:
        end, m = run.keep(end), run.level_from_rho(s.rho + a * (t.rho - s.rho))
        second = run.denoise(ode_step(x, denoised, s, m), m)
    return end + (0.5 / a * t.alpha * (s.rho - t.rho) / m.rho) * (second - denoised)


@solver("dpm_2", order=2, exact_marginal={"s_noise": 1.0})
def dpm_2(
    run: Run, x: Lin, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> Lin:
    """DPM-Solver-2 in the manner of Karras et al. 2022 (k-diffusion's sample_dpm_2): midpoint rule, middle in log rho.

    m at rho = sqrt(rho_s rho_t), x_m by Euler, x'/alpha_t = x/alpha_s + (rho_t - rho_s) d_m; churn as in Alg. 2. The
    step to sigma = 0, and one from a level without signal, is Euler's.
    """
    for _, s, t in run.intervals():
        x, s = churn(run, x, s, s_churn, s_tmin, s_tmax, s_noise)
        x = _midpoint(run, x, s, t)
    return x


@solver("dpm_2_ancestral", order=2, exact_marginal={"s_noise": 1.0})
def dpm_2_ancestral(run: Run, x: Lin, eta: float = 1.0, s_noise: float = 1.0) -> Lin:
    """dpm_2 to the lower level of an ancestral split, then noise up to t (k-diffusion's sample_dpm_2_ancestral)."""
    for _, s, t in run.intervals():
        down, scale, added = ancestral_target(run, s, t, eta)
        x = scale * _midpoint(run, x, s, down)
        if added * s_noise > 0.0:
            x = x + (s_noise * added) * run.noise()
    return x


def _midpoint(run: Run, x: Lin, s: Level, t: Level) -> Lin:
    denoised = run.denoise(x, s)
    if t.sigma == 0.0 or s.alpha == 0.0:
        return ode_step(x, denoised, s, t)
    m = run.level_between(s, t, 0.5)
    ahead = ode_step(x, denoised, s, m)
    return slope_step(x, noise_estimate(ahead, run.denoise(ahead, m), m), s, t)


@solver("heunpp2", order=1)
def heunpp2(run: Run, x: Lin) -> Lin:
    """Heun++ (ComfyUI's sample_heunpp2): Heun over the next one or two steps, slopes weighted by their rho.

    x'/alpha_t = x/alpha_s + (rho_t - rho_s) (w1 d_s + w2 d_t + w3 d_u), u the level after t, w2 = rho_t/(3 rho_s),
    w3 = rho_u/(3 rho_s), w1 = 1 - w2 - w3: the mean of three slopes over one step, so of first order. Where u would be
    sigma = 0: w2 = rho_t/(2 rho_s), w3 = 0.
    """
    for i, s, t in run.intervals():
        denoised = run.denoise(x, s)
        if t.sigma == 0.0 or s.alpha == 0.0:
            x = ode_step(x, denoised, s, t)
            continue
        first = noise_estimate(x, denoised, s)
        u = run.levels[i + 2] if i + 2 < len(run.levels) else CLEAN
        base, ahead = run.keep(x), slope_step(x, first, s, t)
        second = noise_estimate(ahead, run.denoise(ahead, t), t)
        if u.sigma == 0.0:
            w = 0.5 * t.rho / s.rho
            slope = (1.0 - w) * first + w * second
        else:
            w2, w3 = t.rho / s.rho / 3.0, u.rho / s.rho / 3.0
            known = run.keep((1.0 - w2 - w3) * first + w2 * second)
            ahead = slope_step(ahead, second, t, u)
            slope = known + w3 * noise_estimate(ahead, run.denoise(ahead, u), u)
        x = slope_step(base, slope, s, t)
    return x
