"""What stands for a pipeline's scheduler where a solver of fastdiff takes its place.

May import: torch, compiler, process, models, and the programs of this folder. The levels are those the scheduler itself
sets, from its config and from what the pipeline asks; only the steps between them are the solver's.
"""

from __future__ import annotations

import copy
import functools
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

REFUSED = ("denoising_start", "denoising_end", "eta", "use_clipped_model_output")  # only the scheduler understands them


class Solving:
    """A scheduler, as far as a pipeline looks at one, whose steps are a solver's plan on the scheduler's own levels.

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
        self._spacing = copy.deepcopy(original)
        if config.get("skip_prk_steps") is False:  # its first steps have midpoints in between
            self._spacing.register_to_config(skip_prk_steps=True)
        self.begin = 0

        @functools.wraps(original.set_timesteps)  # a pipeline looks there whether it may give timesteps or sigmas
        def set_timesteps(*args: Any, **kw: Any) -> None:
            self._space(*args, **kw)

        self.set_timesteps = set_timesteps

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def _space(self, *args: Any, **kw: Any) -> None:
        """The levels that the scheduler sets for these arguments, each once."""
        own = self._spacing
        own.set_timesteps(*args, **kw)
        continuous = self.schedule.kind == "flow" or self.prediction == "edm"
        times = own.sigmas if continuous else own.timesteps
        real = times[:: getattr(own, "order", 1)].tolist()  # one of order 2 has a midpoint, or a repeat, after each
        found = dict.fromkeys(time for time in real if not continuous or time > 0.0)
        self._made = self.solver, self.schedule, tuple(found), self._clamp
        self.begin = 0
        self.levels = _plan(*self._made, 0).levels[:-1]
        shown = [self._shown(level) for level in self.levels]
        self.timesteps = torch.tensor(shown, device=own.timesteps.device)
        scale = float(getattr(own, "init_noise_sigma", 1.0))
        # one that is not 1 is of a state over alpha, and the rows' state is alpha times that
        self.init_noise_sigma = scale if scale == 1.0 else scale * self.levels[0].alpha

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


def check_solver(solver: str) -> None:
    """TypeError or ValueError unless this names a solver that can take a scheduler's place."""
    if not isinstance(solver, str):
        raise TypeError(
            f"accelerate: solver must be a name of fd.solvers.names(), got {type(solver).__name__}; its steps are "
            "num_inference_steps of the call, its levels those of the scheduler's config"
        )
    if solver.endswith("Scheduler"):
        raise ValueError(
            f"accelerate: solver is a name of fd.solvers.names() such as 'dpmpp_2m', got {solver!r}; for a scheduler "
            f"give it to the pipeline, pipe.scheduler = {solver}.from_config(pipe.scheduler.config), and leave it out"
        )
    try:
        chosen = solvers.get(solver)
    except ValueError as error:
        raise ValueError(
            f"accelerate: {error} Levels are those of the scheduler's config (use_karras_sigmas=True, for one): a "
            "pipeline is given no grid"
        ) from None
    why = "chooses its own steps" if chosen.adaptive else "goes from images to noise" if chosen.upward else None
    if why is not None:
        raise ValueError(
            f"accelerate: {solver} {why}, and a pipeline goes down a fixed number of steps; run it with fd.Sampler"
        )


def check_call(solver: str, name: str, arguments: Arguments) -> None:
    """ValueError for arguments that only the pipeline's own scheduler understands."""
    for argument in REFUSED:
        if arguments.given.get(argument):
            raise ValueError(
                f"{name}: {argument} is for the pipeline's own scheduler, and solver={solver!r} runs instead; leave "
                "it out, or accelerate(pipe) without a solver"
            )


@functools.lru_cache(maxsize=64)
def _plan(
    solver: str, schedule: Schedule, times: tuple[float, ...], clamp: tuple[float, float] | None, begin: int
) -> Plan:
    plan = build_plan(solver, schedule, grid=times, start_step=begin, clamp=clamp)
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
