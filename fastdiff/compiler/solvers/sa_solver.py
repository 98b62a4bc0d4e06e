"""SA-Solver (Xue et al. 2023): stochastic Adams methods with a predictor and a corrector on one draw of noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastdiff.compiler.lin import Lin
from fastdiff.compiler.run import Run
from fastdiff.compiler.solvers.exponential import exponential_step, noise_scale, phi
from fastdiff.compiler.solvers.history import History, check_choice, check_order
from fastdiff.compiler.solvers.quadrature import exponential_weights
from fastdiff.compiler.solvers.registry import solver
from fastdiff.compiler.solvers.steps import half_log_snr_step
from fastdiff.process.schedules import Level


@solver("sa_solver", order=2, exact_marginal={"s_noise": 1.0})
def sa_solver(
    run: Run,
    x: Lin,
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: float = 1.0,
    tau_from: float = 0.0,
    tau_to: float = math.inf,
    taus: Sequence[float] | None = None,
    mode: str = "pec",
    lower_final: bool = True,
    s_noise: float = 1.0,
    flavor: str | None = None,
) -> Lin:
    """SA-Solver (Xue et al. 2023, Alg. 1): x' = (sigma_t/sigma_s) e^(-tau^2 h) x + sum_j b_j D_j + noise.

    b_j = alpha_t int k e^(k (lambda - lambda_t)) L_j dlambda, k = 1 + tau^2; noise sigma_t sqrt(1 - e^(-2 tau^2 h)) z.
    predictor_order 1..4: over the last D. corrector_order 0..4: the step just made again, with the D found at its end
    and the same z; 0 leaves it out. tau: strength of the noise (0 the ODE, 1 the SDE), where
    tau_from <= sigma/alpha <= tau_to and 0 elsewhere; taus: instead of these, one number per step. mode: "pec"
    evaluates once a step, "pece" again after the correction. lower_final: come down to order 1 over the last steps.
    flavor "diffusers": order 2 uses its simplified weights.

    Order (Theorems 5.1 and 5.2): the strong error is O(tau h + h^p) of the predictor alone, with a corrector
    O(tau h + h^min(p + 1, c)); the variance is of order 2 where tau > 0 and both orders are 2 or more.
    """
    check_order("sa_solver", predictor_order, 4, "predictor_order")
    if corrector_order != 0:
        check_order("sa_solver", corrector_order, 4, "corrector_order")
    check_choice("sa_solver", "mode", mode, ("pec", "pece"))
    check_choice("sa_solver", "flavor", flavor, (None, "diffusers"))
    strengths = _strengths(run, tau, tau_from, tau_to, taus)
    simple = flavor == "diffusers"
    history = History(run, predictor_order, lower_final=lower_final)
    older = History(run, max(1, corrector_order - 1))
    begun: tuple[Lin, float] | None = None
    for i, s, t in run.intervals():
        denoised = run.denoise(x, s)
        if begun is not None:
            rest, weight = begun
            x = rest + weight * denoised
            if mode == "pece":
                denoised = run.denoise(x, s)
        if t.sigma == 0.0:
            history.order(i, t)
            return t.alpha * denoised
        history.add(s, denoised)
        older.add(s, denoised)
        order = history.order(i, t)
        h, stretch = half_log_snr_step(s, t), strengths[i] ** 2
        added = s_noise * noise_scale(t, h, stretch)
        noise = added * run.noise() if added > 0.0 else 0.0 * x
        begun = None
        if corrector_order:
            most = min(corrector_order, run.steps - i + 1) if lower_final else corrector_order
            usable = sum(level.alpha > 0.0 for level in older.levels)
            nodes = max(1, min(most, usable + 1))
            if nodes < corrector_order:
                why = (
                    "the last steps come down to order 1" if nodes == most else f"{usable} model evaluations are known"
                )
                run.note(f"the corrector of step {i} has order {nodes} instead of {corrector_order}: {why}")
            through = [t, *older.levels][:nodes]
            weight, *known = _weights(through, s, t, 1.0 + stretch, simple)
            # all of the next correction but D at t: one register carries it, and the draw is made once
            begun = run.keep(_adams(x, known, older.values, s, t, stretch) + noise), t.alpha * weight
        known = _weights(history.levels[:order], s, t, 1.0 + stretch, simple)
        x = _adams(x, known, history.values, s, t, stretch) + noise
    return x


def _adams(x: Lin, weights: Sequence[float], values: Sequence[Lin], s: Level, t: Level, stretch: float) -> Lin:
    """From x at s to t by the newest values with these weights."""
    combined = sum((w * value for w, value in zip(weights, values, strict=False)), 0.0 * x)
    return exponential_step(x, combined, s, t, 1.0, stretch)


def _weights(levels: Sequence[Level], s: Level, t: Level, k: float, simple: bool) -> list[float]:
    """int k e^(k (lambda - lambda_t)) L_j dlambda over the step, L_j of the polynomial through these levels."""
    h = half_log_snr_step(s, t)
    if simple and len(levels) == 2 and math.isfinite(h):
        # the weight of the value that is not at s: exact to O(h^3) only
        (other,) = (j for j, level in enumerate(levels) if level != s)
        part = 0.5 * k * h if levels[other] == t else 0.5 * k * h**2 / (levels[other].lam - s.lam)
        return [phi(k * h) - part, part] if other == 1 else [part, phi(k * h) - part]
    return exponential_weights([level.lam - t.lam for level in levels], h, k)


def _strengths(run: Run, tau: float, low: float, high: float, taus: Sequence[float] | None) -> list[float]:
    """tau of every step."""
    if taus is None:
        return [float(tau) if low <= s.rho <= high else 0.0 for _, s, _ in run.intervals()]
    if len(taus) != run.steps or not all(math.isfinite(value) for value in taus):
        raise ValueError(f"sa_solver: taus must hold {run.steps} finite numbers, one per step, got {list(taus)}")
    return [float(value) for value in taus]
