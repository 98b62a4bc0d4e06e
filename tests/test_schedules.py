"""Schedules against the closed forms, the papers' numbers and diffusers."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fastdiff.process import predictions, schedules
from fastdiff.process.clocks import CLEAN, DiscreteSchedule, Level, Schedule

EVERY: list[Callable[[], Schedule]] = [
    schedules.linear,
    schedules.scaled_linear,
    schedules.quadratic,
    schedules.cosine,
    schedules.ou,
    schedules.vp,
    schedules.sub_vp,
    schedules.ve,
    schedules.edm,
    schedules.rectified_flow,
    lambda: schedules.linear(7, 0.05, 0.4),
    lambda: schedules.from_betas([0.1, 0.2, 0.3]),
    lambda: schedules.from_alpha_bar([0.9, 0.5, 0.1, 0.0]),
    lambda: schedules.rescale_zero_terminal_snr(schedules.scaled_linear()),
    lambda: schedules.time_shared(schedules.scaled_linear()),
]
every = pytest.mark.parametrize("make", EVERY, ids=lambda make: repr(make()))


def interior(schedule: Schedule, count: int = 401) -> np.ndarray:
    low, high = schedule.time_range
    return low + (high - low) * np.linspace(0, 1, count + 2)[1:-1]


@pytest.mark.parametrize("make", EVERY)
def test_both_scales_at_once_are_alpha_and_sigma(make: Callable[[], Schedule]) -> None:
    schedule = make()
    times = np.linspace(*schedule.time_range, 7)
    for got, want in zip(schedule.scales_at(times), (schedule.alpha(times), schedule.sigma(times)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_whole_indices_beside_others_and_alone_are_the_same_levels() -> None:
    schedule = schedules.linear()
    whole = np.array([0.0, 7.0, 998.0, 999.0])
    assert schedule.rho(whole)[1] == np.sqrt(np.expm1(-schedule.log_alpha_bar[7]))
    np.testing.assert_array_equal(schedule.rho(np.append(whole, 7.5))[:-1], schedule.rho(whole))


def test_golden_alpha_bar() -> None:
    linear, cosine, quadratic = schedules.linear(), schedules.cosine(), schedules.quadratic()
    assert linear.alpha_bar(999) == pytest.approx(4.036e-5, rel=2e-4)
    assert linear.alpha(999) == pytest.approx(6.35e-3, rel=1e-3)
    assert cosine.betas[0] == pytest.approx(4.128e-5, rel=2e-4)
    assert cosine.alpha_bar(499) == pytest.approx(0.49384, rel=2e-5)
    assert cosine.alpha_bar(999) == pytest.approx(2.43e-9, rel=2e-3)
    assert cosine.betas[-1] == pytest.approx(0.999, rel=1e-12)
    assert quadratic.alpha_bar(999) == pytest.approx(7.33e-4, rel=1e-3)


def test_golden_elbo_weights() -> None:
    """beta/(2 alpha (1 - alpha_bar)) of the linear schedule with sigma^2 = beta."""
    schedule = schedules.linear()
    beta = schedule.betas
    weight = beta / (2 * (1 - beta) * (1 - schedule.alpha_bar(np.arange(1000))))
    assert weight[[0, 1, 499, 999]] == pytest.approx([0.50005, 0.2727, 0.005503, 0.010204], rel=2e-4)


@pytest.mark.parametrize(
    ("schedule", "config"),
    [
        (schedules.linear(), {"beta_schedule": "linear"}),
        (
            schedules.scaled_linear(),
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        ),
        (schedules.quadratic(), {"beta_schedule": "scaled_linear"}),
        (schedules.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
        (
            schedules.linear(50, 1e-3, 0.3),
            {"beta_schedule": "linear", "beta_start": 1e-3, "beta_end": 0.3, "num_train_timesteps": 50},
        ),
    ],
    ids=lambda value: repr(value),
)
def test_betas_equal_diffusers(schedule: DiscreteSchedule, config: dict[str, object]) -> None:
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DDPMScheduler(**config)
    np.testing.assert_allclose(schedule.betas, peer.betas.double().numpy(), rtol=1e-6)
    steps = np.arange(schedule.steps)
    # diffusers multiplies T numbers near 1 in fp32
    np.testing.assert_allclose(schedule.alpha_bar(steps), peer.alphas_cumprod.double().numpy(), rtol=1e-4)
    exact = np.cumprod(1 - peer.betas.double().numpy())
    np.testing.assert_allclose(schedule.alpha_bar(steps), exact, rtol=2e-5)


@pytest.mark.parametrize("base", [schedules.linear(), schedules.scaled_linear(), schedules.cosine()], ids=repr)
def test_zero_terminal_snr_equals_diffusers(base: DiscreteSchedule) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    ours = schedules.rescale_zero_terminal_snr(base)
    peer = rescale_zero_terminal_snr(torch.tensor(base.betas, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(ours.betas, peer, rtol=1e-9)
    assert ours.alpha(999) == 0 and ours.sigma(999) == 1 and ours.rho_max == math.inf
    assert ours.alpha_bar(0) == pytest.approx(base.alpha_bar(0), rel=1e-15)
    assert ours.level(999).lam == -math.inf


def test_zero_terminal_snr_keeps_a_schedule_that_has_it() -> None:
    once = schedules.rescale_zero_terminal_snr(schedules.linear())
    twice = schedules.rescale_zero_terminal_snr(once)
    steps = np.arange(1000)
    np.testing.assert_allclose(twice.alpha(steps), once.alpha(steps), rtol=1e-13)


def test_zero_terminal_snr_between_the_last_two_indices() -> None:
    """1/rho = alpha/sigma is linear there, and log rho is linear everywhere else."""
    schedule = schedules.rescale_zero_terminal_snr(schedules.linear())
    inverse = 1 / schedule.rho([998, 998.25, 998.75])
    assert inverse == pytest.approx(inverse[0] * np.array([1, 0.75, 0.25]), rel=1e-13)
    assert float(schedule.time_from_rho(1 / inverse[2])) == pytest.approx(998.75, abs=1e-9)
    assert float(schedule.time_from_rho(math.inf)) == 999
    assert float(schedule.rho(10.5)) == pytest.approx(math.sqrt(schedule.rho(10) * schedule.rho(11)), rel=1e-14)


def test_one_step_kernels_compose_to_the_marginal() -> None:
    schedule = schedules.cosine()
    mean, variance = 1.0, 0.0
    for step, beta in enumerate(schedule.betas):
        mean, variance = mean * math.sqrt(1 - beta), variance * (1 - beta) + beta
        level = schedule.level(step)
        assert level.alpha == pytest.approx(mean, rel=1e-11)
        assert level.sigma**2 == pytest.approx(variance, rel=1e-11)


def test_betas_round_trip_through_the_sums() -> None:
    betas = np.array([1e-9, 1e-4, 0.3, 0.999, 1.0])
    schedule = schedules.from_betas(betas)
    np.testing.assert_allclose(schedule.betas, betas, rtol=1e-9)
    assert schedule.sigma(0) == pytest.approx(math.sqrt(1e-9), rel=1e-13)  # no cancellation in 1 - alpha_bar
    again = schedules.from_alpha_bar(schedule.alpha_bar(np.arange(5)))
    np.testing.assert_allclose(again.alpha(np.arange(5)), schedule.alpha(np.arange(5)), rtol=1e-12)


def test_ou_is_exp_and_composes() -> None:
    schedule = schedules.ou()
    t, h = np.meshgrid(np.linspace(0, 2.5, 26), np.linspace(0, 2.5, 26))
    np.testing.assert_allclose(schedule.alpha(t), np.exp(-t), rtol=1e-13)
    np.testing.assert_allclose(schedule.sigma(t) ** 2, -np.expm1(-2 * t), rtol=1e-12)
    # N(exp(-h) Y, 1 - exp(-2h)) after time t is the level at t + h
    np.testing.assert_allclose(schedule.alpha(t) * schedule.alpha(h), schedule.alpha(t + h), rtol=1e-12)
    variance = schedule.alpha(h) ** 2 * schedule.sigma(t) ** 2 + schedule.sigma(h) ** 2
    np.testing.assert_allclose(variance, schedule.sigma(t + h) ** 2, rtol=1e-12)


def test_closed_forms_of_the_continuous_schedules() -> None:
    t = np.linspace(0.01, 1, 100)
    np.testing.assert_allclose(schedules.vp().rho(t), np.sqrt(np.exp(19.9 * t**2 / 2 + 0.1 * t) - 1), rtol=1e-12)
    np.testing.assert_allclose(schedules.ve().sigma(t), 0.01 * 5000**t, rtol=1e-13)
    np.testing.assert_array_equal(schedules.edm().sigma(t), t)
    np.testing.assert_array_equal(schedules.rectified_flow().alpha(t), 1 - t)
    np.testing.assert_array_equal(schedules.rectified_flow().sigma(t), t)
    assert schedules.ve(0.02, 100).time_range == (0, 1)
    assert schedules.edm().time_range == (0.002, 80)


def test_sub_vp_has_the_signal_of_vp_and_less_noise() -> None:
    """Song et al. 2021, eq. 29: alpha = exp(-B/2), sigma = 1 - exp(-B), where B(t) = 19.9 t^2/2 + 0.1 t."""
    vp, sub = schedules.vp(), schedules.sub_vp()
    t = np.linspace(1e-5, 1, 101)
    np.testing.assert_allclose(sub.alpha(t), vp.alpha(t), rtol=1e-13)
    np.testing.assert_allclose(sub.sigma(t), vp.sigma(t) ** 2, rtol=1e-13)
    np.testing.assert_allclose(sub.sigma(t), -np.expm1(-(9.95 * t + 0.1) * t), rtol=1e-13)
    np.testing.assert_allclose(sub.diffusion(t) ** 2, vp.diffusion(t) ** 2 * -np.expm1(-2 * (9.95 * t + 0.1) * t))
    np.testing.assert_array_equal(sub.drift(t), vp.drift(t))
    assert [float(scale) for scale in sub.scales(np.inf)] == [0.0, 1.0] and sub.level(0.0) == CLEAN


def test_edm_levels_above_the_top_keep_their_own_time() -> None:
    """Churn leads above sigma_max, and a network is shown sigma there as anywhere else."""
    schedule = schedules.edm(0.002, 80.0)
    assert schedule.level_from_rho(113.0, clip=True) == Level(1.0, 113.0, 113.0)
    with pytest.raises(ValueError, match="outside"):
        schedule.level_from_rho(113.0)
    shared = schedules.time_shared(schedule, below=4.0, parts=2)
    for process, rho, time in ((schedule, 113.0, 113.0), (shared, 113.0, 113.0), (shared, 3.0, 2.001)):
        fold = predictions.coefficients("x0", process.level_from_rho(rho, clip=True), process)
        assert fold.time == pytest.approx(time, rel=1e-15)
    churned = schedules.vp().level_from_rho(1e4, clip=True)
    assert predictions.coefficients("x0", churned, schedules.vp()).time == 1.0


def test_vp_is_the_limit_of_linear() -> None:
    """beta(t)/T per step is the linear schedule with ends beta_min/T and (beta_min + beta_d)/T, up to O(1/T)."""
    vp = schedules.vp()
    errors = []
    for steps in (1000, 10000):
        t = np.arange(steps)
        discrete = schedules.linear(steps, 0.1 / steps, 20 / steps)
        errors.append(np.abs(discrete.alpha(t) - vp.alpha((t + 1) / steps)).max())
    assert errors[0] < 2e-3
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.05)


@every
def test_coordinates_follow_the_kind(make: Callable[[], Schedule]) -> None:
    schedule = make()
    t = np.append(interior(schedule), schedule.time_range)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    constraint = {"vp": np.hypot(alpha, sigma), "ve": alpha, "flow": alpha + sigma, "sub_vp": alpha**2 + sigma}
    constraint = constraint[schedule.kind]
    np.testing.assert_allclose(constraint, 1, rtol=1e-14)
    inside = alpha > 0
    np.testing.assert_allclose((sigma / np.where(inside, alpha, 1))[inside], schedule.rho(t)[inside], rtol=1e-13)
    assert np.all(np.diff(schedule.rho(np.sort(t))) > 0)


@every
def test_time_from_rho_inverts_rho(make: Callable[[], Schedule]) -> None:
    schedule = make()
    t = interior(schedule, 997)
    span = schedule.time_range[1] - schedule.time_range[0]
    np.testing.assert_allclose(schedule.time_from_rho(schedule.rho(t)), t, atol=1e-10 * span)
    low, high = schedule.time_range
    assert float(schedule.time_from_rho(schedule.rho_min)) == low
    assert float(schedule.time_from_rho(schedule.rho_max)) == pytest.approx(high, rel=1e-15)


@every
def test_levels_agree_with_the_vectors(make: Callable[[], Schedule]) -> None:
    schedule = make()
    for t in interior(schedule, 11):
        level = schedule.level(t)
        assert (level.alpha, level.sigma, level.time) == (schedule.alpha(t), schedule.sigma(t), t)
        assert level.lam == pytest.approx(float(schedule.lam(t)), rel=1e-11, abs=1e-13)
        back = schedule.level_from_rho(level.rho)
        assert (back.alpha, back.sigma) == pytest.approx((level.alpha, level.sigma), rel=1e-13)
        assert back.time == pytest.approx(t, rel=1e-9)
        assert schedule.model_time(t) == t or t < (schedule.shared or (0,))[0]
    assert schedule.level_from_rho(0.0) is CLEAN


@every
def test_scalars_and_arrays_give_the_same(make: Callable[[], Schedule]) -> None:
    schedule = make()
    t = interior(schedule, 6).reshape(2, 3)
    for method in (schedule.alpha, schedule.sigma, schedule.rho, schedule.lam):
        values = method(t)
        assert values.shape == (2, 3) and values.dtype == np.float64
        assert float(method(t[1, 2])) == values[1, 2]


def test_interpolated_time_equals_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    schedule = schedules.scaled_linear()
    log_sigmas = 0.5 * np.log(1 / schedule.alpha_bar(np.arange(1000)) - 1)
    rhos = np.geomspace(0.03, 14.6, 77)
    np.testing.assert_allclose(schedule.time_from_rho(rhos), peer._sigma_to_t(rhos, log_sigmas), atol=1e-8)


@pytest.mark.parametrize(
    "make",
    [schedules.ou, schedules.vp, schedules.sub_vp, schedules.ve, schedules.edm, schedules.rectified_flow],
    ids=lambda f: f.__name__,
)
def test_sde_moves_the_marginals(make: Callable[[], Schedule]) -> None:
    """d alpha/dt = f alpha and d sigma^2/dt = 2 f sigma^2 + g^2, by central differences."""
    schedule = make()
    low, high = schedule.time_range
    t = low + (high - low) * np.linspace(0.05, 0.95, 19)
    h = 1e-5 * (high - low)
    f, g = schedule.drift(t), schedule.diffusion(t)
    slope = (schedule.alpha(t + h) - schedule.alpha(t - h)) / (2 * h)
    np.testing.assert_allclose(slope, f * schedule.alpha(t), rtol=1e-6, atol=1e-12)
    slope = (schedule.sigma(t + h) ** 2 - schedule.sigma(t - h) ** 2) / (2 * h)
    np.testing.assert_allclose(slope, 2 * f * schedule.sigma(t) ** 2 + g**2, rtol=1e-6, atol=1e-7)


@every
def test_json_round_trip_is_exact(make: Callable[[], Schedule]) -> None:
    schedule = make()
    again = Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert again == schedule and hash(again) == hash(schedule) and type(again) is type(schedule)
    t = interior(schedule, 50)
    np.testing.assert_array_equal(again.rho(t), schedule.rho(t))


def test_equality_and_repr() -> None:
    assert schedules.linear() == schedules.get("linear") != schedules.linear(beta_max=0.03)
    assert schedules.linear() != schedules.quadratic()
    assert len({schedules.vp(), schedules.vp(), schedules.ou()}) == 2
    assert len(repr(schedules.from_betas(np.full(1000, 0.01)))) < 80
    with pytest.raises(AttributeError):
        schedules.vp().t_max = 2.0  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        schedules.linear().log_alpha_bar[0] = 0


def test_level_ends() -> None:
    assert (CLEAN.rho, CLEAN.lam) == (0, math.inf)
    noise = Level(alpha=0.0, sigma=1.0)
    assert (noise.rho, noise.lam) == (math.inf, -math.inf) and math.isnan(noise.time)
    flow = schedules.rectified_flow()
    assert (flow.rho_min, flow.rho_max) == (0, math.inf)
    assert flow.level_from_rho(math.inf) == flow.level(1.0) == Level(0.0, 1.0, 1.0)
    assert flow.level(0.0) == CLEAN
    assert schedules.vp().level(0.0) == CLEAN


def test_fp32_ends_are_snapped_and_beyond_can_be_clipped() -> None:
    schedule = schedules.linear()
    top = float(np.float32(schedule.rho_max) * np.float32(1 + 2e-7))
    assert float(schedule.time_from_rho(top)) == 999
    churned = schedule.level_from_rho(200.0, clip=True)
    assert churned.time == 999 and churned.rho == pytest.approx(200, rel=1e-14)


def test_betas_as_a_tensor() -> None:
    betas = torch.linspace(1e-4, 0.02, 10, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert schedules.from_betas(betas) == schedules.from_betas(betas.tolist())
        kept = torch.cumprod(1 - betas, 0)
        assert schedules.from_alpha_bar(kept) == schedules.from_alpha_bar(kept.tolist())


def test_single_step_schedule() -> None:
    schedule = schedules.from_betas([0.3])
    assert schedule.level(0).alpha == pytest.approx(math.sqrt(0.7), rel=1e-15)
    assert float(schedule.time_from_rho(schedule.rho_max)) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedules.get("linaer"), "linear"),
        (lambda: schedules.get(None), "schedule"),
        (lambda: schedules.get("linear", beta_end=0.1), "beta_max"),
        (lambda: schedules.linear(0), "steps must be an integer of at least 1, got 0"),
        (lambda: schedules.linear(True), "steps"),
        (lambda: schedules.linear(10.5), "steps"),
        (lambda: schedules.linear(beta_max=1.5), "position 6"),
        (lambda: schedules.linear(beta_min=float("nan")), "beta_min"),
        (lambda: schedules.cosine(s=None), "s must be"),
        (lambda: schedules.from_betas([0.1, 0.0, 0.2]), "position 1"),
        (lambda: schedules.from_betas([0.1, 1.0, 0.2]), "position 2"),
        (lambda: schedules.from_betas([0.1, float("nan")]), "position 1"),
        (lambda: schedules.from_betas([]), "at least one"),
        (lambda: schedules.from_betas([[0.1, 0.2]]), r"shape \(1, 2\)"),
        (lambda: schedules.from_betas(0.1), r"shape \(\)"),
        (lambda: schedules.from_alpha_bar([0.9, 0.95]), "position 1"),
        (lambda: schedules.from_alpha_bar([1.0, 0.5]), "position 0"),
        (lambda: schedules.from_alpha_bar([0.5, -0.1]), "position 1"),
        (lambda: schedules.edm(80, 0.002), "below"),
        (lambda: schedules.ve(0, 50), "sigma_min"),
        (lambda: schedules.ou(400), "overflow"),
        (lambda: schedules.rescale_zero_terminal_snr(schedules.vp()), "discrete"),
        (lambda: schedules.linear().alpha(1000), "from 0 to 999"),
        (lambda: schedules.linear().level(float("nan")), "nan"),
        (lambda: schedules.linear().time_from_rho(158.0), "from 0.0100005 to 157.407"),
        (lambda: schedules.linear().time_from_rho(0.0), "outside"),
        (lambda: schedules.linear().time_from_rho(float("nan"), clip=True), "nan"),
        (lambda: schedules.vp().time_from_rho(math.inf), "outside"),
        (lambda: schedules.ve().alpha_bar(0.5), "vp"),
        (lambda: schedules.linear().drift(3), "discrete"),
        (lambda: Schedule.from_dict({"name": "linear"}), "to_dict"),
        (lambda: Schedule.from_dict([]), "to_dict"),  # type: ignore[arg-type]
        (lambda: Schedule.from_dict({"name": "linear", "options": {"steps": "1000"}}), "steps"),
        (lambda: Schedule.from_dict({"name": "linear", "options": {"name": "cosine"}}), "name"),
        (lambda: Schedule.from_dict({"name": "rescale_zero_terminal_snr", "options": {"schedule": 3}}), "discrete"),
    ],
)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_names_are_constructors() -> None:
    assert set(schedules.names()) >= {"linear", "scaled_linear", "quadratic", "cosine", "ou", "vp", "ve", "edm"}
    assert all(callable(getattr(schedules, name)) for name in schedules.names())
