"""`fd.sample`: from a model and a few names to images, in one call. May import: compiler, sampler."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.compiler import solvers
from fastdiff.compiler.build import plan as build_plan
from fastdiff.compiler.plan import Plan
from fastdiff.engine.arguments import settle_guidance, settle_perturbation
from fastdiff.engine.external import Noise
from fastdiff.engine.guidance import DynamicThreshold, Rule
from fastdiff.engine.loop import RowInfo
from fastdiff.engine.sampler import Sampler
from fastdiff.engine.skipping import AdaptiveSkip
from fastdiff.errors import warn
from fastdiff.models.denoiser import Condition, Denoiser
from fastdiff.process import elsewhere


def sample(
    model: Denoiser,
    shape: Sequence[int],
    solver: str = "dpmpp_2m",
    steps: int | None = None,
    grid: str | Sequence[float] = "karras",
    *,
    seed: int | Sequence[int] | Tensor = 0,
    init: Tensor | None = None,
    strength: float = 1.0,
    start_step: int = 0,
    noise: Noise = "white",
    cond: Condition = None,
    uncond: Condition = None,
    guidance: float | Sequence[float] | Tensor | None = None,
    callback: Callable[[RowInfo], None] | None = None,
    progress: bool = False,
    backend: str = "auto",
    graph: bool | str = "auto",
    memory_format: torch.memory_format = torch.contiguous_format,
    grid_options: Mapping[str, Any] | None = None,
    rule: Rule | None = None,
    threshold: DynamicThreshold | None = None,
    guide: Denoiser | None = None,
    perturbed: Denoiser | None = None,
    perturbed_cond: Condition = None,
    perturbed_scale: float | Sequence[float] | Tensor | None = None,
    given: Mapping[str, Tensor] | None = None,
    skip: AdaptiveSkip | None = None,
    max_batch: int | str | None = None,
    **options: Any,
) -> Tensor:
    """Draw samples from a model: fp32 [B, *S].

    solver, steps, grid, grid_options, **options: the plan (`fd.plan`); an adaptive solver takes its two ends from the
    grid and a tolerance (rtol, atol) from the options. init, strength, start_step: an image to start
    from, noised to the level `strength` of the way up the model's clock, or to the one after `start_step` others.
    The rest as in `Sampler.sample` and `Sampler`.
    """
    if not isinstance(model, Denoiser):
        raise TypeError(
            f"sample needs a Denoiser, got {type(model).__name__}; wrap the network: "
            'fd.Denoiser(net, schedule=fd.schedules.linear(), prediction="eps")'
        )
    if isinstance(solver, Plan):
        raise TypeError("sample makes its own plan: run one that is made with fd.Sampler(plan, model).sample(shape)")
    _check_names(solver, options)
    plan = build_plan(
        solver,
        model.schedule,
        steps,
        grid,
        strength=strength,
        start_step=start_step,
        grid_options=grid_options,
        **options,
    )
    upward = solvers.get(solver).upward
    if init is None and (strength != 1.0 or upward):
        why = f"{solver} goes from an image up to noise and" if upward else "strength < 1"
        raise ValueError(f"{why} needs init=, the image to start from")
    if init is not None and strength == 1.0 and start_step == 0 and not upward:
        raise ValueError(
            "init= needs strength= below 1 (or start_step=): from the top level nothing of it would be left"
        )
    # a sampler may hold networks for those of its runs that ask for them; here is one run
    settle_guidance(guidance, uncond, plan.reads_unguided, guide)
    settle_perturbation(perturbed_scale, perturbed_cond, perturbed)
    if guidance is None and not plan.reads_unguided:
        _refuse_idle(options, "guidance", ("guidance_interval", "guidance_schedule"))
    if perturbed_scale is None:
        _refuse_idle(options, "perturbed_scale", ("perturbed_interval",))
    _warn_of_bytes(init)
    return Sampler(plan, model, backend, graph, memory_format, guide, perturbed).sample(
        shape, seed, init, noise, cond, uncond, guidance, callback, progress, "image",
        rule, threshold, perturbed_cond, perturbed_scale, given, skip, max_batch,
    )  # fmt: skip


def _refuse_idle(options: Mapping[str, Any], amount: str, names: Sequence[str]) -> None:
    for name in names:
        if options.get(name) is not None:
            raise ValueError(
                f"{name}= says where {amount} applies, and there is none: give {amount}= too, or leave {name}= out"
            )


def _warn_of_bytes(init: Tensor | None) -> None:
    """UserWarning where the image to start from looks like one of 0 .. 255: all of it positive, and far above 1."""
    if not isinstance(init, Tensor) or not init.is_floating_point() or init.is_cuda or init.numel() == 0:
        return
    low, high = (float(value) for value in init.aminmax())
    if low >= 0 and high > 64:
        warn(
            f"init goes from {low:g} to {high:g}, and a picture from -1 to 1: where it is of 0 .. 255, give "
            "init / 127.5 - 1",
        )


ELSEWHERE = {  # what other libraries call them
    "device": "it draws on the network's device; move that, model.to('cuda')",
    "dtype": "the state is float32 and the network has its own; cast that, model.to(dtype=torch.float16)",
    "generator": "write seed=, a number for every sample",
    "guidance_scale": "write guidance=",
    "negative_prompt": "write uncond=, the condition of the unguided branch",
    "scheduler": "write solver=, a name of fd.solvers.names(), or run fd.capture(scheduler) with fd.Sampler",
}


def _check_names(solver: str, options: Mapping[str, Any]) -> None:
    """TypeError for a keyword that is nobody's; it names the arguments of `sample` that are spelt like it."""
    known = solvers.get(solver).options()
    own = [name for function in (sample, build_plan) for name in inspect.signature(function).parameters]
    for name in options:
        instead = ELSEWHERE.get(name) or elsewhere.argument(name)
        if instead and name not in known:
            raise TypeError(f"sample has no argument {name!r}: {instead}")
        close = difflib.get_close_matches(name, own, n=2, cutoff=0.7)
        if name not in known and name not in own and close:
            raise TypeError(f"sample has no argument {name!r}. Did you mean {' or '.join(map(repr, close))}?")
