"""Direct discretisations of the reverse-time SDE."""

from __future__ import annotations

import math

from fastdiff.compiler.lin import Lin
from fastdiff.compiler.run import Run
from fastdiff.compiler.solvers.registry import solver
from fastdiff.process.schedules import Level


@solver("euler_maruyama", order=1, exact_marginal=False)
def euler_maruyama(run: Run, x: Lin, eta: float = 1.0) -> Lin:
    """Euler-Maruyama on the reverse SDE (Anderson 1982; Song et al. 2021b, eq. 6), in the schedule's own clock.

    Forward dx = f x dt + g dw; backward over dt = t_s - t_t > 0:
    x' = x - dt (f x - (1 + eta^2)/2 g^2 score) + eta g sqrt(dt) z, score = (alpha D - x) / sigma^2.
    eta = 1 is the reverse SDE, eta = 0 Euler on the probability-flow ODE. The step to sigma = 0 is x' = D.
    """
    if run.schedule is None:
        raise ValueError("euler_maruyama needs a schedule with a clock, got custom levels; pass schedule=")
    for _, s, t in run.intervals():
        denoised = run.denoise(x, s)
        if t.sigma == 0.0:
            return t.alpha * denoised
        if s.alpha == 0.0:
            raise ValueError(
                "euler_maruyama: the reverse SDE has no finite drift where alpha = 0; use a grid that starts below it "
                "(grid='leading', 'karras' with sigma_max, or custom levels)"
            )
        dt = s.time - t.time
        drift, diffusion = float(run.schedule.drift(s.time)), float(run.schedule.diffusion(s.time)) ** 2
        score = (s.alpha * denoised - x) / s.sigma**2
        x = x - (dt * drift) * x + (dt * 0.5 * (1.0 + eta**2) * diffusion) * score
        if eta > 0.0:
            x = x + (eta * math.sqrt(diffusion * dt)) * run.noise()
    return x


@solver("reverse_diffusion", order=1, exact_marginal=False)
def reverse_diffusion(run: Run, x: Lin) -> Lin:
    """Reverse diffusion sampler (Song et al. 2021b, eq. 46): x' = (2 - a) x + b^2 score + b z, last step x' = D.

    x_s = a x_t + b z is the forward step being reversed: a = alpha_s/alpha_t, b^2 = sigma_s^2 - a^2 sigma_t^2.
    """
    for _, s, t in run.intervals():
        x = reverse_step(run, x, s, t, "reverse_diffusion")
    return x


def reverse_step(run: Run, x: Lin, s: Level, t: Level, name: str) -> Lin:
    """One step of `reverse_diffusion`, which langevin_pc takes too."""
    denoised = run.denoise(x, s)
    if t.sigma == 0.0:
        return t.alpha * denoised
    if s.alpha == 0.0:
        raise ValueError(
            f"{name}: the forward step that leads to alpha = 0 cannot be reversed to first order; use a grid that "
            "starts below it, or 'ddpm'"
        )
    a = s.alpha / t.alpha
    added = s.sigma**2 - (a * t.sigma) ** 2
    ahead = (2.0 - a) * x + (added / s.sigma**2) * (s.alpha * denoised - x)
    return ahead + math.sqrt(added) * run.noise()
