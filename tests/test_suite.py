"""The whole product of samplers, schedules, grids and predictions, and the suite that a user's own sampler runs too."""

from __future__ import annotations

import math

import numpy as np
import pytest
from solver_cases import CASES, FLOW_ONLY, Case

import fastdiff as fd
from fastdiff.compiler import solvers
from fastdiff.compiler.build import compile_levels
from fastdiff.compiler.verify import verify
from fastdiff.engine import suite
from fastdiff.process import grids, predictions
from fastdiff.process.schedules import CLEAN, Level, Schedule

SHIPPED = sorted({case.solver for case in CASES})
DEFAULT = {case.solver: case for case in CASES if not case.options} | {"pndm": Case("pndm")}
# what a combination without meaning says, and where it may say so
NO_GRID = {"ays": "Align Your Steps has no levels for", "flow_shift": "flow_shift is for flow schedules"}
NO_SIGNAL = "alpha = 0"


def levels_of(grid: str, schedule: Schedule, steps: int) -> list[Level]:
    if grid == "custom":
        times = grids.make("custom", schedule, None, levels=grids.make("linspace", schedule, steps))
    else:
        times = grids.make(grid, schedule, steps)
    return [schedule.level(float(time)) for time in times] + [CLEAN]


def refused_grid(grid: str, schedule: Schedule) -> bool:
    if grid == "ays":
        return not math.isclose(schedule.rho_max, 14.615, rel_tol=0.01)
    return grid == "flow_shift" and schedule.kind != "flow"


@pytest.fixture(scope="module")
def places() -> dict[tuple[str, str], list[Level]]:
    """Four levels of every grid on every schedule that has them; the others are refused by name."""
    found = {}
    for name, schedule in suite.processes().items():
        for grid in grids.names():
            if refused_grid(grid, schedule):
                with pytest.raises(ValueError, match=NO_GRID[grid]):
                    levels_of(grid, schedule, 4)
            else:
                found[name, grid] = levels_of(grid, schedule, 4)
    assert len(found) > 180
    return found


def reason(solver: str, schedule: Schedule, levels: list[Level]) -> str | None:
    """What the error must say where a sampler has no meaning on these levels; None where it must compile."""
    if solver in FLOW_ONLY:
        return None if schedule.kind == "flow" else f"{solver} needs a flow schedule"
    if solver == "euler_maruyama" and schedule.steps is not None:
        # a first level without signal is found before the missing clock is
        return NO_SIGNAL if levels[0].alpha == 0.0 else "is discrete and has no SDE"
    return (
        NO_SIGNAL
        if levels[0].alpha == 0.0 and not DEFAULT[solver].applies(suite.processes()["rectified_flow"])
        else None
    )


@pytest.mark.parametrize("solver", SHIPPED)
def test_every_schedule_grid_and_prediction(solver: str, places: dict[tuple[str, str], list[Level]]) -> None:
    """Four steps of everything: a plan that keeps its laws and packs for every network, or an error of a known kind."""
    upward = solvers.get(solver).upward
    options = {"inner": 2} if solver == "annealed_langevin" else {}  # a tenth of its rows
    compiled = 0
    for (name, grid), levels in places.items():
        schedule = suite.processes()[name]
        expected = reason(solver, schedule, levels)
        ordered = levels[::-1] if upward else levels
        if expected is not None:
            with pytest.raises(ValueError, match=expected):
                compile_levels(solver, ordered, schedule, grid, options)
            continue
        plan = compile_levels(solver, ordered, schedule, grid, options)
        report = verify(plan, refine=False)
        assert report.ok, f"{name} {grid}: {report}"
        compiled += 1
        evaluated = [row.level for row in plan.rows if row.level is not None]
        blind = any(level.alpha == 0.0 for level in evaluated)
        for kind in predictions.names():
            if blind and kind in ("eps", "score", "edm"):
                with pytest.raises(ValueError, match=NO_SIGNAL if kind != "edm" else "not finite"):
                    plan.pack(kind)
            else:
                assert np.isfinite(plan.pack(kind).coef[:, fd.compiler.layout.P : fd.compiler.layout.Q + 1]).all()
    assert compiled >= len(places) - 180 if solver not in FLOW_ONLY else compiled >= 18


def trial_id(trial: suite.Trial) -> str:
    return str(trial)


@pytest.mark.parametrize("trial", [t for case in DEFAULT.values() for t in suite.trials(case.solver)], ids=trial_id)
def test_suite(trial: suite.Trial) -> None:
    """Every sampler with every schedule, every grid, every prediction and every executor of the CPU."""
    outcome = trial.run()
    assert outcome.ok, outcome.sentence
    if trial.what != "executor":
        assert outcome.refused == meaningless(trial), outcome.sentence


def meaningless(trial: suite.Trial) -> bool:
    schedule = suite.processes()[trial.schedule]
    first = levels_of(trial.grid, schedule, 8)[0]
    if trial.what == "prediction":
        return first.alpha == 0.0 and trial.name in ("eps", "score", "edm")
    return any(reason(trial.solver, schedule, levels_of(trial.grid, schedule, n)) for n in suite.STEPS)
