"""All pairs of samplers, schedules, grids and predictions, and the suite that a user's own sampler runs too."""

from __future__ import annotations

import inspect
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from solver_cases import CASES, FLOW_ONLY, Case

import fastdiff as fd
from fastdiff import cli
from fastdiff.compiler import convergence, solvers
from fastdiff.compiler.build import compile_levels
from fastdiff.compiler.solvers import registry
from fastdiff.compiler.solvers.steps import ancestral_split, ode_step
from fastdiff.compiler.verify import verify
from fastdiff.engine import suite
from fastdiff.process import grids, predictions, schedules
from fastdiff.process.schedules import CLEAN, Level, Schedule

SHIPPED = sorted({case.solver for case in CASES})
DEFAULT = {case.solver: case for case in CASES if not case.options} | {"pndm": Case("pndm")}
# a tenth of its rows; test_solver_laws.py has those of its defaults
FEWER: dict[str, dict[str, Any]] = {"annealed_langevin": {"inner": 2}}
# what a combination without meaning says, and where it may say so
NO_GRID = {
    "ays": "Align Your Steps has no levels for",
    "flow_shift": "flow_shift is for flow schedules",
    "gits": "gits is measured on a model",
}
NO_SIGNAL = "alpha = 0"


@cache
def levels_of(grid: str, name: str, steps: int) -> list[Level]:
    schedule = suite.processes()[name]
    if grid == "custom":
        times = grids.make("custom", schedule, None, levels=grids.make("linspace", schedule, steps))
    else:
        times = grids.make(grid, schedule, steps)
    return [schedule.level(float(time)) for time in times] + [CLEAN]


def refused_grid(grid: str, schedule: Schedule) -> bool:
    parameters = list(inspect.signature(grids.get(grid)).parameters.values())[2:]
    if grid != "custom" and any(parameter.default is parameter.empty for parameter in parameters):
        return True  # it needs what no schedule has, such as a network
    if grid == "gits":
        return True  # it is measured on a network
    if grid == "ays":
        return not math.isclose(schedule.rho_max, 14.615, rel_tol=0.01)
    return grid == "flow_shift" and schedule.kind != "flow"


Places = dict[tuple[str, str], list[Level]]


@pytest.fixture(scope="module")
def places() -> Places:
    """Four levels of every grid on every schedule that has them; the others are refused by name."""
    found = {}
    for name, schedule in suite.processes().items():
        for grid in grids.names():
            if refused_grid(grid, schedule):
                with pytest.raises(ValueError, match=NO_GRID.get(grid, "missing a required argument")):
                    levels_of(grid, name, 4)
            else:
                found[name, grid] = levels_of(grid, name, 4)
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


def all_pairs(solver: str, places: Places) -> list[tuple[str, str]]:
    """The fewest places where the sampler meets every schedule, every grid, and a start without signal on each.

    Of the places where it compiles, and again of those where it is refused. Each sampler goes through the schedules
    with its own shift of the grids, so that the samplers together also meet every grid on every schedule.
    """
    names, kinds = grids.names(), list(suite.processes())

    def diagonal(place: tuple[str, str]) -> tuple[int, int]:
        schedule = kinds.index(place[0])
        return (names.index(place[1]) - schedule - SHIPPED.index(solver)) % len(names), schedule

    met: set[object] = set()
    chosen = []
    for place in sorted(places, key=diagonal):
        refused = reason(solver, suite.processes()[place[0]], places[place]) is not None
        blind = places[place][0].alpha == 0.0
        new = {(refused, place[0], blind), (refused, place[1])} - met
        met |= new
        chosen += [place] if new else []
    return chosen


def hold_everywhere(solver: str, places: Places) -> None:
    """Four steps in each place: a plan that keeps its laws and packs for every network, or an error of a known kind."""
    upward = solvers.get(solver).upward
    options = FEWER.get(solver, {})
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
        evaluated = [row.level for row in plan.rows if row.level is not None]
        blind = any(level.alpha == 0.0 for level in evaluated)
        for kind in predictions.names():
            if solver == "mean_reverting" and kind != "x0":
                with pytest.raises(ValueError, match="its option prediction= says what the network predicts"):
                    plan.pack(kind)
            elif kind == "edm" and schedule.shared is not None:
                with pytest.raises(ValueError, match="has no time to share"):
                    plan.pack(kind)
            elif blind and kind in ("eps", "score", "edm"):
                with pytest.raises(ValueError, match=NO_SIGNAL if kind != "edm" else "not finite"):
                    plan.pack(kind)
            else:
                assert np.isfinite(plan.pack(kind).coef[:, fd.compiler.layout.P : fd.compiler.layout.Q + 1]).all()


