"""What stands for a pipeline's scheduler where a solver of fastdiff takes its place.

May import: NumPy, torch, compiler, process, models, and the programs of this folder. The levels are the model's own:
spaced as the scheduler's config says, shifted as the pipeline asks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.compiler import solvers
from fastdiff.compiler.build import plan as build_plan
from fastdiff.compiler.plan import Plan
from fastdiff.integrations.diffusers.pipelines import Arguments, Kind
from fastdiff.integrations.diffusers.program import Program, solved
from fastdiff.models.from_diffusers import TRAINED, trained_with
from fastdiff.process import predictions
from fastdiff.process.schedules import Level, Schedule

OWN = ("timesteps", "sigmas", "denoising_start", "denoising_end")  # arguments that only the scheduler understands
FLAGS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta_sigma"}


class Solving:
    """A scheduler, as far as a pipeline looks at one, whose steps are a solver's plan on the model's own levels.

    All that is not defined here is the pipeline's own scheduler's.
    """

    order = 1

    def __init__(self, original: Any, solver: str) -> None:
        self.original, self.solver = original, solver
        self.schedule, self.prediction, self.sigma_data = trained_with(original)
        config = original.config
        if config.get("thresholding"):
            raise ValueError(
                f"accelerate: {type(original).__name__} thresholds its estimates, which solver={solver!r} would not; "
                "set thresholding=False, or leave solver out"
            )
        bound = float(config.get("clip_sample_range", 1.0) or 1.0)
        self._clamp = (-bound, bound) if config.get("clip_sample") else None
        self.begin = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """The levels; `sigmas` that a pipeline makes itself, evenly spaced, only say how many."""
        steps = num_inference_steps if sigmas is None else len(sigmas)
        grid, options = self._spaced(mu)
        self._made = self.solver, self.schedule, steps, grid, tuple(options.items()), self._clamp
        self.begin = 0
        self.levels = _plan(*self._made, 0).levels[:-1]
        self.timesteps = torch.tensor([self._shown(level) for level in self.levels], device=device)
        self.init_noise_sigma = self.levels[0].sigma

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this level instead of the first."""
        self.begin = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample: what scales it is in the rows."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """alpha x0 + sigma n at the level the run starts with."""
        level = self.levels[self.begin]
        return level.alpha * original_samples + level.sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """As `add_noise`, in the order that flow schedulers take."""
        return self.add_noise(sample, noise, timestep)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> Any:
        """Its signature is looked at; the loop never calls it."""
        raise RuntimeError(f"accelerate: a step of solver={self.solver!r} was asked for outside the pipeline's loop")

    def program(self, kind: Kind, dtype: torch.dtype) -> Program:
        """The rows from where the run starts."""
        return _program(self._made, self.begin, self.prediction, self.sigma_data, self._scale, kind, dtype)

    @property
    def _scale(self) -> float:
        return float(TRAINED) if self.schedule.kind == "flow" else 1.0

    def _shown(self, level: Level) -> float:
        return predictions.coefficients(self.prediction, level, self.schedule, self.sigma_data).time * self._scale

    def _spaced(self, mu: float | None) -> tuple[str, Mapping[str, Any]]:
        config = self.original.config
        if self.schedule.kind == "flow":
            linear = config.get("time_shift_type") == "linear"
            shifted = config.get("shift") or config.get("flow_shift") or 1.0
            return "flow_shift", {"shift": shifted if mu is None else mu if linear else math.exp(mu)}
        if self.schedule.kind != "vp":
            return "karras", {}
        for flag, grid in FLAGS.items():
            if config.get(flag):
                return grid, {}
        spacing = config.get("timestep_spacing") or "leading"
        return spacing, {"steps_offset": config.get("steps_offset") or 0} if spacing == "leading" else {}


def check_solver(solver: str) -> None:
    """ValueError unless this is a solver that can take a scheduler's place."""
    chosen = solvers.get(solver)
    why = "chooses its own steps" if chosen.adaptive else "goes from images to noise" if chosen.upward else None
    if why is not None:
        raise ValueError(
            f"accelerate: {solver} {why}, and a pipeline goes down a fixed number of steps; run it with fd.Sampler"
        )


def check_call(solver: str, name: str, arguments: Arguments) -> None:
    """ValueError for arguments that only the pipeline's own scheduler understands."""
    for argument in OWN:
        if arguments.given.get(argument) is not None:
            raise ValueError(
                f"{name}: {argument} is for the pipeline's own scheduler, and solver={solver!r} runs instead; leave "
                "it out, or accelerate(pipe) without a solver"
            )
    for argument in ("eta", "use_clipped_model_output"):
        if arguments.given.get(argument):
            raise ValueError(
                f"{name}: {argument} is an option of the pipeline's own scheduler, and solver={solver!r} runs instead; "
                "leave it out, or accelerate(pipe) without a solver"
            )


@functools.lru_cache(maxsize=64)
def _plan(
    solver: str, schedule: Schedule, steps: int, grid: str, options: tuple[tuple[str, Any], ...],
    clamp: tuple[float, float] | None, begin: int,
) -> Plan:  # fmt: skip
    plan = build_plan(solver, schedule, steps, grid, start_step=begin, clamp=clamp, grid_options=dict(options))
    if plan.given:
        raise ValueError(
            f"accelerate: {solver} needs tensors of the caller's ({', '.join(plan.given)}), which a pipeline does not "
            "give; run it with fd.Sampler"
        )
    return plan


@functools.lru_cache(maxsize=64)
def _program(
    made: tuple[Any, ...], begin: int, prediction: str, sigma_data: float | None, scale: float, kind: Kind,
    dtype: torch.dtype,
) -> Program:  # fmt: skip
    return solved(_plan(*made, begin), prediction, sigma_data, scale, kind, dtype)
