"""Grids against diffusers' timesteps and sigmas, their closed forms, and what they must refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastdiff.process import grids, schedules
from fastdiff.process.clocks import Schedule
from fastdiff.process.grid_rules import AYS

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SOME = ("custom", "ays", "flow_shift", "gits")  # those need more than steps, or a schedule of their own
NAMED = [name for name in grids.names() if name not in SOME]
LINEAR = schedules.linear()
ALL = [
    schedules.linear(),
    schedules.cosine(),
    schedules.rescale_zero_terminal_snr(schedules.scaled_linear()),
    schedules.ou(),
    schedules.vp(),
    schedules.ve(),
    schedules.edm(),
    schedules.rectified_flow(),
    schedules.linear(60, 1e-3, 0.3),
]


def rounded(peer: Any) -> Schedule:
    """The schedule with a diffusers scheduler's own fp32 alpha_bar."""
    return schedules.from_alpha_bar(peer.alphas_cumprod.double().numpy())


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_uniform_grids_equal_diffusers(spacing: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DDIMScheduler(timestep_spacing=spacing)
    for steps in range(2, 1001):
        peer.set_timesteps(steps)
        # trailing: diffusers sometimes gives one timestep too many, -1
        np.testing.assert_array_equal(grids.make(spacing, LINEAR, steps), peer.timesteps.numpy()[:steps])


def test_leading_with_an_offset_equals_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    peer.set_timesteps(20)
    ours = grids.make("leading", schedules.linear(), 20, steps_offset=1)
    np.testing.assert_array_equal(ours, peer.timesteps.numpy())
    with pytest.raises(ValueError, match="Level 0 of the grid is 1000"):
        grids.make("leading", schedules.linear(), 1000, steps_offset=1)


@pytest.mark.parametrize("name", ["karras", "exponential"])
@pytest.mark.parametrize("steps", [2, 3, 10, 20, 50])
def test_spaced_grids_equal_diffusers_euler(name: str, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.EulerDiscreteScheduler(**SD, **{f"use_{name}_sigmas": True})
    peer.set_timesteps(steps)
    # the peer's alpha_bar is an fp32 product, off by 1e-5: once with its own numbers, once with the exact ones
    for schedule, rtol, atol in ((rounded(peer), 1e-6, 1e-4), (schedules.scaled_linear(), 2e-5, 2e-3)):
        ours = grids.make(name, schedule, steps)
        np.testing.assert_allclose(schedule.rho(ours), peer.sigmas[:-1].double().numpy(), rtol=rtol)
        np.testing.assert_allclose(ours, peer.timesteps.double().numpy(), atol=atol)


@pytest.mark.parametrize("steps", [2, 3, 10, 20, 50])
def test_logsnr_equals_diffusers_lu_lambdas(steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DPMSolverMultistepScheduler(**SD, use_lu_lambdas=True)
    peer.set_timesteps(steps)
    for schedule, rtol in ((rounded(peer), 1e-6), (schedules.scaled_linear(), 2e-5)):
        ours = grids.make("logsnr", schedule, steps)
        np.testing.assert_allclose(schedule.rho(ours), peer.sigmas[:-1].double().numpy(), rtol=rtol)
        np.testing.assert_allclose(np.diff(schedule.lam(ours), 2), 0, atol=1e-12)
        np.testing.assert_array_equal(ours, grids.make("exponential", schedule, steps))


def test_karras_equals_the_paper_on_edm() -> None:
    i, n = np.arange(18), 18
    expected = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    times = grids.make("karras", schedules.edm(), n)
    np.testing.assert_allclose(times, expected, rtol=1e-13)
    assert (times[0], times[-1]) == (80, 0.002)
    assert times[1] == pytest.approx(57.586, rel=1e-4)
    other = grids.make("karras", schedules.edm(), n, sigma_min=0.1, sigma_max=10.0, rho=3.0)
    np.testing.assert_allclose(np.diff(other ** (1 / 3), 2), 0, atol=1e-13)
    assert (other[0], other[-1]) == (10, 0.1)


def test_exponential_is_geometric() -> None:
    schedule = schedules.cosine()
    rhos = schedule.rho(grids.make("exponential", schedule, 30))
    np.testing.assert_allclose(rhos[1:] / rhos[:-1], (schedule.rho_min / schedule.rho_max) ** (1 / 29), rtol=1e-10)


def test_flow_grids() -> None:
    schedule = schedules.rectified_flow()
    np.testing.assert_allclose(grids.make("trailing", schedule, 4), [1, 0.75, 0.5, 0.25])
    low = grids.RHO_FLOOR / (1 + grids.RHO_FLOOR)
    np.testing.assert_allclose(grids.make("linspace", schedule, 3), [1, (1 + low) / 2, low])
    np.testing.assert_allclose(grids.make("leading", schedule, 2), [(1 + low) / 2, low])


@pytest.mark.parametrize("schedule", [ALL[2], ALL[7]], ids=repr)
@pytest.mark.parametrize("name", ["karras", "exponential", "logsnr"])
def test_grids_that_start_at_alpha_0(schedule: Schedule, name: str) -> None:
    times = grids.make(name, schedule, 12)
    assert times[0] == schedule.time_range[1]
    finite = grids.make(name, schedule, 12, sigma_max=grids.RHO_CAP)
    np.testing.assert_array_equal(times[1:], finite[1:])
    assert schedule.rho(finite[0]) == pytest.approx(grids.RHO_CAP, rel=1e-11)
    assert np.all(np.isfinite(times))


@pytest.mark.parametrize("schedule", ALL, ids=repr)
@pytest.mark.parametrize("name", NAMED)
def test_every_grid_on_every_schedule(name: str, schedule: Schedule) -> None:
    low, high = schedule.time_range
    for steps in (1, 2, 3, 10, 20, 50):
        times = grids.make(name, schedule, steps)
        assert times.shape == (steps,) and times.dtype == np.float64
        assert np.all(np.diff(times) < 0) and low <= times[-1] and times[0] <= high
        assert schedule.rho(times[-1]) > 0
        if steps == 1 or name not in ("leading", "ddim_uniform"):
            assert times[0] == high
        if schedule.steps and name in ("leading", "trailing", "linspace"):
            np.testing.assert_array_equal(times, np.rint(times))


OTHERS = [
    schedules.scaled_linear(),
    schedules.quadratic(),
    schedules.edm(0.002, 700.0),
    schedules.edm(0.2, 14.615),
    schedules.from_betas(np.linspace(0.001, 0.4, 40)),
    schedules.from_betas([0.3]),
    schedules.time_shared(schedules.scaled_linear()),
]
# what a grid that is not for every schedule says where it has no levels
REASONS = {
    "ays": "Align Your Steps has no levels for",
    "flow_shift": "flow_shift is for flow schedules",
    "gits": "Grid gits is measured on a model, so it needs the file of its costs",
    "custom": "Grid custom: missing a required argument: 'levels'",
}


def has_levels(name: str, schedule: Schedule) -> bool:
    if name == "ays":
        return schedule.rho_min < 0.152 and abs(schedule.rho_max / 14.615 - 1) < 0.01
    return schedule.kind == "flow" if name == "flow_shift" else name in NAMED


@pytest.mark.parametrize("schedule", ALL + OTHERS, ids=repr)
@pytest.mark.parametrize("name", grids.names())
def test_a_grid_is_made_or_says_why_not(name: str, schedule: Schedule) -> None:
    for steps in (1, 2, 7, 33):
        if schedule.steps == 1 and steps > 1 and name != "custom":
            with pytest.raises(ValueError, match=f"has one level only.*got {steps}"):
                grids.make(name, schedule, steps)
        elif not has_levels(name, schedule):
            with pytest.raises(ValueError, match=REASONS[name]) as refusal:
                grids.make(name, schedule, steps)
            assert repr(schedule) in str(refusal.value) or name in ("gits", "custom")
        elif schedule.steps is not None and steps > schedule.steps and name in grids._ON_INDICES:
            with pytest.raises(ValueError, match=f"Grid {name} takes at most {schedule.steps} steps"):
                grids.make(name, schedule, steps)
        else:
            times = grids.make(name, schedule, steps)
            low, high = schedule.time_range
            assert times.shape == (steps,) and np.all(np.diff(times) < 0)
            assert low <= times[-1] and times[0] <= high and schedule.rho(times[-1]) > 0


@pytest.mark.parametrize("schedule", [s for s in ALL + OTHERS if s.steps != 1], ids=repr)
@pytest.mark.parametrize("model", ["sd15", "sdxl", "svd"])
def test_every_ays_table_on_every_schedule(model: str, schedule: Schedule) -> None:
    """The tables have a few schedules; elsewhere the error names both ends of the table and of the schedule."""
    first, last = AYS[model][0], AYS[model][-1]
    if abs(schedule.rho_max / first - 1) < 0.01 and schedule.rho_min <= last:
        rhos = schedule.rho(grids.make("ays", schedule, 10, model=model))
        np.testing.assert_allclose(rhos[1:], AYS[model][1:], rtol=1e-9)
        return
    ends = f"from sigma/alpha = {first:g} to {last:g}, this schedule from {schedule.rho_max:.6g} to"
    with pytest.raises(ValueError, match=ends):
        grids.make("ays", schedule, 10, model=model)


@pytest.mark.parametrize("steps", [2, 5, 20])
@pytest.mark.parametrize("schedule", ALL + OTHERS[:4], ids=repr)
def test_exponential_and_logsnr_are_one_grid(schedule: Schedule, steps: int) -> None:
    """log(sigma/alpha) = -lam, so uniform in one is uniform in the other, whatever the kind of the schedule."""
    times = grids.make("exponential", schedule, steps)
    np.testing.assert_array_equal(times, grids.make("logsnr", schedule, steps))
    inner = schedule.lam(times)[1 if math.isinf(schedule.rho_max) else 0 :]
    np.testing.assert_allclose(np.diff(inner, 2), 0, atol=1e-9)


def test_exponential_in_the_sigma_of_a_flow_is_another_grid() -> None:
    """diffusers spaces log(sigma) of a flow, sigma = t; ours is log(t/(1 - t)), and theirs can be given as custom."""
    diffusers = pytest.importorskip("diffusers")
    flow = schedules.rectified_flow()
    peer = diffusers.FlowMatchEulerDiscreteScheduler(use_exponential_sigmas=True)
    peer.set_timesteps(10)
    theirs = peer.sigmas[:-1].double().numpy()
    np.testing.assert_allclose(theirs[1:] / theirs[:-1], theirs[1] / theirs[0], rtol=1e-5)
    ours = grids.make("exponential", flow, 10, sigma_min=theirs[-1] / (1 - theirs[-1]))
    assert ours[-1] == pytest.approx(theirs[-1]) and np.abs(ours - theirs).max() > 0.3
    np.testing.assert_array_equal(grids.make("custom", flow, 10, levels=theirs), theirs)


def test_a_discrete_schedule_can_be_walked_whole() -> None:
    schedule = schedules.linear(60, 1e-3, 0.3)
    for name in ("leading", "trailing", "linspace"):
        np.testing.assert_array_equal(grids.make(name, schedule, 60), np.arange(59, -1, -1))


def test_custom_levels_are_taken_as_given() -> None:
    schedule = schedules.linear()
    np.testing.assert_array_equal(grids.make("custom", schedule, None, levels=[999, 500, 0]), [999, 500, 0])
    rhos = [100.0, 3.0, 0.5, 0.0]
    times = grids.make("custom", schedule, 3, levels=rhos, unit="rho")
    np.testing.assert_allclose(schedule.rho(times), rhos[:-1], rtol=1e-13)
    flow = schedules.rectified_flow()
    np.testing.assert_array_equal(grids.make("custom", flow, None, levels=[1.0, 0.5, 0.0]), [1, 0.5])
    np.testing.assert_array_equal(grids.make("custom", flow, None, levels=[math.inf, 1.0], unit="rho"), [1, 0.5])
    np.testing.assert_array_equal(grids.make("custom", schedules.edm(), 2, levels=[80, 0.3], unit="rho"), [80, 0.3])


def test_custom_takes_the_fp32_sigmas_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.EulerDiscreteScheduler(**SD, use_karras_sigmas=True)
    peer.set_timesteps(20)
    schedule = schedules.scaled_linear()
    times = grids.make("custom", schedule, 20, levels=peer.sigmas.numpy(), unit="rho")
    np.testing.assert_allclose(schedule.rho(times), peer.sigmas[:-1].double().numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grids.get("karas"), "karras"),
        (lambda: grids.make("traling", LINEAR, 5), "trailing"),
        (lambda: grids.make("karras", LINEAR, 0), "steps must be an integer of at least 1.* got 0"),
        (lambda: grids.make("karras", LINEAR, -3), "got -3"),
        (lambda: grids.make("karras", LINEAR, 2.0), "got 2.0"),
        (lambda: grids.make("karras", LINEAR, True), "got True"),
        (lambda: grids.make("karras", LINEAR, None), "got None"),
        (
            lambda: grids.make("karras", LINEAR, [9.0, 3.0]),
            r"got \[9.0, 3.0\]. Levels of your own are grid=\[...\], desc",
        ),
        (lambda: grids.make("trailing", LINEAR, 1001), "at most 1000 steps.*got 1001"),
        (lambda: grids.make("karras", LINEAR, 5, gamma=3), "sigma_min, sigma_max, rho"),
        (lambda: grids.make("karras", LINEAR, 5, rho=0), "rho must be"),
        (lambda: grids.make("karras", LINEAR, 5, sigma_max=500.0), "outside"),
        (lambda: grids.make("karras", LINEAR, 5, sigma_min=3.0, sigma_max=2.0), "sigma_min < sigma_max"),
        (lambda: grids.make("exponential", LINEAR, 5, sigma_min=-1.0), "sigma_min"),
        (lambda: grids.make("custom", LINEAR, None, levels=[900, 950, 3]), "Levels 0 and 1.*900 and 950"),
        (lambda: grids.make("custom", LINEAR, None, levels=[900, 500, 500]), "Levels 1 and 2.*500 and 500"),
        (lambda: grids.make("custom", LINEAR, None, levels=[900, math.nan, 3]), "Level 1 .*nan"),
        (lambda: grids.make("custom", LINEAR, None, levels=[math.inf, 3]), "Level 0 .*inf.*outside"),
        (lambda: grids.make("custom", LINEAR, None, levels=[1000, 3]), "Level 0 .*1000.*from 0 to 999"),
        (lambda: grids.make("custom", LINEAR, None, levels=[9, 3, -1]), "Level 2 .*-1"),
        (
            lambda: grids.make("custom", schedules.vp(), None, levels=[10.0, 3.0]),
            "Level 0 .*10, outside vp.*, whose clock goes from 0 to 1.*sigmas, sigma/alpha .* need unit='rho' in grid",
        ),
        (
            lambda: grids.make("custom", LINEAR, None, levels=[200.0, 3], unit="rho"),
            "Level 0 .*200.*sigma/alpha .*157.407",
        ),
        (lambda: grids.make("custom", LINEAR, 4, levels=[9, 3]), "steps is 4"),
        (lambda: grids.make("custom", LINEAR, None, levels=[9, 3], unit="sigma"), "unit"),
        (lambda: grids.make("custom", LINEAR, None, levels=[]), "at least one"),
        (lambda: grids.make("custom", LINEAR, None, levels=[[9, 3]]), r"shape \(1, 2\)"),
        (lambda: grids.make("custom", LINEAR, None), "levels"),
        (lambda: grids.make("custom", schedules.rectified_flow(), None, levels=[0.0]), "clean"),
        (lambda: grids.check([0.5, 0.0], schedules.vp()), "clean"),
    ],
)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
