"""Samplers with the options worth telling apart, how many evaluations they make, and their measured order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastdiff.compiler.build import plan as build
from fastdiff.compiler.convergence import slope, variance_error
from fastdiff.process.schedules import Schedule

FLOW_ONLY = ("flow_euler", "flow_heun", "flow_sde", "overshoot", "iadb", "interpolant")
NEEDS_SIGNAL = ("reverse_diffusion", "langevin_pc", "dpm_fast")


@dataclass(frozen=True)
class Case:
    """order: of the variance on Gaussian data before the last denoise; None where it is not a convergent method.

    nfe: evaluations at n steps, none of them from a level without signal. grid: of the measurement; in equal ratios the
    single step of order 1 with which a multistep method starts is the largest error of all, and caps the order at 2.
    """

    solver: str
    options: dict[str, Any] = field(default_factory=dict)
    order: float | None = 1.0
    nfe: Callable[[int], int] = lambda n: n
    grid: str = "karras"

    @property
    def name(self) -> str:
        return "-".join([self.solver, *(str(v) for v in self.options.values())])

    def applies(self, schedule: Schedule) -> bool:
        """Whether the solver is defined on a schedule from its top; the exceptions are tested to refuse."""
        if self.solver in FLOW_ONLY:
            return schedule.kind == "flow"
        if self.solver == "langevin_pc" and self.options.get("predictor") == "ddpm":
            return math.isfinite(schedule.rho_max)
        return self.solver not in NEEDS_SIGNAL or math.isfinite(schedule.rho_max)


def two(n: int) -> int:
    return 2 * n - 1


def three(n: int) -> int:
    return 3 * n - 2


CASES = [
    Case("dpmpp_3m", {}, 2),
    Case("dpmpp_3m", {"curvature": "exact"}, 3),
    Case("dpmpp_3m", {"flavor": "diffusers", "correction": "heun"}, 2),
    Case("dpmpp_3m_sde", {}, 2),
    Case("dpmpp_3m_sde", {"eta": 0.5, "curvature": "exact"}, 2, grid="exponential"),
    Case("dpmpp_3m_sde", {"flavor": "diffusers"}, 1),
    Case("dpmsolver", {"order": 1}, 1),
    Case("dpmsolver", {}, 2),
    Case("dpmsolver", {"correction": "heun"}, 2),
    Case("dpmsolver", {"order": 3, "curvature": "exact"}, 3),
    Case("dpmsolver", {"order": 2, "method": "singlestep"}, 2, two),
    Case("dpmsolver", {"order": 3, "method": "singlestep"}, 3, three, "exponential"),
    Case("dpmpp_2s", {}, 2, two),
    Case("dpmpp_2s", {"r": 0.7}, 2, two),
    Case("dpmpp_3s", {}, 3, three),
    Case("dpmpp_2s", {"flavor": "diffusers"}, 2),
    Case("dpmpp_3s", {"flavor": "diffusers"}, None),
    Case("dpm_fast", {}, None),
    Case("dpm_fast", {"eta": 0.7}, None),
    Case("exp_heun_2_x0", {}, 2, two),
    Case("exp_heun_2_x0", {"eta": 1.0}, 2, two),
    Case("seeds_2", {}, 2, two),
    Case("seeds_2", {"weights": "phi_2", "eta": 0.5}, 2, two),
    Case("seeds_3", {}, 2, three),
    Case("dpmpp_sde", {}, 1, two),
    Case("dpmpp_2s_ancestral", {}, 2, two),
    Case("dpmpp_2s_ancestral", {"eta": 0.5}, 2, two),
    Case("res_multistep", {}, 2),
    Case("res_multistep_ancestral", {}, 2),
    Case("mean_reverting", {}, 2),
    Case("mean_reverting", {"order": 3, "noise": "sde"}, 2),
    Case("unipc", {}, 3),
    Case("unipc", {"variant": "bh1"}, 3),
    Case("unipc", {"order": 3}, 4),
    Case("unipc", {"order": 4}, None),
    Case("unipc", {"order": 1}, 2),
    Case("unipc", {"corrector": False}, 2),
    Case("unipc", {"order": 3, "corrector": False}, 3),
    Case("deis", {"order": 1}, 1),
    Case("deis", {"order": 2}, 2),
    Case("deis", {}, 3),
    Case("deis", {"order": 4}, None),
    Case("exponential_ab", {}, 3),
    Case("exponential_ab", {"variable": "rho"}, 3),
    Case("exponential_ab", {"variable": "velocity", "order": 2}, 2),
    Case("lms", {}, 4),
    Case("lms", {"order": 2}, 2),
    Case("ipndm", {}, 2),
    Case("ipndm_v", {}, 4),
    Case("ipndm_v", {"flavor": "comfyui"}, None),
    Case("pndm", {"warmup": "plms"}, 2, lambda n: n + (n > 1)),
    Case("pndm", {}, 2, lambda n: n + 3 * min(3, n - 1)),
    Case("sa_solver", {}, 3),
    Case("sa_solver", {"tau": 0.0}, None),
    Case("sa_solver", {"predictor_order": 3, "corrector_order": 0, "tau": 0.0}, 3),
    Case("sa_solver", {"predictor_order": 3, "corrector_order": 4}, None),
    Case("sa_solver", {"mode": "pece"}, None, two),
    Case("sa_solver", {"flavor": "diffusers"}, 2),
    Case("er_sde", {"order": 1}, 1),
    Case("er_sde", {"order": 2}, 2),
    Case("er_sde", {}, 2),
    Case("er_sde", {"noise": "inverse"}, None),
    Case("er_sde", {"noise": "steep", "flavor": "authors"}, None),
    Case("er_sde", {"noise": "log", "flavor": "comfyui"}, None),
    Case("er_sde", {"form": "corrected", "noise": "ode"}, None),
    Case("edm", {}, None, two),
    Case("edm", {"s_churn": 0.0, "a": 0.5}, 3, two),
    Case("dpm_2", {}, 2, two),
    Case("dpm_2_ancestral", {}, 2, two),
    Case("heunpp2", {}, None, lambda n: 1 if n == 1 else 3 * n - 3),
    Case("hb", {}, 1),
    Case("ghvb", {}, 2),
    Case("ghvb", {"order": 3}, 2),
    Case("gradient_estimation", {}, 1),
    Case("reverse_diffusion", {}, 1),
    Case("langevin_pc", {}, None, lambda n: 2 * n),
    Case("langevin_pc", {"predictor": "ddpm", "corrections": 2}, None, lambda n: 3 * n),
    Case("lcm", {}, None),
    Case("tcd", {}, None),
    Case("consistency", {}, None),
    Case("cold", {}, None),
    Case("ddim_inverse", {}, 1),
    Case("flow_heun", {}, 2, two),
    Case("flow_sde", {}, 1),
    Case("flow_sde", {"eta": 0.5}, 1),
    Case("flow_sde", {"flavor": "diffusers"}, None),
    Case("overshoot", {}, 1),
    Case("iadb", {}, 1),
    Case("interpolant", {}, 1),
    Case("interpolant", {"epsilon": 0.5}, 1),
]


def measured_order(case: Case, schedule: Schedule | str, steps: tuple[int, int]) -> float:
    """log of the ratio of errors over that of steps; from sigma/alpha = 20 to 0.01."""
    ends = {"sigma_min": 0.01, "sigma_max": 20.0}
    errors = [
        variance_error(build(case.solver, schedule, n, case.grid, grid_options=ends, **case.options)) for n in steps
    ]
    return slope(steps, errors)
