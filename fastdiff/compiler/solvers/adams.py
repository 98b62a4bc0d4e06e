"""Adams-Bashforth samplers: a polynomial through past model values, integrated over the step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from fastdiff.compiler.lin import Lin
from fastdiff.compiler.run import Run
from fastdiff.compiler.solvers.exponential import exponential_step
from fastdiff.compiler.solvers.history import History, check_choice, check_order
from fastdiff.compiler.solvers.quadrature import exponential_weights, lagrange_weights
from fastdiff.compiler.solvers.registry import solver
from fastdiff.compiler.solvers.steps import half_log_snr_step, noise_estimate, ode_step, slope_step
from fastdiff.process.schedules import Level

# the weights of order p on equal steps, newest first
_CONSTANT_STEP = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@solver("deis", order=3)
def deis(run: Run, x: Lin, order: int = 3, flavor: str | None = None) -> Lin:
    """tAB-DEIS in log rho (Zhang and Chen 2023): x'/alpha_t = x/alpha_s + sum_j E_j int L_j(log rho) drho.

    order 1..4. flavor "diffusers": fewer than 15 steps come down to order 1 at the end.
    """
    check_order("deis", order, 4)
    check_choice("deis", "flavor", flavor, (None, "diffusers"))
    history = History(run, order, lower_final=flavor == "diffusers" and run.steps < 15)
    return _exponential(run, x, history, k=-1.0)


@solver("exponential_ab", order=3)
def exponential_ab(run: Run, x: Lin, order: int = 3, variable: str = "x0") -> Lin:
    """Adams-Bashforth of order 1..4 with exact weights, for any quantity held by the polynomial.

    variable: "x0" and "eps" in lambda = log(alpha/sigma), the exponential integrators on D and on E (eps is deis);
    "rho", E against rho = sigma/alpha (lms); "velocity", E - D against u = sigma/(alpha + sigma):
    x'/(alpha + sigma) = x/(alpha + sigma) + sum_j (E_j - D_j) int L_j(u) du, the time of a straight flow.
    """
    check_order("exponential_ab", order, 4)
    check_choice("exponential_ab", "variable", variable, ("x0", "eps", "rho", "velocity"))
    history = History(run, order, without_signal=variable == "velocity")
    if variable == "velocity":
        return _velocity(run, x, history)
    if variable == "rho":
        return _slopes(run, x, history, _lagrange_in_rho, to_zero=False)
    return _exponential(run, x, history, k=1.0 if variable == "x0" else -1.0)


@solver("lms", order=4, denoises={"flavor": None})
def lms(run: Run, x: Lin, order: int = 4, flavor: str | None = None) -> Lin:
    """Linear multistep (k-diffusion's sample_lms): x'/alpha_t = x/alpha_s + sum_j E_j int L_j(rho) drho over the step.

    order 1..4. flavor "diffusers" or "k_diffusion": the step to sigma = 0 keeps its order instead of being x' = D.
    """
    check_order("lms", order, 4)
    check_choice("lms", "flavor", flavor, (None, "diffusers", "k_diffusion"))
    return _slopes(run, x, History(run, order, to_zero=flavor is not None), _lagrange_in_rho, flavor is not None)


@solver("ipndm", order=2, denoises={"flavor": None})
def ipndm(run: Run, x: Lin, order: int = 4, flavor: str | None = None) -> Lin:
    """iPNDM (Zhang and Chen 2023): x'/alpha_t = x/alpha_s + (rho_t - rho_s) sum_j a_j E_j.

    a_j: Adams-Bashforth weights of equal steps, order 1..4, rising from 1; on grids uneven in rho they give order 2.
    flavor "diffusers": the step to sigma = 0 keeps its order instead of being x' = D.
    """
    check_order("ipndm", order, 4)
    check_choice("ipndm", "flavor", flavor, (None, "diffusers"))
    return _slopes(run, x, History(run, order, to_zero=flavor is not None), _even_in_rho, flavor is not None)


@solver("ipndm_v", order=4)
def ipndm_v(run: Run, x: Lin, order: int = 4, flavor: str | None = None) -> Lin:
    """iPNDM with the Adams-Bashforth weights of the grid's own steps in rho (Zhang and Chen 2023): order 1..4.

    int L_j drho / (rho_t - rho_s) in place of the a_j of ipndm, and so the table of lms. flavor "comfyui": the weights
    that its released code computes, which are not these from the third order on (`_as_released`).
    """
    check_order("ipndm_v", order, 4)
    check_choice("ipndm_v", "flavor", flavor, (None, "comfyui"))
    weigh = _lagrange_in_rho if flavor is None else _as_released
    return _slopes(run, x, History(run, order), weigh, to_zero=False)


# of sigma/alpha in one Runge-Kutta step: its last slope divides what rounding left of the first level by the last one
LONGEST = 1e3


@solver("pndm", order=2, denoises={"flavor": None})
def pndm(run: Run, x: Lin, warmup: str = "prk", flavor: str | None = None) -> Lin:
    """PNDM (Liu et al. 2022): linear multistep of order 4 on E, x'/alpha_t = x/alpha_s + (rho_t - rho_s) E'.

    warmup: "prk", three pseudo Runge-Kutta steps of four evaluations, their middle halfway on the schedule's clock; or
    "plms", the first step twice, the second time with the mean of E at both ends. A step over which sigma/alpha falls
    by more than 1000 has order 1: in float32 its slopes would be rounding. flavor "diffusers": the step to
    sigma = 0 keeps its order instead of being x' = D.
    """
    check_choice("pndm", "warmup", warmup, ("prk", "plms"))
    check_choice("pndm", "flavor", flavor, (None, "diffusers"))
    history = History(run, 4, to_zero=flavor is not None)
    for i, s, t in run.intervals():
        denoised = run.denoise(x, s)
        if t.sigma == 0.0 and flavor is None:
            history.order(i, t)
            return t.alpha * denoised
        slope = run.keep(noise_estimate(x, denoised, s))
        history.add(s, slope)
        if s.alpha == 0.0:
            x = ode_step(x, denoised, s, t)
            continue
        if s.rho > LONGEST * t.rho > 0.0:
            run.note(f"step {i} has order 1 instead of 4: sigma/alpha falls by a factor of {s.rho / t.rho:.3g}")
            x = ode_step(x, denoised, s, t)
            continue
        warms = i < (3 if warmup == "prk" else 1) and t.sigma > 0.0
        if warms and warmup == "prk":
            slope = _runge_kutta(run, x, slope, s, t)
        elif warms:
            base = run.keep(x)
            ahead = slope_step(x, slope, s, t)
            slope, x = 0.5 * (slope + noise_estimate(ahead, run.denoise(ahead, t), t)), base
        else:
            order = history.order(i, t)
            if order == 1:
                x = ode_step(x, denoised, s, t)
                continue
            slope = combine_values(constant_step(order), history.values)
        x = slope_step(x, slope, s, t)
    return x


def _runge_kutta(run: Run, x: Lin, first: Lin, s: Level, t: Level) -> Lin:
    """(e1 + 2 e2 + 2 e3 + e4) / 6, e2 and e3 in the middle of the step and e4 at its end (Liu et al. 2022)."""
    if run.schedule is None:
        raise ValueError("pndm: warmup 'prk' needs a schedule with a clock, got custom levels; use warmup='plms'")
    middle = run.schedule.level(0.5 * (s.time + t.time))
    base, total, slope = run.keep(x), first, first
    for weight, level in ((2.0, middle), (2.0, middle), (1.0, t)):
        ahead = slope_step(base, slope, s, level)
        slope = noise_estimate(ahead, run.denoise(ahead, level), level)
        total = run.keep(total + weight * slope)
    return total / 6.0


def _slopes(
    run: Run, x: Lin, history: History, weigh: Callable[[Sequence[Level], Level], Sequence[float]], to_zero: bool
) -> Lin:
    """x'/alpha_t = x/alpha_s + sum_j w_j E_j for the rule that gives w from the known levels and the next one."""
    for i, s, t in run.intervals():
        denoised = run.denoise(x, s)
        if t.sigma == 0.0 and not to_zero:
            history.order(i, t)
            return t.alpha * denoised
        history.add(s, run.keep(noise_estimate(x, denoised, s)))
        order = history.order(i, t)
        if order == 1:  # the same step, without large terms that cancel
            x = ode_step(x, denoised, s, t)
            continue
        weights = weigh(history.levels[:order], t)
        x = (t.alpha / s.alpha) * x + t.alpha * combine_values(weights, history.values)
    return x


def _lagrange_in_rho(levels: Sequence[Level], t: Level) -> Sequence[float]:
    return lagrange_weights([level.rho for level in levels], levels[0].rho, t.rho)


def _as_released(levels: Sequence[Level], t: Level) -> Sequence[float]:
    """The released ipndm_v: Newton's form with two of its integrals off, I_m of prod_{i<m} (rho - rho_i) over the step.

    With h the step, g and k the ones before it, a = h/(3 (h + g)) and q = h (h + g)/(g (g + k)): I_2/(g (g + k)) is
    taken as (1 - a q)/2 where (1 - a) q/2 is right, and I_3 as a sum that should be a difference.
    """
    nodes = [level.rho for level in levels]
    h, *before = [t.rho - nodes[0], *(new - old for new, old in itertools.pairwise(nodes))]
    integrals = [1.0, 0.5 * h]
    if len(nodes) > 2:
        g, k = before[:2]
        a = h / (3.0 * (h + g))
        integrals.append(0.5 * (g * (g + k) - a * h * (h + g)))
        share = 0.5 * (1.0 - a) + (1.0 - h / (2.0 * (h + g))) * h / (6.0 * (h + g + k))
        integrals.append(share * h * (h + g) * (h + g + k))
    weights = [0.0] * len(nodes)
    for m in range(len(nodes)):
        for j in range(m + 1):
            others = [nodes[j] - nodes[i] for i in range(m + 1) if i != j]
            weights[j] += h * integrals[m] / math.prod(others)
    return weights


def _even_in_rho(levels: Sequence[Level], t: Level) -> Sequence[float]:
    return [(t.rho - levels[0].rho) * a for a in constant_step(len(levels))]


def _exponential(run: Run, x: Lin, history: History, k: float) -> Lin:
    """The exponential Adams-Bashforth method on D (k = 1) or E (k = -1)."""
    for i, s, t in run.intervals():
        denoised = run.denoise(x, s)
        if t.sigma == 0.0:
            history.order(i, t)
            return t.alpha * denoised
        history.add(s, denoised if k > 0.0 else run.keep(noise_estimate(x, denoised, s)))
        order = history.order(i, t)
        if order == 1:
            x = ode_step(x, denoised, s, t)
            continue
        nodes = [level.lam - t.lam for level in history.levels[:order]]
        weights = exponential_weights(nodes, half_log_snr_step(s, t), k)
        x = exponential_step(x, combine_values(weights, history.values), s, t, k)
    return x


def _velocity(run: Run, x: Lin, history: History) -> Lin:
    for i, s, t in run.intervals():
        denoised = run.denoise(x, s)
        if t.sigma == 0.0:
            history.order(i, t)
            return t.alpha * denoised
        history.add(s, run.keep(noise_estimate(x, denoised, s) - denoised))
        levels = history.levels[: history.order(i, t)]
        weights = lagrange_weights([_flow_time(level) for level in levels], _flow_time(s), _flow_time(t))
        total = t.alpha + t.sigma
        x = (total / (s.alpha + s.sigma)) * x + total * combine_values(weights, history.values)
    return x


def _flow_time(level: Level) -> float:
    return level.sigma / (level.alpha + level.sigma)


def constant_step(order: int) -> tuple[float, ...]:
    """Adams-Bashforth weights of equal steps, newest first; they sum to 1."""
    return _CONSTANT_STEP[order - 1]


def combine_values(weights: Sequence[float], values: Sequence[Lin]) -> Lin:
    """sum_j w_j m_j over as many values as there are weights."""
    return sum((w * value for w, value in zip(weights, values, strict=False)), 0.0 * values[0])
