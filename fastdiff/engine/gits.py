"""`fd.gits`: measure on a model what each jump between levels costs, and choose the grid from it.

May import: process, compiler, models.denoiser, files, arguments, noise, seeds, sampler.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.compiler.build import plan as build_plan
from fastdiff.compiler.layout import STREAM_LATENT
from fastdiff.compiler.plan import Plan
from fastdiff.engine.arguments import batch_shape, settle_guidance
from fastdiff.engine.loop import RowInfo
from fastdiff.engine.noise import normal
from fastdiff.engine.sampler import Sampler
from fastdiff.engine.seeds import per_sample
from fastdiff.files import check_writable_file, write_atomically
from fastdiff.models.denoiser import Condition, Denoiser
from fastdiff.process.clocks import Array, Level
from fastdiff.process.gits import COEFFICIENT, Costs, read


def gits(
    model: Denoiser,
    shape: Sequence[int],
    steps: int,
    *,
    cache: str | os.PathLike[str] | None = None,
    coefficient: float = COEFFICIENT,
    seed: int | Sequence[int] | Tensor = 0,
    cond: Condition = None,
    uncond: Condition = None,
    guidance: float | Sequence[float] | Tensor | None = None,
    teacher: str = "ipndm",
    teacher_steps: int = 60,
    teacher_grid: str = "karras",
) -> Array:
    """The `steps` levels that serve this model best (GITS: Chen et al. 2024), for `grid=` of `fd.plan` and `fd.sample`.

    A teacher of `teacher_steps` evaluations draws a batch of `shape` [B, *S] from `seed`, with these conditions and
    this guidance. In x/alpha, with rho = sigma/alpha and D_i, n_i the teacher's estimates of data and noise at level i,
    c[i][j] = mean over the batch of |D_i + rho_j n_i - x_j/alpha_j|, one Euler jump from i to j; then
    fastdiff.process.gits.best_path. Returns times, [steps] float64, the first the schedule's noisiest.

    cache: a file of the costs, a few tens of kB. If it is there it is read instead of running the teacher; with
    grid="gits", grid_options={"cache": ...} it gives the levels for any other number of steps. It does not know the
    network's weights or the conditions: delete it when they change. Keeps 2 (teacher_steps + 1) batches on the device.
    Raises ValueError for a teacher that draws noise or does not evaluate once per level, for uncond without guidance,
    for a damaged file and for one measured otherwise than asked for, naming what differs. Deterministic.
    """
    if not isinstance(model, Denoiser):
        raise TypeError(f"gits needs a Denoiser, got {type(model).__name__}; wrap the network: fd.Denoiser(net, ...)")
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, the number of levels of the grid, got {steps!r}")
    shape = batch_shape(shape)
    seeds = per_sample(seed, shape[0])
    weights = settle_guidance(guidance, uncond, reads_unguided=False)
    measured = {
        "shape": list(shape),
        "seeds": seeds.tolist(),
        "guidance": torch.as_tensor(weights, dtype=torch.float64).flatten().tolist(),
        "prediction": model.prediction,
        "teacher": teacher,
        "teacher_steps": int(teacher_steps),
        "teacher_grid": teacher_grid,
    }
    if cache is not None and Path(cache).is_file():
        costs = read(cache, model.schedule)
        _check_same(costs.measured, measured, Path(cache))
        return costs.levels(steps, coefficient)
    if cache is not None:
        check_writable_file(Path(cache))  # before the teacher runs, which may take minutes
    plan = build_plan(teacher, model.schedule, teacher_steps, teacher_grid)
    _check_teacher(plan)
    states, estimates = _trajectory(plan, model, shape, seeds, cond, uncond, weights)
    cost = _jump_costs(states, estimates, plan.levels)
    costs = Costs(model.schedule, np.array([level.time for level in plan.levels[:-1]]), cost, measured)
    levels = costs.levels(steps, coefficient)
    if cache is not None:
        write_atomically(Path(cache), lambda temporary: temporary.write_text(costs.to_json(), encoding="utf-8"))
    return levels


def _check_teacher(plan: Plan) -> None:
    evaluated = [row.level for row in plan.rows[1:]]
    if plan.stochastic or evaluated != list(plan.levels[:-1]):
        raise ValueError(
            f"teacher {plan.solver!r} {'draws noise' if plan.stochastic else 'does not evaluate once at each level'}, "
            "so it has no trajectory to compare with; use ipndm, dpmpp_2m, unipc or ddim"
        )


def _check_same(stored: Mapping[str, Any], asked: Mapping[str, Any], path: Path) -> None:
    different = [key for key in asked if stored.get(key) != asked[key]]
    if different:
        key = different[0]
        raise ValueError(
            f"the GITS costs in {path} were measured with {key} {stored.get(key)!r}, asked for with {asked[key]!r}; "
            "delete the file to measure again, give another name, or take it as it is: grid='gits', "
            f"grid_options={{'cache': {str(path)!r}}}"
        )


def _trajectory(
    plan: Plan,
    model: Denoiser,
    shape: torch.Size,
    seeds: Tensor,
    cond: Condition,
    uncond: Condition,
    guidance: float | Sequence[float] | Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """The teacher's states at every level, the clean one too, and its estimates D at all but that, each [B, d]."""
    start = _latents(seeds, shape).mul_(plan.levels[0].sigma).to(model.device)
    states, estimates = [start.flatten(1)], []

    def record(at: RowInfo) -> None:
        estimates.append(at.denoised.clone(memory_format=torch.contiguous_format).flatten(1))
        states.append(at.state.clone(memory_format=torch.contiguous_format).flatten(1))

    Sampler(plan, model).sample(
        shape, seeds, start, cond=cond, uncond=uncond, guidance=guidance, callback=record, opening="state"
    )
    return states, estimates


def _latents(seeds: Tensor, shape: torch.Size) -> Tensor:
    """The unit normals from which a run with these seeds starts."""
    size = math.prod(shape[1:])
    return torch.stack([torch.from_numpy(normal(seed, size, 0, STREAM_LATENT)) for seed in seeds.tolist()]).view(shape)


def _jump_costs(states: Sequence[Tensor], estimates: Sequence[Tensor], levels: Sequence[Level]) -> Array:
    """c[i][j > i] = mean |D_i + rho_j n_i - x_j/alpha_j| with n_i = (x_i - alpha_i D_i)/sigma_i; 0 elsewhere."""
    cost = np.zeros((len(levels), len(levels)))
    ends = [x / level.alpha for x, level in zip(states[1:], levels[1:], strict=True)]
    for i, (level, denoised) in enumerate(zip(levels[:-1], estimates, strict=True)):
        noise = (states[i] - level.alpha * denoised) / level.sigma
        jumps = zip(levels[i + 1 :], ends[i:], strict=True)
        distances = [(denoised + to.rho * noise - end).norm(dim=1).mean() for to, end in jumps]
        cost[i, i + 1 :] = torch.stack(distances).cpu().double().numpy()
    return cost
