"""Brownian noise: exact law of the increments, one path at any number of steps, and the samples that follow from it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.compiler import brownian
from fastdiff.models.exact import Mixture

BACKENDS = [name for name in ("reference", "cpp") if fd.backends()[name].ok]


def dot(a: brownian.Terms, b: brownian.Terms) -> float:
    return sum(weight * b.get(node, 0.0) for node, weight in a.items())


def levels(steps: int, grid: str = "karras") -> list[tuple[float, float]]:
    plan = fd.plan("ddim", "edm", steps, grid)
    rho = [level.rho for level in plan.levels]
    return list(itertools.pairwise(rho))


@pytest.mark.parametrize("steps", [1, 2, 10, 50, 1000])
def test_increments_are_unit_normals_and_independent(steps: int) -> None:
    draws = brownian.increments(levels(steps))
    assert max(abs(dot(d, d) - 1.0) for d in draws) <= 1e-12
    nearby = [(draws[i], draws[j]) for i in range(len(draws)) for j in range(i + 1, min(i + 5, len(draws)))]
    assert max((abs(dot(a, b)) for a, b in nearby), default=0.0) <= 1e-12


def test_infinite_and_zero_levels_are_the_ends_of_the_path() -> None:
    draws = brownian.increments([(np.inf, 3.0), (3.0, 0.1), (0.1, 0.0)])
    gram = np.array([[dot(a, b) for a in draws] for b in draws])
    assert np.abs(gram - np.eye(3)).max() <= 1e-12


def length(s: float, t: float) -> float:
    return brownian.place(s) - brownian.place(t)


@pytest.mark.parametrize("parts", [2, 4, 32])
@pytest.mark.parametrize("top", [80.0, np.inf])
def test_a_coarse_increment_is_the_sum_of_the_fine_ones(parts: int, top: float) -> None:
    """Node by node: W(b) - W(a) over an interval is the sum over its parts, wherever it is cut."""
    rng = np.random.default_rng(parts)
    coarse = [top, *np.geomspace(79.0, 0.002, 10)]
    for s, t in itertools.pairwise(coarse):
        where = (np.arange(1, parts) + rng.uniform(-0.4, 0.4, parts - 1)) / parts
        cuts = [s, *(min(s, 1e5) ** (1.0 - where) * t**where), t]
        total: dict[int, float] = {}
        for pair in itertools.pairwise(cuts):
            for node, weight in brownian.increment(*pair).items():
                total[node] = total.get(node, 0.0) + weight * np.sqrt(length(*pair))
        whole = {node: weight * np.sqrt(length(s, t)) for node, weight in brownian.increment(s, t).items()}
        assert max(abs(total.get(n, 0.0) - whole.get(n, 0.0)) for n in {*total, *whole}) <= 1e-15


def test_overlapping_increments_have_the_paths_covariance() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        (a, b), (c, d) = np.sort(np.exp(rng.uniform(-6.0, 4.0, (2, 2))))
        shared = length(min(b, d), max(a, c)) if min(b, d) > max(a, c) else 0.0
        expected = shared / np.sqrt(length(b, a) * length(d, c))
        assert dot(brownian.increment(b, a), brownian.increment(d, c)) == pytest.approx(expected, abs=1e-13)


def test_a_level_of_few_bits_is_one_place_at_any_depth() -> None:
    """So an adaptive run that asks for deeper places, to take shorter steps, is on the same path."""
    clock = np.array([0.75, 0.5 + 2.0**-12, 0.5, 0.5 - 2.0**-18])
    s, m, t, u = np.exp(brownian.LOG_RHO * (2.0 * clock - 1.0))
    for pair in ((s, m), (m, t), (t, u)):
        deep, usual = brownian.increment(*pair, depth=brownian.FINEST), brownian.increment(*pair)
        assert deep.keys() == usual.keys() and deep == pytest.approx(usual, rel=1e-12)
    assert len(brownian.increment(9e4, 2e-5, depth=brownian.FINEST)) <= brownian.MOST_NODES
    with pytest.raises(ValueError, match="differ by 9e-05"):
        brownian.increment(t, t * (1.0 - 1e-6))
    assert dot(*[brownian.increment(t, t * (1.0 - 1e-6), depth=brownian.FINEST)] * 2) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("step", [1.0, 0.1, 1e-3])
def test_a_step_may_end_where_the_path_has_a_short_name(step: float) -> None:
    for rho in np.exp(np.random.default_rng(0).uniform(-5.0, 4.0, 50)):
        end = brownian.near(rho, step)
        assert abs(np.log(end / rho)) <= step / 16.0
        place = brownian.place(end, brownian.FINEST)
        assert place == brownian.place(end * (1.0 + 1e-9), brownian.FINEST)
        bits = int(place * 2**brownian.FINEST)
        assert bits & -bits >= 2**brownian.FINEST * step / (32.0 * brownian.LOG_RHO)


def test_rows_stay_short() -> None:
    plan = brownian.on_path(fd.plan("dpmpp_2m_sde", "edm", 20))
    # a step of 1.3 in log rho covers parts of five cells, and each of its ends hangs on the 12 levels below them
    assert max(len(row.noise) for row in plan.rows) <= 5 + 2 * (brownian.DEPTH - brownian.FIRST)
    assert {stream for row in plan.rows for _, stream in row.noise} == {2}


@pytest.mark.parametrize("backend", BACKENDS[-1:])
def test_a_seed_is_one_sample_in_the_limit_of_many_steps(backend: str) -> None:
    data = Mixture(np.array([0.3, 0.7]), np.array([[-1.0], [1.0]]), np.array([0.05, 0.02]))
    schedule = fd.schedules.edm(0.02, 10.0)

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sigma = float(t[0])
        return data(x.reshape(-1, 1).double(), fd.Level(1.0, sigma, sigma)).view_as(x).float()

    model = fd.Denoiser(denoise, schedule, "x0")

    def draw(steps: int, noise: str) -> torch.Tensor:
        return fd.sample(model, (8, 1, 4, 4), "dpmpp_2m_sde", steps, seed=3, noise=noise, backend=backend)

    def moved(noise: str, steps: int) -> float:
        return float((draw(2 * steps, noise) - draw(steps, noise)).abs().mean())

    few, many = moved("brownian", 15), moved("brownian", 120)
    assert many < 0.5 * few
    assert many < 0.25 * moved("white", 120)


@pytest.mark.parametrize("backend", BACKENDS)
def test_white_and_brownian_alternate_on_one_sampler_and_place_does_not_matter(backend: str) -> None:
    model = fd.Denoiser(lambda x, t: torch.tanh(x), fd.schedules.edm(), "edm", sigma_data=0.5)
    sampler = fd.Sampler(fd.plan("ddpm", model.schedule, 6), model, backend)
    first = sampler.sample((5, 3, 4, 5), seed=[9, 1, 2, 3, 4], noise="brownian")
    white = sampler.sample((5, 3, 4, 5), seed=[9, 1, 2, 3, 4])
    again = sampler.sample((5, 3, 4, 5), seed=[4, 3, 2, 1, 9], noise="brownian")
    assert torch.equal(first.flip(0), again)
    assert not torch.equal(first, white)


def test_executors_agree_on_a_path() -> None:
    model = fd.Denoiser(lambda x, t: torch.tanh(x), fd.schedules.edm(), "edm", sigma_data=0.5)
    drawn = [fd.sample(model, (3, 3, 7, 5), "dpmpp_2m_sde", 12, noise="brownian", backend=b) for b in BACKENDS]
    for other in drawn[1:]:
        assert (other - drawn[0]).abs().max() <= 1e-5 * drawn[0].abs().max()


def test_refusals() -> None:
    model = fd.Denoiser(lambda x, t: x, fd.schedules.edm(), "x0")

    def fn(m, x, sigmas):  # type: ignore[no-untyped-def]
        return m(m(x, sigmas[0]) + torch.randn_like(x) - 0.5 * torch.randn_like(x), sigmas[1])

    traced = fd.trace(fn, [1.0, 0.5], model.schedule)
    assert traced.draws == 2 and traced.intervals == ()
    with pytest.raises(ValueError, match="trace:fn does not say which levels each of its draws covers"):
        fd.Sampler(traced, model).sample((1, 1, 2, 2), noise="brownian")
    with pytest.raises(ValueError, match="are one place of the path"):
        brownian.increment(1.00001, 1.0)
    deterministic = fd.plan("ddim", model.schedule, 3)
    assert brownian.on_path(deterministic) is deterministic


def test_json_keeps_the_intervals() -> None:
    for solver, options in (("ddpm", {}), ("seeds_3", {}), ("edm", {"s_tmin": 0.0})):
        plan = fd.plan(solver, "rectified_flow", 5, **options)
        assert fd.Plan.from_json(plan.to_json()) == plan
        assert len(plan.intervals) == plan.draws > 0
