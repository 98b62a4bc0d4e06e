"""Every stochastic sampler on a Brownian path: its exact law, which levels its draws cover, and strong convergence."""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from peers import k_diffusion_sampling
from solver_cases import CASES, FLOW_ONLY
from table_cases import CASES as FIRST

import fastdiff as fd
from fastdiff.compiler import brownian, run, solvers
from fastdiff.compiler.build import plan as build
from fastdiff.compiler.convergence import variance_error
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.verify import execute, propagate
from fastdiff.engine import noise
from fastdiff.process.schedules import Level

OVERLAPPING = ("dpmpp_sde",)  # its two draws in a step are two increments of the path that start together
WHITE = ("annealed_langevin", "edm")  # all their noise is Langevin's or churn
EVERY = [(case.solver, case.options) for case in CASES] + [(name, dict(options)) for name, options in FIRST]


def plans(solver: str, steps: int, **options: Any) -> Plan:
    flow = solvers.get(solver).flow_only
    return build(solver, "rectified_flow" if flow else "vp", steps, "linspace" if flow else "logsnr", **options)


STOCHASTIC = [(solver, options) for solver, options in EVERY if plans(solver, 6, **options).stochastic]
stochastic = pytest.mark.parametrize(
    ("solver", "options"), STOCHASTIC, ids=["-".join([s, *map(str, o.values())]) for s, o in STOCHASTIC]
)


def test_the_stochastic_samplers_are_all_here() -> None:
    noisy = {name for name in solvers.names() if "run.noise" in inspect.getsource(solvers.get(name).function)}
    assert noisy <= {solver for solver, _ in STOCHASTIC}
    assert {"seeds_2", "seeds_3", "dpmpp_sde", "edm", "langevin_pc", "sa_solver"} <= {s for s, _ in STOCHASTIC}
    assert FLOW_ONLY


@stochastic
def test_the_law_on_a_path_is_that_of_white_noise(solver: str, options: dict[str, Any]) -> None:
    """Increments over disjoint intervals are independent unit normals, so every state's variance stays what it was."""
    plan = plans(solver, 6, **options)
    path = brownian.on_path(plan)
    white, walked = propagate(plan), propagate(path)
    np.testing.assert_allclose(walked.mean, white.mean, rtol=1e-10, atol=1e-12)
    if solver in OVERLAPPING:
        assert np.abs(walked.variance / white.variance - 1.0).max() > 0.01
    else:
        np.testing.assert_allclose(walked.variance, white.variance, rtol=1e-10, atol=1e-14)


@stochastic
def test_draws_cover_the_way_down_once(solver: str, options: dict[str, Any]) -> None:
    plan = plans(solver, 6, **options)
    assert len(plan.intervals) == plan.draws
    covered = [pair for pair in plan.intervals if pair is not None]
    assert bool(covered) == (solver not in WHITE and "s_churn" not in options)
    assert all(s > t for s, t in covered)
    if solver not in OVERLAPPING:
        assert all(t >= s for (_, t), (s, _) in itertools.pairwise(covered))
    ends = {level.rho for level in plan.levels}
    assert {s for s, _ in covered} <= ends or solver in (*OVERLAPPING, "seeds_2", "seeds_3", "dpm_fast")


def test_churn_and_langevin_noise_is_white_on_a_path() -> None:
    plan = build("langevin_pc", "edm", 4, "karras", corrections=2)
    assert [pair is None for pair in plan.intervals] == [True, True, False] * 3 + [True, True]
    streams = [{stream for _, stream in row.noise} for row in brownian.on_path(plan).rows]
    assert {1} in streams and {2} in streams


def test_two_draws_of_dpmpp_sde_on_one_path_make_it_second_order() -> None:
    """The noise a step ends with has met its middle estimate: with independent draws that covariance, of the size of
    h^2 in a step, is missing and the variance has order 1; with two increments of one path it has order 2."""
    ends = {"sigma_min": 0.01, "sigma_max": 20.0}

    def errors(path: bool, **options: Any) -> list[float]:
        made = [build("dpmpp_sde", "edm", n, "karras", grid_options=ends, **options) for n in (80, 160)]
        return [abs(variance_error(brownian.on_path(plan) if path else plan)) for plan in made]

    for options in ({}, {"eta": 0.5}, {"r": 1.0}):
        white, path = errors(False, **options), errors(True, **options)
        assert np.log2(white[0] / white[1]) == pytest.approx(1.0, abs=0.15)
        assert np.log2(path[0] / path[1]) == pytest.approx(2.0, abs=0.15)


