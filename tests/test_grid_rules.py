"""The grids by published rules, against their formulas, diffusers and k-diffusion."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from peers import k_diffusion_sampling

from fastdiff.process import grids, schedules
from fastdiff.process.grid_rules import AYS, beta_quantile

EDM = schedules.edm(0.01, 80.0)
FLOW = schedules.rectified_flow()
LINEAR = schedules.linear()


@pytest.mark.parametrize("steps", [2, 3, 10, 50])
@pytest.mark.parametrize("rho", [0.5, 1.0, 2.0])
def test_polyexponential(rho: float, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = grids.make("polyexponential", EDM, steps, rho=rho)
    ramp = np.linspace(1, 0, steps) ** rho
    np.testing.assert_allclose(ours, 0.01 * (80.0 / 0.01) ** ramp, rtol=1e-12)
    if rho == 1.0:
        np.testing.assert_allclose(ours, grids.make("exponential", EDM, steps), rtol=1e-12)
    theirs = k_diffusion_sampling(monkeypatch).get_sigmas_polyexponential(steps, 0.01, 80.0, rho)
    np.testing.assert_allclose(ours, theirs[:-1], rtol=1e-5)


@pytest.mark.parametrize("steps", [2, 3, 10, 50])
def test_vp(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the levels of t = 1 and t = 1e-3 it is k-diffusion's, and on vp() it is uniform in its clock."""
    schedule = schedules.vp()
    high, low = (float(schedule.rho(t)) for t in (1.0, 1e-3))
    ours = grids.make("vp", schedule, steps, sigma_min=low, sigma_max=high)
    np.testing.assert_allclose(ours, np.linspace(1.0, 1e-3, steps), rtol=1e-9)
    theirs = k_diffusion_sampling(monkeypatch).get_sigmas_vp(steps)
    np.testing.assert_allclose(schedule.rho(ours), theirs[:-1], rtol=5e-4)  # their fp32 exp(.) - 1


def test_beta_is_the_published_example() -> None:
    expected = [999, 959, 876, 765, 637, 500, 362, 234, 123, 40]
    np.testing.assert_array_equal(grids.make("beta", LINEAR, 10), expected)
    unrounded = grids.make("beta", schedules.linear(20, 1e-3, 0.3), 15)
    assert len(unrounded) == 15 and not np.array_equal(unrounded, np.rint(unrounded))


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (0.5, 0.5), (2.0, 3.0), (0.8, 1.7)])
def test_beta_quantile(a: float, b: float) -> None:
    """Against closed forms (arcsine law, polynomials), symmetry, and the distribution by quadrature."""
    ranks = np.linspace(0.0, 1.0, 41)
    x = beta_quantile(ranks, a, b)
    assert (x[0], x[-1]) == (0.0, 1.0) and np.all(np.diff(x) > 0)
    np.testing.assert_allclose(x, 1.0 - beta_quantile(1.0 - ranks, b, a), atol=1e-12)
    if (a, b) == (0.5, 0.5):
        np.testing.assert_allclose(x, np.sin(0.5 * np.pi * ranks) ** 2, atol=1e-12)
    if (a, b) == (2.0, 3.0):
        np.testing.assert_allclose(6 * x**2 - 8 * x**3 + 3 * x**4, ranks, atol=1e-12)
    # u = t^a flattens the density's pole at 0; its other one is beyond x <= 1/2
    points, weights = np.polynomial.legendre.leggauss(200)
    scale = math.gamma(a + b) / (math.gamma(a) * math.gamma(b))
    for rank, end in zip(ranks, x, strict=True):
        if 0.0 < end <= 0.5:
            u = 0.5 * end**a * (points + 1.0)
            inside = 0.5 * end**a / a * float(weights @ (1.0 - u ** (1.0 / a)) ** (b - 1.0))
            assert scale * inside == pytest.approx(rank, rel=1e-6)