@pytest.mark.parametrize("solver", SHIPPED)
def test_every_schedule_grid_and_prediction(solver: str, places: Places) -> None:
    """Every pair of them; test_every_combination has the whole product."""
    hold_everywhere(solver, {place: places[place] for place in all_pairs(solver, places)})


@pytest.mark.slow
@pytest.mark.parametrize("solver", SHIPPED)
def test_every_combination(solver: str, places: Places) -> None:
    hold_everywhere(solver, places)


def test_all_pairs_are_met(places: Places) -> None:
    """Each sampler, where it compiles and where it is refused, misses no schedule and no grid of the whole product."""

    def met(solver: str, among: Iterable[tuple[str, str]]) -> set[tuple[bool, int, str]]:
        refusals = {p: reason(solver, suite.processes()[p[0]], places[p]) is not None for p in among}
        return {(refused, axis, p[axis]) for p, refused in refusals.items() for axis in (0, 1)}

    visits: Counter[tuple[str, str]] = Counter()
    for solver in SHIPPED:
        chosen = all_pairs(solver, places)
        visits.update(chosen)
        assert met(solver, chosen) == met(solver, places), solver
        assert len([key for key in met(solver, chosen) if key[:2] == (False, 1)]) >= 18, (
            f"{solver} compiles on fewer grids"
        )
    assert set(visits) == set(places) and min(visits.values()) >= 2
    assert visits.total() < 0.15 * len(SHIPPED) * len(places)


def trial_id(trial: suite.Trial) -> str:
    return str(trial)


def every_trial() -> Iterator[Any]:
    """Of the trials of schedules and grids, which the test above meets too, a third, another of every sampler."""
    for shift, name in enumerate(DEFAULT):
        for place, trial in enumerate(suite.trials(name, **FEWER.get(name, {}))):
            usual = trial.what != "table" or (place + shift) % 3 == 0
            yield pytest.param(trial, marks=() if usual else pytest.mark.slow)


@pytest.mark.parametrize("trial", [*every_trial()], ids=trial_id)
def test_suite(trial: suite.Trial) -> None:
    """Every sampler with every schedule, every grid, every prediction and every executor of the CPU."""
    outcome = trial.run()
    assert outcome.ok, outcome.sentence
    if trial.what != "executor":
        assert outcome.refused == meaningless(trial), outcome.sentence


def meaningless(trial: suite.Trial) -> bool:
    schedule = suite.processes()[trial.schedule]
    if refused_grid(trial.grid, schedule):
        return True
    first = levels_of(trial.grid, trial.schedule, 8)[0]
    if trial.what == "prediction":
        if trial.solver == "mean_reverting":
            return trial.name != "x0"  # its own option says what the network predicts
        return first.alpha == 0.0 and trial.name in ("eps", "score", "edm")
    return any(reason(trial.solver, schedule, levels_of(trial.grid, trial.schedule, n)) for n in suite.STEPS)


MINE = '''
"""A sampler of somebody's package."""

import fastdiff as fd
from {package}.steps import down


@fd.solver("{name}", order=1)
def {name}(run, x):
    """Euler in x / alpha."""
    for _, s, t in run.intervals():
        denoised = run.denoise(x, s)
        x = down(x, denoised, s, t)
    return x
'''
STEPS_OF_MINE = """
def down(x, denoised, s, t):
    ratio = t.sigma / s.sigma
    return {step}
"""
RIGHT = "ratio * x + (t.alpha - s.alpha * ratio) * denoised"
IGNORES_ALPHA = "ratio * x + (1.0 - ratio) * denoised"  # right where alpha = 1, and where alpha + sigma = 1


@pytest.fixture
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_SOLVERS", dict(registry._SOLVERS))


def package(folder: Path, name: str, step: str = RIGHT) -> str:
    """A package with a sampler that imports another of its modules; its name."""
    inside = folder / f"package_of_{name}"
    inside.mkdir()
    (inside / "__init__.py").write_text("")
    (inside / "steps.py").write_text(STEPS_OF_MINE.format(step=step))
    (inside / "samplers.py").write_text(MINE.format(package=inside.name, name=name))
    return inside.name


