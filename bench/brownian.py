"""Brownian noise: a whole step of `dpmpp_2m_sde` on a path, against k-diffusion's function and its Brownian tree.

Both run steps 6 to 15 of the same 20 levels on a network that returns a stored tensor, and both draw every increment
for the first time. Ours is the row that draws its increment, makes the step and writes the next network input and time;
theirs is `sample_dpmpp_2m_sde` itself over those levels, with one tree for the batch (its default, and faster than one
per sample), made beforehand and not timed. The noise alone is timed too: ours as a row that only draws.
The numbers drawn differ by construction, so the gate is in two parts: the same normals given to both lead through the
same states, and our increments, as the executor draws them, have unit variance and add up to one path at any number of
steps.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastdiff as fd
from bench import measure, ops
from bench.measure import Task
from fastdiff.compiler.assemble import Output
from fastdiff.compiler.brownian import on_path

SOLVER, STEPS = "dpmpp_2m_sde", 20
SHAPES = ((1, 3, 32, 32), (64, 3, 32, 32), (64, 4, 128, 128))
TOLERANCE = 1e-5  # of the largest element, after 20 steps that each round in fp32
COARSE, FINE = 10, 40  # step counts whose noise must add up to the same path
SAME_PATH = 0.98  # least correlation; interval ends are rounded to a sixty-fourth, see fastdiff.compiler.brownian
CHECKED_ELEMENTS = 1 << 18


class Missing(ImportError):
    """The peer is not installed; the message says what to do."""


def k_diffusion() -> types.ModuleType:
    """k-diffusion's file of samplers with its Brownian tree; what the rest of that package imports is left out."""
    for name, install in (
        ("k_diffusion", "pip install --no-deps k-diffusion"),
        ("torchsde", "pip install -e '.[bench]'"),
        ("torchdiffeq", "pip install -e '.[bench]'"),
        ("scipy", "pip install -e '.[bench]'"),
    ):
        if importlib.util.find_spec(name) is None:
            raise Missing(f"{name.replace('_', '-')} is not installed and there is nothing to compare with: {install}")
    found = importlib.util.find_spec("k_diffusion")
    assert found is not None and found.submodule_search_locations
    package, utilities = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
    package.utils = utilities  # type: ignore[attr-defined]
    path = Path(found.submodule_search_locations[0]) / "sampling.py"
    spec = importlib.util.spec_from_file_location("k_diffusion.sampling", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"k_diffusion": package, "k_diffusion.utils": utilities}):
        spec.loader.exec_module(module)
    return module


def plan_of(steps: int = STEPS) -> fd.Plan:
    """The sampler both sides run: levels of Karras et al. from 80 to 0.002."""
    return fd.plan(SOLVER, "edm", steps, "karras")


def noise_only(plan: fd.Plan) -> fd.Plan:
    """The plan with every step reduced to its unit increment, which takes the state's place."""

    def reduced(row: Any) -> Any:
        if not row.noise:
            return row
        scale = math.hypot(*row.outputs[0].noise)
        only = Output(row.x, 0.0, (), 0.0, tuple(c / scale for c in row.outputs[0].noise))
        return dataclasses.replace(row, slots=(), outputs=(only,))

    return dataclasses.replace(plan, rows=tuple(reduced(row) for row in plan.rows))


def deterministic_error(sampling: Any, shape: tuple[int, ...], executor: str, device: torch.device) -> float:
    """The largest difference of the states both evaluate, of their largest element, on the same normals."""
    generator = torch.Generator(device).manual_seed(1)
    plan = plan_of()
    draws = torch.randn(plan.draws, *shape, generator=generator, device=device)
    estimates = torch.randn(plan.nfe, *shape, generator=generator, device=device)
    start = plan.levels[0].sigma * torch.randn(shape, generator=generator, device=device)

    def network(seen: list[Tensor]) -> Callable[..., Tensor]:
        def evaluate(x: Tensor, level: Tensor) -> Tensor:
            seen.append(x.clone())
            return estimates[len(seen) - 1]

        return evaluate

    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    sampler = fd.Sampler(plan, fd.Denoiser(network(ours), "edm", "x0", device=device), executor, graph=False)
    sampler.sample(shape, init=start, noise=draws)
    given = iter(draws)
    sigmas = torch.tensor([level.sigma for level in plan.levels], dtype=torch.float64)
    sampling.sample_dpmpp_2m_sde(network(theirs), start, sigmas, disable=True, noise_sampler=lambda *_: next(given))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def increments(steps: int, shape: tuple[int, ...], executor: str, device: torch.device) -> Tensor:
    """[steps - 1, *shape]: the unit increments of a run, as the executor draws them."""
    plan = noise_only(on_path(plan_of(steps)))
    case = ops.Case(SOLVER, shape, torch.float32, executor)
    bound = ops.Bound(case, device, range(plan.nfe - 1), plan, "x0")
    drawn = []
    for row in plan.rows[1:-1]:
        bound.step(bound.model_out)
        drawn.append(bound.tensors.state[row.x].clone())
    return torch.stack(drawn)


