"""Names and numbers to a Plan: choose the levels, run the solver symbolically, assemble the rows.

May import: process, solvers, run, assemble, plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff.compiler import solvers
from fastdiff.compiler.adaptive import adaptive_plan
from fastdiff.compiler.assemble import assemble
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.run import Run, record
from fastdiff.errors import warn
from fastdiff.process import grids, schedules
from fastdiff.process.schedules import CLEAN, Level, Schedule

STEPS = 20  # of a grid that is named, where the caller says nothing


def plan(
    solver: str,
    schedule: Schedule | str = "linear",
    steps: int | None = None,
    grid: str | Sequence[float] | NDArray[np.float64] = "karras",
    *,
    strength: float = 1.0,
    start_step: int = 0,
    guidance_interval: tuple[float, float] | None = None,
    guidance_schedule: Sequence[float] | Callable[[Level], float] | None = None,
    perturbed_interval: tuple[float, float] | None = None,
    cfg_pp: bool = False,
    clamp: tuple[float, float] | None = None,
    skipping: Mapping[str, Any] | None = None,
    grid_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Plan:
    """Compile a sampler to a table.

    solver: a name of `fd.solvers.names()`; options go to it. schedule: what the noise does, or its name.
    steps: how many levels the grid has, 20 where nothing is said. grid: a name of `fd.grids.names()`, or the levels
    themselves, without the final clean one: descending times on the schedule's clock (0 .. 999 of `linear`, t of
    `rectified_flow`, sigma of `edm`), or with grid_options={"unit": "rho"} sigma/alpha, as `fd.trace` takes them.
    grid_options: of that grid.
    strength: start at this fraction of the schedule's clock instead of its top (img2img by noise level: the start
    level is exact, and the grid's levels below it are kept). start_step: drop this many levels instead (img2img by
    step count). guidance_interval, guidance_schedule, perturbed_interval, cfg_pp, clamp: as in `Plan.guided`.
    skipping: the arguments of `Plan.skipping`, {"every": 2} say: an approximation, some rows do not ask the network. An
    adaptive solver (dpm_adaptive, rk45) goes from the grid's first level to its last, whatever lies between, and makes
    its own steps; its plan is an `AdaptivePlan`, which `Sampler` runs like any other. Warns of steps without an effect.
    Raises ValueError or TypeError, naming what is wrong, and never a half-built plan.
    """
    chosen = solvers.get(solver)
    chosen.check_options(options)
    process = schedules.get(schedule) if isinstance(schedule, str) else schedule
    if not isinstance(process, Schedule):
        raise TypeError(f"plan needs a schedule or its name second, got {schedule!r}; steps= is the third argument")
    name, named = (grid, {}) if isinstance(grid, str) else ("custom", {"levels": grid})
    if "levels" in named and "levels" in (grid_options or {}):
        raise ValueError("the levels are given twice, as grid= and in grid_options=: leave one of them out")
    named |= grid_options or {}

    def cut(count: int | None) -> NDArray[np.float64]:
        return _truncated(grids.make(name, process, count, **named), process, strength, start_step)

    given = name == "custom"  # levels, which are counted where nobody says how many
    count = STEPS if steps is None and not given else steps
    times = cut(None if given and chosen.adaptive else count)
    if chosen.adaptive:
        _check_ends(solver, name, times)
        if steps is not None and (given or _same_ends(times, cut, steps)):
            warn(
                f"{solver} makes its own steps between the ends of the grid, so steps={steps} has no effect: leave it "
                "out; the options rtol and atol say how many it takes",
            )
        top, bottom = (process.level(float(time)) for time in (times[0], times[-1]))
        plain = {key: _plain(value) for key, value in options.items()}
        compiled: Plan = adaptive_plan(chosen, plain, process, name, top, bottom)
    else:
        levels = [process.level(float(time)) for time in times] + [CLEAN]
        if chosen.upward:
            levels.reverse()
        compiled = compile_levels(solver, levels, process, name, options)
    compiled = compiled.guided(
        interval=guidance_interval,
        schedule=guidance_schedule,
        perturbed_interval=perturbed_interval,
        cfg_pp=cfg_pp,
        clamp=clamp,
    )
    return compiled if skipping is None else compiled.skipping(**skipping)


def compile_levels(
    solver: str, levels: Sequence[Level], schedule: Schedule | None, grid: str, options: Mapping[str, Any]
) -> Plan:
    """The plan of a solver on exactly these levels, the last one where the sample is wanted."""
    plain = {key: _plain(value) for key, value in options.items()}
    chosen = solvers.get(solver)
    if chosen.adaptive:
        raise ValueError(
            f"{solver} chooses its levels while it runs and has no table on given ones; make it with fd.plan and run "
            "it with fd.Sampler"
        )
    chosen.check_schedule(schedule)
    run = Run(solver, levels, schedule)
    segments = record(solver, chosen.function, run, plain)
    rows, registers, result = assemble(solver, segments, len(run.givens))
    return Plan(
        solver=solver,
        options={**{k: v for k, v in chosen.options().items() if v is not None}, **plain},
        schedule=schedule,
        grid=grid,
        levels=tuple(levels),
        rows=rows,
        registers=registers,
        result=result,
        draws=run.draws,
        intervals=run.intervals_drawn,
        notes=tuple(run.notes),
        given={name: 1 + k for k, name in enumerate(run.givens)},
        centre=run.centre,
    )


def _truncated(times: NDArray[np.float64], schedule: Schedule, strength: float, start_step: int) -> NDArray[np.float64]:
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength must be in (0, 1], got {strength}: 1 starts from pure noise, small keeps the image")
    if not 0 <= start_step < len(times):
        raise ValueError(
            f"start_step must be in 0..{len(times) - 1} (the grid has {len(times)} levels), got {start_step}"
        )
    if strength < 1.0 and start_step:
        raise ValueError("give strength (a noise level) or start_step (a number of steps), not both")
    if strength == 1.0:
        return times[start_step:]
    low, high = schedule.time_range
    start = low + strength * (high - low)
    return np.concatenate([[start], times[times < start]])


def _check_ends(solver: str, grid: str, times: NDArray[np.float64]) -> None:
    if grid == "custom" and len(times) > 2:
        raise ValueError(
            f"{solver} chooses its own levels: give the first and the last noisy one, grid=[first, last], "
            f"got {len(times)} levels"
        )


def _same_ends(times: NDArray[np.float64], cut: Callable[[int], NDArray[np.float64]], steps: int) -> bool:
    """Whether the grid of another number of steps has these ends; False where there is no such grid."""
    try:
        others = cut(steps - 1 if steps > 2 else steps + 1)
    except ValueError:
        return False
    return bool(np.allclose(times[[0, -1]], others[[0, -1]], rtol=1e-9, atol=0.0))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value
