"""`accelerate(pipe)` where pipeline, scheduler or network are not what they were, or not what a loop can take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_accelerate import LATENT, SD, apart, call, quiet, tiny

from fastdiff.integrations.diffusers import accelerate, restore

diffusers = pytest.importorskip("diffusers")
__all__ = ["quiet"]  # a fixture of every test here


def scheduler(name: str, **config: Any) -> Any:
    """Of the tiny latent pipelines."""
    return getattr(diffusers, f"{name}Scheduler")(**tiny.LATENT, **config)


@pytest.mark.parametrize("name", ["EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete"])
@pytest.mark.parametrize("kind", ["DDPMPipeline", "DiTPipeline"])
def test_a_loop_that_mixes_scaled_input_and_state_is_refused(kind: str, name: str) -> None:
    """DiT's steps the scaled tensor, DDPM's never scales: at once, and where the scheduler is replaced later."""
    scaling, pipe = getattr(diffusers, f"{name}Scheduler")(), tiny.make(kind)
    own, before = pipe.scheduler, call(pipe)
    accelerate(pipe)
    pipe.scheduler = scaling
    with pytest.raises(TypeError, match=f"{name}Scheduler scales.*DDIMScheduler"):
        call(pipe)
    with pytest.raises(TypeError, match=f"{name}Scheduler scales"):
        accelerate(restore(pipe))
    pipe.scheduler = own
    assert apart(call(accelerate(pipe)), before) <= LATENT


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_a_learned_variance_is_refused_by_name(variance: str) -> None:
    pipe = tiny.make("DDPMPipeline", diffusers.DDPMScheduler(variance_type=variance))
    with pytest.raises(TypeError, match=f"DDPMScheduler uses the variance.*{variance}.*not taken over"):
        accelerate(pipe)


@pytest.mark.parametrize("name", ["KDPM2Discrete", "KDPM2AncestralDiscrete", "HeunDiscrete", "PNDM"])
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
