"""Samples whose law is known: mixtures, finite data sets and guided Gaussians, through the engine and in float64.

Each statistical bound is at five or six standard errors, and the seeds are fixed: a run that passes passes again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from solver_cases import CASES, FLOW_ONLY

import fastdiff as fd
from fastdiff.compiler import solvers
from fastdiff.compiler.build import plan as build
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.verify import execute
from fastdiff.models.exact import Mixture, Points
from fastdiff.process import schedules
from fastdiff.process.schedules import Level, Schedule

Array = np.ndarray[Any, np.dtype[np.float64]]
Options = dict[str, Any]

EDM = schedules.edm(0.002, 80.0)


def through_the_engine(
    plan: Plan, data: Callable[[Any, Level], Any], start: Array, seed: int = 0, together: int = 1
) -> Array:
    """The engine in fp32 with the exact denoiser as its network, from states at the plan's first level.

    together: so many states are one sample of the engine, whose elements are as independent as samples and cost less.
    """
    levels = iter([row.level for row in plan.rows if row.level is not None])
    assert plan.schedule is not None
    states = start.shape
    shape = states if together == 1 else (len(start) // together, together, *states[1:])
    model = fd.Denoiser(lambda x, t: data(x.view(states), next(levels)).view_as(x), plan.schedule, "x0")
    init = torch.from_numpy(start.reshape(shape)).float()
    given = {name: torch.zeros_like(init) for name in plan.given}
    end = fd.Sampler(plan, model).sample(shape, seed=seed, init=init, given=given)
    return end.view(states).double().numpy()


def marginal(data: Mixture, count: int, level: Level, seed: int) -> Array:
    """Exact draws of the mixture at a noise level."""
    rng = np.random.default_rng(seed)
    which = rng.choice(len(data.weights), size=count, p=data.weights)
    spread = np.sqrt(data.variances[which]).reshape(-1, *(1 for _ in data.means.shape[1:]))
    clean = data.means[which] + spread * rng.standard_normal((count, *data.means.shape[1:]))
    noisy: Array = level.alpha * clean + level.sigma * rng.standard_normal(clean.shape)
    return noisy


LINE = Mixture([0.3, 0.5, 0.2], [[-1.5], [0.2], [1.4]], [0.02, 0.05, 0.01])


def line_cdf(x: Array, level: Level) -> Array:
    """P(X <= x) of the noised LINE."""
    spread = np.sqrt(level.alpha**2 * LINE.variances + level.sigma**2)
    z = (np.asarray(x)[..., None] - level.alpha * LINE.means[:, 0]) / (spread * math.sqrt(2.0))
    total: Array = (0.5 * (1.0 + np.vectorize(math.erf)(z)) * LINE.weights).sum(-1)
    return total


def line_quantile(share: Array, level: Level) -> Array:
    low, high = np.full_like(share, -30.0), np.full_like(share, 30.0)
    for _ in range(80):
        middle = 0.5 * (low + high)
        below = line_cdf(middle, level) < share
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    middle = 0.5 * (low + high)
    return middle


TRANSPORT: list[tuple[str, Options, Schedule | str, str, float]] = [
    ("ddim", {}, EDM, "karras", 0.05),
    ("heun", {}, EDM, "karras", 4e-4),
    ("dpmpp_2m", {}, EDM, "karras", 2e-3),
    ("dpmpp_3s", {}, EDM, "karras", 1e-4),
    ("unipc", {"order": 3}, EDM, "karras", 1e-4),
    ("deis", {}, EDM, "karras", 4e-4),
    ("lms", {}, EDM, "karras", 4e-4),
    ("unipc", {"order": 3}, "vp", "logsnr", 1e-3),
    ("flow_heun", {}, "rectified_flow", "karras", 4e-4),
]


@pytest.mark.parametrize(
    ("solver", "options", "schedule", "grid", "bound"), TRANSPORT, ids=[f"{c[0]}-{c[3]}" for c in TRANSPORT]
)
def test_exact_transport_on_a_line(solver: str, options: Options, schedule: Any, grid: str, bound: float) -> None:
    """In 1-D the ODE keeps every quantile: it takes x at the top to F_0^-1(F_top(x)), whatever lies between."""
    ends = {"sigma_min": 0.01, "sigma_max": 80.0}
    plan = build(solver, schedule, 200, grid, grid_options=ends, **options)
    top, last = plan.levels[0], plan.levels[-2]
    shares = np.linspace(0.002, 0.998, 400)
    start = line_quantile_wide(shares, top)
    levels = [row.level for row in plan.rows if row.level is not None]
    expected = LINE(line_quantile(shares, last)[:, None], levels[-1])
    error = through_the_engine(plan, LINE, start[:, None]) - expected
    assert np.sqrt(np.mean(error**2)) < bound


def line_quantile_wide(shares: Array, level: Level) -> Array:
    """Quantiles at a level whose spread is far above the data's."""
    if level.sigma < 5.0:
        return line_quantile(shares, level)
    unit = Level(level.alpha / level.sigma, 1.0)
    return level.sigma * line_quantile(shares, unit)