def difference(solver: str, steps: int, path: bool, **options: Any) -> float:
    """Root mean square of x_N - x_2N before the last denoise, exact: data N(0, 1/4), one seed, nested levels."""
    ends = np.geomspace(20.0, 0.05, 2 * steps + 1)
    made = [build(solver, "edm", None, grid, grid_options={"unit": "rho"}, **options) for grid in (ends[::2], ends)]
    made = [brownian.on_path(plan) for plan in made] if path else made
    names = {name: i + 1 for i, name in enumerate(sorted({n for p in made for row in p.rows for n in row.noise}))}
    unit = np.eye(len(names) + 1)
    before_last = []
    for plan in made:
        seen: list[np.ndarray[Any, Any]] = []

        def denoise(x: Any, level: Level, seen: Any = seen) -> Any:
            seen.append(x)
            return 0.25 / (0.25 + level.sigma**2) * x

        execute(
            plan,
            denoise,
            np.sqrt(0.25 + 400.0) * unit[0],
            lambda i, stream: unit[names[i, stream]],
            dict.fromkeys(plan.given, 0.0),
        )
        before_last.append(seen[-1])
    return float(np.linalg.norm(before_last[1] - before_last[0]))


BACKENDS = [name for name in ("reference", "cpp") if fd.backends()[name].ok]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ["dpmpp_sde", "seeds_3", "langevin_pc", "sa_solver", "dpmpp_2m_sde"])
def test_the_engine_draws_the_nodes_of_the_path(solver: str, backend: str) -> None:
    """In fp32 with in-kernel normals what `execute` computes from the normals of the nodes' names."""
    model = fd.Denoiser(lambda x, t: torch.tanh(x), "vp", "x0")
    plan = fd.plan(solver, model.schedule, 6, "logsnr")
    got = fd.Sampler(plan, model, backend).sample((2, 3, 4, 5), seed=[7, 2**63], noise="brownian")

    def normal(index: int, stream: int) -> Any:
        return np.stack([noise.normal(seed, 60, index, stream).reshape(3, 4, 5) for seed in (7, 2**63)])

    start = plan.levels[0].sigma * normal(0, 0).astype(np.float64)
    expected = execute(brownian.on_path(plan), lambda x, level: np.tanh(x), start, normal)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)


def test_the_formulas_tell_nodes_from_draws() -> None:
    text = brownian.on_path(fd.plan("langevin_pc", "edm", 3)).explain()
    assert " z0" in text and " w" in text


STRONG = [
    ("euler_ancestral", {}),
    ("ddpm", {}),
    ("ddim", {"eta": 1.0}),
    ("dpmpp_2m_sde", {}),
    ("dpmpp_3m_sde", {}),
    ("dpmpp_sde", {}),
    ("dpmpp_2s_ancestral", {}),
    ("dpm_2_ancestral", {}),
    ("res_multistep_ancestral", {}),
    ("seeds_2", {}),
    ("seeds_3", {}),
    ("exp_heun_2_x0", {"eta": 1.0}),
    ("sa_solver", {}),
    ("er_sde", {"noise": "sde"}),
    ("mean_reverting", {"noise": "sde"}),
    ("euler_maruyama", {}),
    ("reverse_diffusion", {}),
    ("random_walk", {"point": "sde"}),
]


@pytest.mark.parametrize(("solver", "options"), STRONG, ids=[solver for solver, _ in STRONG])
def test_a_seed_converges_to_one_sample_on_a_path_and_not_in_white_noise(solver: str, options: dict[str, Any]) -> None:
    """Strong order 1, as additive noise allows; independent normals leave the difference where it is."""
    path = [difference(solver, n, True, **options) for n in (40, 80)]
    white = [difference(solver, n, False, **options) for n in (40, 80)]
    assert np.log2(path[0] / path[1]) >= 0.8
    assert white[1] > 0.7 * white[0] and white[1] > 5.0 * path[1]


def twice(run: run.Run, x: Any, told: bool = True) -> Any:
    """Two draws in a step, one on each half of it."""
    for _, s, t in run.intervals():
        denoised = run.denoise(x, s)
        if t.sigma == 0.0:
            return t.alpha * denoised
        m = run.level_between(s, t, 0.5)
        halves = (run.noise(s, m), run.noise(m, t)) if told else (run.noise(), run.noise())
        x = denoised + t.sigma * 0.5**0.5 * (halves[0] + halves[1])
    return x


