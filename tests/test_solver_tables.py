"""Every table's evaluations, registers and laws, that a wrong one fails them, and its variance on Gaussian data."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from table_cases import every_solver, rows_of

from fastdiff.compiler import layout
from fastdiff.compiler.build import compile_levels
from fastdiff.compiler.build import plan as build
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.verify import propagate
from fastdiff.process import schedules
from fastdiff.process.schedules import Schedule


@every_solver
def test_one_step_and_two(solver: str, options: dict[str, Any], schedule: Schedule, grid: str) -> None:
    """Every table at steps = 1 and 2 is finite, and its last row is x' = D unless the options say otherwise."""
    for steps in (1, 2):
        plan = build(solver, schedule, steps, grid, **options)
        numbers = [c for row in plan.rows for o in row.outputs for c in (o.x, o.denoised, *o.slots, *o.noise)]
        assert np.isfinite(numbers).all()
        if options.get("denoise", True):
            *_, (_, _, last) = rows_of(plan)
            assert (last["A"], last["R"], last["C"]) == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)
            assert last["B"] == pytest.approx(1.0, rel=1e-12)


@every_solver
def test_evaluations_and_registers(solver: str, options: dict[str, Any], schedule: Schedule, grid: str) -> None:
    """NFE, at most three registers, and rows the kernel has room for."""
    steps = 7
    plan = build(solver, schedule, steps, grid, **options)
    single = plan.levels[0].alpha == 0.0
    expected = {"heun": 2 * steps - 1 - single, "annealed_langevin": 20 * steps + (options.get("denoise") is not False)}
    assert plan.nfe == expected.get(solver, steps)
    assert plan.registers <= 3
    for row in plan.rows:
        assert len(row.outputs) <= layout.MAX_OUTPUTS
        assert len(row.slots) + 1 <= layout.MAX_SLOTS


@every_solver
def test_every_plan_obeys_the_laws(solver: str, options: dict[str, Any], schedule: Schedule, grid: str) -> None:
    report = build(solver, schedule, 6, grid, **options).verify()
    assert report.ok, str(report)


@pytest.mark.parametrize("solver", ["random_walk", "annealed_langevin", "euler_maruyama"])
def test_a_start_without_signal_is_refused_where_it_has_no_limit(solver: str) -> None:
    with pytest.raises(ValueError, match="alpha = 0"):
        build(solver, "rectified_flow", 5, "trailing")


def test_a_wrong_table_fails_its_checks() -> None:
    """A plan with one coefficient changed by a part in a thousand does not verify."""
    plan = build("dpmpp_2m", "vp", 10, "logsnr")
    row = plan.rows[4]
    wrong = dataclasses.replace(row.outputs[0], denoised=row.outputs[0].denoised * 1.001)
    rows = (*plan.rows[:4], dataclasses.replace(row, outputs=(wrong, *row.outputs[1:])), *plan.rows[5:])
    report = dataclasses.replace(plan, rows=rows).verify()
    assert not report.ok
    assert "FAIL point mass" in str(report)


def test_the_variance_of_ddpm_is_beta_not_beta_squared_over_alpha() -> None:
    """E1, data N(0, 1), 1000 steps: beta .9999, posterior .991, beta/alpha 1.0055, beta^2/alpha .0057."""

    def variance(plan: Plan) -> float:
        return float(propagate(plan, 0.0, 1.0, start="noise").variance[-1, 0])

    large = build("ddpm", "linear", 1000, "trailing", variance="fixed_large")
    assert variance(large) == pytest.approx(0.9999, abs=6e-5)
    assert variance(build("ddpm", "linear", 1000, "trailing")) == pytest.approx(0.991, abs=6e-4)
    assert variance(build("random_walk", "linear", 1000, "trailing", point="sde")) == pytest.approx(1.0055, abs=6e-5)

    def literal(row: Any) -> Any:
        if not row.noise:
            return row
        beta = row.outputs[0].noise[0] ** 2
        noise = (math.sqrt(beta**2 / (1.0 - beta)),)
        return dataclasses.replace(row, outputs=(dataclasses.replace(row.outputs[0], noise=noise),))

    wrong = dataclasses.replace(large, rows=tuple(literal(row) for row in large.rows))
    assert variance(wrong) == pytest.approx(0.0057, abs=1e-4)


def test_time_reversal_has_a_plus_sign() -> None:
    """E2: dZ = +[Z + 2 score] dt + sqrt(2) dB from T = 3 gives the data's .25; with a minus it explodes."""
    plan = build("euler_maruyama", schedules.ou(3.0), 1500, "trailing")
    assert propagate(plan, 0.0, 0.25, start="noise").variance[-1, 0] == pytest.approx(0.25, abs=3e-3)

    def flipped(row: Any) -> Any:
        output = row.outputs[0]
        if row.level is None or not row.noise:
            return row
        return dataclasses.replace(
            row, outputs=(dataclasses.replace(output, x=2.0 - output.x, denoised=-output.denoised),)
        )

    wrong = dataclasses.replace(plan, rows=tuple(flipped(row) for row in plan.rows))
    assert propagate(wrong, 0.0, 0.25, start="noise").variance[-2, 0] > 1e4


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_langevin_has_its_stationary_variance(temperature: float) -> None:
    """x + tau s + sqrt(2 tau T) z on N(0, v) settles at v T / (1 - tau/(2 v)), v the noised data's variance."""
    level = schedules.edm().level(1.5)
    data, tau, count = 0.4, 0.7, 200
    v = data + level.sigma**2
    options = {"tau": [tau] * count, "temperatures": [temperature] * count, "denoise": False}
    plan = compile_levels("random_walk", [level] * count + [level], schedules.edm(), "one level", options)
    got = propagate(plan, 0.0, data).variance[-2, 0]
    assert got == pytest.approx(v * temperature / (1.0 - tau / (2.0 * v)), rel=1e-10)