STOCHASTIC: list[tuple[str, Options]] = [
    ("ddpm", {}),
    ("ddim", {"eta": 1.0}),
    ("euler_ancestral", {}),
    ("dpmpp_2m_sde", {}),
    ("sa_solver", {}),
    ("er_sde", {}),
    ("seeds_2", {}),
    ("edm", {"s_noise": 1.0}),
    ("langevin_pc", {}),
]


@pytest.mark.parametrize(("solver", "options"), STOCHASTIC, ids=[solver for solver, _ in STOCHASTIC])
def test_the_law_on_a_line(solver: str, options: Options) -> None:
    """Kolmogorov-Smirnov at a probability of 1e-6, and what the last of so many steps may be off by."""
    first_order = solvers.get(solver).order == 1
    plan = build(solver, EDM, 600 if first_order else 200, "karras", grid_options={"sigma_min": 0.01}, **options)
    count = 20_000
    end = through_the_engine(plan, LINE, marginal(LINE, count, plan.levels[0], 1), seed=3, together=1000)[:, 0]
    empirical = (np.arange(count) + 0.5) / count
    distance = np.abs(line_cdf(np.sort(end), Level(1.0, 0.0)) - empirical).max()
    assert distance < math.sqrt(math.log(2.0 / 1e-6) / 2.0 / count) + (0.008 if first_order else 0.002)


def mode_statistics(data: Mixture, x: Array) -> list[tuple[int, Array, float]]:
    """Per mode: how many samples, their mean, and the variance about the exact mean."""
    flat = x.reshape(len(x), -1)
    means = data.means.reshape(len(data.means), -1)
    distance = np.square(flat[:, None] - means).sum(-1) / data.variances
    owner = np.argmin(distance + means.shape[1] * np.log(data.variances), axis=1)
    found = []
    for k, mean in enumerate(means):
        mine = flat[owner == k]
        found.append((len(mine), mine.mean(axis=0), float(np.square(mine - mean).mean())))
    return found


def check_modes(data: Mixture, x: Array, bias: float) -> None:
    """Weights, means and variances of the modes within six standard errors, the variance's beside a known bias."""
    count, dimension = len(x), data.means[0].size
    for k, (mine, mean, variance) in enumerate(mode_statistics(data, x)):
        weight, exact = data.weights[k], data.variances[k]
        assert abs(mine / count - weight) < 6.0 * math.sqrt(weight * (1.0 - weight) / count), k
        distance = np.square(mean - data.means[k].ravel()).sum() * mine / exact  # chi-squared of `dimension`
        assert abs(distance - dimension) < 6.0 * math.sqrt(2.0 * dimension) + 10.0, k
        assert abs(variance / exact - 1.0) < 6.0 * math.sqrt(2.0 / (mine * dimension)) + bias, k


PLANE = Mixture([0.2, 0.5, 0.3], [[-3.0, 0.5], [1.0, 2.5], [2.0, -2.0]], [0.05, 0.1, 0.02])
MODES: list[tuple[str, Options]] = [
    ("unipc", {"order": 3}),
    ("heun", {}),
    ("dpmpp_2m_sde", {}),
    ("sa_solver", {}),
    ("ddpm", {}),
]


@pytest.mark.parametrize(("solver", "options"), MODES, ids=[solver for solver, _ in MODES])
def test_the_law_in_a_plane(solver: str, options: Options) -> None:
    first_order = solver == "ddpm"
    plan = build(solver, EDM, 500 if first_order else 200, "karras", **options)
    end = through_the_engine(plan, PLANE, marginal(PLANE, 8_000, plan.levels[0], 2), seed=5, together=500)
    check_modes(PLANE, end, 0.03 if first_order else 0.005)


