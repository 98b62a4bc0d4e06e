"""The steps of the adaptive samplers in float64: against k-diffusion, SciPy, exact solutions, and one Brownian path."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peers import k_diffusion_sampling

import fastdiff as fd
from fastdiff.compiler import brownian
from fastdiff.compiler import layout as at
from fastdiff.compiler.adaptive import AdaptivePlan
from fastdiff.compiler.step_control import Control, StepSize
from fastdiff.compiler.verify_adaptive import Outcome, at_tolerance, execute, measure
from fastdiff.compiler.walk import Walk
from fastdiff.engine import noise
from fastdiff.models.exact import Gaussian, Mixture

SHAPE = (1, 3, 2, 2)
EDM = fd.schedules.edm(0.02, 60.0)
MIXTURE = Mixture([0.3, 0.5, 0.2], np.random.default_rng(0).standard_normal((3, 12)), [0.05, 0.02, 0.1])
START = np.random.default_rng(1).standard_normal(SHAPE)
SETTINGS: list[dict[str, Any]] = [
    {"order": order, "rtol": rtol, "atol": atol}
    for order in (2, 3)
    for rtol, atol in ((0.05, 0.0078), (0.005, 0.0078), (0.001, 0.001))
] + [
    {"order": 3, "rtol": 0.01, "pcoeff": 0.4, "icoeff": 0.3, "dcoeff": 0.05, "h_init": 0.2, "accept_safety": 0.9},
    {"order": 2, "eta": 1.0},
    {"order": 3, "eta": 0.5, "s_noise": 0.9},
]


def make(solver: str, schedule: fd.Schedule | str = EDM, **options: Any) -> AdaptivePlan:
    plan = fd.plan(solver, schedule, **options)
    assert isinstance(plan, AdaptivePlan)
    return plan


def mixture(x: Any, level: fd.Level) -> Any:
    return MIXTURE(x.reshape(1, 12), level).reshape(x.shape)


def draw(index: int, stream: int) -> np.ndarray[Any, Any]:
    return noise.normal(7, 12, index, stream).astype(np.float64).reshape(SHAPE)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_dpm_adaptive_takes_k_diffusions_steps(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = k_diffusion_sampling(monkeypatch)
    double = functools.partial(torch.tensor, dtype=torch.float64)
    monkeypatch.setattr(torch, "tensor", double)
    reached: list[float] = [60.0]
    draws = (torch.from_numpy(draw(i, at.STREAM_STEP)) for i in itertools.count())

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return mixture(x, fd.Level(1.0, float(sigma[0])))

    end, info = sampling.sample_dpm_adaptive(
        model, 60.0 * torch.from_numpy(START), 0.02, 60.0, disable=True, return_info=True,
        noise_sampler=lambda *_: next(draws), callback=lambda at: reached.append(float(at["sigma"])), **options,
    )  # fmt: skip
    ours = execute(make("dpm_adaptive", denoise=False, **options), mixture, 60.0 * START, draw)
    walk = ours.walk
    assert (walk.evaluations, walk.accepted, walk.rejected) == (info["nfe"], info["n_accept"], info["n_reject"])
    grid = [sigma for sigma, _ in itertools.groupby(reached)]  # a rejected step stays where it is
    np.testing.assert_allclose([level.rho for level in walk.grid], grid, rtol=1e-9)
    np.testing.assert_allclose(ours.sample, end.numpy(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", ["dpm_adaptive", "rk45"])
@pytest.mark.parametrize("schedule", ["linear", "vp", "rectified_flow", "ve"])
def test_the_steps_are_the_same_on_every_schedule(solver: str, schedule: str) -> None:
    ends = {"grid_options": {"sigma_min": 0.05, "sigma_max": 40.0}}

    def run(name: str) -> Outcome:
        plan = make(solver, name, **ends)
        top = plan.levels[0]
        # x / alpha is what all schedules share, and so is D; the network is asked at alpha = 1
        return execute(plan, mixture, 40.0 * START * top.alpha)

    expected, got = run("edm"), run(schedule)
    np.testing.assert_allclose([lv.rho for lv in got.walk.grid], [lv.rho for lv in expected.walk.grid], rtol=1e-6)
    np.testing.assert_allclose(got.sample, expected.sample, rtol=1e-6, atol=1e-6)
    own = fd.schedules.get(schedule)
    assert got.walk.grid[3].time == pytest.approx(float(own.time_from_rho(got.walk.grid[3].rho)), rel=1e-12)


def one_step(plan: AdaptivePlan, s: float, t: float, y: Any, data: Callable[..., Any]) -> tuple[Any, ...]:
    """End, error and carried values of a trial step of rows, from held values made by the plan's own start."""
    from fastdiff.compiler.verify import execute_row

    levels = [fd.Level(1.0, rho, rho) for rho in (s, t)]
    registers = {0: y, 1: data(y, levels[0])}
    trial = plan.trial(*levels)
    for row in trial.rows:
        execute_row(row, registers, data)
    return tuple(registers[r] for r in trial.results)


