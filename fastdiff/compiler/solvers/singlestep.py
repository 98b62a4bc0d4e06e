"""Singlestep exponential integrators: stages between two levels of the grid, for the ODE and the SDE."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from fastdiff.compiler.lin import Lin
from fastdiff.compiler.run import Run
from fastdiff.compiler.solvers.exponential import exponential_step, model_value, noise_scale, phi, phi_slope
from fastdiff.compiler.solvers.history import check_choice, check_order
from fastdiff.compiler.solvers.multistep import CORRECTIONS, multistep
from fastdiff.compiler.solvers.registry import solver
from fastdiff.compiler.solvers.steps import ancestral_split, ancestral_target, half_log_snr_step, ode_step
from fastdiff.process.schedules import Level


@solver("dpmpp_2s", order=2)
def dpmpp_2s(run: Run, x: Lin, r: float = 0.5, flavor: str | None = None) -> Lin:
    """DPM-Solver++(2S) (Lu et al. 2022, Alg. 1): u at lambda_s + r h, x' with (1 - 1/(2r)) D_s + 1/(2r) D_u for D.

    flavor "diffusers": the grid's own levels are the stages, one evaluation per level, in blocks of two (`_blocks`).
    """
    check_choice("dpmpp_2s", "flavor", flavor, (None, "diffusers"))
    return _blocks(run, x, 2) if flavor else _stages(run, x, 2, (_fraction("dpmpp_2s", r),))


@solver("dpmpp_3s", order=3)
def dpmpp_3s(run: Run, x: Lin, r1: float = 1.0 / 3.0, r2: float = 2.0 / 3.0, flavor: str | None = None) -> Lin:
    """DPM-Solver++(3S) (the code of Lu et al. 2022): stages u1, u2 at r1, r2 of the step, three evaluations.

    u1 = first order; u2 = first order + (r2/r1) alpha phi_2(r2 h) (D_1 - D_s);
    x' = first order + (1/r2) alpha_t phi_2(h) (D_2 - D_s), phi_2(h) = 1 - (1 - e^-h)/h.
    flavor "diffusers": the grid's own levels are the stages, in blocks of three (`_blocks`).
    """
    check_choice("dpmpp_3s", "flavor", flavor, (None, "diffusers"))
    if flavor:
        return _blocks(run, x, 3)
    return _stages(run, x, 3, (_fraction("dpmpp_3s", r1), _fraction("dpmpp_3s", r2)))


@solver("dpmsolver", order=2)
def dpmsolver(
    run: Run,
    x: Lin,
    order: int = 2,
    method: str = "multistep",
    correction: str = "midpoint",
    curvature: str = "published",
    flavor: str | None = None,
) -> Lin:
    """DPM-Solver-1/2/3 (Lu et al. 2022a): x' = (alpha_t/alpha_s) x - sigma_t (e^h - 1) E + corrections, in the noise E.

    method: "multistep", or "singlestep" with its stages at 1/2, or 1/3 and 2/3, of the step. correction, curvature and
    flavor "diffusers": of the multistep method, as in dpmpp_3m.
    """
    check_order("dpmsolver", order, 3)
    check_choice("dpmsolver", "method", method, ("multistep", "singlestep"))
    check_choice("dpmsolver", "correction", correction, CORRECTIONS)
    check_choice("dpmsolver", "curvature", curvature, ("published", "exact"))
    check_choice("dpmsolver", "flavor", flavor, (None, "diffusers"))
    if method == "singlestep":
        return _stages(run, x, order, ((), (0.5,), (1.0 / 3.0, 2.0 / 3.0))[order - 1], k=-1.0)
    lower_final = flavor == "diffusers" and run.steps < 15
    return multistep(run, x, order, k=-1.0, correction=correction, curvature=curvature, lower_final=lower_final)


@solver("dpm_fast", order=2, exact_marginal={"s_noise": 1.0}, denoises={"denoise": True})
def dpm_fast(run: Run, x: Lin, denoise: bool = True, eta: float = 0.0, s_noise: float = 1.0) -> Lin:
    """DPM-Solver-fast (Lu et al. 2022a, section 3.4): singlestep orders 3, 3, ..., and what is left, in `steps` calls.

    The grid gives the two ends and the number of evaluations; the levels between are uniform in lambda. denoise: the
    last evaluation is x' = D at the last noisy level; False spends all of them on the way there and ends there, as
    k-diffusion does. eta: every block goes to the lower level of an ancestral split, not below the last noisy level,
    and noise brings it up again.
    """
    top, bottom, final = run.levels[0], run.levels[-2], run.levels[-1]
    evaluations = run.steps - 1 if denoise else run.steps
    if top.alpha == 0.0:
        raise ValueError(
            "dpm_fast is uniform in lambda and cannot start where alpha = 0; use a grid that starts below it"
        )
    if evaluations > 0 and run.steps == 1:
        raise ValueError(
            "dpm_fast with denoise=False needs a grid of two levels or more: it goes from one to the other"
        )
    blocks = evaluations // 3 + 1
    orders = [3] * (blocks - 2) + [2, 1] if evaluations % 3 == 0 else [3] * (blocks - 1) + [evaluations % 3]
    orders = orders if evaluations else []
    ends = [run.level_between(top, bottom, i / len(orders)) for i in range(1, len(orders))]
    for s, t, order in zip([top, *ends], [*ends, bottom], orders, strict=False):
        down = run.level_from_rho(max(ancestral_split(s, t, eta)[0], bottom.rho)) if eta > 0.0 else t
        x = _singlestep(run, x, s, down, ((), (0.5,), (1.0 / 3.0, 2.0 / 3.0))[order - 1], k=-1.0)
        added = math.sqrt(max(0.0, t.rho**2 - down.rho**2)) if down is not t else 0.0
        if added * s_noise > 0.0:
            x = (t.alpha / down.alpha) * x + (s_noise * t.alpha * added) * run.noise()
    return final.alpha * run.denoise(x, bottom) if denoise else (final.alpha / bottom.alpha) * x


@solver("seeds_2", order=2, exact_marginal={"s_noise": 1.0})
def seeds_2(run: Run, x: Lin, eta: float = 1.0, s_noise: float = 1.0, r: float = 0.5, weights: str = "phi_1") -> Lin:
    """SEEDS-2 (Gonzalez et al. 2023): dpmpp_2s for the SDE of strength eta, one Brownian path through both stages.

    The noise of the stage returns at t as e^((r-1) eta h) sqrt(1 - e^(-2 r eta h)) z1 + sqrt(1 - e^(-2(1-r) eta h)) z2,
    times sigma_t. weights: "phi_1" averages D_s and D_u as dpmpp_2s does, "phi_2" integrates the line through them.
    """
    check_choice("seeds_2", "weights", weights, ("phi_1", "phi_2"))
    return _stages(run, x, 2, (_fraction("seeds_2", r),), eta=eta, s_noise=s_noise, exact=weights == "phi_2")


@solver("seeds_3", order=2, exact_marginal={"s_noise": 1.0})
def seeds_3(
    run: Run, x: Lin, eta: float = 1.0, s_noise: float = 1.0, r1: float = 1.0 / 3.0, r2: float = 2.0 / 3.0
) -> Lin:
    """SEEDS-3 (Gonzalez et al. 2023): dpmpp_3s for the SDE of strength eta, one Brownian path through all stages."""
    return _stages(run, x, 3, (_fraction("seeds_3", r1), _fraction("seeds_3", r2)), eta=eta, s_noise=s_noise)


@solver("exp_heun_2_x0", order=2, exact_marginal={"s_noise": 1.0})
def exp_heun_2_x0(run: Run, x: Lin, eta: float = 0.0, s_noise: float = 1.0) -> Lin:
    """Exponential Heun on D (Hochbruck and Ostermann 2010, c2 = 1): seeds_2 with r = 1 and weights "phi_2".

    x' = (sigma_t/sigma_s) e^(-eta h) x + alpha_t (phi_1 D_s + phi_2 (D_t - D_s)) + noise, phi at (1 + eta) h.
    """
    return _stages(run, x, 2, (1.0,), eta=eta, s_noise=s_noise, exact=True)


@solver("dpmpp_sde", order=1, exact_marginal={"s_noise": 1.0})
def dpmpp_sde(run: Run, x: Lin, eta: float = 1.0, s_noise: float = 1.0, r: float = 0.5) -> Lin:
    """DPM-Solver++ SDE (k-diffusion's sample_dpmpp_sde): two ancestral steps from x, to lambda_s + r h and to t.

    x_u = ancestral(x, D_s, s -> u), x' = ancestral(x, (1 - 1/(2r)) D_s + 1/(2r) D_u, s -> t), the split in
    rho = sigma/alpha (`ancestral_split`) and a fresh normal in each.
    """
    weight = 0.5 / _fraction("dpmpp_sde", r)

    def ancestral(estimate: Lin, s: Level, t: Level) -> Lin:
        rho_down, rho_up = ancestral_split(s, t, eta)
        ahead = (t.alpha * rho_down / s.sigma) * x + t.alpha * (1.0 - rho_down / s.rho) * estimate
        added = s_noise * t.alpha * rho_up
        return ahead + added * run.noise() if added > 0.0 else ahead

    for _, s, t in run.intervals():
        denoised = run.denoise(x, s)
        if t.sigma > 0.0 and s.alpha > 0.0:
            u = run.level_between(s, t, r)
            estimate = run.denoise(ancestral(denoised, s, u), u)
            denoised = (1.0 - weight) * denoised + weight * estimate
        x = ancestral(denoised, s, t)
    return x


@solver("dpmpp_2s_ancestral", order=2, exact_marginal={"s_noise": 1.0})
def dpmpp_2s_ancestral(run: Run, x: Lin, eta: float = 1.0, s_noise: float = 1.0) -> Lin:
    """DPM-Solver++(2S) to the lower level of an ancestral split, then noise (k-diffusion's sample_dpmpp_2s_ancestral).

    With r = 1/2 the stage's estimate alone makes the step: x_down = (sigma_down/sigma_s) x + alpha_down phi_1 D_u.
    """
    for _, s, t in run.intervals():
        down, scale, added = ancestral_target(run, s, t, eta)
        if down.sigma > 0.0 and s.alpha > 0.0:
            ahead = _singlestep(run, x, s, down, (0.5,))
        else:
            ahead = ode_step(x, run.denoise(x, s), s, down)
        x = scale * ahead
        if added * s_noise > 0.0:
            x = x + (s_noise * added) * run.noise()
    return x


def _stages(
    run: Run,
    x: Lin,
    order: int,
    fractions: tuple[float, ...],
    *,
    k: float = 1.0,
    eta: float = 0.0,
    s_noise: float = 1.0,
    exact: bool = False,
) -> Lin:
    """Every interval in `order` evaluations; one that starts without signal or ends at sigma = 0 in one."""
    for i, s, t in run.intervals():
        inner = fractions if t.sigma > 0.0 and s.alpha > 0.0 else ()
        if len(inner) < len(fractions):
            ends = "ends at sigma = 0" if t.sigma == 0.0 else "starts at alpha = 0"
            run.note(f"step {i} has order 1 instead of {order}: it {ends}")
        x = _singlestep(run, x, s, t, inner, k=k, eta=eta, s_noise=s_noise, exact=exact)
    return x


def _blocks(run: Run, x: Lin, order: int) -> Lin:
    """Blocks of `order` steps of the grid, the levels inside a block being its stages, and shorter ones at the end.

    The last step is alone; where steps / order leaves nothing, or 2 of 3, the one before it is cut short too. The
    second stage of a block of three is reached by a step of dpmpp_2s.
    """
    whole, left = divmod(run.steps, order)
    tail = {(2, 0): [1, 1], (2, 1): [1], (3, 0): [2, 1], (3, 1): [1], (3, 2): [1, 1]}[order, left]
    lengths = [order] * (whole - (left == 0)) + tail
    start = 0
    for length in lengths:
        s, *inner, t = run.levels[start : start + length + 1]
        if length < order:
            run.note(f"step {start} has order {length} instead of {order}: the last steps come down to order 1")
        if s.alpha == 0.0:  # no place in lambda to put a stage between
            for level, following in itertools.pairwise([s, *inner, t]):
                x = ode_step(x, run.denoise(x, level), level, following)
        else:
            h = half_log_snr_step(s, t)
            fractions = tuple(half_log_snr_step(s, level) / h for level in inner)
            x = _singlestep(run, x, s, t, fractions, levels=inner, averaged=True)
        start += length
    return x


def _singlestep(
    run: Run,
    x: Lin,
    s: Level,
    t: Level,
    fractions: tuple[float, ...],
    *,
    k: float = 1.0,
    eta: float = 0.0,
    s_noise: float = 1.0,
    exact: bool = False,
    levels: Sequence[Level] = (),
    averaged: bool = False,
) -> Lin:
    """One step from s to t with a stage at each fraction of it; the last stage and D_s make the final combination.

    exact: with one stage, integrate the line through its two values instead of averaging them. levels: of the stages,
    if they are known. averaged: reach the second stage by averaging too.
    """
    denoised = run.denoise(x, s)
    if t.sigma == 0.0 or (k < 0.0 and s.alpha == 0.0):
        return ode_step(x, denoised, s, t)
    h = half_log_snr_step(s, t)
    first = model_value(run, x, denoised, s, k)
    noise, before = None, 0.0

    def at(end: Level, fraction: float, slope: Lin | None, mean: bool) -> Lin:
        z = (k + eta) * fraction * h
        combined = phi(z) * first
        if slope is not None:
            combined = combined + (0.5 * phi(z) if mean else phi_slope(z)) * fraction * slope
        ahead = exponential_step(x, combined, s, end, k, eta)
        return ahead + (s_noise * end.sigma) * noise if noise is not None else ahead

    slope = None
    for j, fraction in enumerate((*fractions, 1.0)):
        if eta > 0.0 and fraction > before:
            passed = (fraction - before) * h
            fresh = noise_scale(Level(1.0, 1.0), passed, eta) * run.noise()
            noise = fresh if noise is None else math.exp(-eta * passed) * noise + fresh
            before = fraction
        if j == len(fractions):
            break
        stage = levels[j] if levels else run.level_between(s, t, fraction)
        ahead = at(stage, fraction, slope, mean=averaged)
        slope = (model_value(run, ahead, run.denoise(ahead, stage), stage, k) - first) / fraction
    return at(t, 1.0, slope, mean=len(fractions) == 1 and not exact)


def _fraction(solver: str, r: float) -> float:
    if not 0.0 < r <= 1.0:
        raise ValueError(f"{solver}: a stage must lie within the step, at 0 < r <= 1, got {r}")
    return float(r)
