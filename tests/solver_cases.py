"""Samplers with the options worth telling apart, how many evaluations they make, and their measured order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastdiff.compiler.build import plan as build
from fastdiff.compiler.convergence import slope, variance_error
from fastdiff.process.schedules import Schedule

FLOW_ONLY = ("flow_euler", "flow_heun", "flow_midpoint", "flow_sde", "overshoot", "iadb", "interpolant")
NEEDS_SIGNAL = (
    "reverse_diffusion",
    "langevin_pc",
    "dpm_fast",
    "euler_maruyama",
    "random_walk",
    "annealed_langevin",
)
START = "its first step, with one evaluation known, is of lower order"
UNEVEN = "Adams-Bashforth weights of equal steps, on levels uneven in sigma/alpha"
HALF = "the second difference has half the weight that integrates a parabola"
NOISY = "of order 2 in the variance with the noise on"


@dataclass(frozen=True)
class Case:
    """order: of the variance on Gaussian data before the last denoise, between `steps`; 0 where refining leads nowhere.

    promised, why: the order that the paper, a library or the name gives it where that does not hold, and the reason.
    limit: with order 0, the relative error that refining leads to. nfe: evaluations at n steps, none of them from a
    level without signal. grid, top: of the measurement. In equal ratios the single step of order 1 with which a
    multistep method starts is the largest error of all, and caps the order at 2; from a high top it is small.
    """

    solver: str
    options: dict[str, Any] = field(default_factory=dict)
    order: float = 1.0
    nfe: Callable[[int], int] = lambda n: n
    grid: str = "karras"
    steps: tuple[int, int] = (80, 160)
    top: float = 20.0
    promised: int | None = None
    why: str = ""
    limit: float | None = None

    @property
    def name(self) -> str:
        return "-".join([self.solver, *(f"{key}={value}" for key, value in self.options.items())])

    def applies(self, schedule: Schedule) -> bool:
        """Whether the solver is defined on a schedule from its top; the exceptions are tested to refuse."""
        if self.solver in FLOW_ONLY:
            return schedule.kind == "flow"
        if self.solver == "euler_maruyama" and schedule.steps is not None:
            return False
        return self.solver not in NEEDS_SIGNAL or math.isfinite(schedule.rho_max)


def two(n: int) -> int:
    return 2 * n - 1


def three(n: int) -> int:
    return 3 * n - 2


def prk(n: int) -> int:
    """Four evaluations in each of up to three steps, but for the ones from 80 to .002 and from 2.5 to .002."""
    return n + 3 * min(3, n - 1, {2: 0, 3: 1}.get(n, 3))


CASES = [
    Case("ddpm"),
    Case("ddpm", {"variance": "fixed_large"}),
    Case("ddim"),
    Case("ddim", {"eta": 0.5}),
    Case("ddim", {"eta": 1.0}),
    Case("euler"),
    Case("euler", {"s_churn": 5.0}),
    Case("euler_ancestral"),
    Case("euler_ancestral", {"eta": 0.5}),
    Case("heun", {}, 2, two),
    Case("heun", {"s_churn": 5.0}, 2, two),
    Case("dpmpp_2m", {}, 2),
    Case("dpmpp_2m_sde", {}, 2),
    Case("dpmpp_2m_sde", {"correction": "heun", "eta": 0.5}, 2),
    Case("euler_maruyama"),
    Case("euler_maruyama", {"eta": 0.0}),
    Case("flow_euler"),
    Case("annealed_langevin", {}, nfe=lambda n: 20 * n + 1),
    Case("annealed_langevin", {"inner": 3, "denoise": False}, nfe=lambda n: 3 * n, steps=(160, 320)),
    Case("random_walk"),
    Case("random_walk", {"temperature": 0.8}),
    Case("random_walk", {"point": "ddpm_large"}),
    Case("random_walk", {"point": "ddpm_small"}),
    Case("random_walk", {"point": "sde", "denoise": False}),
    Case("dpmpp_3m", {}, 2, promised=3, why=HALF),
    Case("dpmpp_3m", {"curvature": "exact"}, 3),
    Case("dpmpp_3m", {"flavor": "diffusers", "correction": "heun"}, 2, promised=3, why=HALF),
    Case("dpmpp_3m_sde", {}, 2, promised=3, why=HALF),
    Case("dpmpp_3m_sde", {"eta": 0.5, "curvature": "exact"}, 2, grid="exponential", promised=3, why=NOISY),
    Case(
        "dpmpp_3m_sde",
        {"flavor": "diffusers"},
        1,
        promised=3,
        why="a wrong sign in its second difference",
    ),
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
    # its last block is as long as steps mod 3 says
    Case("dpmpp_3s", {"flavor": "diffusers"}, 3, steps=(81, 162)),
    Case("dpm_fast", {}, 2, promised=3, why="its last blocks are of order 2 and 1"),
    Case("dpm_fast", {"eta": 0.5}, 2),
    Case("exp_heun_2_x0", {}, 2, two),
    Case("exp_heun_2_x0", {"eta": 1.0}, 2, two),
    Case("seeds_2", {}, 2, two),
    Case("seeds_2", {"weights": "phi_2", "eta": 0.5}, 2, two),
    Case("seeds_3", {}, 2, three, promised=3, why=NOISY),
    Case("dpmpp_sde", {}, 1, two, promised=2, why="two independent draws for the two stages of a step"),
    Case("dpmpp_sde", {"eta": 0.0}, 2, two),
    Case("dpmpp_2s_ancestral", {}, 2, two),
    Case("dpmpp_2s_ancestral", {"eta": 0.5}, 2, two),
    Case("res_multistep", {}, 2),
    Case("res_multistep_ancestral", {}, 2),
    Case("mean_reverting", {}, 2),
    Case("mean_reverting", {"order": 3, "noise": "sde"}, 2, promised=3, why=HALF),
    Case("unipc", {}, 3),
    Case("unipc", {"variant": "bh1"}, 3),
    Case("unipc", {"order": 3}, 4),
    Case("unipc", {"order": 4}, 3, promised=5, why=START),
    Case("unipc", {"order": 1}, 2),
    Case("unipc", {"corrector": False}, 2),
    Case("unipc", {"order": 3, "corrector": False}, 3),
    Case("deis", {"order": 1}, 1),
    Case("deis", {"order": 2}, 2),
    Case("deis", {}, 3),
    Case("deis", {"order": 4}, 4, grid="exponential", top=500.0),
    Case("exponential_ab", {}, 3),
    Case("exponential_ab", {"order": 4}, 4, grid="exponential", top=500.0),
    Case("exponential_ab", {"variable": "rho"}, 3),
    Case("exponential_ab", {"variable": "velocity", "order": 2}, 2),
    Case("lms", {}, 4),
    Case("lms", {"order": 2}, 2),
    Case("lms", {"order": 3}, 3),
    Case("ipndm", {}, 2, promised=4, why=UNEVEN),
    Case("ipndm", {"order": 3}, 2, promised=3, why=UNEVEN),
    Case("ipndm_v", {}, 4),
    Case("ipndm_v", {"flavor": "comfyui"}, 3, steps=(160, 320), promised=4, why="two of its integrals are off"),
    Case("pndm", {"warmup": "plms"}, 2, lambda n: n + (n > 2), promised=4, why=UNEVEN),
    Case("pndm", {}, 2, prk, promised=4, why=UNEVEN),
    # tau = 0: the order of the predictor p and the nodes c of the corrector give min(p + 1, c), Theorems 5.1 and 5.2
    Case("sa_solver", {"tau": 0.0}, 2, grid="exponential", steps=(320, 640)),
    Case("sa_solver", {"tau": 0.0, "predictor_order": 1, "corrector_order": 0}, 1),
    Case("sa_solver", {"tau": 0.0, "predictor_order": 1, "corrector_order": 2}, 2),
    Case("sa_solver", {"tau": 0.0, "predictor_order": 2, "corrector_order": 0}, 2),
    Case("sa_solver", {"tau": 0.0, "predictor_order": 2, "corrector_order": 3}, 3),
    Case("sa_solver", {"predictor_order": 3, "corrector_order": 0, "tau": 0.0}, 3),
    Case("sa_solver", {"tau": 0.0, "predictor_order": 3, "corrector_order": 4}, 4, grid="exponential", top=500.0),
    # tau > 0: strong order 1 (the term tau h of the theorems), order 2 in the variance, whatever the nodes; but at
    # tau = 1 the trapezoid's term of order 2 vanishes, here and by Monte Carlo on a mixture
    Case("sa_solver", {"tau": 0.5}, 2, grid="exponential", steps=(320, 640)),
    Case("sa_solver", {}, 3, grid="exponential"),
    Case("sa_solver", {"predictor_order": 1, "corrector_order": 0}, 1),
    Case("sa_solver", {"predictor_order": 1, "corrector_order": 2}, 2),
    Case("sa_solver", {"predictor_order": 2, "corrector_order": 0}, 2),
    Case("sa_solver", {"predictor_order": 3, "corrector_order": 0}, 2, promised=3, why=NOISY),
    Case("sa_solver", {"predictor_order": 3, "corrector_order": 4}, 2, promised=4, why=NOISY),
    Case("sa_solver", {"mode": "pece"}, 3, two, "exponential"),
    Case("sa_solver", {"flavor": "diffusers"}, 2),
    Case("er_sde", {"order": 1}, 1),
    Case("er_sde", {"order": 2}, 2),
    Case("er_sde", {}, 2, promised=3, why="the backward difference stands for the derivative at the node"),
    Case("er_sde", {"noise": "inverse"}, 2),
    Case("er_sde", {"noise": "log"}, 2),
    Case("er_sde", {"noise": "steep", "flavor": "authors"}, 1, grid="exponential", promised=3, why="left Riemann sums"),
    Case(
        "er_sde",
        {"noise": "log", "flavor": "comfyui"},
        1,
        grid="exponential",
        steps=(640, 1280),
        promised=3,
        why="left Riemann sums",
    ),
    Case("er_sde", {"form": "corrected", "noise": "ode"}, 3, grid="exponential", top=500.0),
    Case("er_sde", {"form": "corrected", "noise": "sde"}, 2, promised=3, why=NOISY),
    Case("edm", {}, 0, two, steps=(640, 1280), promised=2, why="s_noise adds what no level holds", limit=6.05e-3),
    Case("edm", {"s_noise": 1.0}, 2, two, steps=(160, 320)),
    Case("edm", {"s_noise": 1.0, "s_churn": 10.0, "s_tmin": 0.0}, 2, two, steps=(160, 320)),
    Case("edm", {"s_churn": 0.0}, 2, two),
    Case("edm", {"s_churn": 0.0, "a": 0.5}, 3, two),
    Case("dpm_2", {}, 2, two),
    Case("dpm_2", {"s_churn": 5.0}, 2, two),
    Case("dpm_2_ancestral", {}, 2, two),
    Case(
        "heunpp2",
        {},
        1,
        lambda n: 1 if n == 1 else 3 * n - 3,
        promised=2,
        why="the mean of three slopes, one from beyond the step",
    ),
    Case("hb", {}, 1, promised=2, why="the damping is not undone"),
    Case("ghvb", {}, 2),
    Case("ghvb", {"order": 3}, 2, promised=3, why=UNEVEN),
    Case("ghvb", {"order": 4, "beta": 1.0}, 2, promised=4, why=UNEVEN),
    Case("gradient_estimation", {}, 1),
    Case("gradient_estimation", {"gamma": 1.5}, 2),
    Case("reverse_diffusion", {}, 1),
    Case("langevin_pc", {}, 1, lambda n: 2 * n, steps=(320, 640)),
    # the errors of predictor and corrector have opposite signs and cancel at some number of steps
    Case("langevin_pc", {"predictor": "ddpm", "corrections": 2}, 1, lambda n: 3 * n, steps=(40, 80)),
    Case("lcm", {}, 0, limit=-0.5),
    Case("tcd", {}, 0, limit=-0.15),
    Case("tcd", {"gamma": 1.0}, 0, limit=-0.5),
    Case("consistency", {}, 0, limit=-0.5),
    Case("cold", {}, 0, limit=-1.0),
    Case("ddim_inverse", {}, 1),
    Case("flow_heun", {}, 2, two),
    Case("flow_midpoint", {}, 3, two),  # of the variance; of order 2 in the states, which the variance does not see
    Case("flow_sde", {}, 1),
    Case("flow_sde", {"eta": 0.5}, 1),
    Case("flow_sde", {"flavor": "diffusers"}, 0, limit=-0.5),
    Case("overshoot", {}, 1),
    Case("iadb", {}, 1),
    Case("interpolant", {}, 1),
    Case("interpolant", {"epsilon": 0.5}, 1),
]


def measured_errors(case: Case, schedule: Schedule | str) -> list[float]:
    """Signed errors at the case's two numbers of steps, from sigma/alpha = top to 0.01."""
    ends = {"sigma_min": 0.01, "sigma_max": case.top}
    return [
        variance_error(build(case.solver, schedule, n, case.grid, grid_options=ends, **case.options))
        for n in case.steps
    ]


def measured_order(case: Case, schedule: Schedule | str) -> float:
    """log of the ratio of errors over that of steps."""
    return slope(case.steps, measured_errors(case, schedule))
