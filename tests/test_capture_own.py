"""Captures of schedulers that somebody wrote: where their state is, what draws and who answers, what a clamp clips."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from capture_cases import make
from own_scheduler_cases import DrawsFromItsOwn, InPlace, Own
from torch.overrides import TorchFunctionMode

import fastdiff as fd
from fastdiff.compiler.capture.intercept import Intercept


class Kept(Own):
    """State in every place the capture looks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Own()
        self.many: dict[str, Any] = {"pair": (None, 0)}

    def set_timesteps(self, steps: int) -> None:
        super().set_timesteps(steps)
        self.inner.old, self.many = None, {"pair": (None, 0)}

    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        step = 0.9 * sample + model_output / timestep
        if self.inner.old is not None:
            step = step - 0.1 * self.inner.old + 0.01 * self.many["pair"][0]
        self.inner.old = model_output - 0.5 * sample
        self.many["pair"] = (sample + torch.zeros_like(sample).normal_(), 1)
        return step + 0.1 * torch.randn_like(sample)


class Carrying:
    """What the pipeline does around CogVideoXDPMScheduler: carries the last estimate and the last timestep."""

    def __init__(self) -> None:
        self.scheduler = make("CogVideoXDPM", {"prediction_type": "v_prediction"})
        self.config = self.scheduler.config
        self.timesteps: Any = None

    def set_timesteps(self, steps: int) -> None:
        self.scheduler.set_timesteps(steps)
        self.timesteps = self.scheduler.timesteps
        self.estimate, self.back = None, None

    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        state, self.estimate = self.scheduler.step(model_output, self.estimate, timestep, self.back, sample)
        self.back = timestep
        return state


def test_state_is_found_wherever_it_is_kept() -> None:
    plan = fd.capture(Kept(), 6)
    assert plan.options["mismatch"] < 1e-12
    assert plan.draws == 12 and plan.registers <= 4


def test_what_the_caller_carries_can_be_kept_in_an_object_around_it() -> None:
    plan = fd.capture(Carrying(), 10)
    assert plan.options["mismatch"] < 1e-6 and plan.options["prediction"] == "v"
    assert plan.registers == 2 and plan.draws == 18


def test_a_scheduler_may_work_in_place() -> None:
    plan = fd.capture(InPlace(), 6)
    assert plan.options["mismatch"] < 1e-12 and plan.registers == 2


class DrawsByShape(Own):
    """Draws that take none of the tensors it is given, from torch's generator or from its own, by turns."""

    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        own = torch.Generator().manual_seed(3) if timestep % 2 else None
        return 0.9 * sample + 0.1 * model_output + 0.3 * torch.randn(sample.shape, generator=own, dtype=torch.float64)


class DrawsInto(Own):
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        normal = torch.empty(sample.shape, dtype=torch.float64)
        torch.randn(sample.shape, out=normal)
        return 0.9 * sample + 0.1 * model_output + 0.3 * normal


class Answers(TorchFunctionMode):
    """Somebody's own mode, which answers torch.randn."""

    asked = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.randn:
            self.asked += 1
            return torch.zeros(*args, dtype=torch.float64)
        return func(*args, **(kwargs or {}))


def test_draws_are_not_answered_by_a_mode_around_the_capture() -> None:
    with Answers() as mode:
        plan = fd.capture(DrawsByShape(), 6)
    assert plan.draws == 6 and mode.asked == 0


@pytest.mark.parametrize("kind", [DrawsByShape, DrawsFromItsOwn, DrawsInto])
def test_draws_by_a_shape_alone_are_named(kind: type[Own]) -> None:
    plan = fd.capture(kind(), 6)
    assert plan.draws == 6 and [row.noise for row in plan.rows[1:]] == [((i, 1),) for i in range(6)]
    assert all(row.outputs[0].noise == (0.3,) for row in plan.rows[1:])
    assert plan.options["mismatch"] < 1e-12


