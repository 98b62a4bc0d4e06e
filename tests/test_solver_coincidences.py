"""Each sampler's table against those of the samplers it must coincide with."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from table_cases import everywhere, rows_of, scaled, with_signal

from fastdiff.compiler.build import compile_levels
from fastdiff.compiler.build import plan as build
from fastdiff.compiler.plan import Plan
from fastdiff.process.schedules import CLEAN, Level, Schedule


def same_tables(left: Plan, right: Plan, tolerance: float = 1e-10) -> None:
    assert left.nfe == right.nfe
    for a, b in zip(left.rows, right.rows, strict=True):
        assert (a.level, a.x, a.slots, a.noise) == (b.level, b.x, b.slots, b.noise)
        for p, q in zip(a.outputs, b.outputs, strict=True):
            assert p.dest == q.dest
            for one, two in zip(dataclasses.astuple(p)[1:], dataclasses.astuple(q)[1:], strict=True):
                np.testing.assert_allclose(one, two, rtol=tolerance, atol=tolerance)


@everywhere
def test_ddim_without_noise_is_euler_is_the_first_order_dpmpp(schedule: Schedule, grid: str) -> None:
    ddim = build("ddim", schedule, 12, grid)
    same_tables(ddim, build("euler", schedule, 12, grid))
    if schedule.kind == "flow":
        same_tables(ddim, build("flow_euler", schedule, 12, grid))
    if grid != "leading":
        same_tables(build("ddim", schedule, 1, grid), build("dpmpp_2m", schedule, 1, grid))


@everywhere
def test_full_eta_is_the_posterior_is_ancestral(schedule: Schedule, grid: str) -> None:
    ddpm = build("ddpm", schedule, 12, grid)
    same_tables(ddpm, build("ddim", schedule, 12, grid, eta=1.0))
    if schedule.kind != "flow":
        same_tables(ddpm, build("euler_ancestral", schedule, 12, grid))


@everywhere
def test_the_sde_solver_without_noise_is_the_ode_solver(schedule: Schedule, grid: str) -> None:
    same_tables(build("dpmpp_2m", schedule, 12, grid), build("dpmpp_2m_sde", schedule, 12, grid, eta=0.0))


@pytest.mark.parametrize("point", ["large", "small"])
@with_signal
def test_ddpm_is_a_point_of_the_random_walk(schedule: Schedule, grid: str, point: str) -> None:
    walk = build("random_walk", schedule, 12, grid, point=f"ddpm_{point}")
    same_tables(build("ddpm", schedule, 12, grid, variance=f"fixed_{point}"), walk)


@with_signal
def test_reverse_diffusion_is_a_point_of_the_random_walk(schedule: Schedule, grid: str) -> None:
    """x_VE + (sigma_k^2 - sigma_{k+1}^2) score + sqrt(sigma_k^2 - sigma_{k+1}^2) z (Song et al. 2021b, appendix E)."""

    def formula(s: Level, t: Level) -> tuple[float, float, float]:
        drop = s.rho**2 - t.rho**2
        noise = math.sqrt(drop) if t.sigma else 0.0
        return scaled(s, t, 1.0 - drop / s.rho**2, drop / s.rho**2, noise)

    for s, t, got in rows_of(build("random_walk", schedule, 12, grid, point="sde")):
        np.testing.assert_allclose([got[k] for k in "ABC"], formula(s, t), rtol=1e-10, atol=1e-10)


@with_signal
def test_ncsn_is_a_point_of_the_random_walk(schedule: Schedule, grid: str) -> None:
    """Annealed Langevin is tau = a_i/2, T = 1, with every level visited `inner` times."""
    ncsn = build("annealed_langevin", schedule, 5, grid, epsilon=0.1, inner=3)
    levels = [level for level in ncsn.levels[:-1] for _ in range(3)] + [ncsn.levels[-2], CLEAN]
    same_tables(ncsn, compile_levels("random_walk", levels, schedule, "repeated", {"epsilon": 0.05}))
