"""The loop of an accelerated pipeline: callbacks, what runs between two evaluations, and the step that is recorded."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate_cases import KINDS, LATENT, SD, TEXT, apart, call, tiny, watching
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.integrations.diffusers import accelerate, restore
from fastdiff.integrations.diffusers import desk as desk_module
from fastdiff.integrations.diffusers.accelerate import ENGINE
from fastdiff.integrations.diffusers.loop import Loop

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")


@pytest.mark.parametrize("change", [False, True])
@pytest.mark.parametrize("kind", TEXT)
def test_callback_on_step_end(kind: str, change: bool) -> None:
    """It sees the same states, times and pipeline, and what it changes counts."""
    pipe, logs = tiny.make(kind), ([], [])  # type: ignore[var-annotated]
    tensors = ["latents", "prompt_embeds"]

    def run(log: list[Any]) -> Any:
        watch = watching(log, change)
        return call(pipe, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=tensors)

    before = run(logs[0])
    accelerate(pipe)
    assert apart(run(logs[1]), before) <= LATENT
    assert len(logs[0]) == len(logs[1]) >= 3
    for (theirs, given), (ours, got) in zip(*logs, strict=True):
        assert ours == theirs
        assert apart(got["latents"], given["latents"]) <= LATENT
        assert torch.equal(got["prompt_embeds"], given["prompt_embeds"])


def test_the_old_callback_and_a_callback_object() -> None:
    pipe = tiny.make(SD, diffusers.HeunDiscreteScheduler(**tiny.LATENT))
    cutoff = diffusers.callbacks.SDCFGCutoffCallback(cutoff_step_ratio=0.4)
    logs: list[list[Any]] = [[], []]

    def run(log: list[Any]) -> Any:
        old = {"callback": lambda i, t, x: log.append((i, float(t), x.clone())), "callback_steps": 1}
        with pytest.warns(FutureWarning, match="deprecated"):
            call(pipe, **old)
        return call(pipe, callback_on_step_end=cutoff)

    before = run(logs[0])
    accelerate(pipe)
    assert apart(run(logs[1]), before) <= LATENT
    assert [entry[:2] for entry in logs[1]] == [entry[:2] for entry in logs[0]]
    assert all(apart(ours[2], theirs[2]) <= LATENT for ours, theirs in zip(*logs[::-1], strict=True))


@pytest.mark.parametrize("by", ["callback", "network"])
def test_interrupt(by: str) -> None:
    """Set in a callback, or from anywhere while the rows run."""
    pipe = tiny.make(SD)
    calls = []

    def stop(i: int) -> None:
        calls.append(i)
        pipe._interrupt = len(calls) == 3

    if by == "network":
        pipe.unet.register_forward_hook(lambda *_: stop(0))
        more = {}
    else:
        more = {"callback_on_step_end": lambda pipe, i, t, tensors: (stop(i), tensors)[1]}
    before, evaluated = call(pipe, **more), len(calls)
    calls.clear()
    accelerate(pipe)
    assert apart(call(pipe, **more), before) <= LATENT
    assert evaluated == len(calls) == 3
    calls.extend(range(9))
    assert apart(call(pipe), before) > 1e-3 or by == "network"


def test_progress_bar_and_step_index(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tiny.make(SD, diffusers.HeunDiscreteScheduler(**tiny.LATENT))
    pipe.set_progress_bar_config(disable=False)
    call(pipe)
    index, shown = pipe.scheduler.step_index, capsys.readouterr().err
    accelerate(pipe)
    call(pipe)
    assert "6/6" in shown and "6/6" in capsys.readouterr().err
    assert pipe.scheduler.step_index == index


class Gaps(TorchDispatchMode):
    """The names of torch's operations before each evaluation of a network, since the one before."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.gaps: list[list[str]] = []
        self._inside, self._pending = False, list[str]()
        own = network.forward

        def forward(*args: Any, **kw: Any) -> Any:
            self.gaps.append(self._pending)
            self._inside = True
            output = own(*args, **kw)
            self._inside, self._pending = False, []
            return output

        network.forward = forward

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._inside:
            self._pending.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_row_runs_between_two_evaluations(kind: str) -> None:
    """No operation of scheduler or guidance, no draw, and no copy of DiT's channels and SD3's strides."""
    pipe = tiny.make(kind)
    before = Gaps(getattr(pipe, "unet", None) or pipe.transformer)
    with before:
        call(pipe)
    count = len(before.gaps)
    assert all(before.gaps[1::2]) and count
    accelerate(pipe)
    call(pipe)
    after = Gaps(getattr(pipe, "unet", None) or pipe.transformer)
    with after:
        call(pipe, seed=5)
    assert not any(after.gaps[1:])
    assert len(after.gaps) == count >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_recorded_step(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU replays, replayed as it is: one record for other prompts, steps and guidance, on the same buffers."""
    pipe = accelerate(tiny.make(kind))
    cases = [{"seed": 1}, {"seed": 2, "steps": 9, "guidance": 2.5}, {"seed": 3, "steps": 4, "guidance": 3.0}]

    def run() -> list[Any]:
        form = "latent" if kind in TEXT else "np"
        return [pipe(**tiny.arguments(kind, **case) | {"output_type": form}).images for case in cases]

    eager, records, twin = run(), [], copy.deepcopy(pipe)  # type: ignore[var-annotated]
    recorder = SimpleNamespace(record=lambda work, warm_up: (records.append(work), work)[1])
    monkeypatch.setattr(desk_module, "recorder_for", lambda device, executor: recorder)
    accelerate(pipe)
    assert all(apart(ours, theirs) <= LATENT for ours, theirs in zip(run(), eager, strict=True))
    assert len(records) == 1
    if kind in TEXT:
        changed = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
        both = [call(one, callback_on_step_end=watching([], True), **changed) for one in (pipe, restore(twin))]
        assert apart(*both) <= LATENT


def test_a_network_that_cannot_be_recorded_runs_eagerly_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(work: Any, warm_up: int) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(desk_module, "recorder_for", lambda device, executor: SimpleNamespace(record=fails))
    pipe = tiny.make(SD)
    before = call(pipe)
    accelerate(pipe)
    with pytest.warns(UserWarning, match=f"{SD}: the network cannot be captured.*graph=False") as caught:
        assert apart(call(pipe), before) <= LATENT
    assert [Path(warning.filename).name for warning in caught] == ["accelerate_cases.py"]  # where it is called
    assert apart(call(pipe), before) <= LATENT
    with pytest.raises(RuntimeError, match="not permitted"):
        call(accelerate(pipe, graph=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_one_graph_and_no_sync_in_the_loop(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step graph serves other prompts, steps and guidance; no host sync while rows run; pictures as eager ones."""
    pipe = tiny.make(kind).to("cuda")
    cases = [{"seed": 1}, {"seed": 2, "steps": 9, "guidance": 2.5}, {"seed": 3, "steps": 4, "guidance": 3.0}]

    def run() -> list[Any]:
        made = []
        for case in cases:
            options = tiny.arguments(kind, **case) | {"generator": torch.Generator("cuda").manual_seed(1)}
            on_gpu = {name: v.cuda() if isinstance(v, Tensor) else v for name, v in options.items()}
            made.append(pipe(**on_gpu).images)
        return made

    before = run()
    accelerate(pipe)
    own = Loop.run

    def strict(self: Loop, count: int) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            own(self, count)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    run()
    monkeypatch.setattr(Loop, "run", strict)
    assert all(apart(ours, theirs) <= 0.1 / 255 for ours, theirs in zip(run(), before, strict=True))
    (desk,) = vars(pipe)[ENGINE]._desks
    assert len(desk.recorded) == 1
    accelerate(pipe, graph=False)
    monkeypatch.setattr(Loop, "run", own)
    assert all(apart(ours, theirs) <= 0.1 / 255 for ours, theirs in zip(run(), before, strict=True))
