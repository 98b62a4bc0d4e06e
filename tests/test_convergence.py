"""Measured order of convergence, on Gaussian data exactly and on a Gaussian mixture against exact references.

Errors are those of the state that enters the last evaluation: what the last denoise from sigma > 0 loses does not
depend on the solver. Stochastic solvers are measured weakly, by the variance they give, without sampling.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fastdiff.compiler import solvers
from fastdiff.compiler.build import compile_levels
from fastdiff.compiler.build import plan as build
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.verify import execute, propagate, verify
from fastdiff.models.exact import Gaussian, Mixture, Points
from fastdiff.process import schedules
from fastdiff.process.schedules import Level

Array = np.ndarray[Any, np.dtype[np.float64]]

DATA = Mixture([1.0, 2.0, 1.0], [[-1.0, 0.5], [0.3, 0.2], [0.8, -1.0]], [0.05, 0.2, 0.1])
SCHEDULES = {
    "vp": schedules.vp(),
    "linear": schedules.linear(),
    "edm": schedules.edm(),
    "flow": schedules.rectified_flow(),
}
on_every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
ODE: list[tuple[str, dict[str, Any]]] = [
    ("ddim", {}),
    ("euler", {}),
    ("heun", {}),
    ("dpmpp_2m", {}),
    ("euler_maruyama", {"eta": 0.0}),
    ("flow_euler", {}),
]
SDE: list[tuple[str, dict[str, Any]]] = [
    ("ddpm", {}),
    ("ddpm", {"variance": "fixed_large"}),
    ("ddim", {"eta": 0.5}),
    ("ddim", {"eta": 1.0}),
    ("euler", {"s_churn": 10.0}),
    ("heun", {"s_churn": 10.0}),
    ("euler_ancestral", {}),
    ("dpmpp_2m_sde", {}),
    ("dpmpp_2m_sde", {"correction": "heun", "eta": 0.5}),
    ("euler_maruyama", {}),
    ("random_walk", {"point": "sde"}),
    ("random_walk", {"point": "ddpm_small"}),
]


def defined(cases: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Each case on each schedule it is defined on: flow_euler on flows only, euler_maruyama where there is an SDE."""
    return [
        pytest.param(schedule, solver, options, id=f"{solver}-{'-'.join(map(str, options.values()))}-{name}")
        for solver, options in cases
        for name, schedule in SCHEDULES.items()
        if not (solver == "flow_euler" and schedule.kind != "flow")
        and not (solver == "euler_maruyama" and schedule.steps is not None)
    ]


def compiled(solver: str, schedule: schedules.Schedule, intervals: int, **options: Any) -> Plan:
    """A plan from sigma/alpha = 20 to 0.02 in equal steps of log(sigma/alpha), then the clean level."""
    rhos = np.geomspace(20.0, 0.02, intervals + 1)
    return build(solver, schedule, grid=rhos, grid_options={"unit": "rho"}, **options)


def before_the_end(plan: Plan, start: Array) -> Array:
    seen = []

    def denoise(x: Array, level: Level) -> Array:
        seen.append(x)
        return DATA(x, level)

    execute(plan, denoise, start)
    return seen[-1]


def slope(errors: Sequence[float]) -> float:
    """The order between the two finest runs, each of twice the steps of the one before."""
    return math.log2(errors[-2] / errors[-1])


def law_errors(solver: str, schedule: schedules.Schedule, counts: Sequence[int], **options: Any) -> list[float]:
    """Worst relative error of the variance over four data variances, before the last denoise."""
    v = np.array([0.05, 0.25, 1.0, 4.0])
    errors = []
    for intervals in counts:
        states = propagate(compiled(solver, schedule, intervals, **options), 0.0, v)
        level = states.levels[-2]
        errors.append(float(np.abs(states.variance[-2] / (level.alpha**2 * v + level.sigma**2) - 1.0).max()))
    return errors


@functools.cache
def exact_trajectories(schedule: schedules.Schedule) -> tuple[Array, Array]:
    """States at the first level and where the ODE takes them, by ten times the steps of the finest run measured."""
    plan = compiled("heun", schedule, 800)
    start = plan.levels[0].sigma * np.random.default_rng(0).standard_normal((30, 2))
    return start, before_the_end(plan, start)


@pytest.mark.parametrize(("schedule", "solver", "options"), defined(ODE))
def test_ode_solvers(schedule: schedules.Schedule, solver: str, options: dict[str, Any]) -> None:
    """Order 1, 1, 2, 2, 1, 1, on the trajectory of a mixture and on the variance of Gaussian data."""
    order = solvers.get(solver).order
    start, exact = exact_trajectories(schedule)
    counts = (40, 80)
    ends = [before_the_end(compiled(solver, schedule, n, **options), start) for n in counts]
    errors = [float(np.sqrt(np.mean(np.square(end - exact)))) for end in ends]
    assert slope(errors) == pytest.approx(order, abs=0.12), errors
    errors = law_errors(solver, schedule, counts, **options)
    assert slope(errors) == pytest.approx(order, abs=0.12), errors


