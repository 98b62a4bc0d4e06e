"""Predictions: P and Q against the definitions, the published tables, and each other."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastdiff.process import predictions, schedules
from fastdiff.process.clocks import CLEAN, Level, Schedule
from fastdiff.process.predictions import coefficients, convert

KINDS = ("eps", "x0", "v", "score", "flow")
SCHEDULES = [schedules.linear(), schedules.ou(), schedules.ve(), schedules.edm(), schedules.rectified_flow()]
rng = np.random.default_rng(7)
X0, N = rng.standard_normal((2, 64))


def truth(level: Level) -> dict[str, np.ndarray]:
    """Each prediction straight from its definition."""
    return {
        "x0": X0,
        "eps": N,
        "v": level.alpha * N - level.sigma * X0,
        "score": -N / level.sigma,
        "flow": N - X0,
    }


def levels(schedule: Schedule) -> list[Level]:
    low, high = schedule.time_range
    return [schedule.level(low + (high - low) * f) for f in (0.02, 0.3, 0.5, 0.9, 0.99)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_coefficients_recover_x0(schedule: Schedule, kind: str) -> None:
    for level in levels(schedule):
        x = level.alpha * X0 + level.sigma * N
        got = coefficients(kind, level, schedule)
        error = np.abs(got.P * x + got.Q * truth(level)[kind] - X0)
        assert error.max() < 1e-13 * max(1, level.rho) * 10
        assert (got.c_in, got.time) == (1, level.time)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_published_coefficients(schedule: Schedule) -> None:
    for level in levels(schedule):
        a, s = level.alpha, level.sigma

        def pair(kind: str, level: Level = level) -> tuple[float, float]:
            got = coefficients(kind, level, schedule)
            return got.P, got.Q

        assert pair("eps") == pytest.approx((1 / a, -s / a), rel=1e-14)
        assert pair("x0") == (0, 1)
        assert pair("score") == pytest.approx((1 / a, s * s / a), rel=1e-14)
        if schedule.kind == "vp":
            assert pair("v") == pytest.approx((a, -s), rel=1e-13)
        if schedule.kind == "flow":
            assert pair("flow") == pytest.approx((1, -s), rel=1e-13)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_conversions_are_the_definitions_and_round_trip(schedule: Schedule, source: str, target: str) -> None:
    for level in levels(schedule):
        x = level.alpha * X0 + level.sigma * N
        known = truth(level)
        there = convert(known[source], x, level, source, target)
        scale = max(level.rho, 1 / level.rho) * (1 + 1 / level.sigma)
        np.testing.assert_allclose(there, known[target], atol=1e-14 * scale, rtol=1e-12)
        back = convert(there, x, level, target, source)
        np.testing.assert_allclose(back, known[source], atol=1e-14 * scale, rtol=1e-12)


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_round_trips_to_1e12_on_flow_and_vp(source: str, target: str) -> None:
    for schedule in (schedules.ou(), schedules.rectified_flow()):
        for fraction in (0.1, 0.3, 0.5, 0.7):
            level = schedule.level(fraction)
            x = level.alpha * X0 + level.sigma * N
            value = truth(level)[source]
            back = convert(convert(value, x, level, source, target), x, level, target, source)
            np.testing.assert_allclose(back, value, rtol=1e-12, atol=1e-12)


def test_the_three_ddpm_means_are_equal() -> None:
    """Feeding x0, eps or the score of one sample gives the same x0, so the same posterior mean."""
    schedule = schedules.linear()
    for t in (0, 1, 499, 999):
        level = schedule.level(t)
        x = level.alpha * X0 + level.sigma * N
        got = [
            coefficients(kind, level, schedule).P * x + coefficients(kind, level, schedule).Q * truth(level)[kind]
            for kind in KINDS
        ]
        for value in got[1:]:
            np.testing.assert_allclose(value, got[0], atol=1e-12)


@pytest.mark.parametrize("sigma", [0.002, 0.3, 0.5, 2.0, 80.0])
@pytest.mark.parametrize("sigma_data", [None, 0.5, 1.0])
def test_edm_equals_table_1(sigma: float, sigma_data: float | None) -> None:
    d = sigma_data or 0.5
    got = coefficients("edm", schedules.edm().level(sigma), schedules.edm(), sigma_data)
    assert pytest.approx(d**2 / (sigma**2 + d**2), rel=1e-14) == got.P
    assert pytest.approx(sigma * d / math.sqrt(sigma**2 + d**2), rel=1e-14) == got.Q
    assert got.c_in == pytest.approx(1 / math.sqrt(sigma**2 + d**2), rel=1e-14)
    assert got.time == pytest.approx(math.log(sigma) / 4, rel=1e-14, abs=1e-16)
    # unit variance of the input and of the target, for data of standard deviation sigma_data (eqs. 114 and 121)
    assert got.c_in**2 * (sigma**2 + d**2) == pytest.approx(1, rel=1e-14)
    assert ((1 - got.P) ** 2 * d**2 + got.P**2 * sigma**2) / got.Q**2 == pytest.approx(1, rel=1e-12)


def test_edm_equals_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    peer = diffusers.EDMEulerScheduler()
    x, f = torch.tensor(X0), torch.tensor(N)
    for sigma in (0.01, 0.7, 30.0):
        got = coefficients("edm", schedules.edm().level(sigma), schedules.edm())
        np.testing.assert_allclose(got.P * X0 + got.Q * N, peer.precondition_outputs(x, f, sigma).numpy(), rtol=1e-12)
        np.testing.assert_allclose(got.c_in * X0, peer.precondition_inputs(x, sigma).numpy(), rtol=1e-12)


def test_edm_is_the_same_network_in_any_coordinates() -> None:
    vp = schedules.vp()
    for t in (0.05, 0.5, 1.0):
        level = vp.level(t)
        ours = coefficients("edm", level, vp)
        reference = coefficients("edm", Level(1.0, level.rho), schedules.edm(), 0.5)
        x = level.alpha * X0 + level.sigma * N
        np.testing.assert_allclose(ours.c_in * x, reference.c_in * x / level.alpha, rtol=1e-13)
        np.testing.assert_allclose(ours.P * x, reference.P * x / level.alpha, rtol=1e-13)
        assert (ours.Q, ours.time) == pytest.approx((reference.Q, reference.time), rel=1e-13)


@pytest.mark.parametrize("rho", [0.05, 1.0, 7.3, 100.0])
def test_vp_network_in_ve_coordinates(rho: float) -> None:
    """x/alpha as state: the published k-space columns, input scale 1/sqrt(rho^2 + 1) and the index as time."""
    schedule = schedules.linear()
    level = Level(1.0, rho)
    c_in = 1 / math.sqrt(rho**2 + 1)
    eps, v = coefficients("eps", level, schedule), coefficients("v", level, schedule)
    assert (eps.P, eps.Q, eps.c_in) == pytest.approx((1, -rho, c_in), rel=1e-13)
    assert (v.P, v.Q, v.c_in) == pytest.approx((1 / (rho**2 + 1), -rho * c_in, c_in), rel=1e-13)
    assert float(schedule.rho(eps.time)) == pytest.approx(rho, rel=1e-12)


def test_flow_network_in_vp_coordinates_gives_its_own_x0() -> None:
    flow, vp = schedules.rectified_flow(), schedules.vp()
    own = flow.level(0.4)
    alpha, sigma = (float(scale) for scale in vp.scales(own.rho))
    got = coefficients("flow", Level(alpha, sigma), flow)
    x = alpha * X0 + sigma * N
    np.testing.assert_allclose(got.c_in * x, own.alpha * X0 + own.sigma * N, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(got.P * x + got.Q * (N - X0), X0, atol=1e-13)
    assert got.time == pytest.approx(0.4, rel=1e-13)


def test_a_level_beyond_the_schedule_keeps_the_nearest_time() -> None:
    got = coefficients("eps", Level(1.0, 200.0), schedules.linear())
    assert got.time == 999 and pytest.approx(-200, rel=1e-13) == got.Q


def test_without_a_schedule_the_level_is_the_networks() -> None:
    got = coefficients("eps", Level(1.0, 3.0, 3.0), None)
    assert (got.P, got.Q, got.c_in, got.time) == (1, -3, 1, 3)
    assert math.isnan(coefficients("x0", Level(1.0, 3.0), None).time)


def test_zero_snr() -> None:
    zero = schedules.rescale_zero_terminal_snr(schedules.linear())
    flow = schedules.rectified_flow()
    for kind in ("eps", "score"):
        for schedule in (zero, flow):
            with pytest.raises(ValueError, match=r"zero signal-to-noise.*'v' or 'x0'.*does not start at zero SNR"):
                coefficients(kind, schedule.level(schedule.time_range[1]), schedule)
    v = coefficients("v", zero.level(999), zero)
    assert (v.P, v.Q, v.c_in, v.time) == (0, -1, 1, 999)
    x0 = coefficients("x0", zero.level(999), zero)
    assert (x0.P, x0.Q) == (0, 1)
    velocity = coefficients("flow", flow.level(1.0), flow)
    assert (velocity.P, velocity.Q, velocity.time) == (1, -1, 1)
    np.testing.assert_array_equal(convert(X0, N, zero.level(999), "x0", "eps"), N)
    with pytest.raises(ValueError, match="not finite"):
        coefficients("edm", zero.level(999), zero)
    with pytest.raises(ValueError, match="alpha = 0"):
        coefficients("v", zero.level(999), schedules.edm())


def test_sigma_zero() -> None:
    schedule = schedules.vp()
    assert [coefficients(kind, CLEAN, schedule).P for kind in KINDS] == [1, 0, 1, 1, 1]
    assert [coefficients(kind, CLEAN, schedule).Q for kind in KINDS] == [0, 1, 0, 0, 0]
    assert coefficients("v", CLEAN, schedules.edm()).time == 0.002
    np.testing.assert_array_equal(convert(N, X0, CLEAN, "eps", "x0"), X0)
    np.testing.assert_allclose(convert(N, X0, CLEAN, "eps", "flow"), N - X0)
    np.testing.assert_array_equal(convert(N, X0, CLEAN, "score", "score"), N)
    for source, target in (("x0", "eps"), ("x0", "v"), ("eps", "score"), ("v", "score")):
        with pytest.raises(ValueError, match="sigma = 0"):
            convert(X0, X0, CLEAN, source, target)
    with pytest.raises(ValueError, match="not finite"):
        coefficients("edm", CLEAN, schedules.edm())


def test_errors() -> None:
    schedule = schedules.linear()
    level = schedule.level(500)
    with pytest.raises(ValueError, match="eps"):
        coefficients("epsilon", level, schedule)
    with pytest.raises(ValueError, match="flow"):
        convert(X0, X0, level, "x0", "flo")
    with pytest.raises(ValueError, match="x0"):
        convert(X0, X0, level, "edm", "x0")
    with pytest.raises(ValueError, match="sigma_data belongs"):
        coefficients("eps", level, schedule, 0.5)
    for value in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="sigma_data must"):
            coefficients("edm", level, schedule, value)
    assert set(predictions.names()) == {*KINDS, "edm"}
