"""Samplers that must coincide, and coefficients written out from their papers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastdiff.compiler.build import plan as build
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.verify import execute
from fastdiff.process import schedules
from fastdiff.process.schedules import Level, Schedule

Array = np.ndarray[Any, np.dtype[np.float64]]
Options = dict[str, Any]

PROCESSES = {
    "vp": (schedules.vp(), "logsnr"),
    "edm": (schedules.edm(), "karras"),
    "zero-snr": (schedules.rescale_zero_terminal_snr(schedules.scaled_linear()), "trailing"),
    "flow": (schedules.rectified_flow(), "trailing"),
}
everywhere = pytest.mark.parametrize(("schedule", "grid"), PROCESSES.values(), ids=PROCESSES)


def outcome(plan: Plan) -> tuple[list[Array], Array]:
    """States met and the sample, on random estimates and normals that depend on the row number only."""
    seen: list[Array] = []
    estimates = np.random.default_rng(0).standard_normal((plan.nfe, 5))
    normals = np.random.default_rng(1).standard_normal((plan.draws + 1, 5))

    def denoise(x: Array, level: Level) -> Array:
        seen.append(x)
        return estimates[len(seen) - 1]

    start = max(plan.levels[0].sigma, 1.0) * np.random.default_rng(2).standard_normal(5)
    end = execute(plan, denoise, start, lambda i, _: normals[i], dict.fromkeys(plan.given, 0.0))
    return seen, end


def agree(left: Plan, right: Plan, rtol: float = 1e-9) -> None:
    assert left.nfe == right.nfe
    (states, end), (others, other) = outcome(left), outcome(right)
    for one, two in zip([*states, end], [*others, other], strict=True):
        np.testing.assert_allclose(one, two, rtol=rtol, atol=rtol * float(np.abs(two).max()))


SAME: list[tuple[str, Options, str, Options]] = [
    ("dpmpp_3m_sde", {"eta": 0.0}, "dpmpp_3m", {"correction": "heun"}),
    ("sa_solver", {"tau": 0.0, "predictor_order": 1, "corrector_order": 0}, "ddim", {}),
    ("er_sde", {"noise": "ode", "order": 1}, "ddim", {}),
    ("er_sde", {"noise": "sde", "order": 1}, "ddim", {"eta": 1.0}),
    ("sa_solver", {"tau": 1.0, "predictor_order": 1, "corrector_order": 0}, "ddim", {"eta": 1.0}),
    ("res_multistep", {}, "exponential_ab", {"order": 2}),
    ("res_multistep_ancestral", {"eta": 0.0}, "res_multistep", {}),
    ("mean_reverting", {"order": 2}, "res_multistep", {}),
    ("exponential_ab", {"order": 2}, "sa_solver", {"tau": 0.0, "corrector_order": 0, "lower_final": False}),
    ("exponential_ab", {}, "sa_solver", {"tau": 0.0, "predictor_order": 3, "corrector_order": 0, "lower_final": False}),
    ("unipc", {"order": 2, "corrector": False, "lower_final": False}, "dpmpp_2m", {}),
    ("unipc", {"order": 1, "corrector": False}, "ddim", {}),
    ("deis", {"order": 3}, "exponential_ab", {"variable": "eps"}),
    ("deis", {"order": 2}, "dpmsolver", {"order": 2, "correction": "heun"}),
    ("lms", {"order": 3}, "exponential_ab", {"variable": "rho"}),
    ("lms", {}, "ipndm_v", {}),
    ("ghvb", {"order": 4, "beta": 1.0}, "ipndm", {}),
    ("hb", {"order": 4, "beta": 1.0}, "ipndm", {}),
    ("gradient_estimation", {"gamma": 1.0}, "ddim", {}),
    ("gradient_estimation", {"gamma": 1.5}, "ipndm", {"order": 2}),
    ("edm", {"s_churn": 0.0}, "heun", {}),
    ("seeds_2", {"eta": 0.0}, "dpmpp_2s", {}),
    ("seeds_3", {"eta": 0.0}, "dpmpp_3s", {}),
    ("exp_heun_2_x0", {"eta": 0.7}, "seeds_2", {"eta": 0.7, "r": 1.0, "weights": "phi_2"}),
    ("dpmpp_2s_ancestral", {"eta": 0.0}, "dpmpp_2s", {}),
    ("dpmpp_sde", {"eta": 0.0, "r": 0.3}, "dpmpp_2s", {"r": 0.3}),
    ("dpm_2_ancestral", {"eta": 0.0}, "dpm_2", {}),
    ("dpmsolver", {"order": 1}, "ddim", {}),
    ("dpmsolver", {"order": 1, "method": "singlestep"}, "ddim", {}),
    ("tcd", {"gamma": 0.0}, "ddim", {}),
    ("consistency", {"epsilon": 0.0}, "lcm", {}),
]


@pytest.mark.parametrize(
    ("one", "its", "other", "others"), SAME, ids=["-".join(map(str, [a, *b.values(), "is", c])) for a, b, c, _ in SAME]
)
@everywhere
def test_samplers_that_coincide(
    schedule: Schedule, grid: str, one: str, its: Options, other: str, others: Options
) -> None:
    agree(build(one, schedule, 9, grid, **its), build(other, schedule, 9, grid, **others))


@pytest.mark.parametrize(
    ("solver", "options"),
    [("overshoot", {"c": 0.0}), ("iadb", {}), ("interpolant", {}), ("flow_sde", {"eta": 0.0})],
)
def test_flow_samplers_that_are_euler(solver: str, options: Options) -> None:
    agree(
        build(solver, "rectified_flow", 9, "trailing", **options), build("flow_euler", "rectified_flow", 9, "trailing")
    )


def test_flow_samplers_that_coincide() -> None:
    flow = ("rectified_flow", 9, "trailing")
    agree(build("flow_sde", *flow, eta=0.6), build("sa_solver", *flow, tau=0.6, predictor_order=1, corrector_order=0))
    agree(build("flow_sde", *flow, flavor="diffusers"), build("lcm", *flow))
    agree(build("exponential_ab", *flow, order=1, variable="velocity"), build("flow_euler", *flow))


@everywhere
def test_unipc_of_higher_order_does_not_depend_on_b(schedule: Schedule, grid: str) -> None:
    """From order 3 on, its system has one solution whatever B(h) is, once the first steps are alike."""
    one, two = (
        build("unipc", schedule, 9, grid, order=3, variant=variant, lower_final=False) for variant in ("bh1", "bh2")
    )
    for left, right in zip(one.rows[6:], two.rows[6:], strict=True):
        for a, b in zip(left.outputs, right.outputs, strict=True):
            np.testing.assert_allclose(a.slots, b.slots, rtol=1e-9, atol=1e-9)


def unipc_by_the_paper(
    x: Array, model: Callable[[Array, Level], Array], levels: list[Level], order: int, variant: str
) -> Array:
    """UniPC as Zhao et al. 2023 state it, with R rho = b solved as it stands (b_k = k! psi_k / B, R_kj = r_j^(k-1))."""

    def move(x: Array, known: list[tuple[Level, Array]], t: Level, p: int, found: Array | None) -> Array:
        (s, m0), others = known[0], known[1:p]
        h = t.lam - s.lam
        b_h = -h if variant == "bh1" else math.expm1(-h)
        r = [(level.lam - s.lam) / h for level, _ in others]
        d = [(m - m0) / ratio for (_, m), ratio in zip(others, r, strict=True)]
        if found is not None:
            r, d = [*r, 1.0], [*d, found - m0]
        n = len(r)
        rhs, psi = [], math.expm1(-h) / -h - 1.0
        for k in range(1, n + 1):
            rhs.append(math.factorial(k) * psi / b_h)
            psi = psi / -h - 1.0 / math.factorial(k + 1)
        if n == 1:
            rho = [0.5]
        else:
            rho = list(np.linalg.solve([[ratio**k for ratio in r] for k in range(n)], rhs)) if n else []
        total = t.sigma / s.sigma * x - t.alpha * math.expm1(-h) * m0
        return total - t.alpha * b_h * sum((c * v for c, v in zip(rho, d, strict=True)), np.zeros_like(x))

    known: list[tuple[Level, Array]] = []
    before, p = x, 0
    steps = len(levels) - 1
    for i in range(steps):
        s, t = levels[i], levels[i + 1]
        value = model(x, s)
        if i:
            x = move(before, known, s, p, value)
        known = [(s, value), *known][:order]
        p = min(order, steps - i, i + 1)
        if t.sigma == 0.0:
            return value
        before, x = x, move(x, known, t, p, None)
    return x


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_unipc_is_the_papers(order: int, variant: str) -> None:
    plan = build("unipc", "vp", 10, "logsnr", order=order, variant=variant)
    estimates = np.random.default_rng(0).standard_normal((plan.nfe, 5))
    start = np.random.default_rng(1).standard_normal(5)
    ours, theirs = iter(estimates), iter(estimates)
    got = execute(plan, lambda x, level: next(ours), start)
    expected = unipc_by_the_paper(start, lambda x, level: next(theirs), list(plan.levels), order, variant)
    np.testing.assert_allclose(got, expected, rtol=1e-7)


@pytest.mark.parametrize("noise", ["ode", "sde"])
def test_mean_reverting_is_the_published_step(noise: str) -> None:
    """MRS-ODE-1 and MRS-SDE-1 with mu written in, against ours, which is the usual solver on x - mu."""
    plan = build("mean_reverting", "vp", 6, "logsnr", order=1, noise=noise)
    rng = np.random.default_rng(0)
    clean, normals = rng.standard_normal((2, plan.nfe, 3))
    mu, start = rng.standard_normal((2, 3))
    x = start
    states: list[Array] = []

    def denoise(state: Array, level: Level) -> Array:
        states.append(state)
        return clean[len(states) - 1]

    end = execute(plan, denoise, start, lambda i, _: normals[i], {"mu": mu})
    np.testing.assert_allclose(end, clean[-1], rtol=1e-12)
    for i, (s, t) in enumerate(zip(plan.levels[:-2], plan.levels[1:-1], strict=True)):
        np.testing.assert_allclose(states[i], x, rtol=1e-9)
        h = t.lam - s.lam
        if noise == "ode":
            drift = t.sigma / s.sigma * s.alpha - t.alpha + 1.0 - t.sigma / s.sigma
            x = t.sigma / s.sigma * x - t.alpha * math.expm1(-h) * clean[i] + mu * drift
        else:
            spread = -math.expm1(-2.0 * h)
            drift = 1.0 - t.alpha / s.alpha * math.exp(-2.0 * h) - t.alpha * spread
            x = t.sigma / s.sigma * math.exp(-h) * x + t.alpha * spread * clean[i] + mu * drift
            x = x + t.sigma * math.sqrt(spread) * normals[i]
    np.testing.assert_allclose(states[-1], x, rtol=1e-9)


def test_heunpp2() -> None:
    """d' = (1 - w2 - w3) d1 + w2 d2 + w3 d3, w2 = s1/(3 s0), w3 = s2/(3 s0); in the last but one w2 = s1/(2 s0)."""
    plan = build("heunpp2", "edm", 6, "karras")
    rng = np.random.default_rng(0)
    values = rng.standard_normal((plan.nfe, 4))
    x = 80.0 * rng.standard_normal(4)
    ours, theirs = iter(values), iter(values)
    got = execute(plan, lambda y, level: next(ours), x)
    s = [level.sigma for level in plan.levels]
    for i in range(6):
        d = (x - next(theirs)) / s[i]
        if s[i + 1] == 0.0:
            x = x - d * s[i]
            continue
        x2 = x + d * (s[i + 1] - s[i])
        d2 = (x2 - next(theirs)) / s[i + 1]
        if s[i + 2] == 0.0:
            w2, w3, d3 = s[i + 1] / (2 * s[i]), 0.0, np.zeros(4)
        else:
            x3 = x2 + d2 * (s[i + 2] - s[i + 1])
            d3 = (x3 - next(theirs)) / s[i + 2]
            w2, w3 = s[i + 1] / (3 * s[i]), s[i + 2] / (3 * s[i])
        x = x + ((1 - w2 - w3) * d + w2 * d2 + w3 * d3) * (s[i + 1] - s[i])
    np.testing.assert_allclose(got, x, rtol=1e-9, atol=1e-9)


