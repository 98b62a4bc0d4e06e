"""`fast(SchedulerClass)` against the class itself: same outputs, same draws, same behaviour, for all that captures.

In float32 both run freely with the same generator; in half precision both are fed the original's own tensors and
compared with the original in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import scheduler_loops as loops
import torch
from capture_cases import CASES, IDS, UNABLE, make
from fast_cases import X, both, made
from torch import Tensor

from fastdiff.engine import backends
from fastdiff.integrations.diffusers import fast

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")

MORE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("DDPMWuerstchen", {}, {}),
    ("SCM", {}, {}),
    ("DPMSolverSDE", {}, {"s_noise": 0.5}),
    ("UniPCMultistep", {"use_karras_sigmas": True, "prediction_type": "sample"}, {}),
]
REFUSED = ("Helios",)  # its output holds tensors that no row gives
ALL = [case for case in CASES if case[0] not in REFUSED] + MORE
ALL_IDS = [label for label, case in zip(IDS, CASES, strict=True) if case[0] not in REFUSED]
ALL_IDS += [f"{name}-more{i}" for i, (name, *_) in enumerate(MORE)]


@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize(("name", "config", "options"), ALL, ids=ALL_IDS)
def test_numbers_and_draws_are_the_originals(
    name: str, config: dict[str, Any], options: dict[str, Any], steps: int
) -> None:
    try:
        original = made(name, config, steps)
        theirs = loops.Run(original, options)
    except (ValueError, ZeroDivisionError):
        assert (name, steps) in UNABLE
        with pytest.raises((ValueError, RuntimeError, ZeroDivisionError)):
            made(name, config, steps, fast)
        return
    twin = made(name, config, steps, fast)
    ours = loops.Run(twin, options)
    off = loops.apart(ours.outputs, theirs.outputs)
    if off > 1e-5:  # where the original itself is further than that from float64, closer to that than it is
        exact, _ = both(name, config, steps)
        truth = loops.Run(exact, options, torch.float64).outputs
        errors = [_furthest(run.outputs, truth) for run in (ours, theirs)]
        assert errors[0] < 1e-6 < 1e-5 < errors[1], (off, errors)
    for left, right in zip(ours.left, theirs.left, strict=True):
        assert torch.equal(left, right), "a draw more or less than the original's"
    if hasattr(original, "step_index"):
        assert twin.step_index == original.step_index


def _furthest(outputs: list[Any], truth: list[Any]) -> float:
    pairs = zip(outputs, truth, strict=True)
    return max(loops.difference(one[name], other[name]) for one, other in pairs for name in loops.fields(other))


# a Brownian path in half precision is another one than in float64
PATHLESS = [
    pytest.param(*case, id=name)
    for case, name in zip(ALL, ALL_IDS, strict=True)
    if case[0] not in ("DPMSolverSDE", "CosineDPMSolverMultistep")
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("name", "config", "options"), PATHLESS)
def test_half_precision_is_as_near_float64_as_the_original(
    name: str, config: dict[str, Any], options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Every step on the tensors the original was given: error <= 2 x the original's own, against float64."""
    original, twin = both(name, config, 10)
    exact, _ = both(name, config, 10)
    with loops.Normals():
        theirs = loops.Run(original, options, dtype)
    ours = _replay(twin, theirs, options, lambda x: x)
    truth = _replay(exact, theirs, options, Tensor.double)
    for i, (one, other, right) in enumerate(zip(ours, theirs.outputs, truth, strict=True)):
        assert type(one) is type(other)
        for field in loops.fields(right):
            assert one[field].dtype == other[field].dtype
            own = loops.difference(other[field], right[field])
            assert loops.difference(one[field], right[field]) <= 2 * own + 1e-6, (i, field, own)


def _replay(scheduler: Any, run: loops.Run, options: dict[str, Any], cast: Any) -> list[Any]:
    """The outputs of a scheduler that is given the tensors of another run."""
    raws = iter([cast(raw) for raw, _ in run.inputs])
    states = [cast(state) for _, state in run.inputs]
    with loops.Normals():
        again = loops.Run(
            scheduler,
            options,
            states[0].dtype,
            net=lambda x, t: next(raws),
            between=lambda i, x: states[min(i + 1, len(states) - 1)],
        )
    return again.outputs


COUNTING = ["UniPCMultistep", "DPMSolverMultistep", "EulerDiscrete", "HeunDiscrete", "KDPM2Discrete", "SASolver"]


@pytest.mark.parametrize("begin", [4, 8])
@pytest.mark.parametrize("said", [True, False], ids=["set_begin_index", "by its timestep"])
@pytest.mark.parametrize("name", [*COUNTING, "LCM", "DPMSolverSinglestep", "FlowMatchEulerDiscrete"])
def test_a_run_begins_where_the_original_does(name: str, said: bool, begin: int) -> None:
    """Image to image: from a begin index, or from the first timestep that is given."""
    original, twin = both(name, {}, 12)
    for scheduler in (original, twin):
        if said:
            scheduler.set_begin_index(begin)
    theirs, ours = (loops.Run(scheduler, {}, start=begin) for scheduler in (original, twin))
    assert loops.apart(ours.outputs, theirs.outputs) < 1e-5
    assert twin.step_index == original.step_index


