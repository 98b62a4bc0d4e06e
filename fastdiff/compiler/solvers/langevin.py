"""Langevin samplers and the random-walk template they are points of, in x / alpha against rho = sigma / alpha."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fastdiff.compiler.lin import Lin
from fastdiff.compiler.run import Run
from fastdiff.compiler.solvers.history import check_choice
from fastdiff.compiler.solvers.registry import solver
from fastdiff.compiler.solvers.sde import reverse_step
from fastdiff.compiler.solvers.steps import ancestral_split
from fastdiff.process.schedules import Level


def walk(run: Run, x: Lin, s: Level, t: Level, tau: float, temperature: float, draw: Callable[[], Lin]) -> Lin:
    """x/alpha += tau score + sqrt(2 tau T) z, score = (D - x/alpha) / rho^2, then carried to level t's scale.

    draw: of z, `run.noise` where the walk goes down, `run.white_noise` where it stays at a level.
    """
    denoised = run.denoise(x, s)
    ahead = (t.alpha * (1.0 - tau / s.rho**2) / s.alpha) * x + (t.alpha * tau / s.rho**2) * denoised
    return ahead + (t.alpha * math.sqrt(2.0 * tau * temperature)) * draw() if temperature > 0.0 else ahead


@solver("annealed_langevin", order=1, exact_marginal=False, denoises={"denoise": True})
def annealed_langevin(run: Run, x: Lin, epsilon: float = 0.2, inner: int = 20, denoise: bool = True) -> Lin:
    """Annealed Langevin dynamics (Song and Ermon 2019, Alg. 1), levels from large to small.

    At each level `inner` steps of x += (a/2) score + sqrt(a) z with a = epsilon rho^2 (the paper's epsilon is this one
    times rho_min^2). denoise: end with one noise-free evaluation x = D.
    """
    _check_positive("annealed_langevin", epsilon=epsilon, inner=inner)
    _check_signal("annealed_langevin", run)
    last = run.steps - 1
    for i, s, t in run.intervals():
        for j in range(inner):
            target = t if j == inner - 1 and i < last else s
            x = walk(run, x, s, target, 0.5 * epsilon * s.rho**2, 1.0, run.white_noise)
    s, t = run.levels[last], run.levels[-1]
    return t.alpha * run.denoise(x, s) if denoise else (t.alpha / s.alpha) * x


@solver(
    "random_walk",
    order=1,
    exact_marginal={"point": "ddpm_small", "tau": None, "temperatures": None},
    denoises={"denoise": True, "tau": None},
)
def random_walk(
    run: Run,
    x: Lin,
    point: str = "walk",
    epsilon: float = 0.5,
    temperature: float = 1.0,
    tau: Sequence[float] | None = None,
    temperatures: Sequence[float] | None = None,
    denoise: bool = True,
) -> Lin:
    """Random walk with Tweedie (Park et al. 2024): x/alpha += tau_k score + sqrt(2 tau_k T_k) z, no noise last.

    point: where in the template to stand. "walk": tau_k = epsilon rho_k^2, T_k linear from `temperature` to 1.
    "ddpm_large", "ddpm_small": tau_k = rho_k^2 - rho_{k+1}^2 with T_k = a^2/2, a = alpha_k/alpha_{k+1}, and
    T_k = rho_{k+1}^2 / (2 rho_k^2): DDPM with sigma^2 = beta and beta~. "sde": that tau with T = 1/2, the VE reverse
    diffusion. tau, temperatures: the tables themselves, one number per level. denoise: the last step is x = D, unless
    tau says what it is.
    """
    _check_signal("random_walk", run)
    steps, heat = _template(run, point, epsilon, temperature)
    steps = _table("tau", tau, steps)
    heat = _table("temperatures", temperatures, heat)
    for i, s, t in run.intervals():
        last = i == run.steps - 1
        if last and denoise and tau is None:
            return t.alpha * run.denoise(x, s)
        x = walk(run, x, s, t, steps[i], 0.0 if last else heat[i], run.noise)
    return x


@solver("langevin_pc", order=1, exact_marginal=False)
def langevin_pc(run: Run, x: Lin, snr: float = 0.16, corrections: int = 1, predictor: str = "reverse_diffusion") -> Lin:
    """Predictor-corrector (Song et al. 2021b, Alg. 1 to 5): at each level Langevin steps, then one step down.

    Corrector: x/alpha += tau score + sqrt(2 tau) z with tau = 2 (snr rho)^2. The paper's 2 (snr |z|/|score|)^2, norms
    averaged over the batch, is this one where the score has its typical size |z|/rho; here no sample depends on its
    neighbours. predictor: "reverse_diffusion", "ddpm" (the posterior, the same step as ancestral sampling) or "ddim".
    """
    _check_positive("langevin_pc", snr=snr, corrections=corrections)
    check_choice("langevin_pc", "predictor", predictor, ("reverse_diffusion", "ddpm", "ddim"))
    _check_signal("langevin_pc", run)
    for _, s, t in run.intervals():
        for _ in range(corrections):
            x = walk(run, x, s, s, 2.0 * (snr * s.rho) ** 2, 1.0, run.white_noise)
        if predictor == "reverse_diffusion":
            x = reverse_step(run, x, s, t, "langevin_pc")
            continue
        denoised = run.denoise(x, s)
        rho_down, rho_up = ancestral_split(s, t, 1.0 if predictor == "ddpm" else 0.0)
        x = (t.alpha * rho_down / s.sigma) * x + t.alpha * (1.0 - rho_down / s.rho) * denoised
        if rho_up > 0.0:
            x = x + (t.alpha * rho_up) * run.noise()
    return x


def _template(run: Run, point: str, epsilon: float, temperature: float) -> tuple[list[float], list[float]]:
    pairs = [(s, t) for _, s, t in run.intervals()]
    drop = [s.rho**2 - t.rho**2 for s, t in pairs]
    if point == "walk":
        _check_positive("random_walk", epsilon=epsilon, temperature=temperature)
        span = max(1, run.steps - 1)
        return (
            [epsilon * s.rho**2 for s, _ in pairs],
            [temperature + (1.0 - temperature) * i / span for i in range(run.steps)],
        )
    if point == "ddpm_large":
        return drop, [0.5 * (s.alpha / t.alpha) ** 2 for s, t in pairs]
    if point == "ddpm_small":
        return drop, [0.5 * (t.rho / s.rho) ** 2 for s, t in pairs]
    if point == "sde":
        return drop, [0.5] * run.steps
    raise ValueError(f"random_walk: point must be walk, ddpm_large, ddpm_small or sde, got {point!r}")


def _table(name: str, given: Sequence[float] | None, default: list[float]) -> list[float]:
    if given is None:
        return default
    numbers = isinstance(given, Sequence) and all(isinstance(v, int | float) for v in given)
    if not numbers or len(given) != len(default) or not all(math.isfinite(v) and v >= 0.0 for v in given):
        raise ValueError(f"random_walk: {name} must hold {len(default)} finite numbers >= 0, got {given!r}")
    return [float(v) for v in given]


def _check_positive(name: str, **values: float) -> None:
    for key, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}: {key} must be > 0, got {value}")


def _check_signal(name: str, run: Run) -> None:
    if run.levels[0].alpha == 0.0:
        raise ValueError(f"{name} walks in x / alpha and cannot start where alpha = 0; use a grid that starts below it")
