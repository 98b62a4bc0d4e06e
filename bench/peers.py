"""The contenders beside ours: the papers' formulas in float64 and under torch.compile, and diffusers' schedulers.

A formula is written once, for tensors or for numbers; run on unit numbers it gives its own coefficients.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastdiff as fd

STEPS = 20
TRAINED, BETAS = 1000, (1e-4, 0.02)
SOLVERS = ("ddim", "dpmpp_2m", "euler_ancestral", "ddpm")
NOISY = ("euler_ancestral", "ddpm")
TOLERANCE = 2e-6  # times the sum of the magnitudes a step adds up; diffusers keeps its schedule in fp32


def formula(solver: str, levels: Sequence[fd.Level], i: int, x: Any, f: Any, old: Any, z: Any) -> tuple[Any, Any]:
    """(x', D) of step i as the papers write it, for a network that predicts eps.

    x, f, old, z: state, network output, previous D, unit normals; float64 tensors, or numbers to read coefficients off.
    """
    s, t = levels[i], levels[i + 1]
    denoised = (x - s.sigma * f) / s.alpha
    if solver == "ddim":  # Song et al. 2021, eq. 12
        return t.alpha * denoised + t.sigma * f, denoised
    if solver == "dpmpp_2m":  # Lu et al. 2022, Alg. 2
        h, h_old = t.lam - s.lam, s.lam - levels[i - 1].lam
        ahead = (1 + h / (2 * h_old)) * denoised - h / (2 * h_old) * old
        return t.sigma / s.sigma * x + (t.alpha - s.alpha * t.sigma / s.sigma) * ahead, denoised
    if solver == "euler_ancestral":  # k-diffusion: x/alpha against rho = sigma/alpha
        up = t.rho * (1 - (t.rho / s.rho) ** 2) ** 0.5
        down = (t.rho**2 - up**2) ** 0.5
        return t.alpha * (x / s.alpha + (down - s.rho) * f + up * z), denoised
    if solver == "ddpm":  # Ho et al. 2020, eq. 7
        kept = (s.alpha / t.alpha) ** 2
        beta = 1 - kept
        mean = t.alpha * beta / s.sigma**2 * denoised + kept**0.5 * t.sigma**2 / s.sigma**2 * x
        return mean + (beta * (t.sigma / s.sigma) ** 2) ** 0.5 * z, denoised
    raise ValueError(f"no formula for solver {solver!r}; it has {', '.join(SOLVERS)}")


def has_diffusers() -> bool:
    """True when diffusers can be measured beside ours; without it the lines lack its columns."""
    return importlib.util.find_spec("diffusers") is not None


def scheduler_of(solver: str) -> Any:
    """diffusers' own class for a solver, set to the same schedule and grid, its timesteps on the CPU."""
    import diffusers

    common: dict[str, Any] = {"beta_start": BETAS[0], "beta_end": BETAS[1], "timestep_spacing": "trailing"}
    made: dict[str, Callable[[], Any]] = {
        "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False, **common),
        "ddpm": lambda: diffusers.DDPMScheduler(clip_sample=False, **common),
        "euler_ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**common),
        "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(**common),
    }
    scheduler = made[solver]()
    scheduler.set_timesteps(STEPS)
    if solver == "euler_ancestral":
        scheduler.scale_model_input(torch.zeros(1), scheduler.timesteps[0])  # a pipeline has called it by then
    return scheduler


def seek(scheduler: Any, i: int, old: Tensor | None = None) -> None:
    """Put a scheduler that counts its steps to step i, in the middle of a run."""
    if hasattr(scheduler, "_step_index"):
        scheduler._step_index = i
    if hasattr(scheduler, "lower_order_nums"):
        scheduler.lower_order_nums = scheduler.config.solver_order
        if old is not None:
            scheduler.model_outputs = [None, old]


def diffusers_step(
    solver: str, levels: Sequence[fd.Level], i: int, x: Tensor, f: Tensor, old: Tensor, z: Tensor
) -> Tensor:
    """x' by diffusers with the given noise, in the plan's coordinates."""
    scheduler = scheduler_of(solver)
    seek(scheduler, i, old)
    before, after = (levels[i].alpha, levels[i + 1].alpha) if solver == "euler_ancestral" else (1.0, 1.0)
    module = sys.modules[type(scheduler).__module__]
    with mock.patch.object(module, "randn_tensor", lambda *_, **__: z):
        made = scheduler.step(f, scheduler.timesteps[i], x / before, return_dict=False)[0]
    return made.double() * after


@functools.cache
def compiled(solver: str, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """The formula on tensors x, old, f and the step's coefficients, in place, under torch.compile."""
    if solver == "dpmpp_2m":

        def update(x: Tensor, old: Tensor, f: Tensor, c: Tensor) -> None:
            denoised = c[4] * x + c[5] * f
            x.copy_(c[0] * x + c[1] * f + c[2] * old)
            old.copy_(denoised)

    elif solver in NOISY:

        def update(x: Tensor, old: Tensor, f: Tensor, c: Tensor) -> None:
            x.copy_(c[0] * x + c[1] * f + c[3] * torch.randn_like(x))

    else:

        def update(x: Tensor, old: Tensor, f: Tensor, c: Tensor) -> None:
            x.copy_(c[0] * x + c[1] * f)

    if device.type == "cuda":
        return torch.compile(update, fullgraph=True, dynamic=True, mode="max-autotune-no-cudagraphs")
    # on a CPU inductor's own generator is scalar code, several times slower than torch.randn
    return torch.compile(update, fullgraph=True, dynamic=False, options={"fallback_random": True})


def coefficients(solver: str, levels: Sequence[fd.Level], steps: Sequence[int], device: torch.device) -> list[Tensor]:
    """Of x, f, old, z in x', then of x, f in D, fp32 [6] for each step."""
    made = []
    for i in steps:
        units = [formula(solver, levels, i, *(float(k == j) for k in range(4))) for j in range(4)]
        made.append(torch.tensor([u[0] for u in units] + [u[1] for u in units[:2]], device=device))
    return made


def check_compiled(
    update: Callable[..., None],
    solver: str,
    levels: Sequence[fd.Level],
    i: int,
    x: Tensor,
    old: Tensor,
    f: Tensor,
    c: Tensor,
) -> None:
    """RuntimeError unless the compiled formula, its noise set to zero, is the formula of step i."""
    wanted, _ = formula(solver, levels, i, x.double(), f.double(), old.double(), 0.0)
    got, silent = x.clone(), c.clone()
    silent[3] = 0.0
    update(got, old.clone(), f, silent)
    error, scale = float((got.double() - wanted).abs().max()), float(c[:3].abs().sum() * x.abs().max())
    if not error <= TOLERANCE * scale:
        raise RuntimeError(f"the compiled formula of {solver} is off by {error:.1e}; its time means nothing")
