"""What a sampler costs beside its network: one row between two evaluations and nothing else, and a plan in no time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pace
import pytest
import torch
from solver_cases import CASES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff as fd
from fastdiff.compiler import solvers
from fastdiff.engine import adaptive, buffers, ops, skipping

ADAPTIVE = [name for name in fd.solvers.names() if solvers.get(name).adaptive]
FIXED = [name for name in fd.solvers.names() if name not in ADAPTIVE]
BACKENDS = [name for name in ("reference", "cpp") if fd.backends()[name].ok]
SCHEDULES = ("edm", "linear", "rectified_flow")
SHAPE = (2, 3, 8, 8)
PLAN_SECONDS = 0.05
# Copies of a table, of each sample's row or of the outputs of some samples; the others are views, which run nothing.
COPIES = {"aten.copy_.default", "aten.lift_fresh.default", "aten.select.int", "aten.slice.Tensor"}


class Traffic(TorchDispatchMode):
    """Torch operations and rows since the network was left, listed when it is entered again."""

    def __init__(self) -> None:
        super().__init__()
        self.between: list[list[str]] = []
        self._now: list[str] = []
        self._in_row = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._in_row:
            self._now.append(str(func))
        return func(*args, **(kwargs or {}))

    def enter_network(self) -> None:
        self.between.append(self._now)

    def leave_network(self) -> None:
        self._now = []

    def counting(self, name: str, bind: Callable[..., ops.Step]) -> Callable[..., ops.Step]:
        """A function that binds an op of ours, whose calls are noted by name whatever the executor does in them."""

        def bound(*arguments: Any, **options: Any) -> ops.Step:
            step = bind(*arguments, **options)

            def call(*outputs: Any) -> None:
                self._now.append(name)
                self._in_row = True
                step(*outputs)
                self._in_row = False

            return call

        return bound


def schedule_for(solver: str, **options: Any) -> str:
    """The first schedule the solver is defined on."""
    for schedule in SCHEDULES:
        try:
            fd.plan(solver, schedule, 4, **options)
        except ValueError:
            continue
        return schedule
    raise AssertionError(f"{solver} works on none of {SCHEDULES}")


def traffic_of(
    solver: str, backend: str, patch: pytest.MonkeyPatch, copies: int = 1, **arguments: Any
) -> tuple[list[list[str]], fd.Sampler]:
    """What happens between the evaluations of a second run, when the buffers and the table are there."""
    seen = Traffic()
    output = torch.zeros(copies * SHAPE[0], *SHAPE[1:])

    def net(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        seen.enter_network()
        seen.leave_network()
        return output

    patch.setattr(ops, "bind", seen.counting("row", ops.bind))
    for module, name in ((buffers, "bind_guide"), (adaptive, "bind_measure"), (skipping, "bind_measure")):
        patch.setattr(module, name, seen.counting("reduction", getattr(module, name)))
    plan = fd.plan(solver, schedule_for(solver), 6)
    sampler = fd.Sampler(plan, fd.Denoiser(net, plan.schedule, "x0"), backend)
    arguments |= {"given": {name: torch.zeros(SHAPE) for name in plan.given}}
    sampler.sample(SHAPE, **arguments)
    seen.between.clear()
    with seen:
        sampler.sample(SHAPE, **arguments)
    return seen.between[1:], sampler


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", FIXED)
def test_no_solver_runs_more_than_its_row_between_two_evaluations(
    solver: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    between, sampler = traffic_of(solver, backend, monkeypatch)
    assert between == [["row"]] * (sampler.plan.nfe - 1)
    assert sampler.plan.nfe > 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_an_adaptive_solver_does_more_only_where_it_decides(
    solver: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a trial step a row and nothing else; after it one reduction, and one row that accepts or rejects.

    Beside them the host copies its decision, a table, to the device.
    """
    between, sampler = traffic_of(solver, backend, monkeypatch)
    assert sampler.last_run is not None and sampler.last_run.adaptive is not None
    counts = sampler.last_run.adaptive
    trials = max(a + r for a, r in zip(counts.accepted, counts.rejected, strict=True))
    gaps = [tuple(name for name in gap if name not in COPIES) for gap in between]
    assert len(between) == sampler.last_run.nfe - 1
    assert set(gaps) <= {("row",), ("row", "reduction", "row"), ("row", "row")}
    # the last decision of a solver that evaluates nothing after it is not between two evaluations
    assert trials - gaps.count(("row", "reduction", "row")) in (0, 1)
    assert gaps.count(("row", "row")) <= 1  # from the first evaluation, before the first trial
    assert all(gap == ["row"] for gap in between if len(gap) < 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_adaptive_skipping_is_one_reduction(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    between, sampler = traffic_of("ddim", backend, monkeypatch, skip=fd.AdaptiveSkip(0.0))
    gaps = [[name for name in gap if name not in COPIES] for gap in between]
    assert gaps[1:] == [["row", "reduction"]] * (sampler.plan.nfe - 2)
    assert gaps[0] == ["aten.zeros_like.default", "row", "reduction"]  # memory for the outputs, once


@pytest.mark.parametrize("backend", BACKENDS)
def test_neither_does_noise_on_a_path_or_guidance(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    between, sampler = traffic_of("dpmpp_2m_sde", backend, monkeypatch, noise="brownian")
    assert between == [["row"]] * (sampler.plan.nfe - 1)
    labels = {"y": torch.zeros(SHAPE[0])}
    between, sampler = traffic_of("unipc", backend, monkeypatch, 2, cond=labels, uncond=labels, guidance=2.0)
    assert between == [["row"]] * (sampler.plan.nfe - 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "rule",
    [
        {"rule": fd.guidance.Rescale(0.7)},
        {"rule": fd.guidance.APG(0.3, -0.5, 2.0)},
        {"rule": fd.guidance.CFGZero(1)},
        {"threshold": fd.guidance.DynamicThreshold(0.99)},
        {"rule": fd.guidance.Rescale(0.7), "threshold": fd.guidance.DynamicThreshold(0.99)},
    ],
    ids=str,
)
def test_a_guidance_rule_is_one_reduction(backend: str, rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    labels = {"y": torch.zeros(SHAPE[0])}
    guided = {"cond": labels, "uncond": labels, "guidance": 2.0}
    between, sampler = traffic_of("dpmpp_2m", backend, monkeypatch, 2, **guided, **rule)
    assert between == [["reduction", "row"]] * (sampler.plan.nfe - 1)


def test_an_operation_between_two_evaluations_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count itself: a callback's operation is one more on every row."""
    between, sampler = traffic_of("ddim", BACKENDS[0], monkeypatch, callback=lambda at: at.state.sum())
    extra = [row.count("aten.sum.default") for row in between]
    assert extra == [1] * (sampler.plan.nfe - 1)


@pytest.mark.alone
def test_a_plan_of_fifty_steps_takes_less_than_fifty_milliseconds() -> None:
    """Every solver on every schedule, then with the options of its cases; the best of three if need be."""
    every: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [(name, {}, SCHEDULES) for name in fd.solvers.names()]
    every += [(case.solver, case.options, (schedule_for(case.solver, **case.options),)) for case in CASES]
    times: dict[str, float] = {}
    for solver, options, schedules in every:
        for schedule in schedules:
            try:
                fd.plan(solver, schedule, 4, **options)
            except ValueError:
                continue  # not defined on this schedule
            name = " ".join([solver, *map(str, options.values()), "on", schedule])
            for _ in range(3):
                took, _ = pace.timed(fd.plan, solver, schedule, 50, limit=PLAN_SECONDS, **options)
                times[name] = min(times.get(name, math.inf), took)
                if times[name] < PLAN_SECONDS:
                    break
    slowest = sorted(times, key=times.__getitem__, reverse=True)[:3]
    print("slowest: " + ", ".join(f"{name} {1e3 * times[name]:.1f} ms" for name in slowest))
    assert times[slowest[0]] < PLAN_SECONDS, slowest[0]
