"""Each sampler's table against its formula written out by hand, and against the samplers it must coincide with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastdiff.compiler import layout
from fastdiff.compiler.build import compile_levels
from fastdiff.compiler.build import plan as build
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.verify import execute, propagate
from fastdiff.models.exact import Mixture
from fastdiff.process import schedules
from fastdiff.process.schedules import CLEAN, Level, Schedule

Array = np.ndarray[Any, np.dtype[np.float64]]
TIGHT = {"rtol": 1e-11, "atol": 1e-12}

ZERO_SNR = schedules.rescale_zero_terminal_snr(schedules.scaled_linear())
PROCESSES = {
    "linear-trailing": (schedules.linear(), "trailing"),
    "cosine-leading": (schedules.cosine(), "leading"),
    "quadratic-linspace": (schedules.quadratic(), "linspace"),
    "zero-snr-trailing": (ZERO_SNR, "trailing"),
    "ou-trailing": (schedules.ou(), "trailing"),
    "vp-logsnr": (schedules.vp(), "logsnr"),
    "ve-exponential": (schedules.ve(), "exponential"),
    "edm-karras": (schedules.edm(), "karras"),
    "flow-trailing": (schedules.rectified_flow(), "trailing"),
    "flow-karras": (schedules.rectified_flow(), "karras"),
}
everywhere = pytest.mark.parametrize(("schedule", "grid"), PROCESSES.values(), ids=PROCESSES)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("ddpm", {}),
    ("ddpm", {"variance": "fixed_large"}),
    ("ddim", {}),
    ("ddim", {"eta": 0.5}),
    ("ddim", {"eta": 1.0}),
    ("euler", {}),
    ("euler", {"s_churn": 5.0}),
    ("euler_ancestral", {}),
    ("euler_ancestral", {"eta": 0.5}),
    ("heun", {}),
    ("heun", {"s_churn": 5.0}),
    ("dpmpp_2m", {}),
    ("dpmpp_2m_sde", {}),
    ("dpmpp_2m_sde", {"correction": "heun", "eta": 0.5}),
    ("euler_maruyama", {}),
    ("euler_maruyama", {"eta": 0.0}),
    ("flow_euler", {}),
    ("annealed_langevin", {}),
    ("annealed_langevin", {"denoise": False}),
    ("random_walk", {}),
    ("random_walk", {"point": "ddpm_large"}),
    ("random_walk", {"point": "ddpm_small"}),
    ("random_walk", {"point": "sde", "denoise": False}),
]


def applies(solver: str, schedule: Schedule, grid: str) -> bool:
    """Whether a solver is defined on a process: the exceptions are tested to refuse."""
    if solver == "flow_euler":
        return schedule.kind == "flow"
    if solver == "euler_maruyama" and schedule.steps is not None:
        return False
    if solver in ("euler_maruyama", "random_walk", "annealed_langevin"):
        return math.isfinite(schedule.rho_max)
    return True


with_signal = pytest.mark.parametrize(
    ("schedule", "grid"), [p for p in PROCESSES.values() if math.isfinite(p[0].rho_max)]
)
every_solver = pytest.mark.parametrize(
    ("solver", "options", "schedule", "grid"),
    [
        pytest.param(name, options, *process, id=f"{name}-{'-'.join(map(str, options.values()))}-{label}")
        for name, options in CASES
        for label, process in PROCESSES.items()
        if applies(name, *process)
    ],
)


def rows_of(plan: Plan) -> list[tuple[Level, Level, dict[str, float]]]:
    """(s, t, coefficients of the next state) per row: A on x, B on D, C on a fresh normal, R on a register."""
    found = []
    for i, row in enumerate(plan.rows[1:], start=1):
        following = plan.rows[i + 1].x if i < plan.nfe else plan.result
        output = next(o for o in row.outputs if o.dest == following)
        assert row.level is not None
        after = plan.rows[i + 1].level if i < plan.nfe else plan.levels[-1]
        assert after is not None
        found.append(
            (
                row.level,
                after,
                {"A": output.x, "B": output.denoised, "C": sum(output.noise), "R": sum(output.slots)},
            )
        )
    return found


def one_step(plan: Plan, formula: Callable[[Level, Level], tuple[float, float, float]]) -> None:
    for s, t, got in rows_of(plan):
        assert got["R"] == 0.0
        np.testing.assert_allclose([got["A"], got["B"], got["C"]], formula(s, t), **TIGHT)


def scaled(s: Level, t: Level, a: float, b: float, c: float) -> tuple[float, float, float]:
    """Coefficients in x / alpha as coefficients in x; a is sigma'-proportional, so alpha = 0 has a limit."""
    return (t.alpha * a if a == 0.0 else t.alpha / s.alpha * a), t.alpha * b, t.alpha * c


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


