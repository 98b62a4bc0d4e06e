"""`accelerate(pipe)`: every pipeline, with tiny random components, against itself before.

Pictures in [0, 1] agree to a hundredth of an 8-bit level, latents to 2e-5 of the largest element.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate_cases import KINDS, LATENT, SD, TEXT, apart, call, tiny
from torch import Tensor

from fastdiff.integrations.diffusers import accelerate, fast, restore

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")

PICTURE = 0.01 / 255


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_pictures(kind: str) -> None:
    """Other prompts, sizes, batches, steps and guidance through one pipeline; the generators end where they did."""
    pipe = tiny.make(kind)
    cases: list[dict[str, Any]] = [
        {"seed": 1, "steps": 6, "guidance": 4.0},
        {"seed": 2, "steps": 9, "guidance": 2.0, "batch": 2, "size": (24, 16)},
        {"seed": 3, "steps": 5, "guidance": 1.0},
    ]

    forms = ["np", "latent", "latent"] if kind in TEXT else ["np"] * 3

    def run() -> tuple[list[Any], list[Tensor]]:
        calls = [tiny.arguments(kind, **case) | {"output_type": form} for case, form in zip(cases, forms, strict=True)]
        return [pipe(**one).images for one in calls], [one["generator"].get_state() for one in calls]

    before, left_before = run()
    assert accelerate(pipe) is pipe
    after, left = run()
    assert all(torch.equal(a, b) for a, b in zip(left, left_before, strict=True))
    for a, b in zip(after, before, strict=True):
        assert a.shape == b.shape and float(b.std()) > 0.05
        assert apart(a, b) <= (PICTURE if isinstance(b, np.ndarray) else LATENT)
    restore(pipe)
    assert type(pipe) is getattr(diffusers, kind) and not [key for key in vars(pipe) if "fastdiff" in key]
    assert np.array_equal(pipe(**tiny.arguments(kind, **cases[0])).images, before[0])


SCHEDULERS: list[tuple[str, dict[str, Any]]] = [
    ("DDIM", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    ("DDPM", {"clip_sample": False}),
    ("PNDM", {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    ("DPMSolverMultistep", {"use_karras_sigmas": True}),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
    ("UniPCMultistep", {}),
    ("DEISMultistep", {}),
    ("EulerDiscrete", {}),
    ("DDIM", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ("EulerAncestralDiscrete", {}),
    ("HeunDiscrete", {}),
    ("KDPM2Discrete", {}),
    ("LMSDiscrete", {}),
    ("LCM", {}),
]


@pytest.mark.parametrize("kind", [SD, "StableDiffusionImg2ImgPipeline"])
@pytest.mark.parametrize(("name", "config"), SCHEDULERS, ids=lambda value: value if isinstance(value, str) else "")
def test_schedulers(name: str, config: dict[str, Any], kind: str) -> None:
    """Text to image, and from the middle of the schedule."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(**tiny.LATENT, **config)
    pipe = tiny.make(kind, scheduler)
    strength = {"strength": 0.7} if "Img2Img" in kind else {}
    before = call(pipe, **strength)
    accelerate(pipe)
    assert apart(call(pipe, **strength), before) <= LATENT


def test_where_the_original_rounds_coarsely_ours_is_nearer_to_float64() -> None:
    """Its Euler holds a state of 4096 standard deviations in the first step of a schedule that ends in noise."""
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    pipe = tiny.make(SD, diffusers.EulerDiscreteScheduler(**tiny.LATENT, **config))
    options = tiny.arguments(SD, seed=1) | {"output_type": "latent", "latents": torch.randn(1, 4, 8, 8)}

    def run(dtype: torch.dtype) -> Tensor:
        cast = {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in options.items()}
        return pipe.to(dtype)(**cast).images

    before, exact = run(torch.float32), run(torch.float64)
    accelerate(pipe)
    assert apart(run(torch.float32), exact) < 1e-6 < apart(before, exact) / 5
    with pytest.raises(TypeError, match="float64"):
        run(torch.float64)


ARGUMENTS: list[tuple[str, dict[str, Any]]] = [
    (SD, {"eta": 0.7}),
    (SD, {"guidance_rescale": 0.7}),
    (SD, {"num_images_per_prompt": 3}),
    (SD, {"generator": [3, 4], "num_images_per_prompt": 2, "eta": 1.0}),
    (SD, {"latents": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(8))}),
    (SD, {"timesteps": [900, 500, 220, 30]}),
    ("StableDiffusionXLPipeline", {"guidance_rescale": 0.4}),
    ("StableDiffusionXLPipeline", {"denoising_end": 0.6}),
    ("StableDiffusionXLPipeline", {"sigmas": [14.0, 5.0, 2.0, 0.4, 0.0]}),
    ("StableDiffusionXLPipeline", {"original_size": (32, 8), "negative_target_size": (8, 8)}),
    ("StableDiffusionXLImg2ImgPipeline", {"denoising_start": 0.4, "image": torch.ones(1, 4, 8, 8)}),
    ("StableDiffusion3Pipeline", {"sigmas": [1.0, 0.7, 0.2]}),
    ("FluxPipeline", {"guidance_scale": 7.0, "true_cfg_scale": 1.0}),
    ("FluxPipeline", {"sigmas": [1.0, 0.7, 0.2]}),
    ("DDIMPipeline", {"eta": 0.6}),
    ("DDIMPipeline", {"eta": 0.6, "use_clipped_model_output": True}),
    ("DDIMPipeline", {"batch_size": 2, "generator": [1, 2], "eta": 0.3}),
]


