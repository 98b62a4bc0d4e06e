"""What `accelerate(pipe)` and its calls refuse, and that a call which fails leaves the pipeline as it was."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from accelerate_cases import LATENT, SD, apart, call, tiny

import fastdiff as fd
from fastdiff.integrations.diffusers import accelerate, restore

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")


class Own(getattr(diffusers, SD)):  # type: ignore[misc]
    """A pipeline of somebody's own."""

    def __call__(self, *args: Any, **kw: Any) -> Any:
        """Not the original's."""
        return super().__call__(*args, **kw)


def test_refused_by_name_and_left_as_it_was() -> None:
    pipe = tiny.make(SD)
    own = Own(**pipe.components, requires_safety_checker=False)
    inpaint = diffusers.StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    thresholding = diffusers.DDIMScheduler(**tiny.LATENT, thresholding=True, sample_max_value=2.0)
    refusals: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (own, {}, TypeError, "Own has a __call__ of its own"),
        (inpaint, {}, TypeError, "StableDiffusionInpaintPipeline is not a pipeline whose loop is known"),
        (torch.nn.Linear(1, 1), {}, TypeError, "Linear is not a pipeline"),
        (3, {}, TypeError, "int is not a pipeline; it takes a diffusers pipeline .*not a part of it or a network"),
        (fd.load("fashion"), {}, TypeError, r"Denoiser is not a pipeline.* sampled with fd.sample\(model, shape\)"),
        (tiny.make(SD, thresholding), {}, TypeError, "DDIMScheduler.*step"),
        (pipe, {"solver": "dpmpp_2n"}, ValueError, "dpmpp_2m"),
        (pipe, {"solver": "dpm_adaptive"}, ValueError, "dpm_adaptive chooses its own steps"),
        (pipe, {"solver": "ddim_inverse"}, ValueError, "ddim_inverse goes from images to noise"),
        (pipe, {"solver": "mean_reverting"}, ValueError, "mean_reverting needs tensors.*mu"),
        (pipe, {"solver": "flow_euler"}, ValueError, "flow_euler needs a flow schedule"),
        (tiny.make(SD, thresholding), {"solver": "euler"}, ValueError, "thresholding=False"),
        (pipe, {"steps": 0}, ValueError, "steps must be"),
        (pipe, {"graph": "yes"}, ValueError, "graph must be"),
    ]
    for object, options, error, message in refusals:
        before = dict(getattr(object, "__dict__", {}))
        with pytest.raises(error, match=message):
            accelerate(object, **options)
        assert getattr(object, "__dict__", {}) == before


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (SD, {"ip_adapter_image_embeds": [torch.zeros(2, 1, 8)]}, ValueError, "ip_adapter_image_embeds.*restore"),
        ("FluxPipeline", {"negative_ip_adapter_image": 1}, ValueError, "negative_ip_adapter_image"),
        ("StableDiffusion3Pipeline", {"skip_guidance_layers": [0]}, ValueError, "skip_guidance_layers.*restore"),
        ("FluxPipeline", {"heigth": 8}, TypeError, "heigth"),
        (SD, {"num_inference_steps": 0}, ValueError, ""),
    ],
)
def test_a_call_that_is_refused_leaves_the_pipeline_ready(
    kind: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    pipe = tiny.make(kind)
    before = call(pipe)
    accelerate(pipe)
    generator = torch.Generator().manual_seed(1)
    if message:
        with pytest.raises(error, match=message):
            call(pipe, generator=generator, **options)
        assert torch.equal(generator.get_state(), torch.Generator().manual_seed(1).get_state())
    else:
        with pytest.raises((ValueError, IndexError, RuntimeError, TypeError, ZeroDivisionError)):
            call(pipe, **options)
    assert apart(call(pipe), before) <= LATENT


def test_refused_for_a_cache_or_a_graph_that_cannot_be() -> None:
    pipe = tiny.make("FluxPipeline")
    accelerate(pipe, graph=True)
    with pytest.raises(ValueError, match="graph=True needs.*cpu"):
        call(pipe)
    accelerate(pipe)
    config = diffusers.FirstBlockCacheConfig(threshold=0.1)
    pipe.transformer.enable_cache(config)
    with pytest.raises(RuntimeError, match="disable_cache"):
        call(pipe)
    pipe.transformer.disable_cache()
    call(pipe)


def test_an_error_in_a_call_changes_nothing() -> None:
    pipe = tiny.make(SD)
    before = call(pipe)
    accelerate(pipe)
    fails = pipe.unet.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(pipe)
    with pytest.raises(ZeroDivisionError):
        call(pipe, callback_on_step_end=lambda pipe, i, t, tensors: tensors)
    fails.remove()
    assert type(pipe.unet).__name__ == "UNet2DConditionModel" and pipe.do_classifier_free_guidance
    assert apart(call(pipe), before) <= LATENT
    assert torch.equal(call(restore(pipe)), before)
    assert restore(pipe) is pipe


def test_one_pipeline_in_two_threads_and_a_copy_for_each() -> None:
    pipe = accelerate(tiny.make(SD))
    expected, twin = call(pipe), copy.deepcopy(pipe)
    inside, go = threading.Event(), threading.Event()
    found: list[Any] = []

    def held(*_: Any) -> None:
        inside.set()
        go.wait(20)

    hook = pipe.unet.register_forward_pre_hook(held)
    thread = threading.Thread(target=lambda: found.append(call(pipe)))
    thread.start()
    assert inside.wait(20)
    try:
        with pytest.raises(RuntimeError, match="running already"):
            call(pipe)
        with pytest.raises(RuntimeError, match="the pipeline is running"):
            restore(pipe)
        assert type(pipe.unet).__name__ == "UNet2DConditionModel" and type(pipe.scheduler).__name__ == "PNDMScheduler"
        assert torch.equal(call(twin), expected)
    finally:
        hook.remove()
        go.set()
        thread.join()
    assert torch.equal(found[0], expected) and torch.equal(call(pipe), expected)
