"""Captured schedulers: their table gives what they give, in float64 and through the engine, and the rest is refused.

Every configuration is run by the test itself, on its own random outputs and draws; the mismatch that `capture` reports
is not trusted. Levels, prediction types and clamps are checked where diffusers says what they are.
"""

from __future__ import annotations

import copy
import math
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pace
import pytest
import torch
from capture_cases import CASES, EXACT, FLOW, IDS, KINDS, SIZE, STEPS, UNABLE, VP_KINDS, Array, Loop, make, tiny
from torch.overrides import TorchFunctionMode

import fastdiff as fd
from fastdiff.compiler import layout
from fastdiff.compiler.capture.intercept import Intercept
from fastdiff.compiler.verify import execute
from fastdiff.process.schedules import Level

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("name", "config", "options"), CASES, ids=IDS)
def test_the_table_is_the_scheduler(
    name: str, config: dict[str, Any], options: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same random outputs, same draws: every state, in float64."""
    scheduler = make(name, config)
    try:
        loop = Loop(scheduler, steps, options, torch.float64)
        rng = np.random.default_rng(7)
        outputs = rng.standard_normal((len(loop.scheduler.timesteps), *SIZE))
        queue = iter(torch.from_numpy(outputs))
        theirs = loop.run(lambda x, t: next(queue), monkeypatch)
        fails = not bool(torch.isfinite(theirs).all())
    except Exception:
        fails = True
    if fails:  # diffusers cannot do it itself: nor can a capture, and it says so
        assert (name, steps) in UNABLE, (name, config, steps)
        with pytest.raises((RuntimeError, TypeError), match=rf"{name}Scheduler( itself fails|.*inf or nan)"):
            fd.capture(scheduler, steps, step_options=options)
        return
    before = copy.deepcopy(scheduler.__dict__)
    plan = fd.capture(scheduler, steps, step_options=options)
    assert scheduler.__dict__.keys() == before.keys(), "the caller's scheduler is not touched"
    assert plan.nfe == len(outputs)
    assert plan.draws in (0, loop.drawn)
    worst, seen = 0.0, 0

    def denoise(x: Array, level: Level) -> tuple[Array, Array]:
        nonlocal worst, seen
        row = plan.rows[seen + 1]
        state = loop.states[seen].numpy()
        worst = max(worst, float(np.abs(x - state).max() / np.abs(state).max()))
        assert row.reading is not None
        raw = outputs[seen]
        seen += 1
        estimate = row.reading.P * x + row.reading.Q * raw
        return estimate if row.clamp is None else estimate.clip(*row.clamp), estimate

    ours = execute(plan, denoise, loop.start.numpy(), lambda k, _: loop.normals[k])
    worst = max(worst, float(np.abs(ours - theirs.numpy()).max() / np.abs(theirs.numpy()).max()))
    assert worst < EXACT[plan.options["precision"]], plan.options
    assert plan.options["mismatch"] < EXACT[plan.options["precision"]]
    assert max(len(row.outputs) for row in plan.rows) <= layout.MAX_OUTPUTS
    assert fd.Plan.from_json(plan.to_json()).to_json() == plan.to_json()


@pytest.mark.parametrize(("name", "config", "options"), CASES, ids=IDS)
def test_the_engine_runs_the_schedulers_own_loop(
    name: str, config: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same network, latents and draws through `Sampler` and through diffusers, both in float32."""
    scheduler = make(name, config)
    plan = fd.capture(scheduler, 10, step_options=options)
    loop = Loop(scheduler, 10, options, torch.float32)
    theirs = loop.run(tiny, monkeypatch)
    model = fd.Denoiser(tiny, "linear", plan.options.get("prediction", "x0"))
    normals = torch.from_numpy(loop.normals[: plan.draws]).float() if plan.draws else "white"
    ours = fd.Sampler(plan, model).sample(SIZE, init=loop.start, noise=normals)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


def test_latents_and_input_are_scaled_as_the_scheduler_does(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make("EulerDiscrete", {"timestep_spacing": "leading"})
    plan = fd.capture(scheduler, 5)
    scheduler.set_timesteps(5)
    assert plan.latent_scale == pytest.approx(float(scheduler.init_noise_sigma))
    assert plan.latent_scale > plan.levels[0].sigma + 0.01
    seen = []

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append((x.clone(), float(t[0])))
        return torch.zeros_like(x)

    model = fd.Denoiser(net, "linear", "eps")
    fd.Sampler(plan, model).sample(SIZE, seed=1)
    unit = seen[0][0] * (float(scheduler.sigmas[0]) ** 2 + 1) ** 0.5 / float(scheduler.init_noise_sigma)
    assert unit.std() == pytest.approx(1.0, abs=0.2)
    assert [t for _, t in seen] == pytest.approx(scheduler.timesteps.tolist())


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *((name, {"prediction_type": kind}) for name in ("DPMSolverMultistep", "EulerDiscrete") for kind in VP_KINDS),
        *((name, {"prediction_type": kind}) for name in ("DEISMultistep", "UniPCMultistep") for kind in VP_KINDS),
        *(("DDIM", {"prediction_type": kind, "clip_sample": False}) for kind in VP_KINDS),
        ("DPMSolverMultistep", FLOW),
        ("UniPCMultistep", FLOW),
        ("FlowMatchEulerDiscrete", {}),
        ("FlowMatchHeunDiscrete", {}),
    ],
)
def test_d_is_the_denoised_estimate(name: str, config: dict[str, Any]) -> None:
    """A callback sees x0 at the right level: exact data x0 = 0.3 gives D = 0.3 in every row."""
    plan = fd.capture(make(name, config), 6)
    prediction = config.get("prediction_type", "flow_prediction")
    levels = iter(plan.levels)

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        level = next(levels)
        assert float(t[0]) == pytest.approx(level.time)
        flow = prediction == "flow_prediction"
        unit = 1.0 if flow else (level.alpha**2 + level.sigma**2) ** 0.5
        alpha, sigma = level.alpha / unit, level.sigma / unit
        n = (x - alpha * 0.3) / sigma
        forms = {"epsilon": n, "v_prediction": alpha * n - sigma * 0.3, "flow_prediction": n - 0.3}
        return forms.get(prediction, torch.full_like(x, 0.3))

    seen: list[float] = []
    model = fd.Denoiser(net, "linear", KINDS[prediction])
    sampler = fd.Sampler(plan, model)
    result = sampler.sample(SIZE, seed=0, callback=lambda info: seen.append(float((info.denoised - 0.3).abs().max())))
    assert len(seen) == plan.nfe and max(seen) < 1e-3
    if plan.levels[-1].sigma == 0.0:
        assert float((result - plan.levels[-1].alpha * 0.3).abs().max()) < 1e-3