def test_a_solver_of_ones_own_says_what_each_draw_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiff.compiler.solvers.registry._SOLVERS", dict(solvers.registry._SOLVERS))
    solvers.solver("twice_here", order=0)(twice)
    plan = build("twice_here", "edm", 4)
    # equal halves: their sum over sqrt(2) is the increment over the step, up to the rounding of the middle's place
    rows = brownian.on_path(plan).rows
    for row, (s, t) in zip(rows[1:-1], itertools.pairwise(plan.levels[:-1]), strict=True):
        whole = brownian.increment(s.rho, t.rho)
        drawn = {node: c / t.sigma for (node, _), c in zip(row.noise, row.outputs[0].noise, strict=True)}
        assert max(abs(drawn.get(n, 0.0) - whole.get(n, 0.0)) for n in {*drawn, *whole}) <= 1e-3
    untold = build("twice_here", "edm", 4, told=False)
    assert untold.draws == 6 and untold.intervals == ()
    with pytest.raises(ValueError, match=r"twice_here does not say which levels .* run.noise\(s, t\)"):
        brownian.on_path(untold)


TRACED = [
    ("sample_euler_ancestral", "euler_ancestral"),
    ("sample_dpm_2_ancestral", "dpm_2_ancestral"),
    ("sample_dpmpp_2s_ancestral", "dpmpp_2s_ancestral"),
    ("sample_dpmpp_sde", "dpmpp_sde"),
    ("sample_dpmpp_3m_sde", "dpmpp_3m_sde"),
]


@pytest.mark.parametrize(("function", "solver"), TRACED)
def test_a_traced_sampler_follows_the_path_its_sigmas_name(
    function: str, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """k-diffusion's function asks its noise sampler for the same levels as our solver, so both are one table."""
    sampling = k_diffusion_sampling(monkeypatch)
    sigmas = [*np.geomspace(60.0, 0.05, 8), 0.0]
    traced = fd.trace(getattr(sampling, function), sigmas, "edm")
    ours = build(solver, "edm", grid=sigmas[:-1], grid_options={"unit": "rho"})
    assert np.allclose(np.array(traced.intervals), np.array(ours.intervals), rtol=1e-9)
    drawn = functools.cache(lambda i, stream: np.random.default_rng([i, stream]).standard_normal(5))
    start = 60.0 * np.random.default_rng(0).standard_normal(5)
    ends = [execute(brownian.on_path(p), lambda x, level: np.tanh(x), start, drawn) for p in (traced, ours)]
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-8, atol=1e-8)


def test_draws_without_sigmas_share_the_way_down() -> None:
    def fn(m, x, sigmas):  # type: ignore[no-untyped-def]
        x = x + 0.1 * torch.randn_like(x)
        for s, t in itertools.pairwise(sigmas):
            middle = m(x, s)
            x = m(middle, (s * t).sqrt()) + t * torch.randn_like(x)
        return m(x, sigmas[-1])

    traced = fd.trace(fn, [8.0, 4.0, 1.0], "edm")
    assert traced.intervals == (None, (8.0, 4.0), (4.0, 1.0))


diffusers = pytest.importorskip("diffusers")
CAPTURED = [
    ("DDPMScheduler", {"clip_sample": False}, {}),
    ("DDIMScheduler", {"clip_sample": False}, {"eta": 1.0}),
    ("EulerAncestralDiscreteScheduler", {}, {}),
    ("KDPM2AncestralDiscreteScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("SASolverScheduler", {}, {}),
    ("LCMScheduler", {}, {}),
    ("CosineDPMSolverMultistepScheduler", {}, {}),
]


@pytest.mark.parametrize(("name", "config", "options"), CAPTURED, ids=[name for name, _, _ in CAPTURED])
@pytest.mark.filterwarnings("ignore")
def test_captured_schedulers_draw_on_a_path(name: str, config: dict[str, Any], options: dict[str, Any]) -> None:
    """Each draw covers the step it belongs to, and the law is that of white noise."""
    plan = fd.capture(getattr(diffusers, name)(**config), 6, step_options=options)
    rhos = [level.rho for level in plan.levels]
    if name.startswith("KDPM2"):  # the middle of each step is evaluated too
        rhos = rhos[::2]
    assert plan.intervals == tuple(itertools.pairwise(rhos))[: plan.draws]
    white, walked = propagate(plan), propagate(brownian.on_path(plan))
    np.testing.assert_allclose(walked.variance, white.variance, rtol=1e-10)


@pytest.mark.filterwarnings("ignore")
def test_a_captured_brownian_tree_becomes_our_path() -> None:
    """DPMSolverSDEScheduler asks its tree for [s, u] and [s, t], as dpmpp_sde does."""
    pytest.importorskip("torchsde")
    plan = fd.capture(diffusers.DPMSolverSDEScheduler(), 5)
    rhos = [level.rho for level in plan.levels]
    stages, steps = plan.intervals[::2], plan.intervals[1::2]
    assert np.allclose(stages, list(itertools.pairwise(rhos))[:-1:2], rtol=1e-6)
    assert np.allclose(steps, list(itertools.pairwise(rhos[::2]))[: len(steps)], rtol=1e-6)
    brownian.on_path(plan)
