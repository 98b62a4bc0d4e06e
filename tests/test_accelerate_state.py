"""`accelerate(pipe)` where pipeline, scheduler or network are not what they were, or not what a loop can take."""

from __future__ import annotations

import gc
import pickle
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate_cases import LATENT, SD, apart, call, tiny

from fastdiff.integrations.diffusers import accelerate, restore
from fastdiff.integrations.diffusers import desk as desk_module

diffusers = pytest.importorskip("diffusers")
HookRegistry, ModelHook = diffusers.hooks.HookRegistry, diffusers.hooks.ModelHook
pytestmark = pytest.mark.usefixtures("quiet_diffusers")


def scheduler(name: str, **config: Any) -> Any:
    """Of the tiny latent pipelines."""
    return getattr(diffusers, f"{name}Scheduler")(**tiny.LATENT, **config)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("DDPMPipeline", "EulerAncestralDiscrete"),
        ("DDPMPipeline", "HeunDiscrete"),
        ("DiTPipeline", "EulerDiscrete"),
        ("DiTPipeline", "KDPM2Discrete"),
    ],
)
def test_a_loop_that_mixes_scaled_input_and_state_is_refused(kind: str, name: str) -> None:
    """DiT's steps the scaled tensor, DDPM's never scales: at once, and where the scheduler is replaced later."""
    scaling, pipe = getattr(diffusers, f"{name}Scheduler")(), tiny.make(kind)
    accelerate(pipe)
    pipe.scheduler = scaling
    with pytest.raises(TypeError, match=f"{name}Scheduler scales.*DDIMScheduler"):
        call(pipe)
    with pytest.raises(TypeError, match=f"{name}Scheduler scales"):
        accelerate(restore(pipe))


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_a_learned_variance_is_refused_by_name(variance: str) -> None:
    pipe = tiny.make("DDPMPipeline", diffusers.DDPMScheduler(variance_type=variance))
    with pytest.raises(TypeError, match=f"DDPMScheduler uses the variance.*{variance}.*not taken over"):
        accelerate(pipe)


@pytest.mark.parametrize("name", ["KDPM2Discrete", "KDPM2AncestralDiscrete", "PNDM"])
def test_a_solver_takes_the_real_steps_of_a_scheduler_with_midpoints(name: str) -> None:
    """As many evaluations as steps, on the levels that the scheduler has without its midpoints."""
    offset = {"steps_offset": 1}
    plain = scheduler("PNDM", skip_prk_steps=True, **offset) if name == "PNDM" else scheduler("EulerDiscrete", **offset)
    pipe, seen = tiny.make(SD, plain), list[float]()
    pipe.unet.register_forward_hook(lambda module, args, output: seen.append(float(args[1])))
    expected = call(accelerate(pipe, "euler"), num_inference_steps=6)
    levels, pipe.scheduler = seen[:], scheduler(name, **offset)
    seen.clear()
    assert apart(call(accelerate(pipe, "euler"), num_inference_steps=6), expected) <= LATENT
    assert seen == levels and len(levels) == 6


def test_a_solver_looks_at_a_scheduler_that_was_changed_in_place() -> None:
    def shift(pipe: Any) -> None:
        pipe.scheduler.set_shift(8.0)

    def config(pipe: Any) -> None:
        pipe.scheduler.register_to_config(use_karras_sigmas=True)

    for kind, solver, change in (("StableDiffusion3Pipeline", "flow_euler", shift), (SD, "dpmpp_2m", config)):
        made = [tiny.make(kind, scheduler("DPMSolverMultistep") if kind == SD else None) for _ in range(2)]
        stale = call(accelerate(made[0], solver))
        assert torch.equal(call(made[0]), stale)
        for pipe in made:
            change(pipe)
        fresh = call(accelerate(made[1], solver))
        assert torch.equal(call(made[0]), fresh) and apart(fresh, stale) > 1e-3