@pytest.mark.parametrize("name", ["DDPM", "EulerAncestralDiscrete"])
def test_generators_are_left_as_they_were(name: str) -> None:
    given = torch.Generator().manual_seed(1)
    states = given.get_state(), torch.get_rng_state()
    assert fd.capture(make(name, {}), 4, step_options={"generator": given}).draws > 0
    assert fd.capture(make(name, {}), 4).draws > 0
    assert all(map(torch.equal, (given.get_state(), torch.get_rng_state()), states))


def test_no_thread_gets_a_normal_twice() -> None:
    seen: list[float] = []
    done = threading.Event()

    def draw() -> None:
        while not done.is_set():
            seen.append(float(torch.rand((), dtype=torch.float64)))

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        plan = fd.capture(make("LMSDiscrete", {}), 10)
    finally:
        done.set()
        thread.join()
    assert plan.draws == 0 and len(seen) == len(set(seen)) > 10


@pytest.mark.parametrize(("name", "every"), [("LMSDiscrete", False), ("DDPM", True)])
def test_every_torch_call_is_watched_only_where_a_scheduler_draws(
    name: str, every: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a scheduler computes of its levels is most of what it does: LMS integrates polynomials with SciPy."""
    entered: list[object] = []
    monkeypatch.setattr(Intercept, "__enter__", lambda self: entered.append(self) or TorchFunctionMode.__enter__(self))
    fd.capture(make(name, {}), 4)
    assert bool(entered) == every


class Clips(Own):
    """Clips what `way` makes of its estimate, further out than normal tensors reach."""

    def __init__(self, way: Callable[[Any], Any], bound: float = 90.0) -> None:
        super().__init__()
        self.way, self.bound = way, bound

    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        estimate = self.way(sample - 0.5 * model_output).clamp(-self.bound, self.bound)
        return 0.5 * sample + 0.5 * estimate


def _written(write: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    """The tensor of zeros that an estimate was written into."""

    def way(estimate: Any) -> Any:
        plain = torch.zeros(estimate.shape, dtype=estimate.dtype)
        write(plain, estimate)
        return plain

    return way


WAYS_OUT: dict[str, Callable[[Any], Any]] = {
    "numpy": lambda estimate: torch.from_numpy(estimate.numpy()),
    "copy_": _written(lambda plain, estimate: plain.copy_(estimate)),
    "setitem": _written(lambda plain, estimate: plain.__setitem__(slice(None), estimate)),
    "out": _written(lambda plain, estimate: torch.add(estimate, 0.0, out=plain)),
    "clamp out": _written(lambda plain, estimate: torch.clamp(estimate, -90.0, 90.0, out=plain)),
    "foreach": _written(lambda plain, estimate: torch._foreach_add_([plain], [estimate])),
    "dlpack": torch.from_dlpack,
    "as_subclass": lambda estimate: estimate.as_subclass(torch.Tensor),
    "item": lambda estimate: torch.tensor([v.item() for v in estimate.flatten()], dtype=torch.float64).reshape(
        estimate.shape
    ),
    "float": lambda estimate: torch.tensor([float(v) for v in estimate.flatten()], dtype=torch.float64).reshape(
        estimate.shape
    ),
}


@pytest.mark.parametrize("way", sorted(WAYS_OUT))
def test_a_clamp_of_what_went_into_another_tensor_is_in_the_table(way: str) -> None:
    plan = fd.capture(Clips(WAYS_OUT[way]), 5)
    assert all(row.clamp == (-90.0, 90.0) for row in plan.rows[1:])
    assert all((row.reading.P, row.reading.Q) == (1.0, -0.5) for row in plan.rows[1:] if row.reading)


@pytest.mark.parametrize("bound", [90.0, 1e5])
def test_what_clips_unseen_is_refused(bound: float) -> None:
    """Far outside the normal tensors of the proof; its second sample is a million times as large."""
    with pytest.raises(TypeError, match=r"Clips, step 0: is not affine: .* differs from the table by \d"):
        fd.capture(Clips(lambda estimate: torch.nn.functional.hardtanh(estimate, -bound, bound), bound=1e9), 5)