def test_er_sde_with_closed_integrals() -> None:
    """phi = l and l^2 have int dl/phi = log(l_s/l_t) and 1/l_t - 1/l_s; second order by hand."""
    for noise in ("ode", "sde"):
        plan = build("er_sde", "edm", 6, "karras", order=2, noise=noise)
        levels = [level.sigma for level in plan.levels]
        for i in range(1, 4):
            old, s, t = levels[i - 1], levels[i], levels[i + 1]
            r = t / s if noise == "ode" else (t / s) ** 2
            integral = math.log(s / t) * t if noise == "ode" else (1 / t - 1 / s) * t**2
            weight = (t - s + integral) / (s - old)
            output = plan.rows[i + 1].outputs[0]
            assert output.x == pytest.approx(r, rel=1e-10)
            assert output.denoised == pytest.approx(1.0 - r + weight, rel=1e-9)
            assert sum(output.slots) == pytest.approx(-weight, rel=1e-9)
            assert math.hypot(*output.noise) == pytest.approx(math.sqrt(max(0.0, t**2 - (s * r) ** 2)), abs=1e-6)


@pytest.mark.parametrize(("flavor", "points"), [("authors", 100), ("comfyui", 200)])
def test_er_sde_with_the_released_sums(flavor: str, points: int) -> None:
    """S = sum_i (l_s - l_t)/n / phi(l_t + i (l_s - l_t)/n), and S_u with (l - l_s) in it; third order by hand."""
    plan = build("er_sde", "edm", 8, "karras", flavor=flavor)
    rho = [level.sigma for level in plan.levels]

    def phi(rho: Array) -> Array:
        return rho * (np.exp(rho**0.3) + 10.0)

    for i in range(2, 6):
        s, t, low, top = rho[i], rho[i + 1], rho[i - 1], rho[i - 2]
        nodes = t + np.arange(points) * ((s - t) / points)
        total = float(((s - t) / points / phi(nodes)).sum()) * phi(np.array(t))
        moment = float(((nodes - s) * (s - t) / points / phi(nodes)).sum()) * phi(np.array(t))
        linear, curved = t - s + total, 0.5 * (t - s) ** 2 + moment
        r = phi(np.array(t)) / phi(np.array(s))
        first, second = 1.0 / (s - low), 2.0 / (s - top)
        expected = 1.0 - r + linear * first + curved * second * first
        assert plan.rows[i + 1].outputs[0].denoised == pytest.approx(float(expected), rel=1e-9)


