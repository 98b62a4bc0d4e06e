"""`fast(SchedulerClass)` against the class itself: same outputs, same draws, same behaviour, for all that captures.

In float32 both run freely with the same generator; in half precision both are fed the original's own tensors and
compared with the original in float64.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from typing import Any

import pytest
import scheduler_loops as loops
import torch
from test_capture import CASES, IDS, UNABLE, make
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastdiff.engine import backends
from fastdiff.integrations.diffusers import fast, table

diffusers = pytest.importorskip("diffusers")

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


@pytest.fixture(autouse=True)
def quiet() -> None:
    diffusers.utils.logging.set_verbosity_error()


def made(name: str, config: dict[str, Any], steps: int | None, wrap: Any = lambda kind: kind, **kw: Any) -> Any:
    """A scheduler of that class, or of what `wrap` makes of it, with its timesteps set."""
    original = make(name, config)
    scheduler = wrap(type(original)).from_config(original.config)
    if name == "SCM":
        kw["intermediate_timesteps"] = 1.3 if steps == 2 else None
    scheduler.set_timesteps(*(() if steps is None else (steps,)), **kw)
    return scheduler


def both(name: str, config: dict[str, Any], steps: int | None = None, **kw: Any) -> tuple[Any, Any]:
    """(the original, its fast twin), with their timesteps set."""
    return made(name, config, steps, **kw), made(name, config, steps, fast, **kw)


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


@pytest.mark.parametrize("name", ["UniPCMultistep", "DDIM", "HeunDiscrete"])
def test_outputs_are_the_callers(name: str) -> None:
    """No later step writes to an output, and no step writes to what it was given."""
    _, twin = both(name, {"clip_sample": False} if name == "DDIM" else {}, 6)
    x = torch.randn(loops.SHAPE) * float(twin.init_noise_sigma)
    kept = []
    for t in twin.timesteps:
        raw = torch.randn(loops.SHAPE)
        given = raw.clone(), x.clone()
        kept.append((out := twin.step(raw, t, x), {key: value.clone() for key, value in loops.fields(out).items()}))
        assert torch.equal(raw, given[0]) and torch.equal(x, given[1])
        x = out.prev_sample
    for out, then in kept:
        assert all(torch.equal(out[key], then[key]) for key in then)


@pytest.mark.parametrize("name", ["UniPCMultistep", "DPMSolverSinglestep", "DDIM", "PNDM", "EulerAncestralDiscrete"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_by_itself(name: str, how: Any) -> None:
    _, twin = both(name, {"clip_sample": False} if name == "DDIM" else {}, 15)
    g = torch.Generator().manual_seed(0)
    raws = [torch.randn(loops.SHAPE, generator=g) for _ in twin.timesteps]
    x = torch.randn(loops.SHAPE, generator=g)

    def go(scheduler: Any, x: Tensor, steps: range) -> Tensor:
        torch.manual_seed(4)
        for i in steps:
            x = scheduler.step(raws[i], scheduler.timesteps[i], x).prev_sample
        return x

    x = go(twin, x, range(7))
    other = how(twin)
    assert type(other) is type(twin) and other.config == twin.config
    ahead = go(twin, x, range(7, len(raws)))
    assert torch.equal(go(other, x, range(7, len(raws))), ahead)


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "DDIM", "EulerDiscrete"])
def test_saving_and_loading(name: str, tmp_path: Any) -> None:
    config = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    original = make(name, config)
    kind = type(original)
    twin = fast(kind).from_config({**original.config, "from_a_newer_diffusers": 1})
    twin.save_pretrained(tmp_path / "fast")
    original.save_pretrained(tmp_path / "own")
    texts = [(tmp_path / which / "scheduler_config.json").read_text() for which in ("fast", "own")]
    assert texts[1].splitlines()[:-1] == [line for line in texts[0].splitlines() if "newer" not in line][:-1]
    back = fast(kind).from_pretrained(tmp_path / "fast")
    plain = kind.from_pretrained(tmp_path / "fast")
    assert type(back) is fast(kind) and type(plain) is kind
    assert isinstance(back, kind) and back.config.prediction_type == "v_prediction"
    assert fast(kind) is fast(fast(kind)) and fast(kind).__name__ == kind.__name__
    with pytest.raises(TypeError, match="unexpected keyword argument 'from_a_newer_diffusers'"):
        fast(kind)(from_a_newer_diffusers=1)


@pytest.mark.parametrize("name", sorted({name for name, *_ in CASES}))
def test_signatures_and_attributes_are_the_originals(name: str) -> None:
    kind = type(make(name, {"stages": 1} if name == "Helios" else {}))
    twin = fast(kind)
    for method in ("__init__", "set_timesteps", "step", "scale_model_input", "add_noise"):
        if hasattr(kind, method):
            assert inspect.signature(getattr(twin, method)) == inspect.signature(getattr(kind, method))
    config = {"stages": 1} if name == "Helios" else {}
    one, other = kind(**config), twin(**config)
    for attribute in ("init_noise_sigma", "order"):
        assert getattr(other, attribute, None) == getattr(one, attribute, None)
    if hasattr(kind, "__len__"):
        assert len(one) == len(other)


def test_add_noise_is_the_originals() -> None:
    original, twin = both("DPMSolverMultistep", {}, 10)
    x, z = torch.randn(loops.SHAPE), torch.randn(loops.SHAPE)
    times = original.timesteps[[3, 7]]
    assert torch.equal(twin.add_noise(x, z, times), original.add_noise(x, z, times))


@pytest.mark.parametrize("name", ["DDIM", "LCM", "DDPM", "DPMSolverMultistep"])
def test_the_tuple_is_the_originals(name: str) -> None:
    original, twin = both(name, {"clip_sample": False} if name == "DDIM" else {}, 5)
    x, raw = torch.randn(loops.SHAPE), torch.randn(loops.SHAPE)
    t = original.timesteps[0]
    outs = []
    for scheduler in (original, twin):
        torch.manual_seed(0)
        outs.append(scheduler.step(raw, t, x, return_dict=False))
    assert type(outs[1]) is tuple and len(outs[0]) == len(outs[1])
    for one, other in zip(*outs, strict=True):
        assert loops.difference(other, one) < 1e-5


def test_options_by_position() -> None:
    original, twin = both("DDIM", {"clip_sample": False}, 5)
    x, raw = torch.randn(loops.SHAPE), torch.randn(loops.SHAPE)
    given = (raw, original.timesteps[1], x, 1.0, False, None, torch.ones(loops.SHAPE), False)
    for one, other in zip(original.step(*given), twin.step(*given), strict=True):
        assert loops.difference(other, one) < 1e-6


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


class Bent(diffusers.EulerDiscreteScheduler):
    """Overridden maths that is not."""

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        result = super().step(model_output, timestep, sample)
        result.prev_sample = result.prev_sample + 0.1 * model_output.abs()
        return result


@pytest.mark.parametrize("options", [{}, {"strength": 0.8}])
def test_a_subclass_with_its_own_maths(options: dict[str, Any]) -> None:
    original, twin = Halved(), fast(Halved)()
    for scheduler in (original, twin):
        scheduler.set_timesteps(6)
    theirs, ours = (loops.Run(scheduler, options) for scheduler in (original, twin))
    assert loops.apart(ours.outputs, theirs.outputs) < 1e-5


def test_a_second_run_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    real = table.compile_source
    monkeypatch.setattr(table, "compile_source", lambda source: compiled.append(source.first) or real(source))
    for name in ("UniPCMultistep", "SASolver", "DDIM", "PNDM", "HeunDiscrete", "LCM"):
        _, twin = both(name, {"clip_sample": False} if name == "DDIM" else {}, 11)
        first = loops.Run(twin, {})
        count = len(compiled)
        again = fast(type(twin)).from_config(twin.config)
        for scheduler in (twin, again, copy.deepcopy(twin)):
            scheduler.set_timesteps(11)
            assert loops.apart(loops.Run(scheduler, {}).outputs, first.outputs) == 0.0
        assert len(compiled) == count, name
    assert len(table._tables) <= table.KEPT


class Asked(TorchFunctionMode):
    """Notes every torch call that brings a value to the host."""

    ASKING = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.ASKING:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["UniPCMultistep", "DDIM", "EulerDiscrete", "LCM", "PNDM", "HeunDiscrete", "DDPM"])
def test_no_step_asks_for_a_value(name: str) -> None:
    """Not even the first: a timestep is known by where it lies."""
    original, twin = both(name, {"clip_sample": False} if name == "DDIM" else {}, 12)
    x = torch.randn(loops.SHAPE)
    twin.step(x, twin.timesteps[0], x)
    twin.set_timesteps(12)
    with Asked() as ours:
        for i, t in enumerate(twin.timesteps.unbind()):
            if i:
                x = twin.scale_model_input(x, t)
            x = twin.step(x, t, x).prev_sample
    if ours.seen:  # the index of the first timestep is looked up on the host's copy
        assert set(ours.seen) <= {"nonzero", "item", "cpu"} and len(ours.seen) <= 3, ours.seen
    with Asked() as theirs:
        original.step(x, original.timesteps[0], x)
    if name == "LCM":
        assert "item" in theirs.seen, "the test sees what the original asks for"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["UniPCMultistep", "DDIM", "EulerAncestralDiscrete", "PNDM", "HeunDiscrete"])
def test_no_step_waits_for_the_gpu(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    original, twin = both(name, {"clip_sample": False} if name == "DDIM" else {}, 12, device="cuda")
    x = y = torch.randn(loops.SHAPE, device="cuda")
    twin.step(x, twin.timesteps[0], x)
    twin.set_timesteps(12, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.manual_seed(0)
        for t in twin.timesteps.unbind():
            x = twin.step(twin.scale_model_input(x, t), t, x).prev_sample
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.manual_seed(0)
    for t in original.timesteps:
        y = original.step(original.scale_model_input(y, t), t, y).prev_sample
    assert loops.difference(x.cpu(), y.cpu()) < 1e-5


@pytest.mark.gpu
def test_a_generator_of_another_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    _, twin = both("EulerAncestralDiscrete", {}, 4)
    x = torch.randn(loops.SHAPE)
    with pytest.raises(ValueError, match="Cannot generate a cpu tensor from a generator of type cuda"):
        twin.step(x, twin.timesteps[0], x, generator=torch.Generator("cuda"))


def ready(name: str, steps: int = 6, **config: Any) -> Any:
    scheduler = fast(type(make(name, config)))(**config)
    scheduler.set_timesteps(steps)
    return scheduler


X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(loops.SHAPE)


@pytest.mark.parametrize(
    ("error", "words", "act"),
    [
        (IndexError, r"timestep 17 is not in the schedule .*830", lambda s: s["DDIM"].step(X, 17, X)),
        (IndexError, r"timestep 3 is not in the schedule", lambda s: s["EulerDiscrete"].step(X, 3.0, X)),
        (TypeError, r"float64.*float32", lambda s: s["DDIM"].step(X.double(), 0, X.double())),
        (ValueError, r"model_output is \(2, 3, 8, 8\).*\(1, 3, 8, 8\)", lambda s: s["DDIM"].step(X, 0, X[:1])),
        (ValueError, "learned variance", lambda s: s["DDPM"].step(torch.cat([X, X], 1), 0, X)),
        (ValueError, "no elements", lambda s: s["DDIM"].step(X[:0], 0, X[:0])),
        (TypeError, "unexpected keyword argument 'etaa'", lambda s: s["DDIM"].step(X, 0, X, etaa=1.0)),
        (TypeError, "unexpected keyword argument 'generator'", lambda s: s["UniPC"].step(X, 0, X, generator=None)),
        (TypeError, "multiple values for argument 'eta'", lambda s: s["DDIM"].step(X, 0, X, 1.0, eta=1.0)),
        (TypeError, "at most", lambda s: s["DDIM"].step(X, 0, X, *[None] * 9)),
        (TypeError, "eta is a tensor", lambda s: s["DDIM"].step(X, 0, X, eta=torch.tensor(0.1))),
        (ValueError, "both given", lambda s: s["DDIM"].step(X, 332, X, 1.0, False, torch.Generator(), X)),
        (ValueError, r"variance_noise is \(1,", lambda s: s["DDIM"].step(X, 332, X, eta=1.0, variance_noise=X[:1])),
        (RuntimeError, "requires one.*no_grad", lambda s: s["DDIM"].step(X.clone().requires_grad_(), 0, X)),
        (ValueError, "prev_timestep must be the timestep after", lambda s: s["UnCLIP"].step(X, 999, X, 3)),
        (IndexError, "list index out of range", lambda s: s["DDPM"].step(X, 830, X, [torch.Generator()] * 0 or [])),
        (RuntimeError, "asked for step 3", lambda s: _jump(s["UniPC"])),
        (ValueError, r"got timestep 300, this is step 1, whose timestep is 850", lambda s: _skip(s["PNDM"])),
        (ValueError, r"\(1, 3, 8, 8\).*this run began with \(2, 3, 8, 8\)", lambda s: _batch(s["UniPC"])),
        (IndexError, "position 6.*call set_timesteps", lambda s: _once_more(s["UniPC"])),
        (ValueError, "step options changed within a run", lambda s: _options(s["FlowMatchHeunDiscrete"])),
        (RuntimeError, "call set_timesteps", lambda s: _again(s["UniPC"])),
    ],
)
def test_bad_input(error: type[Exception], words: str, act: Any) -> None:
    made = Made()
    with pytest.raises(error, match=words):
        act(made)


class Made(dict):  # type: ignore[type-arg]
    def __missing__(self, name: str) -> Any:
        full = {"UniPC": "UniPCMultistep"}.get(name, name)
        return ready(full, 10 if name == "PNDM" else 6, **({"clip_sample": False} if name == "DDIM" else {}))


def _jump(scheduler: Any) -> None:
    scheduler.step(X, scheduler.timesteps[0], X)
    scheduler._step_index = 3
    scheduler.step(X, scheduler.timesteps[3], X)


def _skip(scheduler: Any) -> None:
    scheduler.step(X, scheduler.timesteps[0], X)
    scheduler.step(X, 300, X)


def _batch(scheduler: Any) -> None:
    scheduler.step(X, scheduler.timesteps[0], X)
    scheduler.step(X[:1], scheduler.timesteps[1], X[:1])


def _once_more(scheduler: Any) -> None:
    for t in [*scheduler.timesteps, 0]:
        scheduler.step(X, t, X)


def _options(scheduler: Any) -> None:
    scheduler.step(X, scheduler.timesteps[0], X)
    scheduler.step(X, scheduler.timesteps[1], X, s_noise=2.0)


def _again(scheduler: Any) -> None:
    scheduler.step(X, scheduler.timesteps[0], X)
    scheduler._step_index = None
    scheduler.step(X, scheduler.timesteps[0], X)


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        ("DPMSolverMultistep", {"thresholding": True, "sample_max_value": 4.0}, r"step \d.*quantile"),
        ("DDIMInverse", {"clip_sample": True}, "clip_sample=False"),
        ("RePaint", {}, "original_image, mask"),
        ("Amused", {"mask_token_id": 5}, "class indices"),
        ("Helios", {"stages": 1}, "returns last_sample, which is no combination"),
        (Bent, {}, r"Bent, step 0: is not affine.*differs from the table by"),
    ],
)
def test_what_is_no_table_is_refused_at_set_timesteps(kind: Any, config: dict[str, Any], words: str) -> None:
    kind = type(make(kind, config)) if isinstance(kind, str) else kind
    scheduler = fast(kind)(**config)  # neither the class nor an object of it is in the way
    with pytest.raises(TypeError, match=words):
        scheduler.set_timesteps(10)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (diffusers.DDIMScheduler(), r"got an object of DDIMScheduler; write fast\(type"),
        (diffusers.ScoreSdeVeScheduler, "has no step"),
        (torch.nn.Linear, "has no set_timesteps"),
    ],
)
def test_what_is_no_scheduler_class(what: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        fast(what)


def test_threads() -> None:
    """Independent steps may come from any thread; steps that count are refused in a second one, by name."""
    original, twin = both("DDIM", {"clip_sample": False}, 20)
    raws = torch.randn(8, *loops.SHAPE)
    wrong: list[str] = []

    def many(k: int) -> None:
        for t in original.timesteps.tolist() * 5:
            ours, theirs = (s.step(raws[k], t, raws[-k]).prev_sample for s in (twin, original))
            if loops.difference(ours, theirs) > 1e-6:
                wrong.append(f"thread {k}, timestep {t}")

    threads = [threading.Thread(target=many, args=(k,)) for k in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]

    counting, alone = ready("UniPCMultistep"), ready("UniPCMultistep")
    caught: list[str] = []

    def step(i: int) -> None:
        try:
            counting.step(X, counting.timesteps[i], X)
        except RuntimeError as error:
            caught.append(str(error))

    def elsewhere(i: int) -> None:
        thread = threading.Thread(target=step, args=(i,))
        thread.start()
        thread.join()

    step(0)
    elsewhere(0)  # a run of its own
    elsewhere(3)
    assert len(caught) == 2 and all("two threads" in each and "deepcopy" in each for each in caught)
    elsewhere(1)  # the same run, carried on, as a server does that streams from a pool of threads
    elsewhere(2)
    for t in alone.timesteps[:3]:
        alone.step(X, t, X)
    ours, theirs = (s.step(X, s.timesteps[3], X).prev_sample for s in (counting, alone))
    assert len(caught) == 2 and torch.equal(ours, theirs)


def test_before_set_timesteps_a_step_is_the_originals() -> None:
    """No schedule was asked for: the thousand training steps are not compiled, and errors are the original's own."""
    original, twin = (kind() for kind in (diffusers.DDPMScheduler, fast(diffusers.DDPMScheduler)))
    compiled = len(table._tables)
    outputs = [s.step(X, 700, X, generator=torch.Generator().manual_seed(1)).prev_sample for s in (original, twin)]
    assert torch.equal(*outputs) and len(table._tables) == compiled
    with pytest.raises(ValueError, match="Number of inference steps is 'None'"):
        fast(diffusers.UniPCMultistepScheduler)().step(X, 700, X)


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


class FromFast(fast(diffusers.EulerDiscreteScheduler)):  # type: ignore[misc]
    """Not made by `fast`: the caller's own class over a fast one."""

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        (x,) = super().step(model_output, timestep, sample, return_dict=False)[:1]
        return (2.0 * x,)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
def test_a_subclass_of_a_fast_class(how: Any) -> None:
    original, mine = both("EulerDiscrete", {}, 5)[0], FromFast()
    mine.set_timesteps(5)
    x = mine.step(X, mine.timesteps[0], X)[0]
    theirs = original.step(X, original.timesteps[0], X).prev_sample
    assert loops.difference(x, 2.0 * theirs) < 1e-6
    other = how(mine)
    assert type(other) is FromFast and other.step_index == 1
    again = [s.step(X, s.timesteps[1], x)[0] for s in (mine, other)]
    assert torch.equal(*again)
    with pytest.raises(TypeError, match="FromFast is made from a fast class.*of EulerDiscreteScheduler itself"):
        fast(FromFast)


def test_no_steps() -> None:
    scheduler = fast(diffusers.EulerDiscreteScheduler)()
    with pytest.raises(ValueError, match="has no timesteps"):
        scheduler.set_timesteps(0)


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
