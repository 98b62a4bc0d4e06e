"""An order higher than the steps allow is lowered, and `explain()` says in which step and why."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from fastdiff.compiler import solvers
from fastdiff.compiler.build import plan as build
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.verify import execute
from fastdiff.process.schedules import Level

Options = dict[str, Any]

# every sampler with an option of that kind, its highest order, and what else makes it the ODE's
HIGHEST: list[tuple[str, str, int, Options]] = [
    ("deis", "order", 4, {}),
    ("dpmsolver", "order", 3, {}),
    ("dpmsolver", "order", 3, {"method": "singlestep"}),
    ("er_sde", "order", 3, {"noise": "ode"}),
    ("exponential_ab", "order", 4, {}),
    ("exponential_ab", "order", 4, {"variable": "eps"}),
    ("exponential_ab", "order", 4, {"variable": "rho"}),
    ("exponential_ab", "order", 4, {"variable": "velocity"}),
    ("ghvb", "order", 4, {}),
    ("hb", "order", 4, {}),
    ("ipndm", "order", 4, {}),
    ("ipndm_v", "order", 4, {}),
    ("lms", "order", 4, {}),
    ("mean_reverting", "order", 3, {}),
    ("sa_solver", "predictor_order", 4, {"tau": 0.0, "corrector_order": 0}),
    ("sa_solver", "corrector_order", 4, {"tau": 0.0, "predictor_order": 1}),
    ("unipc", "order", 4, {}),
    ("unipc", "order", 4, {"corrector": False}),
]
every_order = pytest.mark.parametrize(
    ("solver", "option", "highest", "options"),
    HIGHEST,
    ids=["-".join([solver, option, *map(str, options.values())]) for solver, option, _, options in HIGHEST],
)


def test_every_option_is_here() -> None:
    found = {
        (name, option)
        for name in solvers.names()
        if solvers.get(name).function.__module__.startswith("fastdiff.") and not solvers.get(name).adaptive
        for option in solvers.get(name).options()
        if option.endswith("order")
    }
    assert found == {(solver, option) for solver, option, _, _ in HIGHEST}


def end(plan: Plan) -> Any:
    """The sample on random estimates that depend on the evaluation alone."""
    calls = iter(np.random.default_rng(0).standard_normal((plan.nfe, 4)))

    def denoise(x: Any, level: Level) -> Any:
        return np.tanh(x / level.sigma) + next(calls)

    start = plan.levels[0].sigma * np.random.default_rng(1).standard_normal(4)
    return execute(plan, denoise, start, given=dict.fromkeys(plan.given, 0.0))


@every_order
def test_two_steps_have_order_one(solver: str, option: str, highest: int, options: Options) -> None:
    """The first step knows one evaluation and the second ends at sigma = 0: any order is the table of order 1."""
    plan = build(solver, "edm", 2, "karras", **{option: highest}, **options)
    lowest = build(solver, "edm", 2, "karras", **{option: 1}, **options)
    if not (solver == "dpmsolver" and "method" in options) and option != "corrector_order":
        np.testing.assert_allclose(end(plan), end(lowest), rtol=1e-12)
        np.testing.assert_allclose(end(plan), end(build("ddim", "edm", 2, "karras")), rtol=1e-12)
    assert plan.notes and not [note for note in lowest.notes if "order" in note]


@every_order
def test_where_and_why(solver: str, option: str, highest: int, options: Options) -> None:
    """Ten steps: the first ones rise to the order asked for, the last ends at order 1, and no other is lowered."""
    plan = build(solver, "edm", 10, "karras", **{option: highest}, **options)
    text = plan.explain()
    said: dict[int, tuple[int, str]] = {}
    for note in plan.notes:
        assert f"note: {note}" in text
        found = re.fullmatch(r"(?:the corrector of )?step (\d+) has order (\d) instead of (\d): (.+)", note)
        assert found, note
        assert int(found[3]) == highest
        said[int(found[1])] = int(found[2]), found[4]
    singlestep = options.get("method") == "singlestep"
    if singlestep:
        assert said == {9: (1, "it ends at sigma = 0")}
        return
    if option == "corrector_order":  # the nodes of the corrector: what is known before it, and the one it adds
        expected = {0: (2, "1 model evaluations are known"), 1: (3, "2 model evaluations are known")}
        expected[8] = 3, "the last steps come down to order 1"
        assert said == expected
        return
    comes_down = solver in ("unipc", "sa_solver")
    expected = {i: (i + 1, f"{i + 1} model evaluations are known") for i in range(highest - 1)}
    if comes_down:
        expected |= {10 - k: (k, "the last steps come down to order 1") for k in range(2, highest)}
    expected[9] = (1, "the step to sigma = 0")
    assert said == expected


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
@every_order
def test_any_number_of_steps_compiles(solver: str, option: str, highest: int, options: Options, steps: int) -> None:
    plan = build(solver, "edm", steps, "karras", **{option: highest}, **options)
    report = plan.verify()
    assert report.ok, str(report)
    assert plan.notes or (steps == 1 and option == "corrector_order")
    assert np.isfinite(end(plan)).all()


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "dpmpp_3m_sde", "res_multistep"])
def test_samplers_of_a_fixed_order_say_it_too(solver: str) -> None:
    notes = build(solver, "edm", 6, "karras").notes
    assert notes[0].startswith("step 0 has order 1 instead of ")
    assert notes[-1].startswith("step 5 has order 1 instead of ") and notes[-1].endswith("the step to sigma = 0")


@pytest.mark.parametrize("solver", ["dpmpp_2s", "dpmpp_3s", "seeds_2", "seeds_3", "exp_heun_2_x0"])
def test_stages_that_are_left_out_are_named(solver: str) -> None:
    order = 3 if "3" in solver else 2
    assert build(solver, "edm", 4, "karras").notes == (f"step 3 has order 1 instead of {order}: it ends at sigma = 0",)


def test_a_step_too_long_for_pndm_is_named() -> None:
    plan = build("pndm", "edm", 2, "karras")
    assert plan.notes[0] == "step 0 has order 1 instead of 4: sigma/alpha falls by a factor of 4e+04"
    assert plan.nfe == 2
    assert f"note: {plan.notes[0]}" in plan.explain()
    assert plan.verify().ok