def test_ipndm_v_as_released() -> None:
    """temp = (1 - h/(3 (h + g)) h (h + g)/(g (g + k)))/2: 1 + h/(2g) + temp, -h/(2g) - (1 + g/k) temp, temp g/k."""
    plan = build("ipndm_v", "edm", 8, "karras", order=3, flavor="comfyui")
    sigma = [level.sigma for level in plan.levels]
    states: list[Array] = []
    slopes: list[Array] = []
    rng = np.random.default_rng(0)

    def denoise(x: Array, level: Level) -> Array:
        states.append(x)
        slopes.append(rng.standard_normal(3))
        return x - level.sigma * slopes[-1]

    execute(plan, denoise, rng.standard_normal(3))
    for i in range(2, 7):
        h, g, k = (sigma[j + 1] - sigma[j] for j in (i, i - 1, i - 2))
        temp = (1 - h / (3 * (h + g)) * (h * (h + g)) / (g * (g + k))) / 2
        weights = (1 + h / (2 * g) + temp, -h / (2 * g) - (1 + g / k) * temp, temp * g / k)
        expected = states[i] + h * sum(w * slopes[i - j] for j, w in enumerate(weights))
        np.testing.assert_allclose(states[i + 1], expected, rtol=1e-9)


def test_reverse_diffusion() -> None:
    """VE: x + (s^2 - t^2) score + sqrt(s^2 - t^2) z; VP: (2 - sqrt(1 - b)) x + b score + sqrt(b) z."""
    for schedule, grid in (PROCESSES["edm"], PROCESSES["vp"]):
        plan = build("reverse_diffusion", schedule, 8, grid)
        for i, (s, t) in enumerate(zip(plan.levels[:-2], plan.levels[1:-1], strict=True)):
            beta = s.sigma**2 - t.sigma**2 if schedule.kind == "ve" else 1.0 - (s.alpha / t.alpha) ** 2
            keep = 1.0 if schedule.kind == "ve" else 2.0 - math.sqrt(1.0 - beta)
            output = plan.rows[i + 1].outputs[0]
            assert output.x == pytest.approx(keep - beta / s.sigma**2, rel=1e-9, abs=1e-10)
            assert output.denoised == pytest.approx(beta * s.alpha / s.sigma**2, rel=1e-9)
            assert math.hypot(*output.noise) == pytest.approx(math.sqrt(beta), rel=1e-9)


