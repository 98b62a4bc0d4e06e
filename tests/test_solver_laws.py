"""Laws every sampler obeys on every process: moments, order, evaluations, few steps, rows the kernel has room for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from solver_cases import CASES, FLOW_ONLY, NEEDS_SIGNAL, Case, measured_order

import fastdiff as fd
from fastdiff.compiler import layout, solvers
from fastdiff.compiler.build import plan as build
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.verify import execute
from fastdiff.models.exact import Mixture
from fastdiff.process import schedules
from fastdiff.process.schedules import Schedule

PROCESSES = {
    "linear-leading": (schedules.linear(), "leading"),
    "zero-snr-trailing": (schedules.rescale_zero_terminal_snr(schedules.scaled_linear()), "trailing"),
    "vp-logsnr": (schedules.vp(), "logsnr"),
    "edm-karras": (schedules.edm(), "karras"),
    "flow-trailing": (schedules.rectified_flow(), "trailing"),
}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
everywhere = pytest.mark.parametrize(
    ("case", "schedule", "grid"),
    [
        pytest.param(case, *process, id=f"{case.name}-{label}")
        for case in CASES
        for label, process in PROCESSES.items()
        if case.applies(process[0])
    ],
)


def scalars(plan: Plan) -> list[float]:
    return [c for row in plan.rows for o in row.outputs for c in (o.x, o.denoised, *o.slots, *o.noise)]


@everywhere
def test_laws(case: Case, schedule: Schedule, grid: str) -> None:
    report = build(case.solver, schedule, 8, grid, **case.options).verify()
    assert report.ok, str(report)


@everywhere
def test_few_steps(case: Case, schedule: Schedule, grid: str) -> None:
    """1, 2, 3 and 10 steps compile to finite tables that fit the kernel, and end in x' = D."""
    chosen = solvers.get(case.solver)
    for steps in (1, 2, 3, 10):
        plan = build(case.solver, schedule, steps, grid, **case.options)
        assert np.isfinite(scalars(plan)).all()
        assert Plan.from_json(plan.to_json()) == plan
        for row in plan.rows:
            assert len(row.outputs) <= layout.MAX_OUTPUTS
            assert len(row.slots) + 1 <= layout.MAX_SLOTS
        if chosen.ends_in_denoise(case.options) and not chosen.upward:
            last = next(o for o in plan.rows[-1].outputs if o.dest == plan.result)
            others = (last.x, *last.slots, *last.noise)
            assert (last.denoised, *others) == pytest.approx((1.0, *(0.0 for _ in others)), abs=1e-12)


@every_case
def test_evaluations(case: Case) -> None:
    schedule, grid = PROCESSES["flow-trailing" if case.solver in FLOW_ONLY else "edm-karras"]
    for steps in (1, 2, 3, 10):
        assert build(case.solver, schedule, steps, grid, **case.options).nfe == case.nfe(steps), steps


@pytest.mark.parametrize("case", [case for case in CASES if case.order is not None], ids=lambda case: case.name)
def test_order(case: Case) -> None:
    schedule = schedules.rectified_flow() if case.solver in FLOW_ONLY else schedules.edm()
    assert measured_order(case, schedule, (80, 160)) == pytest.approx(case.order, abs=0.35)


# on the schedule's own clock, scale or direction, where the two coordinates differ
OWN_COORDINATES = (
    "tcd",
    "ddim_inverse",
    "reverse_diffusion",
    "langevin_pc",
    "cold",
    "exponential_ab-velocity-2",
    "pndm",
)


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if not {c.solver, c.name} & {*FLOW_ONLY, *OWN_COORDINATES} or c.name == "pndm-plms"],
    ids=lambda case: case.name,
)
def test_vp_and_ve_coordinates_draw_the_same_sample(case: Case) -> None:
    """x_VE = x_VP / alpha: one run in either coordinates, on the same normals, ends in the same x0."""
    rhos = np.geomspace(80.0, 0.05, 12)
    rng = np.random.default_rng(1)
    data = Mixture([1.0, 2.0], rng.standard_normal((2, 3)), [0.1, 0.3])
    latent, normals = rng.standard_normal((4, 3)), rng.standard_normal((100, 4, 3))
    ends = []
    for schedule in (schedules.vp(), schedules.edm()):
        plan = build(case.solver, schedule, grid=rhos, grid_options={"unit": "rho"}, **case.options)
        ends.append(execute(plan, data, plan.levels[0].sigma * latent, lambda i, _: normals[i]))
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-8, atol=1e-8)


EXECUTORS = [name for name, backend in fd.backends().items() if backend.ok and "cpu" in backend.devices]