def test_beta_sigma() -> None:
    """sigma_min + ppf(1 - i/(N-1)) (sigma_max - sigma_min): both ends, crowded at both."""
    ours = grids.make("beta_sigma", EDM, 11)
    np.testing.assert_allclose(ours, 0.01 + 79.99 * beta_quantile(np.linspace(1, 0, 11), 0.6, 0.6), rtol=1e-12)
    assert ours[5] == pytest.approx(0.5 * (80.0 + 0.01))


@pytest.mark.parametrize("steps", [5, 20, 1000])
def test_laplace(steps: int) -> None:
    """Even quantiles: the law's distribution function of the levels is uniform; symmetric about mu."""
    levels = np.log(grids.make("laplace", EDM, steps, mu=0.3, b=0.7))
    z = (levels - 0.3) / 0.7
    ranks = np.where(z < 0, 0.5 * np.exp(z), 1 - 0.5 * np.exp(-z))
    np.testing.assert_allclose(np.diff(ranks, 2), 0.0, atol=1e-12)
    wide = np.log(grids.make("laplace", schedules.edm(1e-9, 1e9), 21))
    x = np.linspace(0, 1, 21)[1:-1]
    published = -0.5 * np.sign(0.5 - x) * np.log(1 - 2 * np.abs(x - 0.5))
    np.testing.assert_allclose(wide[1:-1], published, atol=1e-6)


def mochi(steps: int, threshold: float) -> list[float]:
    """1 - s_i: a line of steps // 2 points to the threshold, then the parabola through it that ends at 1, C1 there."""
    n = steps // 2
    slope = threshold / n
    levels = [i * slope for i in range(n)]
    # c i^2 + d i + e: value threshold at n, value 1 at N, and e = c n^2
    matrix = [[n**2 + n**2, n], [steps**2 + n**2, steps]]
    c, d = np.linalg.solve(matrix, [threshold, 1.0])
    levels += [c * i**2 + d * i + c * n**2 for i in range(n, steps)]
    return [1.0 - s for s in levels]


@pytest.mark.parametrize("steps", [2, 3, 10, 64])
def test_linear_quadratic(steps: int) -> None:
    for threshold in (0.025, 0.1):
        ours = grids.make("linear_quadratic", FLOW, steps, threshold=threshold)
        np.testing.assert_allclose(ours, mochi(steps, threshold), rtol=1e-10)


def test_kl_optimal() -> None:
    ours = grids.make("kl_optimal", EDM, 12)
    np.testing.assert_allclose(np.diff(np.arctan(ours), 2), 0.0, atol=1e-12)
    assert (ours[0], ours[-1]) == (80.0, 0.01)
    np.testing.assert_array_equal(grids.make("kl_optimal", EDM, 1), [80.0])


def test_quadratic() -> None:
    ours = grids.make("quadratic", LINEAR, 20)
    np.testing.assert_allclose(ours, np.linspace(999**0.5, 0, 20) ** 2, atol=1e-9)
    eight = grids.make("quadratic", LINEAR, 20, top=0.8)
    np.testing.assert_allclose(eight, np.linspace((0.8 * 999) ** 0.5, 0, 20) ** 2, atol=1e-9)


def test_the_rules_on_indices() -> None:
    np.testing.assert_array_equal(grids.make("simple", LINEAR, 7), [999 - int(i * 1000 / 7) for i in range(7)])
    np.testing.assert_allclose(grids.make("normal", LINEAR, 7), np.linspace(999, 0, 7))
    np.testing.assert_allclose(grids.make("sgm_uniform", LINEAR, 7), np.linspace(999, 0, 8)[:-1])
    np.testing.assert_array_equal(grids.make("ddim_uniform", LINEAR, 20), np.arange(951, 0, -50))
    np.testing.assert_array_equal(
        grids.make("ddim_uniform", LINEAR, 20), grids.make("leading", LINEAR, 20, steps_offset=1)
    )
    np.testing.assert_array_equal(grids.make("simple", FLOW, 6), grids.make("trailing", FLOW, 6))