def test_overshoot() -> None:
    """o = min(1, t + c h (1 - t)) in data time, a = t/o, x' = a (x + (o - s) v) + sqrt((1 - t)^2 - a^2 (1 - o)^2) z."""
    plan = build("overshoot", "rectified_flow", 8, "trailing", c=1.5)
    for i, (s, t) in enumerate(zip(plan.levels[:-1], plan.levels[1:], strict=True)):
        over = min(1.0, t.alpha + 1.5 * (t.alpha - s.alpha) * (1.0 - t.alpha))
        a = t.alpha / over
        output = plan.rows[i + 1].outputs[0]
        # v = D - E = (D - x) / (1 - s)
        assert output.x == pytest.approx(a * (1.0 - (over - s.alpha) / s.sigma), abs=1e-12)
        assert output.denoised == pytest.approx(a * (over - s.alpha) / s.sigma, abs=1e-12)
        noise = math.sqrt(max(0.0, (1.0 - t.alpha) ** 2 - (a * (1.0 - over)) ** 2))
        assert (math.hypot(*output.noise) if output.noise else 0.0) == pytest.approx(noise, abs=1e-7)


def test_langevin_pc() -> None:
    """Corrector: tau = 2 (snr sigma)^2, x + tau score + sqrt(2 tau) z at the same level; then the predictor."""
    plan = build("langevin_pc", "edm", 5, "karras", snr=0.2)
    for row in plan.rows[1::2]:
        assert row.level is not None
        output = row.outputs[0]
        tau = 2.0 * (0.2 * row.level.sigma) ** 2
        assert output.x == pytest.approx(1.0 - tau / row.level.sigma**2)
        assert output.denoised == pytest.approx(tau / row.level.sigma**2)
        assert math.hypot(*output.noise) == pytest.approx(math.sqrt(2.0 * tau))
    assert [row.level for row in plan.rows[1::2]] == [row.level for row in plan.rows[2::2]]


def test_sa_solver_reuses_its_draw() -> None:
    """Predictor and corrector of a step have the same normal, equally loud; it is named in one row, once."""
    plan = build("sa_solver", "edm", 6, "karras")
    assert plan.draws == 5
    drawn = [[n for n, _ in row.noise] for row in plan.rows]
    assert drawn == [[], [0], [1], [2], [3], [4], []]
    for row in plan.rows[1:5]:
        predicted, corrected, *_ = (c for o in row.outputs for c in o.noise if c != 0.0)
        assert predicted == corrected > 0.0


def test_tau_outside_its_range_is_the_ode() -> None:
    inside = build("sa_solver", "edm", 8, "karras", tau=0.8, tau_from=0.05, tau_to=10.0)
    listed = [0.8 if 0.05 <= level.sigma <= 10.0 else 0.0 for level in inside.levels[:-1]]
    agree(inside, build("sa_solver", "edm", 8, "karras", taus=listed))
    assert inside.draws == sum(value > 0.0 for value in listed[:-1])