def test_a_step_of_rk45_is_scipys() -> None:
    rk = pytest.importorskip("scipy.integrate._ivp.rk")
    s, t, y = 3.0, 1.7, 2.0 * START

    def slope(rho: float, flat: Any) -> Any:
        level = fd.Level(1.0, rho, rho)
        return ((flat.reshape(SHAPE) - mixture(flat.reshape(SHAPE), level)) / rho).ravel()

    stages = np.empty((7, 12))
    expected, _ = rk.rk_step(slope, s, y.ravel(), slope(s, y.ravel()), t - s, rk.RK45.A, rk.RK45.B, rk.RK45.C, stages)
    error = stages.T @ rk.RK45.E * (t - s)
    end, ours, denoised = one_step(make("rk45"), s, t, y, mixture)
    np.testing.assert_allclose(end.ravel(), expected, rtol=1e-13)
    np.testing.assert_allclose(np.abs(ours.ravel()), np.abs(error), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(denoised, mixture(end, fd.Level(1.0, t, t)), rtol=1e-13)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
def test_rk45_against_scipy_at_the_same_tolerance(tolerance: float) -> None:
    """Gaussian data, whose solution is known; SciPy in rho and in log rho, whichever it likes better."""
    integrate = pytest.importorskip("scipy.integrate")
    data = Gaussian(0.3, np.linspace(0.05, 2.0, 12).reshape(SHAPE[1:]))
    plan = make("rk45", rtol=tolerance, atol=tolerance, denoise=False)
    exact = data.solve_ode(60.0 * START, plan.first, plan.last)

    def slope(rho: float, flat: Any) -> Any:
        level = fd.Level(1.0, rho, rho)
        return ((flat.reshape(SHAPE) - data(flat.reshape(SHAPE), level)) / rho).ravel()

    theirs = [
        integrate.solve_ivp(slope, (60.0, 0.02), 60.0 * START.ravel(), rtol=tolerance, atol=tolerance),
        integrate.solve_ivp(
            lambda u, y: math.exp(u) * slope(math.exp(u), y),
            (math.log(60.0), math.log(0.02)),
            60.0 * START.ravel(), rtol=tolerance, atol=tolerance,
        ),
    ]  # fmt: skip
    ours = execute(plan, data, 60.0 * START)
    error = np.abs(ours.sample - exact).max()
    reference = [np.abs(run.y[:, -1].reshape(SHAPE) - exact).max() for run in theirs]
    assert error <= 3.0 * max(reference)
    assert ours.walk.evaluations <= 1.25 * min(run.nfev for run in theirs)


@pytest.mark.parametrize(("solver", "finest"), [("dpm_adaptive", 2e-6), ("rk45", 1e-7)])
def test_the_error_is_of_the_size_of_the_tolerance(solver: str, finest: float) -> None:
    """Halving the tolerance lowers the error; dpm_adaptive's only where its steps are short, see docs/solvers.md."""
    plan = make(solver, "edm")
    costs = [measure(at_tolerance(plan, tol, tol)) for tol in finest * 2.0 ** np.arange(5)]
    for fine, coarse in itertools.pairwise(costs):
        assert fine.error < 0.75 * coarse.error
        assert fine.nfe >= coarse.nfe
    assert all(cost.error <= 10.0 * cost.rtol for cost in costs)


def test_where_there_is_no_signal_the_start_is_the_limit() -> None:
    """From alpha = 0 the exact solution on N(mu, v) is mu + sqrt(v + rho^2) z."""
    plan = make("rk45", "rectified_flow", rtol=1e-8, atol=1e-8, denoise=False)
    data = Gaussian(0.3, 0.7)
    got = execute(plan, data, START)
    assert plan.levels[0].alpha == 0.0
    exact = 0.3 + np.sqrt(0.7 + plan.last.rho**2) * START
    np.testing.assert_allclose(got.sample, exact, atol=2e-6)  # 0.7 / (2 FIRST_RHO^2), and the tolerance
    assert got.walk.evaluations == 2 + 6 * (got.walk.accepted + got.walk.rejected)


def test_the_controller_is_the_textbook_one() -> None:
    """I alone: h' = h (1 + atan(e^(-1/k) - 1)); with P the last accepted error enters, and a rejected one does not."""
    size = StepSize(Control(3.0, 0.1, 0.0, 1.0, 0.0, 0.81))
    assert size.judge(1.0) and size.h == pytest.approx(0.1)
    assert not size.judge(8.0) and size.h == pytest.approx(0.1 * (1.0 + math.atan(-0.5)))
    size = StepSize(Control(5.0, 0.1, 0.2, 0.65, 0.0, 0.9, aim=0.5))
    assert size.judge(0.25) and not size.judge(5.0)
    before = size.h
    assert size.judge(0.5)
    assert size.h == pytest.approx(before * (1.0 + math.atan(2.0**-0.04 - 1.0)), rel=1e-6)


def _terms(row: Any) -> list[tuple[float, dict[int, float]]]:
    if not row.noise:
        return []
    assert {stream for _, stream in row.noise} == {at.STREAM_BROWNIAN}
    weights = dict(zip((node for node, _ in row.noise), row.outputs[0].noise, strict=True))
    size = math.sqrt(sum(w * w for w in weights.values()))
    return [(size, {node: w / size for node, w in weights.items()})]


@pytest.mark.parametrize("errors", [[0.1], [0.05, 0.3, 3.0], [0.2, 50.0, 0.01, 0.05, 2.0, 0.01]], ids=str)
def test_accepted_steps_follow_one_path_and_rejected_ones_do_not_use_it(errors: list[float]) -> None:
    """Increments over any accepted steps add up to that of the fixed grid: W(top) - W(end of the last noisy step)."""
    ends = [math.exp(brownian.LOG_RHO * (2.0 * u - 1.0)) for u in (0.375, 0.625)]
    schedule = fd.schedules.ve(*ends)
    plan = make("dpm_adaptive", schedule, eta=1.0)
    walk, drawn = Walk(plan, path=True), []
    sequence = itertools.cycle(errors)
    while not walk.done:
        rows = walk.trial()
        assert all(not row.noise for row in rows[1:])
        drawn += _terms(rows[0])
        walk.judge(next(sequence))
    drawn += _terms(walk.finish()[0])
    assert walk.rejected > 0 or errors == [0.1]
    # the last step lands without noise, so its increment is asked for here
    assert len(drawn) == walk.accepted - 1
    gaps = [math.log(s.rho / t.rho) / (2.0 * brownian.LOG_RHO) for s, t in itertools.pairwise(walk.grid)]
    terms = [draw for _, draw in drawn] + [brownian.increment(walk.grid[-2].rho, walk.grid[-1].rho)]
    total: dict[int, float] = {}
    for gap, draws in zip(gaps, terms, strict=True):
        for node, weight in draws.items():
            total[node] = total.get(node, 0.0) + math.sqrt(gap) * weight
    (fixed,) = brownian.increments([(ends[1], ends[0])])
    nodes = set(total) | set(fixed)
    assert max(abs(total.get(n, 0.0) - 0.5 * fixed.get(n, 0.0)) for n in nodes) <= 1e-5
    assert max(len(terms) for _, terms in drawn) <= 40
    for (_, a), (_, b) in itertools.combinations(drawn, 2):
        assert abs(sum(w * b.get(node, 0.0) for node, w in a.items())) <= 1e-12


def test_an_ancestral_step_keeps_the_marginal() -> None:
    """With D == 0 a step from N(0, rho_s^2) to t leaves variance rho_t^2, whatever eta."""
    for eta in (0.3, 1.0):
        plan = make("dpm_adaptive", eta=eta)
        walk = Walk(plan)
        for error in (0.1, 0.1, 0.1):
            walk.trial()
            walk.judge(error)
        row = walk.trial()[0]
        assert row.noise == ((2, at.STREAM_STEP),)
        (added,) = row.outputs[0].noise
        down = walk.plan.level(walk.grid[-2].lam)  # only to name the level the step left
        rho = walk.grid[-1].rho
        assert 0.0 < added < rho < down.rho
        split = rho * min(1.0, eta * math.sqrt(1.0 - (rho / down.rho) ** 2))
        assert added == pytest.approx(split, rel=1e-9)


def test_bounds_of_a_walk() -> None:
    walk = Walk(make("rk45"), sample=3)
    with pytest.raises(
        FloatingPointError, match=r"rk45: the step size of sample 3 at sigma/alpha=60.* fell to .*raise"
    ):
        while True:
            walk.trial()
            walk.judge(math.inf)
    assert walk.accepted == 0 and walk.rejected > 5
    walk = Walk(make("dpm_adaptive", max_steps=4), sample=1)
    with pytest.raises(
        FloatingPointError, match=r"sample 1 at .* needs more than max_steps=4 trial steps \(4 steps acc"
    ):
        for _ in range(5):
            walk.trial()
            walk.judge(1.0)
    nan = Walk(replace(make("rk45")))
    nan.trial()
    nan.judge(math.nan)
    assert (nan.accepted, nan.rejected) == (0, 1)


@pytest.mark.parametrize("s_noise", [0.0, 0.9, 1.1])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_noise_that_leads_elsewhere_is_not_judged(eta: float, s_noise: float) -> None:
    """With s_noise other than 1 the variance is stated, the mean judged, and no ODE is compared with."""
    report = make("dpm_adaptive", eta=eta, s_noise=s_noise).verify()
    assert report.ok, str(report)
    assert [check.name for check in report.checks] == ["point mass", "finite"]
    assert "stated and not judged with s_noise other than 1" in report.checks[0].sentence


def test_noise_of_strength_one_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """With draws 5 % too small the point mass has another variance, and s_noise = 1 does not excuse it."""
    plan = make("dpm_adaptive", eta=1.0)
    assert plan.verify().ok
    landing = Walk._landing

    def quiet(walk: Walk, t: Any) -> Any:
        down, (names, normals) = landing(walk, t)
        return down, (names, tuple(0.95 * c for c in normals))

    monkeypatch.setattr(Walk, "_landing", quiet)
    check = plan.verify().checks[0]
    assert not check.ok and check.value > 0.01
