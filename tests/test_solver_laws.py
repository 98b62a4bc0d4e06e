"""Laws every sampler obeys on every process: moments, order, evaluations, few steps, rows the kernel has room for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from solver_cases import CASES, FLOW_ONLY, NEEDS_SIGNAL, Case, measured_errors, measured_order

import fastdiff as fd
from fastdiff.compiler import layout, solvers
from fastdiff.compiler.build import plan as build
from fastdiff.compiler.convergence import TOLERANCE
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.verify import DATA_VARIANCES, execute
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
    """1, 2, 3 and 10 steps compile to finite tables that fit the kernel, and end in x' = D.

    The evaluations are counted on one process each.
    """
    chosen = solvers.get(case.solver)
    counted = (schedule, grid) == PROCESSES["flow-trailing" if case.solver in FLOW_ONLY else "edm-karras"]
    for steps in (1, 2, 3, 10):
        plan = build(case.solver, schedule, steps, grid, **case.options)
        assert not counted or plan.nfe == case.nfe(steps), steps
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
def test_order(case: Case) -> None:
    """The order of every option; where it is below what is promised, by more than a measurement's tolerance."""
    schedule = schedules.rectified_flow() if case.solver in FLOW_ONLY else schedules.edm(0.002, 600.0)
    if case.order == 0:
        assert case.limit is not None
        coarse, fine = (abs(error - case.limit) for error in measured_errors(case, schedule))
        assert fine < 0.025
        assert fine < coarse or fine == pytest.approx(coarse, rel=0.05)
        return
    measured = measured_order(case, schedule)
    assert measured == pytest.approx(case.order, abs=TOLERANCE)
    if case.promised is not None:
        assert case.why
        assert measured < case.promised - TOLERANCE


def test_the_bias_of_edm_is_what_its_noise_adds() -> None:
    """The limit of many steps, from dV/du = 2 V s (s' - S s)/(v + s^2) + 2 S s^2 s_noise^2, u the share of the steps.

    Churn by gamma = S/N in each of N steps adds s_noise^2 ((1 + gamma)^2 - 1) s^2, and the ODE takes it back.
    """
    churn, noise, low, high = 40.0, 1.003, 0.05, 50.0
    top, bottom = (end ** (1 / 7) for end in (20.0, 0.01))
    worst = 0.0
    for v in DATA_VARIANCES:

        def slope(u: float, variance: float) -> float:
            root = top + u * (bottom - top)
            s, falls = root**7, 7 * root**6 * (bottom - top)
            on = churn if low <= s <= high else 0.0
            return 2 * variance * s * (falls - on * s) / (v + s**2) + 2 * on * (noise * s) ** 2  # noqa: B023

        variance, count = v + 20.0**2, 1_000
        for i in range(count):
            u, h = i / count, 1.0 / count
            k1 = slope(u, variance)
            k2 = slope(u + h / 2, variance + h / 2 * k1)
            k3 = slope(u + h / 2, variance + h / 2 * k2)
            k4 = slope(u + h, variance + h * k3)
            variance += h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        worst = max(worst, variance / (v + 0.01**2) - 1.0)
    case = Case("edm", {}, 0, steps=(640, 2560))
    coarse, fine = measured_errors(case, schedules.edm())
    assert worst == pytest.approx(fine, rel=0.01) == pytest.approx(6.05e-3, rel=0.01)
    assert abs(fine - worst) < abs(coarse - worst)


# on the schedule's own clock, scale or direction, where the two coordinates differ
OWN_COORDINATES = (
    "tcd",
    "ddim_inverse",
    "reverse_diffusion",
    "langevin_pc",
    "cold",
    "exponential_ab-variable=velocity-order=2",
    "pndm",
    "euler_maruyama",
    "ddpm-variance=fixed_large",
    "random_walk-point=ddpm_large",
)


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if not {c.solver, c.name} & {*FLOW_ONLY, *OWN_COORDINATES} or c.name == "pndm-warmup=plms"],
    ids=lambda case: case.name,
)
def test_vp_and_ve_coordinates_draw_the_same_sample(case: Case) -> None:
    """x_VE = x_VP / alpha: one run in either coordinates, on the same normals, ends in the same x0."""
    rhos = np.geomspace(80.0, 0.05, 12)
    rng = np.random.default_rng(1)
    data = Mixture([1.0, 2.0], rng.standard_normal((2, 3)), [0.1, 0.3])
    latent, normals = rng.standard_normal((4, 3)), rng.standard_normal((400, 4, 3))
    ends = []
    for schedule in (schedules.vp(), schedules.edm()):
        plan = build(case.solver, schedule, grid=rhos, grid_options={"unit": "rho"}, **case.options)
        ends.append(execute(plan, data, plan.levels[0].sigma * latent, lambda i, _: normals[i], given(plan)))
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-9, atol=1e-9)


def given(plan: Plan, value: float = 0.0) -> dict[str, float]:
    return dict.fromkeys(plan.given, value)


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
    drawn = (lambda i, _: normals[i], given(plan, 0.4))
    expected = execute(plan, lambda x, level: np.tanh(x) - 0.3 * level.sigma, start, *drawn)
    levels = [row.level for row in plan.rows if row.level is not None]
    model = fd.Denoiser(lambda x, t: torch.tanh(x) - 0.3 * next(sigmas), schedule, "x0")
    sigmas = iter([level.sigma for level in levels])
    sampler = fd.Sampler(plan, model, backend=backend)
    noise = torch.from_numpy(normals[: plan.draws]).float() if plan.draws else "white"
    images = {name: torch.full(shape, 0.4) for name in plan.given}
    got = sampler.sample(shape, seed=0, init=torch.from_numpy(start).float(), noise=noise, given=images)
    np.testing.assert_allclose(got.numpy(), expected, rtol=2e-4, atol=2e-4 * float(np.abs(expected).max()))


def test_every_solver_is_among_the_cases() -> None:
    shipped = {name for name in solvers.names() if solvers.get(name).function.__module__.startswith("fastdiff.")}
    adaptive = {name for name in shipped if solvers.get(name).adaptive}  # test_adaptive.py
    assert {case.solver for case in CASES} == shipped - adaptive


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