def verify_solver(given: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = cli.main(["verify", "--solver", given])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.usefixtures("_own_registry")
def test_a_sampler_of_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its module alone; test_a_package_in_the_folder_of_the_process names it too."""
    name = "users_euler"
    monkeypatch.syspath_prepend(tmp_path)
    status, text, _ = verify_solver(f"{package(tmp_path, name)}.samplers", capsys)
    assert status == 0, text
    assert f"{name}: Euler in x / alpha." in text
    assert "ok   order: declared 1, measured 0.99" in text
    trials = suite.trials(name)
    assert f"ok   suite: {len(trials)} of {len(trials)} hold, over {len(suite.processes())} schedules" in text
    assert all(trial.run().ok for trial in trials if trial.what == "executor")


@pytest.mark.usefixtures("_own_registry")
def test_the_suite_finds_what_one_schedule_hides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step that forgets alpha is right on edm, where the order is measured, and on flows; it fails on every vp."""
    monkeypatch.syspath_prepend(tmp_path)
    status, text, _ = verify_solver(
        f"{package(tmp_path, 'users_ve_only', IGNORES_ALPHA)}.samplers:users_ve_only", capsys
    )
    assert status == 1
    assert "ok   order: declared 1, measured 0.99" in text
    assert "FAIL suite" in text
    failed = {line.split()[1] for line in text.splitlines() if line.startswith("       FAIL")}
    assert failed == {name for name, schedule in suite.processes().items() if "vp" in schedule.kind}


@pytest.mark.usefixtures("_own_registry")
def test_a_package_in_the_folder_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    status, text, _ = verify_solver(f"{package(tmp_path, 'users_here')}.samplers:users_here", capsys)
    assert status == 0, text
    assert sys.path == before


@pytest.mark.usefixtures("_own_registry")
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("no_such_package.samplers", "module 'no_such_package.samplers' cannot be imported: ModuleNotFoundError"),
        ("package_of_mine.steps", "module 'package_of_mine.steps' registers no solver; decorate one with @fd.solver"),
        ("package_of_mine.samplers:other", "registers no solver 'other'; it registers mine"),
        ("package_of_mine.broken", "cannot be imported: ZeroDivisionError: division by zero"),
        ("package_of_mine.", "cannot be imported"),
    ],
)
def test_bad_modules_are_one_line(
    given: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / package(tmp_path, "mine") / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("package_of_mine")]:
        monkeypatch.delitem(sys.modules, name)
    status, out, err = verify_solver(given, capsys)
    assert (status, out) == (2, "")
    assert says in err and len(err.strip().splitlines()) == 1, err


