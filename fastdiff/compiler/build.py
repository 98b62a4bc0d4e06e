"""Names and numbers to a Plan: choose the levels, run the solver symbolically, assemble the rows.

May import: process, solvers, run, assemble, plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff.compiler import solvers
from fastdiff.compiler.assemble import assemble
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.run import Run, record
from fastdiff.process import grids, schedules
from fastdiff.process.schedules import CLEAN, Level, Schedule


def plan(
    solver: str,
    schedule: Schedule | str = "linear",
    steps: int = 20,
    grid: str | Sequence[float] | NDArray[np.float64] = "karras",
    *,
    strength: float = 1.0,
    start_step: int = 0,
    guidance_interval: tuple[float, float] | None = None,
    grid_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Plan:
    """Compile a sampler to a table.

    solver: a name of `fd.solvers.names()`; options go to it. schedule: what the noise does, or its name.
    steps: how many levels the grid has. grid: a name of `fd.grids.names()`, or the levels themselves (descending
    times on the schedule's clock, without the final clean one). grid_options: options of that grid.
    strength: start at this fraction of the schedule's clock instead of its top (img2img by noise level: the start
    level is exact, and the grid's levels below it are kept). start_step: drop this many levels instead (img2img by
    step count). guidance_interval: (low, high) in sigma/alpha; rows outside it evaluate the
    conditional branch alone, half the batch (Kynkäänniemi et al. 2024). Raises ValueError or
    TypeError, naming what is wrong, and never a half-built plan.
    """
    chosen = solvers.get(solver)
    chosen.check_options(options)
    process = schedules.get(schedule) if isinstance(schedule, str) else schedule
    if isinstance(grid, str):
        name, times = grid, grids.make(grid, process, steps, **dict(grid_options or {}))
    else:
        name, times = "custom", grids.make("custom", process, None, levels=grid, **dict(grid_options or {}))
    times = _truncated(times, process, strength, start_step)
    levels = [process.level(float(time)) for time in times] + [CLEAN]
    if chosen.upward:
        levels.reverse()
    compiled = compile_levels(solver, levels, process, name, options)
    return compiled if guidance_interval is None else _guided_within(compiled, guidance_interval)


def compile_levels(
    solver: str, levels: Sequence[Level], schedule: Schedule | None, grid: str, options: Mapping[str, Any]
) -> Plan:
    """The plan of a solver on exactly these levels, the last one where the sample is wanted."""
    plain = {key: _plain(value) for key, value in options.items()}
    chosen = solvers.get(solver)
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


def _guided_within(compiled: Plan, interval: tuple[float, float]) -> Plan:
    low, high = interval
    if not 0.0 <= low < high:
        raise ValueError(f"guidance_interval must be (low, high) in sigma/alpha with 0 <= low < high, got {interval}")
    rows = (
        row if row.level is None else replace(row, gain=float(low <= row.level.rho <= high)) for row in compiled.rows
    )
    return replace(compiled, rows=tuple(rows))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value
