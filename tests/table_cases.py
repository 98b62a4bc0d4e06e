"""The samplers whose tables are written out by hand, the processes they run on, and the coefficients of a table."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fastdiff.compiler.plan import Plan
from fastdiff.process import schedules
from fastdiff.process.schedules import Level, Schedule

ZERO_SNR = schedules.rescale_zero_terminal_snr(schedules.scaled_linear())
PROCESSES = {
    "linear-trailing": (schedules.linear(), "trailing"),
    "cosine-leading": (schedules.cosine(), "leading"),
    "quadratic-linspace": (schedules.quadratic(), "linspace"),
    "zero-snr-trailing": (ZERO_SNR, "trailing"),
    "ou-trailing": (schedules.ou(), "trailing"),
    "vp-logsnr": (schedules.vp(), "logsnr"),
    "ve-exponential": (schedules.ve(), "exponential"),
    "edm-karras": (schedules.edm(), "karras"),
    "flow-trailing": (schedules.rectified_flow(), "trailing"),
    "flow-karras": (schedules.rectified_flow(), "karras"),
}
everywhere = pytest.mark.parametrize(("schedule", "grid"), PROCESSES.values(), ids=PROCESSES)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("ddpm", {}),
    ("ddpm", {"variance": "fixed_large"}),
    ("ddim", {}),
    ("ddim", {"eta": 0.5}),
    ("ddim", {"eta": 1.0}),
    ("euler", {}),
    ("euler", {"s_churn": 5.0}),
    ("euler_ancestral", {}),
    ("euler_ancestral", {"eta": 0.5}),
    ("heun", {}),
    ("heun", {"s_churn": 5.0}),
    ("dpmpp_2m", {}),
    ("dpmpp_2m_sde", {}),
    ("dpmpp_2m_sde", {"correction": "heun", "eta": 0.5}),
    ("euler_maruyama", {}),
    ("euler_maruyama", {"eta": 0.0}),
    ("flow_euler", {}),
    ("annealed_langevin", {}),
    ("annealed_langevin", {"denoise": False}),
    ("random_walk", {}),
    ("random_walk", {"point": "ddpm_large"}),
    ("random_walk", {"point": "ddpm_small"}),
    ("random_walk", {"point": "sde", "denoise": False}),
]


def applies(solver: str, schedule: Schedule, grid: str) -> bool:
    """Whether a solver is defined on a process: the exceptions are tested to refuse."""
    if solver == "flow_euler":
        return schedule.kind == "flow"
    if solver == "euler_maruyama" and schedule.steps is not None:
        return False
    if solver in ("euler_maruyama", "random_walk", "annealed_langevin"):
        return math.isfinite(schedule.rho_max)
    return True


with_signal = pytest.mark.parametrize(
    ("schedule", "grid"), [p for p in PROCESSES.values() if math.isfinite(p[0].rho_max)]
)
every_solver = pytest.mark.parametrize(
    ("solver", "options", "schedule", "grid"),
    [
        pytest.param(name, options, *process, id=f"{name}-{'-'.join(map(str, options.values()))}-{label}")
        for name, options in CASES
        for label, process in PROCESSES.items()
        if applies(name, *process)
    ],
)


def rows_of(plan: Plan) -> list[tuple[Level, Level, dict[str, float]]]:
    """(s, t, coefficients of the next state) per row: A on x, B on D, C on a fresh normal, R on a register."""
    found = []
    for i, row in enumerate(plan.rows[1:], start=1):
        following = plan.rows[i + 1].x if i < plan.nfe else plan.result
        output = next(o for o in row.outputs if o.dest == following)
        assert row.level is not None
        after = plan.rows[i + 1].level if i < plan.nfe else plan.levels[-1]
        assert after is not None
        found.append(
            (
                row.level,
                after,
                {"A": output.x, "B": output.denoised, "C": sum(output.noise), "R": sum(output.slots)},
            )
        )
    return found


def scaled(s: Level, t: Level, a: float, b: float, c: float) -> tuple[float, float, float]:
    """Coefficients in x / alpha as coefficients in x; a is sigma'-proportional, so alpha = 0 has a limit."""
    return (t.alpha * a if a == 0.0 else t.alpha / s.alpha * a), t.alpha * b, t.alpha * c
