"""E-TSDM: near the data the network is shown one time for a whole interval, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.compiler import layout as at
from fastdiff.process.clocks import DiscreteSchedule, Schedule

LINEAR = fd.schedules.linear()
SHARED = fd.schedules.time_shared(LINEAR)
BASES = [
    (LINEAR, 100.0, 5),
    (fd.schedules.cosine(), 100.0, 1),
    (fd.schedules.linear(60, 1e-3, 0.3), 10.0, 4),  # intervals of 2.5 indices
    (fd.schedules.vp(), 0.1, 5),
    (fd.schedules.edm(), 8.0, 3),  # a clock that does not start at 0
    (fd.schedules.rectified_flow(), 1.0, 7),  # the whole clock
]


def shown(time: float, low: float, below: float, parts: int) -> float:
    """f(t) as it is written: the largest start of an interval not above t; t itself from `below` on."""
    starts = [low + (below - low) * i / parts for i in range(parts)]
    return max(start for start in starts if start <= time) if time < below else time


def test_the_published_table() -> None:
    """below = 100 of 1000 steps in 5 parts: 0 for 0..19, 20 for 20..39 ... 80 for 80..99, and t from 100 on."""
    table = SHARED.model_time(np.arange(1000))
    expected = np.concatenate([np.repeat([0, 20, 40, 60, 80], 20), np.arange(100, 1000)])
    np.testing.assert_array_equal(table, expected)
    assert [SHARED.model_time(t) for t in (19.999, 20, 99.999, 100)] == [0, 20, 80, 100]
    assert isinstance(SHARED.model_time(35), float)


@pytest.mark.parametrize(("base", "below", "parts"), BASES, ids=repr)
def test_the_definition(base: Schedule, below: float, parts: int) -> None:
    schedule = fd.schedules.time_shared(base, below, parts)
    low, high = base.time_range
    edges = low + (below - low) * np.arange(parts + 1) / parts
    times = np.concatenate([np.linspace(low, high, 501), edges, np.nextafter(edges[1:], low)])
    expected = [shown(time, low, below, parts) for time in times]
    np.testing.assert_array_equal(schedule.model_time(times), expected)
    np.testing.assert_array_equal([schedule.model_time(time) for time in times], expected)
    assert len(set(expected)) >= parts
    with pytest.raises(ValueError, match="outside time_shared"):
        schedule.model_time(high + 1)


@pytest.mark.parametrize(("base", "below", "parts"), BASES, ids=repr)
def test_levels_times_and_grids_do_not_change(base: Schedule, below: float, parts: int) -> None:
    schedule = fd.schedules.time_shared(base, below, parts)
    assert (schedule.kind, schedule.steps, schedule.time_range) == (base.kind, base.steps, base.time_range)
    low, high = base.time_range
    times = np.linspace(low, high, 101)[1:-1]
    for method in ("rho", "alpha", "sigma", "lam"):
        np.testing.assert_array_equal(getattr(schedule, method)(times), getattr(base, method)(times))
    rhos = base.rho(times)
    np.testing.assert_array_equal(schedule.time_from_rho(rhos), base.time_from_rho(rhos))
    np.testing.assert_allclose(schedule.time_from_rho(rhos), times, rtol=1e-9)  # the level's own time, not the shown
    assert schedule.level(float(times[1])) == base.level(float(times[1]))
    for grid in ("karras", "trailing", "exponential", "beta"):
        np.testing.assert_array_equal(fd.grids.make(grid, schedule, 20), fd.grids.make(grid, base, 20))
    if base.kind != "vp" or base.steps is None:
        np.testing.assert_array_equal(schedule.diffusion(times), base.diffusion(times))


@pytest.mark.parametrize(("base", "below", "parts"), BASES, ids=repr)
def test_json_round_trip(base: Schedule, below: float, parts: int) -> None:
    schedule = fd.schedules.time_shared(base, below, parts)
    again = Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert again == schedule and hash(again) == hash(schedule) and type(again) is type(base)
    assert again.shared == (below, parts) and schedule != base
    assert schedule == fd.schedules.get("time_shared", schedule=base, below=below, parts=parts)
    if parts > 1:
        assert schedule != fd.schedules.time_shared(base, below, parts - 1)


def test_a_discrete_schedule_stays_one() -> None:
    assert isinstance(SHARED, DiscreteSchedule)
    np.testing.assert_array_equal(SHARED.betas, LINEAR.betas)
    rescaled = fd.schedules.rescale_zero_terminal_snr(SHARED)
    assert rescaled.shared == (100.0, 5) and rescaled.model_time(55) == 40
    assert Schedule.from_dict(rescaled.to_dict()).model_time(55) == 40


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "flow"])
@pytest.mark.parametrize(
    ("solver", "grid"), [("ddim", "trailing"), ("dpmpp_2m", "karras"), ("dpmpp_sde", "karras"), ("heun", "logsnr")]
)
def test_of_a_plan_only_the_times_change(solver: str, grid: str, prediction: str) -> None:
    plain, shared = (fd.plan(solver, schedule, 40, grid) for schedule in (LINEAR, SHARED))
    assert shared.levels == plain.levels and shared.rows == plain.rows
    ours, theirs = shared.pack(prediction), plain.pack(prediction)
    np.testing.assert_array_equal(ours.ids, theirs.ids)
    others = np.delete(np.arange(ours.coef.shape[1]), at.EMIT_TIME)
    np.testing.assert_array_equal(ours.coef[:, others], theirs.coef[:, others])
    times = [row.level.time for row in shared.rows[1:] if row.level is not None]
    expected = np.float32([shown(time, 0, 100, 5) for time in times])
    np.testing.assert_array_equal(ours.coef[:-1, at.EMIT_TIME], expected)
    np.testing.assert_array_equal(theirs.coef[:-1, at.EMIT_TIME], np.float32(times))
    low = np.float32(times) < 100
    assert 4 <= low.sum() < len(times) and (expected[low] < np.float32(times)[low]).any()


def test_a_plan_of_a_shared_schedule_is_read_back() -> None:
    plan = fd.plan("dpmpp_2m", SHARED, 10)
    again = fd.Plan.from_json(plan.to_json())
    assert again == plan and again.schedule == SHARED
    np.testing.assert_array_equal(again.pack("eps").coef, plan.pack("eps").coef)


def recorder(schedule: Schedule) -> tuple[fd.Denoiser, list[float]]:
    seen: list[float] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return 0.5 * x

    return fd.Denoiser(net, schedule), seen


def test_the_network_is_shown_the_shared_times() -> None:
    model, seen = recorder(SHARED)
    x = fd.sample(model, (2, 3), "ddim", 100, "trailing")
    assert seen == [*range(999, 99, -10), 80, 80, 60, 60, 40, 40, 20, 20, 0, 0]
    plain, told = recorder(LINEAR)
    assert torch.equal(x, fd.sample(plain, (2, 3), "ddim", 100, "trailing"))  # this network ignores its time
    assert told == list(range(999, 0, -10))


def test_a_plan_without_sharing_is_refused() -> None:
    model, _ = recorder(SHARED)
    with pytest.raises(ValueError, match=r"made for schedule linear\(.*trained on time_shared\(schedule=linear"):
        fd.Sampler(fd.plan("ddim", LINEAR, 5), model)


def test_a_captured_plan_is_refused() -> None:
    """Its times are the scheduler's, which knows nothing of the sharing."""
    diffusers = pytest.importorskip("diffusers")
    captured = fd.capture(diffusers.DDIMScheduler(clip_sample=False), steps=5)
    fd.Sampler(captured, recorder(LINEAR)[0])
    with pytest.raises(ValueError, match="times of the scheduler it was captured from, the model shares times"):
        fd.Sampler(captured, recorder(SHARED)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fd.schedules.time_shared(LINEAR, 0), "below must be finite and above 0"),
        (lambda: fd.schedules.time_shared(LINEAR, 1000), "at most 999, got 1000"),
        (lambda: fd.schedules.time_shared(LINEAR, float("nan")), "below must be finite"),
        (lambda: fd.schedules.time_shared(LINEAR, 100, 0), "parts must be an integer of at least 1, got 0"),
        (lambda: fd.schedules.time_shared(LINEAR, 100, 2.5), "parts must be an integer"),
        (lambda: fd.schedules.time_shared(fd.schedules.vp()), "at most 1, got 100. A tenth of the clock is usual"),
        (lambda: fd.schedules.time_shared(fd.schedules.edm(), 0.002), r"above 0\.002"),
        (lambda: fd.schedules.time_shared(SHARED), "is shared already"),
        (lambda: fd.schedules.time_shared(1000), r"time_shared needs a schedule, got 1000"),
        (lambda: fd.schedules.time_shared("liner"), r"Did you mean 'linear'"),
        (lambda: fd.plan("ddim", SHARED, 5).pack("edm"), "has no time to share"),
        (lambda: fd.Sampler(fd.plan("ddim", SHARED, 5), fd.Denoiser(recorder, SHARED, "edm")), "has no time to share"),
    ],
)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