@pytest.mark.parametrize(
    ("solver", "schedule", "grid"),
    [("unipc", EDM, "karras"), ("dpmpp_2m_sde", EDM, "karras"), ("unipc", schedules.vp(), "logsnr")],
    ids=["ode", "sde", "ode-vp"],
)
def test_the_law_of_images(solver: str, schedule: Schedule, grid: str) -> None:
    """d = 3 x 32 x 32 = 3072, where a relative error of the variance of 0.5 % is four standard errors of a mode."""
    rng = np.random.default_rng(7)
    data = Mixture([0.3, 0.7], 0.5 * rng.standard_normal((2, 3, 32, 32)), [0.05, 0.3])
    plan = build(solver, schedule, 100, grid, **({"order": 3} if solver == "unipc" else {}))
    end = through_the_engine(plan, data, marginal(data, 200, plan.levels[0], 8), seed=9)
    check_modes(data, end, 0.005)


def test_the_bounds_are_not_empty() -> None:
    """On as many samples, the same checks refuse a sampler of first order in twenty steps, and swapped weights."""
    plan = build("ddim", EDM, 20, "karras")
    end = through_the_engine(plan, PLANE, marginal(PLANE, 8_000, plan.levels[0], 2), together=500)
    with pytest.raises(AssertionError):
        check_modes(PLANE, end, 0.03)
    plan = build("unipc", EDM, 200, "karras", order=3)
    wrong = Mixture([0.25, 0.45, 0.3], PLANE.means, PLANE.variances)
    end = through_the_engine(plan, wrong, marginal(wrong, 8_000, plan.levels[0], 2), together=500)
    with pytest.raises(AssertionError):
        check_modes(PLANE, end, 0.005)


POINTS = np.random.default_rng(11).standard_normal((5, 1, 2, 3))
TO_DATA = [case for case in CASES if not case.options and not solvers.get(case.solver).upward]


@pytest.mark.parametrize("case", TO_DATA, ids=[case.solver for case in TO_DATA])
def test_samples_are_data_points(case: Any) -> None:
    """A network that has memorised its data set gives it back: every sample is one of its points."""
    schedule = schedules.rectified_flow() if case.solver in FLOW_ONLY else EDM
    plan = build(case.solver, schedule, 20, "karras")
    start = plan.levels[0].sigma * np.random.default_rng(12).standard_normal((64, 1, 2, 3))
    end = through_the_engine(plan, Points(POINTS), start)
    distance = np.abs(end[:, None] - POINTS).max(axis=(2, 3, 4)).min(axis=1)
    assert np.quantile(distance, 0.9) < 1e-5
    assert distance.max() < 1e-3


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m", "dpmpp_2m_sde", "ddpm"])
def test_every_data_point_is_as_likely(solver: str) -> None:
    """Chi-squared of 4 degrees, at a probability of 1e-6, from states of the exact law at the top."""
    data, count = Points(POINTS), 5000
    plan = build(solver, EDM, 200, "karras")
    end = through_the_engine(plan, data, marginal(data, count, plan.levels[0], 13), seed=14)
    nearest = np.square(end[:, None] - POINTS).sum(axis=(2, 3, 4)).argmin(axis=1)
    counts = np.bincount(nearest, minlength=5)
    assert np.square(counts - count / 5).sum() / (count / 5) < 33.4


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmpp_2m", "heun"])
def test_the_last_step_is_the_mean_shift(solver: str) -> None:
    """S52: the last step from sigma is the softmax-weighted mean of the points, written out."""
    plan = build(solver, EDM, 6, "karras", grid_options={"sigma_min": 2.0})
    states: list[Array] = []

    def denoise(x: Array, level: Level) -> Array:
        states.append(x)
        return Points(POINTS)(x, level)

    rng = np.random.default_rng(15)
    normals = rng.standard_normal((10, 8, 1, 2, 3))
    end = execute(plan, denoise, 80.0 * rng.standard_normal((8, 1, 2, 3)), lambda i, _: normals[i])
    x = states[-1]
    weights = np.exp(-np.square(x[:, None] - POINTS).sum(axis=(2, 3, 4)) / (2.0 * 2.0**2))
    weights /= weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(end, np.einsum("bk,kcij->bcij", weights, POINTS), rtol=1e-9)
    nearest = np.abs(end[:, None] - POINTS).max(axis=(2, 3, 4)).min(axis=1)
    assert nearest.min() > 0.05  # from so much noise it is no data point


