"""Samplers of distilled models, whose D is meant as a sample rather than as a mean."""

from __future__ import annotations

import math

from fastdiff.compiler.lin import Lin
from fastdiff.compiler.run import Run
from fastdiff.compiler.solvers.history import check_choice
from fastdiff.compiler.solvers.registry import solver
from fastdiff.compiler.solvers.steps import noise_estimate
from fastdiff.process.schedules import CLEAN, Level

TIMESTEP_SCALING, SIGMA_DATA = 10.0, 0.5  # of the latent consistency models as released


@solver("lcm", order=0, exact_marginal={"flavor": None, "s_noise": 1.0}, denoises={"flavor": None})
def lcm(run: Run, x: Lin, s_noise: float = 1.0, flavor: str | None = None) -> Lin:
    """Multistep sampling of latent consistency models (Luo et al. 2023): x' = alpha_t D + sigma_t z.

    flavor "diffusers": D is first mixed with the state as in training, D~ = c_skip x + c_out D with
    c_skip = s^2/(tau^2 + s^2), c_out = tau/sqrt(tau^2 + s^2), tau = 10 time, s = 0.5, time the index of a discrete
    schedule.
    """
    check_choice("lcm", "flavor", flavor, (None, "diffusers"))
    if flavor == "diffusers" and (run.schedule is None or run.schedule.steps is None):
        raise ValueError("lcm: flavor 'diffusers' reads the index of a discrete schedule (linear, scaled_linear, ...)")
    for _, s, t in run.intervals():
        denoised = run.denoise(x, s)
        if flavor == "diffusers":
            tau = TIMESTEP_SCALING * s.time
            total = tau**2 + SIGMA_DATA**2
            denoised = (SIGMA_DATA**2 / total) * x + (tau / math.sqrt(total)) * denoised
        x = t.alpha * denoised
        if t.sigma * s_noise > 0.0:
            x = x + (s_noise * t.sigma) * run.noise()
    return x


@solver("tcd", order=0)
def tcd(run: Run, x: Lin, gamma: float = 0.3) -> Lin:
    """Trajectory consistency sampling (Zheng et al. 2024): down to a level u below t, then noise up to t.

    y = alpha_u D + sigma_u E, x' = (alpha_t/alpha_u) y + sqrt(sigma_t^2 - (alpha_t/alpha_u)^2 sigma_u^2) z, u at
    (1 - gamma) of t's time on the schedule's clock (rounded down on a discrete one). gamma = 0 is
    ddim, 1 all new noise.
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"tcd: gamma must be in [0, 1], got {gamma}")
    for _, s, t in run.intervals():
        denoised = run.denoise(x, s)
        u = _below(run, t, gamma)
        y = u.alpha * denoised + u.sigma * noise_estimate(x, denoised, s)
        ratio = t.alpha / u.alpha
        added = math.sqrt(max(0.0, t.sigma**2 - (ratio * u.sigma) ** 2))
        x = ratio * y + added * run.noise() if added > 0.0 else ratio * y
    return x


def _below(run: Run, t: Level, gamma: float) -> Level:
    if t.sigma == 0.0 or gamma == 0.0:
        return t
    if run.schedule is None:
        raise ValueError("tcd needs a schedule with a clock, got custom levels; pass schedule=, or gamma=0")
    low = run.schedule.time_range[0]
    time = low + (1.0 - gamma) * (t.time - low)
    level = run.schedule.level(math.floor(time) if run.schedule.steps is not None else time)
    return level if level.sigma > 0.0 else CLEAN


@solver("consistency", order=0, exact_marginal=False)
def consistency(run: Run, x: Lin, epsilon: float = 0.002) -> Lin:
    """Multistep consistency sampling (Song et al. 2023, Alg. 1): x'/alpha_t = D + sqrt(rho_t^2 - epsilon^2) z.

    The last step is x' = D. epsilon: the rho at which the model was trained to be the identity.
    """
    if not epsilon >= 0.0:
        raise ValueError(f"consistency: epsilon must be >= 0, got {epsilon}")
    for _, s, t in run.intervals():
        x = t.alpha * run.denoise(x, s)
        added = t.alpha * math.sqrt(max(0.0, t.rho**2 - epsilon**2))
        if added > 0.0:
            x = x + added * run.noise()
    return x


@solver("cold", order=0)
def cold(run: Run, x: Lin) -> Lin:
    """Cold diffusion (Bansal et al. 2022, Alg. 2) with noise as its degradation: x' = x - G(D, s) + G(D, t).

    G(D, s) = alpha_s D + sigma_s z with one fixed z, read off in the first step: z = E = (x - alpha D) / sigma there.
    The step to sigma = 0 is x' = D.
    """
    z: Lin | None = None
    for _, s, t in run.intervals():
        denoised = run.denoise(x, s)
        if t.sigma == 0.0:
            return t.alpha * denoised
        if z is None:
            z = run.keep(noise_estimate(x, denoised, s))
        x = x + (t.alpha - s.alpha) * denoised + (t.sigma - s.sigma) * z
    return x