def path_law(shape: tuple[int, ...], executor: str, device: torch.device) -> tuple[float, float]:
    """(variance of the increments and their sums, the furthest from 1; correlation of a path in few and many steps)."""
    paths, variances = [], []
    for steps in (COARSE, STEPS, FINE):
        drawn = increments(steps, shape, executor, device).flatten(1)
        rhos = [level.rho for level in plan_of(steps).levels[:-1]]
        # the path lives on log(sigma/alpha); an increment over an interval is its length to the power 1/2, times z
        lengths = torch.tensor([math.log(s / t) for s, t in itertools.pairwise(rhos)], device=device)
        paths.append((lengths / lengths.sum()).sqrt() @ drawn)
        variances += [*drawn.var(1).tolist(), float(paths[-1].var())]
    correlation = float(torch.corrcoef(torch.stack([paths[0], paths[-1]]))[0, 1])
    return max(variances, key=lambda variance: abs(variance - 1.0)), correlation


def gate(sampling: Any, shape: tuple[int, ...], executor: str, device: torch.device) -> dict[str, Any]:
    """The columns that say whether the results are right; the law over about CHECKED_ELEMENTS, whatever the batch."""
    many = (max(1, CHECKED_ELEMENTS // math.prod(shape[1:])), *shape[1:])
    error = deterministic_error(sampling, (min(shape[0], many[0]), *shape[1:]), executor, device)
    variance, correlation = path_law(many, executor, device)
    spread = 6.0 * math.sqrt(2.0 / math.prod(many))  # six standard errors of a variance
    right = error <= TOLERANCE and abs(variance - 1.0) <= spread and correlation >= SAME_PATH
    return {
        "gate": "green" if right else "red",
        "error": error,
        "tolerance": TOLERANCE,
        "variance": variance,
        "path_correlation": correlation,
    }


def _ours(plan: fd.Plan, case: ops.Case, device: torch.device, emit: bool) -> Task:
    bound = ops.Bound(case, device, plan=plan, prediction="x0")
    step = bound.step_and_emit if emit else bound.step

    def walk() -> None:
        for _ in ops.TIMED:
            step(bound.model_out)

    def reset() -> None:
        bound.reset()
        step(bound.model_out)

    reset()
    return Task(measure.captured(walk) if device.type == "cuda" else walk, len(ops.TIMED), reset)


def _tasks(sampling: Any, case: ops.Case, device: torch.device) -> dict[str, Task]:
    plan = plan_of()
    walked = on_path(plan)
    x, denoised = torch.randn(case.shape, device=device), torch.randn(case.shape, device=device)
    # on the CPU, wherever the state is: each is read as a number in every step
    sigmas = torch.tensor([level.sigma for level in plan.levels])
    part = sigmas[ops.TIMED[0] : ops.TIMED[-1] + 2]
    tree: Any = None

    def plant() -> None:
        nonlocal tree
        tree = sampling.BrownianTreeNoiseSampler(x, sigmas[-2], sigmas[0], seed=0)

    @torch.inference_mode()
    def theirs() -> None:
        sampling.sample_dpmpp_2m_sde(lambda x, sigma: denoised, x, part, disable=True, noise_sampler=tree)

    @torch.inference_mode()
    def their_noise() -> None:
        for sigma, following in itertools.pairwise(part):
            tree(sigma, following)

    return {
        "us": _ours(walked, case, device, emit=True),
        "noise_us": _ours(noise_only(walked), case, device, emit=False),
        "k_diffusion_us": Task(theirs, len(ops.TIMED), plant),
        "k_diffusion_noise_us": Task(their_noise, len(ops.TIMED), plant),
    }


def run(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Measure every shape, one line at a time; nothing, with the reason printed, where the peer is not installed."""
    warnings.filterwarnings("ignore", module="torchsde")
    try:
        sampling = k_diffusion()
    except Missing as missing:
        print(missing)
        return
    torch.manual_seed(0)
    executors = ops.executors(device)
    with torch.no_grad():
        for shape, executor in itertools.product(
            SHAPES[:1] if quick else SHAPES, executors[:1] if quick else executors
        ):
            started = time.perf_counter()
            line = _case(sampling, ops.Case(SOLVER, shape, torch.float32, executor), device, quick)
            yield line | {"took": round(time.perf_counter() - started, 1)}


def _case(sampling: Any, case: ops.Case, device: torch.device, quick: bool) -> dict[str, Any]:
    watch = measure.Watch()
    line = {
        "bench": "brownian",
        "solver": case.solver,
        "steps": STEPS,
        "shape": "x".join(map(str, case.shape)),
        "elements": math.prod(case.shape),
        "model_dtype": "float32",
        "executor": case.executor,
        **gate(sampling, case.shape, case.executor, device),
    }
    if line["gate"] == "red":
        return line
    # their tree takes seconds a step on large batches
    tasks, budget, least = _tasks(sampling, case, device), 0.1 if quick else 6.0, 3 if quick else 5
    timings = measure.interleave(tasks, device, budget, least, warm_up=1)
    for name, timing in timings.items():
        line |= ops.spread(name, timing)
    line["ratio_k_diffusion"] = timings["k_diffusion_us"].median / timings["us"].median
    line["ratio_noise"] = timings["k_diffusion_noise_us"].median / timings["noise_us"].median
    line["repetitions"] = timings["us"].repetitions
    others = watch.others()
    return line | ({} if others is None else {"others": round(others, 3)})
