"""Each sampler's table against its formula written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from table_cases import ZERO_SNR, everywhere, rows_of, scaled

from fastdiff.compiler.build import plan as build
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.verify import execute
from fastdiff.process import schedules
from fastdiff.process.schedules import Level, Schedule

Array = np.ndarray[Any, np.dtype[np.float64]]
TIGHT = {"rtol": 1e-11, "atol": 1e-12}


def one_step(plan: Plan, formula: Callable[[Level, Level], tuple[float, float, float]]) -> None:
    for s, t, got in rows_of(plan):
        assert got["R"] == 0.0
        np.testing.assert_allclose([got["A"], got["B"], got["C"]], formula(s, t), **TIGHT)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@everywhere
def test_ddpm_is_the_product_of_two_gaussians(schedule: Schedule, grid: str, variance: str) -> None:
    def posterior(s: Level, t: Level) -> tuple[float, float, float]:
        if t.sigma == 0.0:
            return 0.0, 1.0, 0.0
        a = s.alpha / t.alpha
        beta = s.sigma**2 - a**2 * t.sigma**2
        precision = 1.0 / t.sigma**2 + a**2 / beta
        noise = 1.0 / precision if variance == "fixed_small" else beta
        return a / beta / precision, t.alpha / t.sigma**2 / precision, math.sqrt(noise)

    one_step(build("ddpm", schedule, 10, grid, variance=variance), posterior)


@pytest.mark.parametrize("schedule", [schedules.linear(), schedules.cosine(), ZERO_SNR])
def test_ddpm_in_alpha_bar(schedule: Schedule) -> None:
    """A = sqrt(a_t)(1 - ab')/(1 - ab), B = sqrt(ab') b_t/(1 - ab), C^2 = (1 - ab')/(1 - ab) b_t."""

    def formula(s: Level, t: Level) -> tuple[float, float, float]:
        ab, after = s.alpha**2, t.alpha**2
        at = ab / after
        c = (1 - after) / (1 - ab) * (1 - at)
        return math.sqrt(at) * (1 - after) / (1 - ab), math.sqrt(after) * (1 - at) / (1 - ab), math.sqrt(c)

    plan = build("ddpm", schedule, 10, "trailing")
    for s, t, got in rows_of(plan):
        np.testing.assert_allclose([got["A"], got["B"], got["C"]], formula(s, t), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@everywhere
def test_ddim(schedule: Schedule, grid: str, eta: float) -> None:
    def formula(s: Level, t: Level) -> tuple[float, float, float]:
        c2 = eta**2 * (t.sigma / s.sigma) ** 2 * max(0.0, s.sigma**2 - (s.alpha / t.alpha) ** 2 * t.sigma**2)
        eps = math.sqrt(t.sigma**2 - c2) / s.sigma
        return eps, t.alpha - s.alpha * eps, math.sqrt(c2)

    one_step(build("ddim", schedule, 10, grid, eta=eta), formula)


@everywhere
def test_euler(schedule: Schedule, grid: str) -> None:
    def formula(s: Level, t: Level) -> tuple[float, float, float]:
        if s.alpha == 0.0:
            return t.sigma / s.sigma, t.alpha, 0.0
        return scaled(s, t, t.rho / s.rho, 1.0 - t.rho / s.rho, 0.0)

    one_step(build("euler", schedule, 10, grid), formula)


def test_churn() -> None:
    """s_hat = s (1 + min(S/N, sqrt 2 - 1)) inside [s_tmin, s_tmax], and the model is evaluated there."""
    plan = build("euler", "edm", 10, "karras", s_churn=3.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.01)
    plain = build("euler", "edm", 10, "karras")
    assert plan.nfe == plain.nfe == 10
    sigmas = [level.sigma for level in plan.levels]
    for i, row in enumerate(plan.rows[1:]):
        inside = 0.05 <= sigmas[i] <= 50.0
        assert row.level is not None
        hat = sigmas[i] * (1.0 + (0.3 if inside else 0.0))
        assert row.level.sigma == pytest.approx(hat, rel=1e-12)
        before = plan.rows[i].outputs[0]
        added = math.hypot(*before.noise) if before.noise else 0.0
        assert added == pytest.approx(1.01 * math.sqrt(hat**2 - sigmas[i] ** 2), rel=1e-9, abs=1e-12)
        output = row.outputs[0]
        assert output.x == pytest.approx(sigmas[i + 1] / hat, rel=1e-12)
        assert output.denoised == pytest.approx(1.0 - sigmas[i + 1] / hat, rel=1e-12)
    capped = build("heun", "edm", 4, "karras", s_churn=100.0)
    assert capped.rows[1].level is not None
    assert capped.rows[1].level.sigma == pytest.approx(80.0 * math.sqrt(2.0))


@pytest.mark.parametrize("eta", [0.5, 1.0])
@everywhere
def test_euler_ancestral(schedule: Schedule, grid: str, eta: float) -> None:
    def formula(s: Level, t: Level) -> tuple[float, float, float]:
        if schedule.kind == "flow":
            down = t.sigma * (1.0 + (t.sigma / s.sigma - 1.0) * eta)
            k = (1.0 - t.sigma) / (1.0 - down)
            noise = math.sqrt(max(t.sigma**2 - (k * down) ** 2, 0.0))
            return k * down / s.sigma, k * (1.0 - down / s.sigma), noise
        if s.alpha == 0.0:
            up, down = eta * t.rho, t.rho * math.sqrt(1.0 - eta**2)
            return t.alpha * down / s.sigma, t.alpha, t.alpha * up
        up = min(t.rho, eta * math.sqrt(t.rho**2 * (s.rho**2 - t.rho**2) / s.rho**2))
        down = math.sqrt(t.rho**2 - up**2)
        return scaled(s, t, down / s.rho, 1.0 - down / s.rho, up)

    one_step(build("euler_ancestral", schedule, 10, grid, eta=eta), formula)


@everywhere
def test_heun(schedule: Schedule, grid: str) -> None:
    """From the state saved before the first stage: A = r, B(D1) = (1-r)(2r-1)/(2r), B(D2) = (1-r)/(2r)."""
    plan = build("heun", schedule, 8, grid)
    rng = np.random.default_rng(0)
    values = rng.standard_normal((plan.nfe, 5))
    seen: list[tuple[Array, Level]] = []

    def denoise(x: Array, level: Level) -> Array:
        seen.append((x, level))
        return values[len(seen) - 1]

    x = rng.standard_normal(5)
    got = execute(plan, denoise, x)
    k = 0
    for s, t in zip(plan.levels, plan.levels[1:], strict=False):
        r = t.sigma / t.alpha / (s.sigma / s.alpha) if s.alpha else 0.0
        np.testing.assert_allclose(seen[k][0], x, rtol=1e-9, atol=1e-10)
        first = values[k]
        k += 1
        if t.sigma == 0.0 or s.alpha == 0.0:
            ratio = t.sigma / s.sigma
            x = ratio * x + (t.alpha - s.alpha * ratio) * first
            continue
        second = values[k]
        assert seen[k][1] == t
        k += 1
        x = t.alpha * (r * x / s.alpha + (1 - r) * (2 * r - 1) / (2 * r) * first + (1 - r) / (2 * r) * second)
    assert k == plan.nfe
    np.testing.assert_allclose(got, x, rtol=1e-9, atol=1e-10)


@everywhere
def test_dpmpp_2m(schedule: Schedule, grid: str) -> None:
    """A = sigma_t/sigma_s, B0 = alpha phi1 (1 + 1/(2 r0)), B1 = -alpha phi1/(2 r0), phi1 = 1 - e^-h."""
    plan = build("dpmpp_2m", schedule, 10, grid)
    h_old = math.inf
    for i, (s, t, got) in enumerate(rows_of(plan)):
        h = t.lam - s.lam
        r0 = h_old / h if i and t.sigma > 0.0 else math.inf
        phi1 = 1.0 - math.exp(-h)
        expected = (t.sigma / s.sigma, t.alpha * phi1 * (1.0 + 0.5 / r0), -t.alpha * phi1 * 0.5 / r0)
        np.testing.assert_allclose([got["A"], got["B"], got["R"]], expected, rtol=1e-9, atol=1e-12)
        h_old = h


@pytest.mark.parametrize("correction", ["midpoint", "heun"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
@everywhere
def test_dpmpp_2m_sde(schedule: Schedule, grid: str, eta: float, correction: str) -> None:
    """k = 1 + eta, phi1 = 1 - e^-kh: alpha phi1 D + alpha w (D - D_old)/r0, w = phi1/2 or 1 - phi1/(kh)."""
    plan = build("dpmpp_2m_sde", schedule, 10, grid, eta=eta, correction=correction, s_noise=1.1)
    h_old = math.inf
    for i, (s, t, got) in enumerate(rows_of(plan)):
        h, k = t.lam - s.lam, 1.0 + eta
        phi1 = 1.0 - math.exp(-k * h)
        r0 = h_old / h if i and t.sigma > 0.0 else math.inf
        weight = 0.0 if math.isinf(h) else 0.5 * phi1 if correction == "midpoint" else 1.0 - phi1 / (k * h)
        noise = t.sigma * math.sqrt(1.0 - math.exp(-2.0 * eta * h)) * 1.1
        expected = (
            t.sigma / s.sigma * math.exp(-eta * h),
            t.alpha * (phi1 + weight / r0),
            -t.alpha * weight / r0,
            noise,
        )
        np.testing.assert_allclose([got[key] for key in "ABRC"], expected, rtol=1e-8, atol=1e-11)
        h_old = h


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["ou", "vp", "ve"])
def test_euler_maruyama(name: str, eta: float) -> None:
    """x' = x - dt (f x - (1 + eta^2)/2 g^2 score) + eta g sqrt(dt) z; f and g as the processes' papers write them."""
    schedule = schedules.get(name)

    def formula(s: Level, t: Level) -> tuple[float, float, float]:
        if t.sigma == 0.0:
            return 0.0, 1.0, 0.0
        beta = {"ou": 2.0, "vp": 0.1 + 19.9 * s.time, "ve": 0.0}[name]
        g2 = beta or 2.0 * s.sigma**2 * math.log(50.0 / 0.01)
        dt, pull = s.time - t.time, 0.5 * (1.0 + eta**2) * g2 / s.sigma**2
        return 1.0 + 0.5 * beta * dt - dt * pull, dt * pull * s.alpha, eta * math.sqrt(g2 * dt)

    one_step(build("euler_maruyama", schedule, 10, "trailing", eta=eta), formula)


def test_flow_euler() -> None:
    """x' = x + (s' - s) u with u = (x - D)/s."""

    def formula(s: Level, t: Level) -> tuple[float, float, float]:
        return 1.0 + (t.sigma - s.sigma) / s.sigma, -(t.sigma - s.sigma) / s.sigma, 0.0

    one_step(build("flow_euler", "rectified_flow", 10, "trailing"), formula)


def test_annealed_langevin() -> None:
    """At every level `inner` steps of x + (a/2) score + sqrt(a) z, a = epsilon sigma^2; then x = D."""
    plan = build("annealed_langevin", "ve", 4, "exponential", epsilon=0.2, inner=3)
    found = rows_of(plan)
    assert plan.nfe == 4 * 3 + 1
    assert plan.draws == 12
    for i, (s, _, got) in enumerate(found[:-1]):
        assert s == plan.levels[i // 3]
        a = 0.2 * s.sigma**2
        np.testing.assert_allclose([got[k] for k in "ABC"], (0.9, 0.1, math.sqrt(a)), **TIGHT)
    assert found[-1][0] == plan.levels[3]
    assert found[-1][2] == {"A": 0.0, "B": 1.0, "C": 0, "R": 0}


def test_random_walk() -> None:
    """x + tau score + sqrt(2 tau T) z, tau = epsilon sigma^2, T linear from its first value to 1, no noise last."""
    plan = build("random_walk", "ve", 6, "exponential", epsilon=0.06, temperature=0.85)
    for i, (s, t, got) in enumerate(rows_of(plan)):
        heat = 0.85 + 0.15 * i / 5
        expected = (0.94, 0.06, s.sigma * math.sqrt(0.12 * heat)) if t.sigma else (0.0, 1.0, 0.0)
        np.testing.assert_allclose([got[k] for k in "ABC"], expected, **TIGHT)