def same_tables(left: Plan, right: Plan, tolerance: float = 1e-10) -> None:
    assert left.nfe == right.nfe
    for a, b in zip(left.rows, right.rows, strict=True):
        assert (a.level, a.x, a.slots, a.noise) == (b.level, b.x, b.slots, b.noise)
        for p, q in zip(a.outputs, b.outputs, strict=True):
            assert p.dest == q.dest
            for one, two in zip(dataclasses.astuple(p)[1:], dataclasses.astuple(q)[1:], strict=True):
                np.testing.assert_allclose(one, two, rtol=tolerance, atol=tolerance)


@everywhere
def test_ddim_without_noise_is_euler_is_the_first_order_dpmpp(schedule: Schedule, grid: str) -> None:
    ddim = build("ddim", schedule, 12, grid)
    same_tables(ddim, build("euler", schedule, 12, grid))
    if schedule.kind == "flow":
        same_tables(ddim, build("flow_euler", schedule, 12, grid))
    if grid != "leading":
        same_tables(build("ddim", schedule, 1, grid), build("dpmpp_2m", schedule, 1, grid))


@everywhere
def test_full_eta_is_the_posterior_is_ancestral(schedule: Schedule, grid: str) -> None:
    ddpm = build("ddpm", schedule, 12, grid)
    same_tables(ddpm, build("ddim", schedule, 12, grid, eta=1.0))
    if schedule.kind != "flow":
        same_tables(ddpm, build("euler_ancestral", schedule, 12, grid))


@everywhere
def test_the_sde_solver_without_noise_is_the_ode_solver(schedule: Schedule, grid: str) -> None:
    same_tables(build("dpmpp_2m", schedule, 12, grid), build("dpmpp_2m_sde", schedule, 12, grid, eta=0.0))


@pytest.mark.parametrize("point", ["large", "small"])
@with_signal
def test_ddpm_is_a_point_of_the_random_walk(schedule: Schedule, grid: str, point: str) -> None:
    walk = build("random_walk", schedule, 12, grid, point=f"ddpm_{point}")
    same_tables(build("ddpm", schedule, 12, grid, variance=f"fixed_{point}"), walk)


@with_signal
def test_reverse_diffusion_is_a_point_of_the_random_walk(schedule: Schedule, grid: str) -> None:
    """x_VE + (sigma_k^2 - sigma_{k+1}^2) score + sqrt(sigma_k^2 - sigma_{k+1}^2) z (Song et al. 2021b, appendix E)."""

    def formula(s: Level, t: Level) -> tuple[float, float, float]:
        drop = s.rho**2 - t.rho**2
        noise = math.sqrt(drop) if t.sigma else 0.0
        return scaled(s, t, 1.0 - drop / s.rho**2, drop / s.rho**2, noise)

    for s, t, got in rows_of(build("random_walk", schedule, 12, grid, point="sde")):
        np.testing.assert_allclose([got[k] for k in "ABC"], formula(s, t), rtol=1e-10, atol=1e-10)


@with_signal
def test_ncsn_is_a_point_of_the_random_walk(schedule: Schedule, grid: str) -> None:
    """Annealed Langevin is tau = a_i/2, T = 1, with every level visited `inner` times."""
    ncsn = build("annealed_langevin", schedule, 5, grid, epsilon=0.1, inner=3)
    levels = [level for level in ncsn.levels[:-1] for _ in range(3)] + [ncsn.levels[-2], CLEAN]
    same_tables(ncsn, compile_levels("random_walk", levels, schedule, "repeated", {"epsilon": 0.05}))


# beta, the larger variance of DDPM, is itself a number of the coordinates; and a churned level has no partner
OWN_COORDINATES = ("euler_maruyama", "flow_euler"), ("fixed_large", "ddpm_large", 5.0)


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        (name, options)
        for name, options in CASES
        if name not in OWN_COORDINATES[0] and not any(value in OWN_COORDINATES[1] for value in options.values())
    ],
)
def test_vp_and_ve_coordinates_draw_the_same_sample(solver: str, options: dict[str, Any]) -> None:
    """x_VE = x_VP / alpha: one run in either coordinates, on the same normals, ends in the same x0."""
    rhos = np.geomspace(80.0, 0.05, 12)
    rng = np.random.default_rng(1)
    data = Mixture([1.0, 2.0], rng.standard_normal((2, 3)), [0.1, 0.3])
    latent, normals = rng.standard_normal((4, 3)), rng.standard_normal((400, 4, 3))
    ends = []
    for schedule in (schedules.vp(), schedules.edm()):
        plan = build(solver, schedule, grid=rhos, grid_options={"unit": "rho"}, **options)
        ends.append(execute(plan, data, plan.levels[0].sigma * latent, lambda i, _: normals[i]))
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-9, atol=1e-9)


@every_solver
def test_one_step_and_two(solver: str, options: dict[str, Any], schedule: Schedule, grid: str) -> None:
    """Every table at steps = 1 and 2 is finite, and its last row is x' = D unless the options say otherwise."""
    for steps in (1, 2):
        plan = build(solver, schedule, steps, grid, **options)
        numbers = [c for row in plan.rows for o in row.outputs for c in (o.x, o.denoised, *o.slots, *o.noise)]
        assert np.isfinite(numbers).all()
        if options.get("denoise", True):
            *_, (_, _, last) = rows_of(plan)
            assert (last["A"], last["R"], last["C"]) == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)
            assert last["B"] == pytest.approx(1.0, rel=1e-12)