def test_ays_tables_are_those_of_diffusers() -> None:
    pytest.importorskip("diffusers")
    from diffusers.schedulers import AysSchedules

    names = {"sd15": "StableDiffusionSigmas", "sdxl": "StableDiffusionXLSigmas", "svd": "StableDiffusionVideoSigmas"}
    for model, name in names.items():
        assert [*AYS[model], 0.0] == AysSchedules[name]


@pytest.mark.parametrize("model", list(AYS))
def test_ays(model: str) -> None:
    schedule = schedules.edm(0.002, 700.0) if model == "svd" else schedules.scaled_linear()
    table = np.array(AYS[model])
    rhos = schedule.rho(grids.make("ays", schedule, 10, model=model))
    np.testing.assert_allclose(rhos[1:], table[1:], rtol=1e-10)
    assert rhos[0] == schedule.rho_max == pytest.approx(table[0], rel=1e-3)
    longer = schedule.rho(grids.make("ays", schedule, 19, model=model))
    np.testing.assert_allclose(longer[2::2], table[1:], rtol=1e-9)
    np.testing.assert_allclose(longer[3::2], np.sqrt(table[1:-1] * table[2:]), rtol=1e-9)
    assert grids.make("ays", schedule, 1, model=model) == [schedule.time_range[1]]


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.5])
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_flow_shift_is_diffusers(steps: int, shift: float) -> None:
    """Pipelines give diffusers the uniform sigmas linspace(1, 1/N, N)."""
    diffusers = pytest.importorskip("diffusers")
    uniform = np.linspace(1.0, 1.0 / steps, steps)
    peer = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    peer.set_timesteps(sigmas=uniform.tolist())
    np.testing.assert_allclose(grids.make("flow_shift", FLOW, steps, shift=shift), peer.sigmas[:-1], rtol=1e-6)
    peer = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=None)
    mu = 0.5 + (1024 - 256) * (1.15 - 0.5) / (4096 - 256)
    peer.set_timesteps(sigmas=uniform.tolist(), mu=mu)
    np.testing.assert_allclose(grids.make("flow_shift", FLOW, steps, tokens=1024), peer.sigmas[:-1], rtol=1e-6)
    if steps > 1:  # with one step diffusers divides by 0 here
        peer = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, shift_terminal=0.1)
        peer.set_timesteps(sigmas=uniform.tolist())
        ours = grids.make("flow_shift", FLOW, steps, shift=shift, terminal=0.1)
        np.testing.assert_allclose(ours, peer.sigmas[:-1], rtol=1e-6, atol=1e-7)
        assert ours[-1] == pytest.approx(0.1)


def test_flow_shift_with_one_step_has_nothing_to_stretch() -> None:
    np.testing.assert_array_equal(grids.make("flow_shift", FLOW, 1, terminal=0.1), [1.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grids.make("quadratic", LINEAR, 5, top=0.0), "top"),
        (lambda: grids.make("polyexponential", EDM, 5, rho=-1.0), "rho must be"),
        (lambda: grids.make("vp", EDM, 5, beta_d=0.0), "beta_d"),
        (lambda: grids.make("beta", EDM, 5, a=0.0), "a must be"),
        (lambda: grids.make("laplace", EDM, 5, b=0.0), "b must be"),
        (lambda: grids.make("linear_quadratic", FLOW, 5, threshold=1.5), "threshold"),
        (lambda: grids.make("linear_quadratic", FLOW, 5, linear_steps=5), "linear_steps must be"),
        (lambda: grids.make("kl_optimal", EDM, 5, sigma_min=5.0, sigma_max=1.0), "sigma_min < sigma_max"),
        (lambda: grids.make("ays", EDM, 10), "Align Your Steps has no levels for edm.*14.615"),
        (lambda: grids.make("ays", EDM, 10, model="sd3"), "model must be one of sd15"),
        (lambda: grids.make("flow_shift", EDM, 10), "flow_shift is for flow schedules"),
        (lambda: grids.make("flow_shift", FLOW, 10, shift=0.0), "shift must be"),
        (lambda: grids.make("flow_shift", FLOW, 10, terminal=1.0), "terminal"),
        (lambda: grids.make("simple", LINEAR, 1001), "at most 1000 steps"),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