# S39: p(x|c) = N(0, 1), p(x) = N(0, 2), noise added with alpha = 1, guidance w = 1 + gamma of the slides
CFG = {
    "ddim": lambda w: 2.0 ** (1.0 - w),
    "ddpm": lambda w: (2.0 - 2.0 ** (2.0 - 2.0 * w)) / (2.0 * w - 1.0),
}
TOP = 2000.0


def guided_variance(solver: str, w: float, steps: int, **options: Any) -> float:
    """The variance of guided samples, exactly: every state is a combination of the latent and the draws."""
    schedule = schedules.edm(1e-3, TOP)
    plan = build(solver, schedule, steps, "karras", **options)
    basis = np.eye(plan.draws + 1)

    def denoise(x: Array, level: Level) -> Array:
        cond, uncond = 1.0 / (1.0 + level.sigma**2), 2.0 / (2.0 + level.sigma**2)
        return (uncond + w * (cond - uncond)) * x

    end = execute(plan, denoise, TOP * basis[0], lambda i, _: basis[i + 1])
    return float(np.square(end).sum())


@pytest.mark.parametrize("w", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(
    ("solver", "law", "order"),
    [
        ("ddim", "ddim", 1),
        ("heun", "ddim", 2),
        ("unipc", "ddim", 3),
        ("ddpm", "ddpm", 1),
        ("dpmpp_2m_sde", "ddpm", 2),
        ("er_sde", "ddpm", 2),
    ],
)
def test_guided_variances(solver: str, law: str, order: int, w: float) -> None:
    """CFG-DDIM 2^(1 - w): .5, .125. CFG-DDPM (2 - 2^(2 - 2w))/(2w - 1): .58333, .28348. Neither is 2/(w + 1).

    The limit of many steps from 250, 500 and 1000 of them, the order being known.
    """
    expected = CFG[law](w)
    options = {"noise": "sde"} if solver == "er_sde" else {}
    coarse, middle, fine = (guided_variance(solver, w, steps, **options) for steps in (250, 500, 1000))
    once = [(2**order * b - a) / (2**order - 1) for a, b in ((coarse, middle), (middle, fine))]
    limit = (2 ** (order + 1) * once[1] - once[0]) / (2 ** (order + 1) - 1)
    assert limit == pytest.approx(expected, rel=1e-4)
    assert fine == pytest.approx(expected, rel=0.03 if order == 1 else 3e-3)
    if w > 1.0:
        assert abs(expected - 2.0 / (w + 1.0)) > 0.08  # the powered p(x|c)^w p(x)^(1 - w), which it does not sample


def test_the_closed_variances() -> None:
    assert [CFG["ddim"](w) for w in (2.0, 4.0)] == pytest.approx([0.5, 0.125])
    assert [CFG["ddpm"](w) for w in (2.0, 4.0)] == pytest.approx([0.58333, 0.28348], abs=5e-6)


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m_sde"])
def test_guidance_lowers_the_variance(solver: str) -> None:
    """S40: more guidance, less spread, down from the conditional law's 1."""
    spreads = [guided_variance(solver, w, 400) for w in (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 7.5)]
    assert spreads[0] == pytest.approx(1.0, abs=2e-3)
    assert all(b < 0.95 * a for a, b in itertools.pairwise(spreads))


@pytest.mark.parametrize("w", [2.0, 4.0])
@pytest.mark.parametrize(("solver", "law", "steps"), [("heun", "ddim", 200), ("dpmpp_2m_sde", "ddpm", 300)])
def test_guided_variances_through_the_engine(solver: str, law: str, steps: int, w: float) -> None:
    """fd.Sampler with cond, uncond and guidance; sample k of the batch is the response to draw k alone."""
    schedule = schedules.edm(0.002, 500.0)
    plan = build(solver, schedule, steps, "karras")
    levels = iter([row.level for row in plan.rows if row.level is not None])

    def net(x: torch.Tensor, t: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        spread = variance[:, None]
        return spread / (spread + next(levels).sigma ** 2) * x

    count = plan.draws + 1
    basis = torch.eye(count)[:, :, None]
    sampler = fd.Sampler(plan, fd.Denoiser(net, schedule, "x0"))
    end = sampler.sample(
        (count, 1),
        seed=0,
        init=500.0 * basis[0],
        noise=basis[1:] if plan.draws else "white",
        cond={"variance": torch.full((count,), 1.0)},
        uncond={"variance": torch.full((count,), 2.0)},
        guidance=w,
    )
    assert float(end.double().square().sum()) == pytest.approx(CFG[law](w), rel=4e-3)