@pytest.mark.parametrize(("schedule", "solver", "options"), defined(SDE))
def test_sde_solvers_on_gaussian_data(schedule: schedules.Schedule, solver: str, options: dict[str, Any]) -> None:
    errors = law_errors(solver, schedule, (80, 160), **options)
    assert slope(errors) == pytest.approx(solvers.get(solver).order, abs=0.12), errors


LINE = Mixture([0.3, 0.7], [[-1.0], [0.6]], [0.02, 0.1])
LINE_VARIANCE = 0.3 * (0.02 + 1.0) + 0.7 * (0.1 + 0.36) - (0.3 * -1.0 + 0.7 * 0.6) ** 2


def variance_on_a_line(solver: str, intervals: int, points: int, **options: Any) -> float:
    """Variance at sigma = 0.4 that a table gives on LINE from sigma = 4, by pushing the density over a grid.

    The density of (last state, this state) is on a grid of states in units of their own spread; the rows are read as
    x' = A x + B D(x) + R D(last x) + C z.
    """
    schedule = schedules.edm(0.1, 10.0)
    levels = [schedule.level(float(s)) for s in np.geomspace(4.0, 0.4, intervals + 1)]
    plan = compile_levels(solver, levels, schedule, "line", options)
    unit = np.linspace(-7.0, 7.0, points)

    def places(level: Level) -> Array:
        return unit * math.hypot(level.sigma, math.sqrt(LINE_VARIANCE))

    x = places(levels[0])
    joint = np.zeros((1, points))
    for weight, mean, data in zip(LINE.weights, LINE.means[:, 0], LINE.variances, strict=True):
        v = data + levels[0].sigma ** 2
        joint[0] += weight * np.exp(-0.5 * (x - mean) ** 2 / v) / math.sqrt(2 * math.pi * v) * (x[1] - x[0])
    memory = np.zeros(1)
    for i, row in enumerate(plan.rows[1:]):
        assert row.level is not None
        output = row.outputs[0]
        denoised = LINE(x[:, None], row.level)[:, 0]
        after = places(levels[i + 1])
        mean = output.x * x + output.denoised * denoised + sum(output.slots) * memory[:, None]
        spread = math.hypot(*output.noise)
        kernel = np.exp(-0.5 * ((after - mean[..., None]) / spread) ** 2)
        kernel *= (after[1] - after[0]) / (math.sqrt(2 * math.pi) * spread)
        joint = np.einsum("mx,mxy->xy", joint, kernel)
        x, memory = after, denoised
        if not any(o.dest != output.dest for o in row.outputs):
            joint, memory = joint.sum(axis=0, keepdims=True), np.zeros(1)
    weights = joint.sum(axis=0)
    assert weights.sum() == pytest.approx(1.0, abs=1e-6)
    mean = float(weights @ x)
    return float(weights @ np.square(x - mean))


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("ddpm", {}),
        ("ddim", {"eta": 0.7}),
        ("euler_ancestral", {}),
        ("euler_maruyama", {}),
        ("dpmpp_2m_sde", {}),
        ("dpmpp_2m_sde", {"correction": "heun"}),
    ],
)
def test_sde_solvers_on_a_mixture(solver: str, options: dict[str, Any]) -> None:
    exact = LINE_VARIANCE + 0.4**2
    points = 111 if solver == "dpmpp_2m_sde" else 301  # a solver with memory costs points^3
    errors = [abs(variance_on_a_line(solver, n, points, **options) - exact) for n in (32, 64)]
    assert slope(errors) == pytest.approx(solvers.get(solver).order, abs=0.12), errors


@pytest.mark.parametrize(
    ("solver", "published"),
    [
        ("ddim", (-0.327, -0.179, -0.0942, -0.0482, -0.0244, -0.0123)),
        ("euler_ancestral", (-0.507, -0.320, -0.183, -0.0983, -0.0510, -0.0260)),
    ],
)
def test_published_errors(solver: str, published: Sequence[float]) -> None:
    """Variance at sigma = .01 of data N(0, .25), VE, 20 -> .01, Karras grid with rho 7, N = 10 .. 320 steps."""
    for intervals, expected in zip((10, 20, 40, 80, 160, 320), published, strict=True):
        plan = build(solver, schedules.ve(0.01, 20.0), intervals + 1, "karras")
        error = propagate(plan, 0.0, 0.25).variance[-2, 0] / (0.25 + 0.01**2) - 1.0
        assert error == pytest.approx(expected, rel=5e-3)


@on_every_schedule
def test_langevin_samplers_approach_the_data(schedule: schedules.Schedule) -> None:
    """More levels at the same step size: a random walk's error falls with its steps, Langevin's to its step's bias."""
    walk = law_errors("random_walk", schedule, (160, 320))
    assert slope(walk) == pytest.approx(1.0, abs=0.15)
    coarse, fine = law_errors("annealed_langevin", schedule, (20, 60), inner=10, epsilon=0.2)
    assert fine < 0.25 < coarse