@pytest.mark.parametrize("name", ["DDIM", "DPMSolverMultistep", "EulerDiscrete", "HeunDiscrete", "UniPCMultistep"])
def test_a_captured_table_obeys_the_laws_of_a_sampler(name: str) -> None:
    config = {"clip_sample": False} if name in ("DDIM",) else {}
    report = fd.capture(make(name, {**config, "timestep_spacing": "trailing"}), 20).verify()
    law = {check.name: check for check in report.checks}
    assert law["finite"].ok and law["point mass"].value < 1e-4, str(report)


def test_the_clamp_is_in_the_table_and_in_the_text() -> None:
    plan = fd.capture(make("DDPM", {"clip_sample_range": 1.5}), 4)
    assert all(row.clamp == (-1.5, 1.5) for row in plan.rows[1:])
    packed = plan.pack("eps")
    np.testing.assert_array_equal(packed.coef[1:, [layout.CLAMP_LO, layout.CLAMP_HI]], [[-1.5, 1.5]] * 4)
    assert "clamped to [-1.5, 1.5]" in plan.explain()
    assert fd.Plan.from_json(plan.to_json()) == plan


def test_custom_timesteps_and_sigmas() -> None:
    plan = fd.capture(make("DDPM", {"clip_sample": False}), timesteps=[900, 500, 100])
    assert [level.time for level in plan.levels[:-1]] == [900, 500, 100]
    plan = fd.capture(make("FlowMatchEulerDiscrete", {}), sigmas=[1.0, 0.6, 0.2])
    assert [level.sigma for level in plan.levels] == pytest.approx([1.0, 0.6, 0.2, 0.0])
    plan = fd.capture(make("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True}), 4, mu=0.8)
    assert plan.options["mu"] == 0.8


@pytest.mark.parametrize("wrong", ["x0", "v"])
def test_a_network_of_another_kind_is_refused(wrong: str) -> None:
    plan = fd.capture(make("DDIM", {"clip_sample": False}), 3)
    with pytest.raises(ValueError, match=f"predicts 'eps'.*predicts '{wrong}'"):
        fd.Sampler(plan, fd.Denoiser(tiny, "linear", wrong))


@pytest.mark.parametrize(
    ("name", "config", "options", "words"),
    [
        ("DDIMInverse", {"clip_sample": True}, {}, r"step 0.*noise-free.*clip_sample=False"),
        ("DDPM", {"thresholding": True, "sample_max_value": 1.5, "clip_sample": False}, {}, r"step \d+.*quantile"),
        ("DPMSolverMultistep", {"thresholding": True, "sample_max_value": 4.0}, {}, r"step \d+.*\de.*quantile"),
        ("CogVideoXDPM", {}, {}, "old_pred_original_sample, timestep_back"),
        ("RePaint", {}, {}, "original_image, mask"),
        ("ScoreSdeVe", {}, {}, "has no step"),
        ("DDPM", {"variance_type": "learned"}, {}, "itself fails"),
        ("Amused", {"mask_token_id": 5}, {}, "class indices"),
    ],
)
def test_diffusers_schedulers_that_are_no_tables(
    name: str, config: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises((TypeError, RuntimeError), match=words) as error:
        fd.capture(make(name, config), 10, step_options=options)
    assert name in str(error.value)


class Own:
    """A scheduler somebody wrote: the base of what is tried below."""

    def __init__(self) -> None:
        self.timesteps: list[float] = []
        self.old: Any = None

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = [float(steps - i) for i in range(steps)]
        self.old = None

    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        raise NotImplementedError


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


class InPlace(Own):
    """Writes into its arguments, as torch code does to save memory."""

    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        model_output.mul_(0.5).add_(sample, alpha=0.1)
        if self.old is not None:
            model_output -= 0.2 * self.old
        self.old = model_output
        return sample.mul_(0.9).add_(model_output)


class Hidden(Own):
    def __init__(self) -> None:
        super().__init__()
        seen: list[Any] = []

        def remember(value: Any) -> Any:
            seen.append(value)
            return seen[-2] if len(seen) > 1 else 0.0 * value

        self.remember = remember

    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        return sample + model_output + 0.5 * self.remember(model_output)


class Nonlinear(Own):
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        return sample + (torch.tanh(model_output) if timestep == 2.0 else model_output)


class Normed(Own):
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        return sample + model_output / model_output.norm()


class Branching(Own):
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        return sample + (model_output if model_output.abs().max() < 1.5 else 2.0 * model_output)


class Constant(Own):
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        return sample + model_output + 0.25


class ClipsState(Own):
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        self.old = model_output if self.old is None else self.old + model_output
        return (sample + self.old).clamp(-1, 1)


class Stochastic(Own):
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        return sample + model_output * torch.rand(sample.shape)


class Greedy(Own):
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        self.old = [*(self.old or []), model_output]
        return sample + sum((i + 1) * value for i, value in enumerate(self.old))


class Wrong(Own):
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        return sample[:, :1, :1, :1]


def test_state_is_found_wherever_it_is_kept() -> None:
    plan = fd.capture(Kept(), 6)
    assert plan.options["mismatch"] < 1e-12
    assert plan.draws == 12 and plan.registers <= 4


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


class DrawsByShape(Own):
    """Draws that take none of the tensors it is given, from torch's generator or from its own, by turns."""

    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        own = torch.Generator().manual_seed(3) if timestep % 2 else None
        return 0.9 * sample + 0.1 * model_output + 0.3 * torch.randn(sample.shape, generator=own, dtype=torch.float64)


class DrawsFromItsOwn(Own):
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        normal = torch.randn(sample.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return 0.9 * sample + 0.1 * model_output + 0.3 * normal


class DrawsInto(Own):
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        normal = torch.empty(sample.shape, dtype=torch.float64)
        torch.randn(sample.shape, out=normal)
        return 0.9 * sample + 0.1 * model_output + 0.3 * normal


class DrawsAndAdds(DrawsFromItsOwn):
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        return super().step(model_output, timestep, sample) + 0.25


class DrawsInAThread(Own):
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return 0.5 * sample + model_output + pool.submit(torch.randn_like, sample).result()


class DrawsLess(Own):
    """Draws on tensors that are mostly zeros, and not on others."""

    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        noise = torch.randn_like(sample) if (sample == 0.0).any() else 0.0
        return 0.5 * sample + model_output + noise


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


@pytest.mark.parametrize(("name", "every"), [("LMSDiscrete", False), ("DDPM", True)])
def test_every_torch_call_is_watched_only_where_a_scheduler_draws(
    name: str, every: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a scheduler computes of its levels is most of what it does: LMS integrates polynomials with SciPy."""
    entered: list[object] = []
    monkeypatch.setattr(Intercept, "__enter__", lambda self: entered.append(self) or TorchFunctionMode.__enter__(self))
    fd.capture(make(name, {}), 4)
    assert bool(entered) == every


def test_what_the_caller_carries_can_be_kept_in_an_object_around_it() -> None:
    plan = fd.capture(Carrying(), 10)
    assert plan.options["mismatch"] < 1e-6 and plan.options["prediction"] == "v"
    assert plan.registers == 2 and plan.draws == 18


def test_a_scheduler_may_work_in_place() -> None:
    plan = fd.capture(InPlace(), 6)
    assert plan.options["mismatch"] < 1e-12 and plan.registers == 2


@pytest.mark.parametrize(
    ("scheduler", "steps", "words"),
    [
        (Own, 5, "got the class Own, expected an object"),
        (3, 5, "int has no set_timesteps"),
        (InPlace(), 0, "InPlace has no timesteps"),
        (InPlace(), "five", "InPlace itself fails in set_timesteps"),
    ],
)
def test_bad_arguments(scheduler: Any, steps: Any, words: str) -> None:
    with pytest.raises((TypeError, RuntimeError), match=words):
        fd.capture(scheduler, steps)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Hidden, "step 0: uses a tensor from an earlier step that is not in its attributes"),
        (Nonlinear, r"step 8: is not affine: .* differs from the table by \d"),
        (Normed, r"step 0: is not affine"),
        (Branching, r"is not affine"),
        (
            DrawsLess,
            r"DrawsLess: is not affine: .* it draws 0 normals, its table 10; it branches on data",
        ),
        (DrawsInAThread, r"step 0: uses a tensor from an earlier step"),
        (DrawsAndAdds, r"step 0: adds the constant 0.25"),
        (Constant, r"step 0: adds the constant 0.25"),
        (ClipsState, r"step 1: clips something else"),
        (Stochastic, r"step 0: is not affine"),
        (Greedy, r"reads \d+.*at most 6"),
        (Wrong, r"step 0: returned shape \(1, 1, 1, 1\)"),
        (Own, r"itself fails in step 0: NotImplementedError"),
    ],
)
def test_what_is_no_table_is_refused_with_its_step(kind: type[Own], words: str) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=words) as error:
        fd.capture(kind(), 10)
    assert kind.__name__ in str(error.value)


@pytest.mark.alone
def test_a_capture_of_fifty_steps_takes_less_than_a_second() -> None:
    """Every configuration of the table; processor time, the best of three where the first is not good enough."""
    times: dict[str, float] = {}
    missing = []
    for case, (name, config, options) in zip(IDS, CASES, strict=True):
        try:
            # this one cannot make more steps than it was trained for, 40 by default
            scheduler = make(name, config if name != "CMStochasticIterative" else {"num_train_timesteps": 60})
        except pytest.skip.Exception as reason:
            missing.append(f"{case}: {reason}")
            continue
        for _ in range(3):
            took, plan = pace.timed(fd.capture, scheduler, 50, limit=1.0, step_options=options)
            times[case] = min(times.get(case, math.inf), took)
            if times[case] < 1.0:
                break
        assert plan.nfe >= 49
    slowest = sorted(times, key=times.__getitem__, reverse=True)[:3]
    print("slowest: " + ", ".join(f"{case} {1e3 * times[case]:.0f} ms" for case in slowest), *missing, sep="\n")
    assert len(times) + len(missing) == len(CASES)
    assert times[slowest[0]] < 1.0, slowest[0]


@pytest.mark.parametrize("steps", [25, 100])
def test_a_scheduler_may_keep_a_tensor_of_every_step(steps: int) -> None:
    """IPNDM never forgets one: the table needs the last four of them, whatever the number of steps."""
    plan = fd.capture(make("IPNDM", {}), steps)
    assert (plan.nfe, plan.registers) == (steps, 4)
    assert plan.options["mismatch"] < EXACT[plan.options["precision"]]


def test_laws_need_levels() -> None:
    plan = fd.capture(make("IPNDM", {}), 5)
    with pytest.raises(ValueError, match="IPNDMScheduler does not say at what level"):
        plan.verify()


def test_a_network_of_diffusers_in_its_own_loop() -> None:
    """UNet2DModel, DDPM with its default clipping, draws from one generator: the loop of diffusers' pipeline."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    ).eval()
    scheduler = make("DDPM", {})
    plan = fd.capture(scheduler, 8)
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(2, 1, 8, 8, generator=generator)
    x = start
    scheduler.set_timesteps(8)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x, generator=generator).prev_sample
    generator.manual_seed(5)
    torch.randn(2, 1, 8, 8, generator=generator)
    draws = torch.stack([torch.randn(2, 1, 8, 8, generator=generator) for _ in range(plan.draws)])
    model = fd.Denoiser(unet, "linear", "eps")
    for backend in ("reference", "auto"):
        ours = fd.Sampler(plan, model, backend=backend).sample((2, 1, 8, 8), init=start, noise=draws)
        assert float((ours - x).abs().max() / x.abs().max()) < 1e-5


def test_every_scheduler_of_diffusers_is_in_the_table(root: Path) -> None:
    folder = Path(diffusers.__file__).parent / "schedulers"
    text = (root / "docs" / "capture.md").read_text()
    names = {
        name
        for path in folder.glob("scheduling_*.py")
        for name in re.findall(r"^class (\w+Scheduler)\(", path.read_text(), re.MULTILINE)
    }
    assert len(names) > 40
    missing = sorted(name for name in names if f"| {name} |" not in text)
    assert not missing, f"run python docs/capture_table.py: {missing}"