def test_the_suite_in_a_test_runner(tmp_path: Path, root: Path) -> None:
    """What docs/solvers.md says to write, in a package of its own: pytest collects a test per trial and they pass."""
    name = package(tmp_path, "users_tested")
    (tmp_path / "test_mine.py").write_text(
        f"import fastdiff as fd\nimport pytest\nimport {name}.samplers\n\n\n"
        '@pytest.mark.parametrize("trial", fd.suite.trials("users_tested"), ids=str)\n'
        "def test_mine(trial):\n    outcome = trial.run()\n    assert outcome.ok, outcome.sentence\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{len(suite.trials('ddim'))} passed" in ran.stdout


def broken(kind: str) -> Any:
    def sampler(run: Any, x: Any) -> Any:
        for _, s, t in run.intervals():
            denoised = run.denoise(x, s)
            if kind == "zero" and t.sigma > 0.0:
                x = 1.0 / (t.sigma - t.sigma) * x
            if kind == "nan" and t.sigma > 0.0:
                x = float("nan") * x
            ratio = t.sigma / s.sigma
            x = ratio * x + (t.alpha - s.alpha * ratio) * denoised
            if kind == "late" and t.sigma == 0.0:
                x = x + 0.1 * run.noise()
        return x

    return sampler


@pytest.mark.usefixtures("_own_registry")
@pytest.mark.parametrize(
    ("kind", "says"),
    [("zero", "ZeroDivisionError at"), ("late", "last row")],
)
def test_what_the_suite_says_of_a_broken_sampler(kind: str, says: str) -> None:
    registry.solver(f"users_{kind}", order=1)(broken(kind))
    trial = suite.Trial(f"users_{kind}", {}, "edm", "karras")
    outcome = trial.run()
    assert not outcome.ok and not outcome.refused
    assert says in outcome.sentence


def register_biased(kind: str) -> str:
    """Samplers whose error first falls and then stays: what they get wrong is as large in every step of any grid."""

    def short_slope(run: Any, x: Any) -> Any:
        for _, s, t in run.intervals():
            denoised = run.denoise(x, s)
            if t.sigma == 0.0:
                return t.alpha * denoised
            x = 0.97 * ode_step(x, denoised, s, t) + 0.03 * (t.alpha / s.alpha) * x
        return x

    def little_noise(run: Any, x: Any) -> Any:
        for _, s, t in run.intervals():
            denoised = run.denoise(x, s)
            if t.sigma == 0.0:
                return t.alpha * denoised
            down = run.level_from_rho(ancestral_split(s, t, 1.0)[0])
            x = (t.alpha / down.alpha) * ode_step(x, denoised, s, down)
            x = x + 0.95 * t.alpha * math.sqrt(t.rho**2 - down.rho**2) * run.noise()
        return x

    name = f"users_{kind}"
    registry.solver(name, order=1, exact_marginal=False)({"short": short_slope, "quiet": little_noise}[kind])
    return name


@pytest.mark.usefixtures("_own_registry")
@pytest.mark.parametrize(("kind", "slope"), [("short", "-0.15"), ("quiet", "0.40")])
def test_a_bias_that_no_refinement_removes_fails(kind: str, slope: str) -> None:
    """3 % too short a slope and 5 % too little noise: one refinement of 8 steps lowers the error, the order fails."""
    name = register_biased(kind)
    assert fd.plan(name, "edm", 8).verify().ok  # why the order is a trial
    order = next(trial for trial in suite.trials(name) if trial.what == "order").run()
    assert not order.ok and not order.refused
    assert f"order: declared 1, measured {slope}; error" in order.sentence


def test_the_order_of_options_that_lower_it() -> None:
    """er_sde of order 1 keeps order 1, though 2 is declared of its defaults; what leads nowhere is not judged."""

    def order(solver: str, **options: Any) -> suite.Outcome:
        return next(trial for trial in suite.trials(solver, **options) if trial.what == "order").run()

    assert order("er_sde", order=1).ok and not order("er_sde", order=1).refused
    assert order("flow_sde", flavor="diffusers").ok
    assert order("euler", s_churn=5.0, s_noise=1.1).ok
    lowered = convergence.measure_table(solvers.get("er_sde"), "edm", {"order": 1})
    assert (lowered.declared, lowered.order) == (1, pytest.approx(0.96, abs=0.05))
    flow = convergence.measure_table(solvers.get("flow_sde"), "rectified_flow", {"flavor": "diffusers"})
    assert flow.unjudged and flow.errors[-1] == pytest.approx(-0.5, abs=0.05)
    noisy = convergence.measure_table(solvers.get("euler"), "edm", {"s_churn": 5.0, "s_noise": 1.1})
    assert noisy.order_options == {"s_noise": 1.0} and noisy.order == pytest.approx(0.97, abs=0.05)


def test_a_failure_of_another_kind_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the compiler and the prediction may refuse; a ValueError from anywhere else fails the trial."""

    def wrong(*_: Any) -> Any:
        raise ValueError("the engine is broken")

    monkeypatch.setattr(suite, "_engine", wrong)
    for what, name in (("prediction", "x0"), ("executor", "reference")):
        outcome = suite.Trial("ddim", {}, "edm", "karras", what, name).run()
        assert not outcome.ok and not outcome.refused
        assert outcome.sentence.startswith("ValueError at") and "the engine is broken" in outcome.sentence


@pytest.mark.usefixtures("_own_registry")
def test_a_sampler_that_runs_nowhere_is_an_error() -> None:
    registry.solver("users_nan", order=1)(broken("nan"))
    with pytest.raises(ValueError, match="on none of the usual schedules.*multiplies a register by nan"):
        suite.trials("users_nan")
    with pytest.raises(ValueError, match="lcm compiles on none of the usual schedules"):
        suite.trials("lcm", flavor="nobody")
    with pytest.raises(ValueError, match="Unknown solver"):
        suite.trials("nobody")


def test_every_schedule_and_grid_is_in_the_suite() -> None:
    trials = [trial for trial in suite.trials("ddim") if trial.what == "table"]
    assert {trial.schedule for trial in trials} == set(schedules.names())
    assert {trial.grid for trial in trials} == set(grids.names()) - {"gits"}
    names = {trial.name for trial in suite.trials("ddim") if trial.what == "prediction"}
    assert names == set(predictions.names())
    assert {"reference", "cpp"} <= {t.name for t in suite.trials("ddim") if t.what == "executor"}


ON_TRITON = """
import sys
import quick_interpreter
from fastdiff.engine import suite

for name in sys.argv[1:]:
    trials = [trial for trial in suite.trials(name) if trial.name == "triton"]
    assert len(trials) == 1, "triton is not there under TRITON_INTERPRET=1"
    outcome = trials[0].run()
    assert outcome.ok and not outcome.refused, f"{trials[0]}: {outcome.sentence}"
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "names",
    [
        # one evaluation, history, stages, reused draws, correctors, and the widest rows there are
        ["ddim", "dpmpp_2m_sde", "seeds_2", "sa_solver", "unipc", "heunpp2", "pndm"],
        pytest.param([name for name in SHIPPED if name != "annealed_langevin"], marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_the_interpreted_triton_executor(names: list[str]) -> None:
    """Triton's kernel under its interpreter, two seconds a sampler, against the float64 table."""
    command = [sys.executable, "-c", ON_TRITON, *names]
    search = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": search}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
