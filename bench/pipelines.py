"""Whole calls of diffusers' pipelines, tiny components, before and after `accelerate`.

Two figures, never mixed: the time a step takes outside the network, from the beginning of the denoising loop to its end
less the time inside calls of the network, over the number of evaluations; and the whole call, with all that is before
and after the loop. Both are taken the same way on both sides, in turn, and the pictures are compared. A row comes after
milliseconds of network that leave nothing of it in the cache, so it takes a few times what it takes in a loop of its
own.
"""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from bench import measure, peers, tiny_pipelines
from bench.measure import Task, Timing
from fastdiff.engine import backends
from fastdiff.integrations.diffusers import accelerate

STEPS = 20
SECONDS = 10.0  # of each case
TOLERANCE = 0.1 / 255  # of pictures in [0, 1]
LATENT: dict[str, Any] = tiny_pipelines.LATENT
TEXT: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {**LATENT, "clip_sample": False, "steps_offset": 1},
    "PNDMScheduler": {**LATENT, "skip_prk_steps": True, "steps_offset": 1},
    "EulerDiscreteScheduler": {**LATENT, "steps_offset": 1},
    "EulerAncestralDiscreteScheduler": {**LATENT, "steps_offset": 1},
    "DPMSolverMultistepScheduler": {**LATENT, "use_karras_sigmas": True},
    "UniPCMultistepScheduler": LATENT,
}
FLOW: dict[str, dict[str, Any]] = {"FlowMatchEulerDiscreteScheduler": {"shift": 3.0}}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "DDPMPipeline": {"DDPMScheduler": {}, "DPMSolverMultistepScheduler": {}},
    "DDIMPipeline": {"DDIMScheduler": {}},
    "DiTPipeline": {"DDIMScheduler": {"clip_sample": False}, "DPMSolverMultistepScheduler": {}},
    "StableDiffusionPipeline": TEXT,
    "StableDiffusionImg2ImgPipeline": {name: TEXT[name] for name in ("DDIMScheduler", "DPMSolverMultistepScheduler")},
    "StableDiffusionXLPipeline": {name: TEXT[name] for name in ("EulerDiscreteScheduler", "UniPCMultistepScheduler")},
    "StableDiffusionXLImg2ImgPipeline": {"EulerDiscreteScheduler": TEXT["EulerDiscreteScheduler"]},
    "StableDiffusion3Pipeline": FLOW,
    "StableDiffusion3Img2ImgPipeline": FLOW,
    "FluxPipeline": {"FlowMatchEulerDiscreteScheduler": {"use_dynamic_shifting": True}},
    "FluxImg2ImgPipeline": {"FlowMatchEulerDiscreteScheduler": {"use_dynamic_shifting": True}},
}


class Clock:
    """Seconds of the last call: in its denoising loop, and of those in the network; and how often it was evaluated."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """A new call."""
        self.loop = self.network = 0.0
        self.evaluations = 0

    def around(self, net: nn.Module) -> None:
        """Time this network's calls from here on."""
        own: Any = type(net)

        def __call__(network: Any, *args: Any, **kw: Any) -> Any:
            started = time.perf_counter()
            output = own.__call__(network, *args, **kw)
            self.network += time.perf_counter() - started
            self.evaluations += 1
            return output

        net.__class__ = type(own.__name__, (own,), {"__call__": __call__, "__module__": own.__module__})

    @property
    def outside(self) -> float:
        """Microseconds of an evaluation's share of the loop that are not the network's."""
        return (self.loop - self.network) / max(self.evaluations, 1) * 1e6


class _Timed:
    """A progress bar that adds the time from its beginning to its end to a clock: the loop's."""

    def __init__(self, bar: Any, clock: Clock) -> None:
        self._bar, self._clock = bar, clock

    def __enter__(self) -> Any:
        self._started = time.perf_counter()
        return self._bar.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)
        self._clock.loop += time.perf_counter() - self._started

    def __iter__(self) -> Iterator[Any]:
        started = time.perf_counter()
        yield from self._bar
        self._clock.loop += time.perf_counter() - started