@pytest.mark.parametrize("covariance", [None, [[1.0, 0.6], [0.6, 0.5]]])
def test_the_gaussian_ode_is_solved_exactly(covariance: Any) -> None:
    """`Gaussian.solve_ode` is where heun goes, and its slope D is the exact one."""
    if covariance is None:
        data = Gaussian([0.5, -1.0], variance=[0.3, 2.0])
    else:
        data = Gaussian([0.5, -1.0], covariance=covariance)
    schedule = schedules.vp()
    plan = compiled("heun", schedule, 400)
    x = np.random.default_rng(1).standard_normal((10, 2))
    seen: list[Array] = []

    def denoise(value: Array, level: Level) -> Array:
        seen.append(value)
        return data(value, level)

    execute(plan, denoise, x)
    np.testing.assert_allclose(seen[-1], data.solve_ode(x, plan.levels[0], plan.levels[-2]), atol=8e-4)


def test_propagate_is_the_law_of_execute() -> None:
    """Mean and variance from the coefficient vectors equal those of many runs."""
    plan = build("dpmpp_2m_sde", "vp", 6, "logsnr", eta=0.6)
    rng = np.random.default_rng(2)
    data = Gaussian(0.4, variance=0.3)
    first = plan.levels[0]
    start = first.alpha * 0.4 + math.hypot(first.alpha * math.sqrt(0.3), first.sigma) * rng.standard_normal(200_000)
    normals = rng.standard_normal((plan.draws, 200_000))
    sample = execute(plan, data, start, lambda i, _: normals[i])
    moments = propagate(plan, 0.4, 0.3)
    assert sample.mean() == pytest.approx(moments.mean[-1, 0], abs=4e-3)
    assert sample.var() == pytest.approx(moments.variance[-1, 0], rel=1e-2)


def test_mixture_denoiser_is_the_score() -> None:
    """D = (x + sigma^2 grad log p(x)) / alpha, the gradient by differences of the written-out density."""
    level = schedules.vp().level(0.4)
    x = np.random.default_rng(3).standard_normal((20, 2))

    def log_density(x: Array) -> Array:
        total = np.zeros(len(x))
        for w, mean, v in zip(DATA.weights, DATA.means, DATA.variances, strict=True):
            s2 = level.alpha**2 * v + level.sigma**2
            total += w * np.exp(-0.5 * np.square(x - level.alpha * mean).sum(1) / s2) / (2 * math.pi * s2)
        return np.log(total)

    h = 1e-5
    steps = np.eye(2) * h
    score = np.stack([(log_density(x + e) - log_density(x - e)) / (2 * h) for e in steps], axis=1)
    np.testing.assert_allclose(DATA(x, level), (x + level.sigma**2 * score) / level.alpha, atol=1e-7)


def test_points_and_limits() -> None:
    """A data set's denoiser: the nearest point at low noise, the mean at high noise, and no NaN at alpha = 0."""
    points = np.random.default_rng(4).standard_normal((5, 3, 4))
    data = Points(points)
    near = data(points[:2] + 1e-3, Level(1.0, 0.01))
    np.testing.assert_allclose(near, points[:2], atol=1e-12)
    top = Level(0.0, 1.0)
    np.testing.assert_allclose(data(points[:2], top), np.broadcast_to(points.mean(0), (2, 3, 4)))
    np.testing.assert_allclose(Gaussian(2.0, variance=0.0)(points, Level(1.0, 0.0)), np.full((5, 3, 4), 2.0))
    single = Points(points[:1])
    np.testing.assert_allclose(single(points, Level(0.8, 0.6)), np.broadcast_to(points[:1], points.shape))


@pytest.mark.parametrize(
    "data", [DATA, Gaussian([0.1, 0.2], variance=[0.5, 0.1]), Gaussian(0.0, covariance=[[1.0, 0.2], [0.2, 0.3]])]
)
def test_torch_and_numpy_agree(data: Any) -> None:
    import torch

    x = np.random.default_rng(5).standard_normal((7, 2))
    level = schedules.rectified_flow().level(0.3)
    np.testing.assert_allclose(data(torch.from_numpy(x), level).numpy(), data(x, level), rtol=1e-12)
    half = data(torch.from_numpy(x).float(), level)
    assert half.dtype == torch.float32
    np.testing.assert_allclose(half.numpy(), data(x, level), rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"variance": 1.0, "covariance": [[1.0]]},
        {"variance": -1.0},
        {"covariance": [[1.0, 2.0], [0.0, 1.0]]},
        {"covariance": [[1.0, 3.0], [3.0, 1.0]]},
    ],
)
def test_gaussians_that_are_none(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Gaussian(**arguments)


def test_the_report_reads() -> None:
    report = verify(build("dpmpp_2m", "edm", 12, "karras"))
    assert report.ok
    assert [check.name for check in report.checks] == ["point mass", "gaussian data", "finite", "last row"]
    assert str(report).splitlines()[0] == "dpmpp_2m, 12 model evaluations, grid karras: ok"
    assert "4 x the steps" in str(report)
