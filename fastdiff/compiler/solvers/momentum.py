"""Samplers that damp or extrapolate the direction of the last steps."""

from __future__ import annotations

from fastdiff.compiler.lin import Lin
from fastdiff.compiler.run import Run
from fastdiff.compiler.solvers.adams import combine_values, constant_step
from fastdiff.compiler.solvers.history import History, check_order
from fastdiff.compiler.solvers.registry import solver
from fastdiff.compiler.solvers.steps import noise_estimate, ode_step, slope_step

# int_0^1 of the backward differences: AB = sum_j DIFFERENCES[j] nabla^j
DIFFERENCES = (1.0, 1 / 2, 5 / 12, 3 / 8)


@solver("hb", order=1)
def hb(run: Run, x: Lin, order: int = 2, beta: float = 0.8) -> Lin:
    """Heavy ball (Wizadwongsa et al. 2024): v = (1 - beta) v + beta AB_p(E), x'/alpha = x/alpha + drho v.

    order p of 1..4: of the Adams-Bashforth combination, rising from 1; beta = 1 is ipndm, below it the method is of
    first order and damps oscillations.
    """
    _check_beta("hb", beta)
    history = History(run, check_order("hb", order, 4))
    velocity: Lin | None = None
    for i, s, t in run.intervals():
        denoised = run.denoise(x, s)
        if t.sigma == 0.0:
            history.order(i, t)
            return t.alpha * denoised
        history.add(s, run.keep(noise_estimate(x, denoised, s)))
        if s.alpha == 0.0:
            x = ode_step(x, denoised, s, t)
            continue
        now = combine_values(constant_step(history.order(i, t)), history.values)
        if velocity is None:  # the step of ddim, written without large terms that cancel
            velocity, x = now, ode_step(x, denoised, s, t)
            continue
        velocity = run.keep((1.0 - beta) * velocity + beta * now)
        x = slope_step(x, velocity, s, t)
    return x


@solver("ghvb", order=2)
def ghvb(run: Run, x: Lin, order: int = 2, beta: float = 0.8) -> Lin:
    """Generalised heavy ball (Wizadwongsa et al. 2024): v = (1 - beta) v + beta E, then mix_p(v) for E.

    x'/alpha_t = x/alpha_s + (rho_t - rho_s) mix_p. mix_p keeps p terms of AB(nabla) (1 + ((1 - beta)/beta) nabla),
    which undoes the damping to order p: ((2 + beta) v_0 - (2 - beta) v_1)/(2 beta) for p = 2. order 1..4; the weights
    are those of equal steps, so uneven grids give order 2 at most. beta = 1 is ipndm.
    """
    _check_beta("ghvb", beta)
    history = History(run, check_order("ghvb", order, 4))
    velocity: Lin | None = None
    for i, s, t in run.intervals():
        denoised = run.denoise(x, s)
        if t.sigma == 0.0:
            history.order(i, t)
            return t.alpha * denoised
        now = noise_estimate(x, denoised, s)
        velocity = run.keep(now if velocity is None else (1.0 - beta) * velocity + beta * now)
        history.add(s, velocity)
        if s.alpha == 0.0:
            x, velocity = ode_step(x, denoised, s, t), None
            continue
        order = history.order(i, t)
        if order == 1 and len(history.values) == 1:
            x = ode_step(x, denoised, s, t)
            continue
        x = slope_step(x, combine_values(mix_weights(order, beta), history.values), s, t)
    return x


@solver("gradient_estimation", order=1)
def gradient_estimation(run: Run, x: Lin, gamma: float = 2.0) -> Lin:
    """Gradient estimation (Permenter and Yuan 2024): gamma E + (1 - gamma) E_old in place of E."""
    history = History(run, 2)
    for i, s, t in run.intervals():
        denoised = run.denoise(x, s)
        if t.sigma == 0.0:
            history.order(i, t)
            return t.alpha * denoised
        history.add(s, run.keep(noise_estimate(x, denoised, s)))
        if history.order(i, t) == 1:
            x = ode_step(x, denoised, s, t)
        else:
            x = slope_step(x, combine_values((gamma, 1.0 - gamma), history.values), s, t)
    return x


def mix_weights(order: int, beta: float) -> list[float]:
    """mix_p as weights of v_0, v_1, ...: p terms of AB(nabla) (1 + ((1 - beta)/beta) nabla), nabla = 1 - shift."""
    undo = (1.0 - beta) / beta
    weights = [0.0] * order
    for power in range(order):
        term = DIFFERENCES[power] + (undo * DIFFERENCES[power - 1] if power else 0.0)
        binomial = 1.0
        for shift in range(power + 1):
            weights[shift] += term * (-1.0) ** shift * binomial
            binomial *= (power - shift) / (shift + 1.0)
    return weights


def _check_beta(solver: str, beta: float) -> None:
    if not 0.0 < beta <= 1.0:
        raise ValueError(f"{solver}: beta, how much of the new direction is taken, must be in (0, 1], got {beta}")