@pytest.mark.parametrize(
    ("name", "config"), [("DDIM", {"clip_sample": False}), ("DDPM", {}), ("PNDM", {"skip_prk_steps": True})]
)
def test_a_run_without_an_index_begins_anywhere(name: str, config: dict[str, Any]) -> None:
    original, twin = both(name, config, 12)
    theirs, ours = (loops.Run(scheduler, {}, start=5) for scheduler in (original, twin))
    assert loops.apart(ours.outputs, theirs.outputs) < 1e-5


def test_steps_that_do_not_depend_on_each_other_come_in_any_order() -> None:
    original, twin = both("DDIM", {"clip_sample": False}, 8)
    x, raw = torch.randn(loops.SHAPE), torch.randn(loops.SHAPE)
    for t in [original.timesteps[5], original.timesteps[2], int(original.timesteps[6]), float(original.timesteps[0])]:
        theirs = original.step(raw, int(t), x)
        assert loops.apart([twin.step(raw, t, x)], [theirs]) < 1e-6
    for eta in (0.0, 1.0, 0.3):  # nor do their options
        t = original.timesteps[3]
        outputs = [s.step(raw, t, x, eta=eta, generator=torch.Generator().manual_seed(1)) for s in (twin, original)]
        assert loops.apart(outputs[:1], outputs[1:]) < 1e-6


@pytest.mark.parametrize("name", [*COUNTING, "DDIM", "EulerAncestralDiscrete"])
def test_the_state_may_be_changed_between_steps(name: str) -> None:
    """Inpainting: another tensor, and the same tensor written to, where no version counter sees it too."""
    config = {"clip_sample": False} if name == "DDIM" else {}
    original, twin = both(name, config, 9)
    mask = torch.rand(loops.SHAPE, generator=torch.Generator().manual_seed(2)) < 0.5

    def paint(i: int, x: Tensor) -> Tensor:
        if i % 3 == 0:
            return torch.where(mask, x, 0.3 * i)
        if i % 3 == 1:
            x.data.mul_(0.9)
        else:
            x.numpy()[:] += 0.01
        return x

    theirs, ours = (loops.Run(scheduler, {}, between=paint) for scheduler in (original, twin))
    assert loops.apart(ours.outputs, theirs.outputs) < 1e-5


@pytest.mark.parametrize("name", ["EulerAncestralDiscrete", "UniPCMultistep", "DDIM"])
def test_another_number_of_steps_batch_and_dtype(name: str) -> None:
    """One object through calls that differ in everything."""
    original = make(name, {"clip_sample": False} if name == "DDIM" else {})
    twin = fast(type(original)).from_config(original.config)
    for steps, shape, dtype in [
        (4, (2, 3, 8, 8), torch.float32),
        (7, (5, 3, 4, 6), torch.float32),
        (7, (5, 3, 4, 6), torch.float16),
        (4, (1, 2, 3), torch.bfloat16),
        (4, (2, 3, 8, 8), torch.float32),
    ]:
        runs = []
        for scheduler in (original, twin):
            scheduler.set_timesteps(steps)
            runs.append(loops.Run(scheduler, {}, dtype, shape))
        limit = 1e-5 if dtype == torch.float32 else 20 * torch.finfo(dtype).eps
        assert loops.apart(runs[1].outputs, runs[0].outputs) < limit


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "EulerAncestralDiscrete", "DDPM", "KDPM2Discrete"])
def test_memory_formats(name: str) -> None:
    """channels_last and strided samples, and a network whose output lies otherwise than the sample."""
    original, twin = both(name, {}, 5)
    lying = [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: torch.cat([x, x], dim=3)[..., : x.shape[3]],
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    ]
    for lie in lying:
        for also in (lie, lambda x: x):
            runs = []
            for scheduler in (original, twin):
                scheduler.set_timesteps(5)
                net = lambda x, t, also=also: also(loops.tiny(x, t).contiguous())  # noqa: E731
                runs.append(loops.Run(scheduler, {}, net=net, between=lambda i, x, lie=lie: lie(x)))
            for one, other in zip(runs[1].outputs, runs[0].outputs, strict=True):
                assert loops.difference(one.prev_sample, other.prev_sample) < 1e-5