@pytest.mark.parametrize("backend", EXECUTORS)
@every_case
def test_the_engine_runs_the_table(case: Case, backend: str) -> None:
    """In fp32 on every CPU executor, with given noise, what `execute` computes in float64."""
    schedule, grid = PROCESSES["flow-trailing" if case.solver in FLOW_ONLY else "vp-logsnr"]
    plan = build(case.solver, schedule, 7, grid, **case.options)
    shape = (2, 3, 5, 4)
    rng = np.random.default_rng(0)
    start = max(plan.levels[0].sigma, 0.5) * rng.standard_normal(shape)
    normals = rng.standard_normal((max(1, plan.draws), *shape))
    expected = execute(plan, lambda x, level: np.tanh(x) - 0.3 * level.sigma, start, lambda i, _: normals[i])
    levels = [row.level for row in plan.rows if row.level is not None]
    model = fd.Denoiser(lambda x, t: torch.tanh(x) - 0.3 * next(sigmas), schedule, "x0")
    sigmas = iter([level.sigma for level in levels])
    sampler = fd.Sampler(plan, model, backend=backend)
    noise = torch.from_numpy(normals[: plan.draws]).float() if plan.draws else "white"
    got = sampler.sample(shape, seed=0, init=torch.from_numpy(start).float(), noise=noise)
    np.testing.assert_allclose(got.numpy(), expected, rtol=2e-4, atol=2e-4 * float(np.abs(expected).max()))


def test_every_solver_is_among_the_cases() -> None:
    from test_solvers import CASES as FIRST

    adaptive = {name for name in solvers.names() if solvers.get(name).adaptive}  # test_adaptive.py
    assert {case.solver for case in CASES} | {name for name, _ in FIRST} == set(solvers.names()) - adaptive


@pytest.mark.parametrize("solver", NEEDS_SIGNAL)
def test_a_start_without_signal_is_refused(solver: str) -> None:
    with pytest.raises(ValueError, match="alpha = 0"):
        build(solver, "rectified_flow", 5, "trailing")


@pytest.mark.parametrize("solver", FLOW_ONLY)
def test_flow_samplers_refuse_other_schedules(solver: str) -> None:
    with pytest.raises(ValueError, match=f"{solver} needs a flow schedule"):
        build(solver, "vp", 5, "trailing")


@pytest.mark.parametrize(
    ("solver", "options", "says"),
    [
        ("unipc", {"order": 5}, "order must be an integer of 1..4, got 5"),
        ("unipc", {"variant": "bh3"}, "variant must be 'bh1' or 'bh2'"),
        ("deis", {"order": 0}, "order must be"),
        ("dpmsolver", {"method": "both"}, "method must be"),
        ("dpmpp_3m", {"flavor": "comfyui"}, "flavor must be"),
        ("dpmpp_2s", {"r": 0.0}, "0 < r <= 1"),
        ("sa_solver", {"taus": [1.0, 0.0]}, "one per step"),
        ("sa_solver", {"corrector_order": 7}, "corrector_order"),
        ("er_sde", {"noise": "loud"}, "noise must be"),
        ("ghvb", {"beta": 0.0}, "beta"),
        ("hb", {"beta": 1.5}, "beta"),
        ("edm", {"a": 0.0}, "a, where in the step"),
        ("tcd", {"gamma": 2.0}, "gamma"),
        ("consistency", {"epsilon": -1.0}, "epsilon"),
        ("lcm", {"flavor": "diffusers"}, "discrete schedule"),
        ("langevin_pc", {"snr": 0.0}, "snr"),
    ],
)
def test_bad_options(solver: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        build(solver, "edm", 6, "karras", **options)


def test_orders_that_the_steps_do_not_allow_are_lowered_and_explained() -> None:
    plan = build("unipc", "edm", 3, "karras", order=4)
    assert plan.notes == (
        "step 0 has order 1 instead of 4: 1 model evaluations are known",
        "step 1 has order 2 instead of 4: the last steps come down to order 1",
        "step 2 has order 1 instead of 4: the step to sigma = 0",
    )
    assert all(f"note: {note}" in plan.explain() for note in plan.notes)
    assert build("dpmpp_3s", "rectified_flow", 2, "trailing").notes == (
        "step 0 has order 1 instead of 3: it starts at alpha = 0",
        "step 1 has order 1 instead of 3: it ends at sigma = 0",
    )


def test_inversion_returns() -> None:
    """ddim_inverse, then ddim over the same levels: the image again, to first order in the steps."""
    data = Mixture([1.0, 2.0], [[0.5], [-1.0]], [0.1, 0.3])
    image = np.array([[0.4], [-1.2], [-0.1]])
    errors = []
    for steps in (50, 200):
        up = build("ddim_inverse", "vp", steps, "logsnr")
        down = build("ddim", "vp", steps, "logsnr")
        assert up.levels == down.levels[::-1]
        noise = execute(up, data, image)
        errors.append(float(np.abs(execute(down, data, noise) - image).max()))
    assert errors[1] < errors[0] / 3.0
    assert errors[1] < 0.03
    assert math.isfinite(errors[0])
