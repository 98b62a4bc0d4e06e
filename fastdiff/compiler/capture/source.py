"""The scheduler being captured, and how it is called.

May import: torch. What the scheduler raises itself is told apart from what the capture refuses.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastdiff.compiler.capture.intercept import has_generator

# These list one time more than they evaluate: where the sample ends.
LISTS_THE_END = ("SCMScheduler", "DDPMWuerstchenScheduler")
TIME_PER_SAMPLE = ("DDPMWuerstchenScheduler",)  # step wants a timestep for every sample


@dataclass(frozen=True)
class Source:
    """The scheduler, and how to step a fresh copy of it. first: where in its schedule the first step stands."""

    scheduler: Any
    name: str
    steps: int
    options: Mapping[str, Any]
    timesteps_options: Mapping[str, Any]
    first: int = 0

    def fresh(self, draw: Callable[..., Tensor]) -> Any:
        """A copy with its timesteps set; a Brownian noise sampler, if it has one, replaced by `draw`."""
        scheduler = copy.deepcopy(self.scheduler)
        kw = self.timesteps_options
        given = any(kw.get(key) is not None for key in ("timesteps", "sigmas"))
        self.call(None, scheduler.set_timesteps, *(() if given else (self.steps,)), **kw)
        if hasattr(scheduler, "noise_sampler"):
            scheduler.noise_sampler = draw
        return scheduler

    def times(self, scheduler: Any) -> list[Any]:
        """The timesteps it evaluates."""
        times = list(scheduler.timesteps)[: -1 if self.name in LISTS_THE_END else None]
        if not times:
            raise TypeError(f"{self.name} has no timesteps after set_timesteps; expected at least one evaluation")
        return times

    def scaled(self, scheduler: Any, i: int, x: Tensor, time: Any) -> Tensor:
        """The network's input for state x."""
        scale = getattr(scheduler, "scale_model_input", None)
        return x if scale is None else self.call(i, scale, x, time)

    @property
    def takes_generator(self) -> bool:
        """Whether its step draws from a generator that it is given."""
        return "generator" in self._parameters or has_generator(self.options)

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        step = self.scheduler.step
        return _parameters(getattr(step, "__func__", step))

    def step(self, scheduler: Any, i: int, output: Tensor, time: Any, x: Tensor, following: Any) -> tuple[Tensor, Any]:
        """(the next state, everything `step` returned)."""
        options = dict(self.options)
        if self.name in TIME_PER_SAMPLE:
            time = time.expand(x.shape[0])
        if "prev_timestep" in self._parameters:
            options.setdefault("prev_timestep", following)
        result = self.call(i, scheduler.step, model_output=output, timestep=time, sample=x, **options)
        state = getattr(result, "prev_sample", None)
        if state is None:
            state = result[0] if isinstance(result, tuple | list) else result
        if not isinstance(state, Tensor) or state.shape != x.shape:
            what = f"shape {tuple(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
            raise TypeError(f"{self.name}, step {i}: returned {what}, expected the next state, {tuple(x.shape)}")
        return state, result

    def call(self, i: int | None, function: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        """Call the scheduler; what it raises itself is reported as its own failure."""
        try:
            return function(*args, **kw)
        except Refused as refused:
            raise refused.error from None
        except Exception as error:
            where = "set_timesteps" if i is None else f"step {i}"
            raise RuntimeError(
                f"{self.name} itself fails in {where}: {type(error).__name__}: {error}. Check its config, the number "
                "of steps and step_options; a scheduler that does not run cannot be captured"
            ) from error


@functools.lru_cache(maxsize=64)
def _parameters(step: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(step).parameters


class Refused(Exception):
    """Carries a refusal through the scheduler's code."""

    def __init__(self, error: TypeError) -> None:
        super().__init__(str(error))
        self.error = error


def latent_scale(scheduler: Any) -> float:
    """What the scheduler multiplies unit latents by."""
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


def check_interface(scheduler: Any, name: str, options: Mapping[str, Any]) -> None:
    """Refuse, with a TypeError, what cannot be stepped with a model output, a timestep and a sample alone."""
    if isinstance(scheduler, type):
        raise TypeError(
            f"capture: got the class {scheduler.__name__}, expected an object of it; write its name with ()"
        )
    for attribute in ("set_timesteps", "step"):
        if not callable(getattr(scheduler, attribute, None)):
            raise TypeError(
                f"capture: {name} has no {attribute}(); expected a scheduler object such as diffusers' have"
            )
    known = inspect.signature(scheduler.step).parameters
    own = ("model_output", "timestep", "sample")
    if not set(own) <= known.keys():
        raise TypeError(f"{name}.step takes ({', '.join(known)}), expected step(model_output, timestep, sample, ...)")
    if "LongTensor" in str(known["sample"].annotation):
        raise TypeError(f"{name}.step moves class indices (a LongTensor), and a row moves continuous samples")
    needed = [
        key
        for key, parameter in known.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and key not in (*own, *options)
    ]
    if needed:
        raise TypeError(
            f"{name}.step also needs {', '.join(needed)}; give constants in step_options, or capture an object around "
            "it that has step(model_output, timestep, sample) and keeps in its attributes what a step hands to the next"
        )