def timing_loops(clocks: dict[int, Clock]) -> Any:
    """Every pipeline's loop timed, by the clock of its id."""
    from diffusers import DiffusionPipeline

    own = DiffusionPipeline.progress_bar
    return mock.patch.object(
        DiffusionPipeline,
        "progress_bar",
        lambda self, iterable=None, total=None: _Timed(own(self, iterable, total), clocks[id(self)]),
    )


def run(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Measure every pipeline and scheduler, one line at a time."""
    warnings.filterwarnings("ignore", module="diffusers")
    if not (peers.has_diffusers() and importlib.util.find_spec("transformers")):
        print("diffusers' pipelines need diffusers and transformers: pip install diffusers transformers")
        return
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    for kind, schedulers in {"StableDiffusion3Pipeline": FLOW}.items() if quick else CASES.items():
        for name, config in schedulers.items():
            yield case(kind, getattr(diffusers, name)(**config), device, 0.2 if quick else SECONDS)


def case(kind: str, scheduler: Any, device: torch.device, budget: float) -> dict[str, Any]:
    """One pipeline with one scheduler, before and after."""
    watch = measure.Watch()
    clocks = {"us": Clock(), "diffusers_us": Clock()}
    pipes = {key: tiny_pipelines.make(kind, type(scheduler).from_config(scheduler.config)).to(device) for key in clocks}
    for key, pipe in pipes.items():
        clocks[key].around(getattr(pipe, "unet", None) or pipe.transformer)
    accelerate(pipes["us"])
    loops = {id(pipe): clocks[key] for key, pipe in pipes.items()}
    strength = {"strength": 1.0} if "Img2Img" in kind else {}

    def call(key: str, **options: Any) -> Any:
        clocks[key].reset()
        given = tiny_pipelines.arguments(kind, steps=STEPS) | strength | options
        given["generator"] = torch.Generator(device).manual_seed(0)
        on_device = {name: value.to(device) if torch.is_tensor(value) else value for name, value in given.items()}
        return pipes[key](**on_device).images

    with timing_loops(loops):
        ours, theirs = call("us"), call("diffusers_us")
        error = float(np.abs(ours - theirs).max())
        line: dict[str, Any] = {
            "bench": "pipelines",
            "network": kind,
            "solver": type(scheduler).__name__,
            "steps": STEPS,
            "batch": 1,
            "shape": "x".join(map(str, ours.shape)),
            "executor": backends.choose(device),
            "gate": "green" if error <= TOLERANCE and ours.std() > 0.01 else "red",
            "error": error,
            "tolerance": TOLERANCE,
        }
        if line["gate"] == "red":
            return line
        outside: dict[str, list[float]] = {key: [] for key in clocks}

        def task(key: str) -> Callable[[], None]:
            def timed() -> None:
                call(key, output_type="latent" if hasattr(pipes[key], "vae") and "DiT" not in kind else "pt")
                outside[key].append(clocks[key].outside)

            return timed

        tasks = {key: Task(task(key)) for key in clocks}
        timings = measure.interleave(tasks, device, budget, least=3, most=200, warm_up=1)
    for key, timing in timings.items():
        whole = key.removesuffix("us") + "seconds"
        line |= {whole: timing.median / 1e6, f"{whole}_p20": timing.p20 / 1e6, f"{whole}_p80": timing.p80 / 1e6}
        if device.type == "cpu":  # a GPU works on while the host's clock says that a network has returned
            alone = Timing.of(outside[key][-timing.repetitions :])
            line |= {key: alone.median, f"{key}_p20": alone.p20, f"{key}_p80": alone.p80}
    if device.type == "cpu":
        line["ratio_diffusers"] = line["diffusers_us"] / line["us"]
    line["repetitions"] = timings["us"].repetitions
    others = watch.others()
    return line | ({} if others is None else {"others": round(others, 3)})