@every_solver
def test_evaluations_and_registers(solver: str, options: dict[str, Any], schedule: Schedule, grid: str) -> None:
    """NFE, at most three registers, and rows the kernel has room for."""
    steps = 7
    plan = build(solver, schedule, steps, grid, **options)
    single = plan.levels[0].alpha == 0.0
    expected = {"heun": 2 * steps - 1 - single, "annealed_langevin": 20 * steps + (options.get("denoise") is not False)}
    assert plan.nfe == expected.get(solver, steps)
    assert plan.registers <= 3
    for row in plan.rows:
        assert len(row.outputs) <= layout.MAX_OUTPUTS
        assert len(row.slots) + 1 <= layout.MAX_SLOTS


@every_solver
def test_every_plan_obeys_the_laws(solver: str, options: dict[str, Any], schedule: Schedule, grid: str) -> None:
    report = build(solver, schedule, 6, grid, **options).verify()
    assert report.ok, str(report)


@pytest.mark.parametrize("solver", ["random_walk", "annealed_langevin", "euler_maruyama"])
def test_a_start_without_signal_is_refused_where_it_has_no_limit(solver: str) -> None:
    with pytest.raises(ValueError, match="alpha = 0"):
        build(solver, "rectified_flow", 5, "trailing")


def test_a_wrong_table_fails_its_checks() -> None:
    """A plan with one coefficient changed by a part in a thousand does not verify."""
    plan = build("dpmpp_2m", "vp", 10, "logsnr")
    row = plan.rows[4]
    wrong = dataclasses.replace(row.outputs[0], denoised=row.outputs[0].denoised * 1.001)
    rows = (*plan.rows[:4], dataclasses.replace(row, outputs=(wrong, *row.outputs[1:])), *plan.rows[5:])
    report = dataclasses.replace(plan, rows=rows).verify()
    assert not report.ok
    assert "FAIL point mass" in str(report)


def test_the_variance_of_ddpm_is_beta_not_beta_squared_over_alpha() -> None:
    """E1, data N(0, 1), 1000 steps: beta .9999, posterior .991, beta/alpha 1.0055, beta^2/alpha .0057."""

    def variance(plan: Plan) -> float:
        return float(propagate(plan, 0.0, 1.0, start="noise").variance[-1, 0])

    large = build("ddpm", "linear", 1000, "trailing", variance="fixed_large")
    assert variance(large) == pytest.approx(0.9999, abs=6e-5)
    assert variance(build("ddpm", "linear", 1000, "trailing")) == pytest.approx(0.991, abs=6e-4)
    assert variance(build("random_walk", "linear", 1000, "trailing", point="sde")) == pytest.approx(1.0055, abs=6e-5)

    def literal(row: Any) -> Any:
        if not row.noise:
            return row
        beta = row.outputs[0].noise[0] ** 2
        noise = (math.sqrt(beta**2 / (1.0 - beta)),)
        return dataclasses.replace(row, outputs=(dataclasses.replace(row.outputs[0], noise=noise),))

    wrong = dataclasses.replace(large, rows=tuple(literal(row) for row in large.rows))
    assert variance(wrong) == pytest.approx(0.0057, abs=1e-4)


def test_time_reversal_has_a_plus_sign() -> None:
    """E2: dZ = +[Z + 2 score] dt + sqrt(2) dB from T = 3 gives the data's .25; with a minus it explodes."""
    plan = build("euler_maruyama", schedules.ou(3.0), 1500, "trailing")
    assert propagate(plan, 0.0, 0.25, start="noise").variance[-1, 0] == pytest.approx(0.25, abs=3e-3)

    def flipped(row: Any) -> Any:
        output = row.outputs[0]
        if row.level is None or not row.noise:
            return row
        return dataclasses.replace(
            row, outputs=(dataclasses.replace(output, x=2.0 - output.x, denoised=-output.denoised),)
        )

    wrong = dataclasses.replace(plan, rows=tuple(flipped(row) for row in plan.rows))
    assert propagate(wrong, 0.0, 0.25, start="noise").variance[-2, 0] > 1e4


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_langevin_has_its_stationary_variance(temperature: float) -> None:
    """x + tau s + sqrt(2 tau T) z on N(0, v) settles at v T / (1 - tau/(2 v)), v the noised data's variance."""
    level = schedules.edm().level(1.5)
    data, tau, count = 0.4, 0.7, 200
    v = data + level.sigma**2
    options = {"tau": [tau] * count, "temperatures": [temperature] * count, "denoise": False}
    plan = compile_levels("random_walk", [level] * count + [level], schedules.edm(), "one level", options)
    got = propagate(plan, 0.0, data).variance[-2, 0]
    assert got == pytest.approx(v * temperature / (1.0 - tau / (2.0 * v)), rel=1e-10)