@pytest.mark.parametrize(
    ("name", "config", "kw"),
    [
        ("EulerDiscrete", {}, {"timesteps": [900, 500, 400, 30]}),
        ("EulerDiscrete", {}, {"sigmas": [12.0, 3.0, 0.5, 0.0]}),
        ("DPMSolverMultistep", {}, {"timesteps": [900, 500, 400, 30]}),
        ("FlowMatchEulerDiscrete", {}, {"sigmas": [1.0, 0.6, 0.2]}),
        ("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True}, {"sigmas": [1.0, 0.6, 0.2], "mu": 0.7}),
        ("DDPM", {}, {"timesteps": [900, 500, 400, 0]}),
    ],
)
def test_custom_timesteps_sigmas_and_mu(name: str, config: dict[str, Any], kw: dict[str, Any]) -> None:
    original, twin = both(name, config, None, **kw)
    theirs, ours = (loops.Run(scheduler, {}) for scheduler in (original, twin))
    assert loops.apart(ours.outputs, theirs.outputs) < 1e-5


def test_sigmas_changed_after_set_timesteps() -> None:
    original, twin = both("EulerDiscrete", {}, 6)
    for scheduler in (original, twin):
        scheduler.sigmas *= 0.7
    theirs, ours = (loops.Run(scheduler, {}) for scheduler in (original, twin))
    assert loops.apart(ours.outputs, theirs.outputs) < 1e-5


@pytest.mark.parametrize("name", ["EulerAncestralDiscrete", "DDPM", "LCM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_generator_for_every_sample(name: str, dtype: torch.dtype) -> None:
    original, twin = both(name, {}, 4)
    results = []
    for scheduler in (original, twin):
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        x = torch.randn(loops.SHAPE, generator=torch.Generator().manual_seed(8)).to(dtype)
        for t in scheduler.timesteps:
            raw = loops.tiny(scheduler.scale_model_input(x, t), t.expand(2))
            x = scheduler.step(raw, t, x, generator=generators).prev_sample
        results.append((x, [g.get_state() for g in generators]))
    limit = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert loops.difference(results[1][0], results[0][0]) < limit
    assert all(torch.equal(*states) for states in zip(results[0][1], results[1][1], strict=True))


def test_inference_mode_before_and_after() -> None:
    original, twin = both("UniPCMultistep", {}, 6)
    with torch.inference_mode():
        ours = loops.Run(twin, {})
    theirs = loops.Run(original, {})
    assert loops.apart(ours.outputs, theirs.outputs) < 1e-5
    twin.set_timesteps(6)
    assert loops.apart(loops.Run(twin, {}).outputs, theirs.outputs) < 1e-5


@pytest.mark.parametrize("name", ["UniPCMultistep", "KDPM2Discrete", "SASolver", "DDPM"])
def test_on_the_reference_executor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Executors that read x from its register only."""
    monkeypatch.setattr(backends, "choose", lambda device: "reference")
    original, twin = both(name, {}, 6)
    theirs, ours = (loops.Run(scheduler, {}) for scheduler in (original, twin))
    assert loops.apart(ours.outputs, theirs.outputs) < 1e-5


class Halved(diffusers.EulerDiscreteScheduler):
    """Overridden maths that is still a table."""

    def step(
        self, model_output: Any, timestep: Any, sample: Any, strength: float = 0.5, return_dict: bool = True
    ) -> Any:
        result = super().step(model_output, timestep, sample)
        result.prev_sample = (1 - strength) * sample + strength * result.prev_sample
        return result if return_dict else (result.prev_sample,)


@pytest.mark.parametrize("options", [{}, {"strength": 0.8}])
def test_a_subclass_with_its_own_maths(options: dict[str, Any]) -> None:
    original, twin = Halved(), fast(Halved)()
    for scheduler in (original, twin):
        scheduler.set_timesteps(6)
    theirs, ours = (loops.Run(scheduler, options) for scheduler in (original, twin))
    assert loops.apart(ours.outputs, theirs.outputs) < 1e-5


def test_a_step_taken_twice() -> None:
    """As diffusers' Cosmos pipelines do: a step for its estimate, the index put back, and the step itself."""
    original, twin = both("EDMEuler", {}, 6)
    ends = []
    for scheduler in (original, twin):
        x = X * 80
        for t in scheduler.timesteps:
            estimate = scheduler.step(0.3 * X, t, x, return_dict=False)[1]
            scheduler._step_index -= 1
            x = scheduler.step(0.1 * estimate.tanh(), t, x, return_dict=False)[0]
        ends.append(x)
    assert loops.difference(ends[1], ends[0]) < 1e-6


@pytest.mark.parametrize("given", [True, False], ids=["a generator", "the global one"])
def test_large_samples_draw_torchs_bits(given: bool) -> None:
    """Beyond the size where our own generator takes over: the same numbers, the same state after."""
    shape = (1, 4, 48, 48)
    results = []
    for scheduler in both("EulerAncestralDiscrete", {}, 4):
        torch.manual_seed(8)
        source = torch.Generator().manual_seed(8) if given else None
        x = 14.0 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
        for t in scheduler.timesteps:
            x = scheduler.step(loops.tiny(x, t.expand(1)), t, x, generator=source).prev_sample
        results.append((x, source.get_state() if source else torch.get_rng_state()))
    assert loops.difference(results[1][0], results[0][0]) < 1e-6
    assert torch.equal(results[0][1], results[1][1])
