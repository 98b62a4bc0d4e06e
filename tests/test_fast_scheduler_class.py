"""A fast class beside its original: signatures, outputs, copies and files, and what a step costs the host."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import scheduler_loops as loops
import torch
from capture_cases import CASES, make
from fast_cases import X, both
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastdiff.integrations.diffusers import fast, table

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")


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


def test_before_set_timesteps_a_step_is_the_originals() -> None:
    """No schedule was asked for: the thousand training steps are not compiled, and errors are the original's own."""
    original, twin = (kind() for kind in (diffusers.DDPMScheduler, fast(diffusers.DDPMScheduler)))
    compiled = len(table._tables)
    outputs = [s.step(X, 700, X, generator=torch.Generator().manual_seed(1)).prev_sample for s in (original, twin)]
    assert torch.equal(*outputs) and len(table._tables) == compiled
    with pytest.raises(ValueError, match="Number of inference steps is 'None'"):
        fast(diffusers.UniPCMultistepScheduler)().step(X, 700, X)


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