def recording(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a GPU records, run as it is from here on; the records."""
    records: list[Any] = []
    recorder = SimpleNamespace(record=lambda work, warm_up: (records.append(work), work)[1])
    monkeypatch.setattr(desk_module, "recorder_for", lambda device, executor: recorder)
    return records


def test_a_record_serves_the_network_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """FreeU, hooks, attention processors and the mode are no conditions, and a record has them in it."""
    records, pipe = recording(monkeypatch), accelerate(tiny.make(SD))
    call(pipe), call(pipe, seed=2)
    assert len(records) == 1
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    call(pipe)
    assert len(records) == 2
    pipe.disable_freeu()
    call(pipe)
    assert len(records) == 2
    hook = pipe.unet.mid_block.register_forward_hook(lambda module, args, output: output * 0.5)
    call(pipe), call(pipe)
    assert len(records) == 3
    hook.remove()
    pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    call(pipe)
    assert len(records) == 4
    pipe.unet.train()
    call(pipe)
    assert len(records) == 5


def test_records_in_and_out_of_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    records, pipe = recording(monkeypatch), tiny.make(SD)
    before = call(pipe)
    accelerate(pipe, graph=True)
    with torch.inference_mode():
        assert apart(call(pipe), before) <= LATENT
    assert apart(call(pipe), before) <= LATENT
    with torch.inference_mode():
        assert apart(call(pipe), before) <= LATENT
    assert len(records) == 1


@pytest.mark.parametrize("recorded", [False, True])
def test_what_a_callback_writes_in_inference_mode_or_another_network_counts(
    recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if i == 1:
            tensors["prompt_embeds"].mul_(0.3)
        return {}

    pipe, other = tiny.make(SD), tiny.make(SD, seed=9).unet
    own, plain = pipe.unet, call(pipe)

    def swap(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if i == 2:
            pipe.unet = other
        return {}

    def run() -> list[Any]:
        with torch.inference_mode():
            found = [call(pipe, callback_on_step_end=write, callback_on_step_end_tensor_inputs=["prompt_embeds"])]
        found.append(call(pipe, callback_on_step_end=swap))
        pipe.unet = own
        return found

    before = run()
    if recorded:
        recording(monkeypatch)
    accelerate(pipe)
    for after, theirs in zip(run(), before, strict=True):
        assert apart(after, theirs) <= LATENT and apart(theirs, plain) > 1e-3


@pytest.mark.parametrize("solver", [None, "dpmpp_2m"])
def test_a_call_leaves_nothing_alive(solver: str | None) -> None:
    """Without the garbage collector: the caller's tensors after a call, the network with its pipeline."""
    pipe = accelerate(tiny.make(SD), solver)
    call(pipe)
    gc.collect()
    gc.disable()
    try:
        prompt = torch.randn(1, 5, 8)
        seen = weakref.ref(prompt), weakref.ref(pipe.unet)
        call(pipe, prompt_embeds=prompt, callback_on_step_end=lambda pipe, i, t, tensors: {})
        del prompt
        assert seen[0]() is None
        del pipe
        assert seen[1]() is None
    finally:
        gc.enable()


def test_the_record_of_a_replaced_network_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    records, pipe = recording(monkeypatch), accelerate(tiny.make(SD))
    call(pipe)
    old, pipe.unet = weakref.ref(pipe.unet), tiny.make(SD, seed=3).unet
    call(pipe)
    assert len(records) == 2
    del records[:]
    gc.collect()
    assert old() is None


def test_weights_that_hooks_move_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    records = recording(monkeypatch)
    for on in (
        lambda net: net.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32),
        lambda net: HookRegistry.check_if_exists_or_initialize(net.mid_block).register_hook(ModelHook(), "group"),
    ):
        pipe = tiny.make(SD)
        on(pipe.unet)
        before = call(pipe)
        assert apart(call(accelerate(pipe)), before) <= LATENT and not records
        with pytest.raises(ValueError, match="hooks that move or cast its weights"):
            call(accelerate(pipe, graph=True))


def test_a_scheduler_that_needs_more_than_a_few_steps() -> None:
    pipe = tiny.make(SD, scheduler("PNDM", steps_offset=1))
    before = call(pipe)
    assert apart(call(accelerate(pipe)), before) <= LATENT
    assert apart(call(accelerate(pipe, steps=8)), before) <= LATENT


def test_pickled_and_without_a_component() -> None:
    pipe = accelerate(tiny.make(SD), steps=4)
    before = call(pipe)
    back = pickle.loads(pickle.dumps(pipe))
    assert type(back) is type(pipe) and torch.equal(call(back), before)
    assert type(restore(back)) is diffusers.StableDiffusionPipeline
    network = pipe.unet
    del pipe.unet
    assert "unet" not in vars(pipe) and not isinstance(pipe.unet, torch.nn.Module)
    with pytest.raises(AttributeError, match="unet"):
        del pipe.unet
    pipe.unet = network
    assert torch.equal(call(pipe), before)


def test_a_scheduler_replaced_in_a_callback_and_a_predicted_variance_are_refused() -> None:
    def swap(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe.scheduler = scheduler("DDIM")
        return {}

    with pytest.raises(RuntimeError, match="scheduler was replaced while it runs"):
        call(accelerate(tiny.make(SD)), callback_on_step_end=swap)
    pipe = accelerate(tiny.make("DDPMPipeline"))
    pipe.unet.conv_out = torch.nn.Conv2d(pipe.unet.conv_out.in_channels, 6, 3, padding=1)
    with pytest.raises(ValueError, match="6 channels for latents of 3; a variance"):
        call(pipe)