@pytest.mark.parametrize(("kind", "options"), ARGUMENTS, ids=lambda value: value if isinstance(value, str) else "")
def test_arguments(kind: str, options: dict[str, Any]) -> None:
    scheduler = None
    if kind == SD:
        scheduler = diffusers.DDIMScheduler(**tiny.LATENT, clip_sample=False)
    if "timesteps" in options:
        scheduler = diffusers.DPMSolverMultistepScheduler(**tiny.LATENT)
    pipe = tiny.make(kind, scheduler)

    def run() -> Any:
        given = dict(options)
        if "generator" in given:
            given["generator"] = [torch.Generator().manual_seed(seed) for seed in given["generator"]]
        return call(pipe, **given)

    before = run()
    plain = call(pipe)
    assert plain.shape != before.shape or apart(plain, before) > 1e-4
    accelerate(pipe)
    assert apart(run(), before) <= LATENT


@pytest.mark.parametrize("form", ["np", "pil", "pt", "latent"])
def test_outputs(form: str) -> None:
    pipe = tiny.make(SD)
    before = call(pipe, output_type=form, return_dict=False)
    named = pipe(**tiny.arguments(SD) | {"output_type": form})
    accelerate(pipe)
    after = call(pipe, output_type=form, return_dict=False)
    assert type(after) is type(before)
    assert type(pipe(**tiny.arguments(SD) | {"output_type": form})) is type(named)
    if form == "pil":
        assert np.abs(np.asarray(after[0], dtype=int) - np.asarray(before[0], dtype=int)).max() <= 1
    else:
        assert apart(after, before) <= LATENT


def test_half_precision_is_nearer_to_single_than_the_original() -> None:
    """The state stays in float32 between steps."""
    single, half = tiny.make(SD), tiny.make(SD).to(torch.bfloat16)
    prompts = {
        name: value.bfloat16() for name, value in tiny.arguments(SD, seed=1).items() if isinstance(value, Tensor)
    }
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = call(single, latents=start.float(), **{name: value.float() for name, value in prompts.items()})
    before = call(half, latents=start, **prompts)
    accelerate(half)
    after = call(half, latents=start, **prompts)
    assert after.dtype == before.dtype == torch.bfloat16
    assert apart(after, exact) <= apart(before, exact)


def test_other_schedulers_sizes_and_dtypes_after_accelerating() -> None:
    """What changes between two calls is looked at anew, and what a call left is not in the way of the next."""
    pipe = tiny.make(SD).to(torch.float16).to(torch.float32)
    schedulers = [
        pipe.scheduler,
        diffusers.EulerAncestralDiscreteScheduler(**tiny.LATENT),
        fast(diffusers.DPMSolverMultistepScheduler)(**tiny.LATENT),
    ]
    cases = [(0, 16, 1), (1, 24, 2), (0, 16, 1), (2, 16, 3), (1, 16, 1)]

    def run() -> list[Any]:
        made = []
        for which, size, batch in cases:
            pipe.scheduler = schedulers[which]
            made.append(pipe(**tiny.arguments(SD, size=(size, 16), batch=batch) | {"output_type": "latent"}).images)
        return [*made, call(pipe.to(torch.float16).to(torch.float32))]

    before = run()
    accelerate(pipe)
    off = [apart(ours, theirs) for ours, theirs in zip(run(), before, strict=True)]
    assert max(off) <= LATENT, off
    pipe.scheduler = diffusers.DDIMScheduler(**tiny.LATENT, thresholding=True, sample_max_value=2.0)
    with pytest.raises(TypeError, match="DDIMScheduler"):
        call(pipe)
    pipe.scheduler = schedulers[0]
    assert apart(call(pipe), before[-1]) > 0


def test_inference_mode_and_another_network() -> None:
    pipe, other = tiny.make(SD), tiny.make(SD, seed=1).unet
    before = call(pipe)
    accelerate(pipe)
    with torch.inference_mode():
        assert apart(call(pipe), before) <= LATENT
        assert apart(call(pipe, callback_on_step_end=lambda pipe, i, t, tensors: tensors), before) <= LATENT
    assert apart(call(pipe), before) <= LATENT
    pipe.unet = other
    assert pipe.unet is other is pipe.components["unet"]
    changed = call(pipe)
    assert apart(changed, before) > 1e-2 and apart(changed, call(restore(pipe))) <= LATENT


def test_accelerating_twice_and_changing_the_settings() -> None:
    pipe = tiny.make(SD)
    before = call(pipe)
    kind = type(pipe)
    accelerate(accelerate(pipe), steps=4)
    options = tiny.arguments(SD) | {"output_type": "latent"}
    del options["num_inference_steps"]
    four = pipe(**options).images
    assert apart(four, call(restore(pipe), seed=0, num_inference_steps=4)) <= LATENT
    assert type(pipe) is kind
    accelerate(pipe, steps=4)
    assert apart(call(pipe), before) <= LATENT, "a call that says how many steps has that many"


def test_a_saved_pipeline_is_the_original(tmp_path: Path) -> None:
    pipe = accelerate(tiny.make("DDIMPipeline"))
    pipe.save_pretrained(tmp_path)
    back = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(back) is diffusers.DDIMPipeline and "fastdiff" not in (tmp_path / "model_index.json").read_text()
    assert apart(call(pipe), call(back)) <= PICTURE
