"""The contenders beside ours: the papers' formulas in float64, a row under torch.compile, and diffusers' schedulers."""

from __future__ import annotations

import functools
import importlib.util
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.compiler.assemble import Row

STEPS = 20
TRAINED, BETAS = 1000, (1e-4, 0.02)
FORMULAS = ("ddim", "dpmpp_2m", "euler_ancestral", "ddpm")
SOLVERS = (*FORMULAS, "unipc", "unipc order 3", "sa_solver")
NOISY = ("euler_ancestral", "ddpm", "sa_solver")
# What diffusers' class of that name does, in our words; its SA-Solver simplifies the weights of order 2.
OPTIONS: dict[str, dict[str, Any]] = {"unipc order 3": {"order": 3}, "sa_solver": {"flavor": "diffusers"}}
ROW_TOLERANCE = 2e-6  # of the compiled row, times the sum of the magnitudes it adds up
WALK_TOLERANCE = 1e-5  # of a whole run, of the largest element; diffusers keeps its schedule in fp32


def plan_of(solver: str) -> fd.Plan:
    """Our plan of a line of the table: `solver` may name an order too."""
    schedule = fd.schedules.linear(TRAINED, *BETAS)
    return fd.plan(solver.split()[0], schedule, STEPS, "trailing", **OPTIONS.get(solver, {}))


def applied(row: Row, x: Any, f: Any, slots: Sequence[Any], normals: Sequence[Any]) -> list[Any]:
    """What a row writes, for a network that predicts eps; of float64 tensors, or of numbers: its own coefficients."""
    assert row.level is not None
    values = [x, (x - row.level.sigma * f) / row.level.alpha, *slots, *normals]
    factors = [(o.x, o.denoised, *o.slots, *o.noise) for o in row.outputs]
    return [sum(c * value for c, value in zip(cs, values, strict=True) if c != 0.0) for cs in factors]


def formula(solver: str, levels: Sequence[fd.Level], i: int, x: Any, f: Any, old: Any, z: Any) -> tuple[Any, Any]:
    """(x', D) of step i as the papers write it, for a network that predicts eps.

    x, f, old, z: state, network output, previous D, unit normals, float64.
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
    raise ValueError(f"no formula for solver {solver!r}; it has {', '.join(FORMULAS)}")


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
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**common),
        "unipc order 3": lambda: diffusers.UniPCMultistepScheduler(solver_order=3, **common),
        "sa_solver": lambda: diffusers.SASolverScheduler(tau_func=lambda _: 1, **common),
    }
    scheduler = made[solver]()
    scheduler.set_timesteps(STEPS)
    if solver == "euler_ancestral":
        scheduler.scale_model_input(torch.zeros(1), scheduler.timesteps[0])  # a pipeline has called it by then
    return scheduler


def place(scheduler: Any) -> Callable[[], None]:
    """A function that puts the scheduler back where it stands now, in the middle of a run."""

    def copied(held: dict[str, Any]) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, list) else value for key, value in held.items()}

    held = copied(vars(scheduler))
    return lambda: vars(scheduler).update(copied(held))


def walk(
    solver: str, levels: Sequence[fd.Level], start: Tensor, outputs: Sequence[Tensor], normals: Callable[[int], Tensor]
) -> list[Tensor]:
    """The states diffusers reaches with these network outputs, in the plan's coordinates; normals(i): step i's draw."""
    scheduler = scheduler_of(solver)
    alphas = [level.alpha if solver == "euler_ancestral" else 1.0 for level in levels]
    module = sys.modules[type(scheduler).__module__]
    x, states = start / alphas[0], []
    for i, (time, f) in enumerate(zip(scheduler.timesteps, outputs, strict=False)):
        draw = functools.partial(normals, i)
        with mock.patch.object(module, "randn_tensor", lambda *_, draw=draw, **__: draw(), create=True):
            x = scheduler.step(f, time, x, return_dict=False)[0]
        states.append(x.double() * alphas[i + 1])
    return states


class CompiledRow:
    """A row under torch.compile, in place on registers of its own shape, with its own noise."""

    def __init__(self, row: Row, device: torch.device) -> None:
        self.row = row
        inputs = 2 + len(row.slots) + len(row.noise)
        units = [[float(j == k) for j in range(inputs)] for k in range(inputs)]
        columns = [applied(row, u[0], u[1], u[2 : 2 + len(row.slots)], u[2 + len(row.slots) :]) for u in units]
        table = [[float(column[o]) for column in columns] for o in range(len(row.outputs))]
        self.coefficients = torch.tensor(table, device=device)
        self.places = [row.x, *row.slots, *(o.dest for o in row.outputs if o.dest not in (row.x, *row.slots))]
        # which inputs every output adds up, and where it goes: the same for all steady rows of a sampler
        sums = tuple(tuple(k for k, c in enumerate(cs) if c != 0.0) for cs in table)
        into = tuple(self.places.index(o.dest) for o in row.outputs)
        self.update = _compiled(sums, into, len(row.slots), len(row.noise), device)

    def __call__(self, registers: Sequence[Tensor], f: Tensor) -> None:
        """Run it on the registers."""
        self.update(self.coefficients, f, *(registers[place] for place in self.places))

    def check(self, registers: Sequence[Tensor], f: Tensor) -> None:
        """RuntimeError unless it does, its noise set to zero, what the row says."""
        x, slots = registers[self.row.x], [registers[slot] for slot in self.row.slots]
        silent = [torch.zeros_like(x, dtype=torch.float64) for _ in self.row.noise]
        wanted = applied(self.row, x.double(), f.double(), [slot.double() for slot in slots], silent)
        read = 2 + len(slots)
        coefficients = self.coefficients.clone()
        coefficients[:, read:] = 0.0
        scale = float(coefficients.abs().sum(1).max() * max(value.abs().max() for value in (x, f, *slots)))
        own = [registers[place].clone() for place in self.places]
        self.update(coefficients, f, *own)
        got = [own[self.places.index(output.dest)].double() for output in self.row.outputs]
        error = max(float((a - b).abs().max()) for a, b in zip(got, wanted, strict=True))
        if not error <= ROW_TOLERANCE * scale:
            raise RuntimeError(f"the compiled row is off by {error:.1e}; its time means nothing")


@functools.cache
def _compiled(
    sums: tuple[tuple[int, ...], ...], into: tuple[int, ...], slots: int, draws: int, device: torch.device
) -> Callable[..., None]:
    """update(c, f, x, *slots, *others): output o = sum over k in sums[o] of c[o, k] input_k, written to into[o]."""

    def update(c: Tensor, f: Tensor, *registers: Tensor) -> None:
        normals = [torch.randn_like(f) for _ in range(draws)]
        inputs = [registers[0], f, *registers[1 : 1 + slots], *normals]
        made = [functools.reduce(operator.add, [c[o, k] * inputs[k] for k in terms]) for o, terms in enumerate(sums)]
        for place, value in zip(into, made, strict=True):
            registers[place].copy_(value)

    # Dynamo keeps what it compiled with the code object, and allows each only a few versions
    update.__code__ = update.__code__.replace()
    if device.type == "cuda":
        return torch.compile(update, fullgraph=True, dynamic=True, mode="max-autotune-no-cudagraphs")
    # on a CPU inductor's own generator is scalar code, several times slower than torch.randn
    return torch.compile(update, fullgraph=True, dynamic=False, options={"fallback_random": True})
