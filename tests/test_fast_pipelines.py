"""Whole diffusers pipelines with tiny random components: the same pictures with the scheduler made fast.

The three lines of docs/diffusers.md are what changes between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff.integrations.diffusers import fast

diffusers = pytest.importorskip("diffusers")

Array = np.ndarray[Any, np.dtype[np.float32]]
SIZE = 16


@pytest.fixture(autouse=True)
def quiet() -> None:
    diffusers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)


def unet() -> Any:
    return diffusers.UNet2DModel(
        sample_size=SIZE,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ).eval()


def before_and_after(pipe: Any, call: Callable[[Any], Array]) -> tuple[Array, Array, Any]:
    """(pictures, pictures after the change, the fast scheduler); pictures are [batch, height, width, channels]."""
    pipe.set_progress_bar_config(disable=True)
    before = call(pipe)
    pipe.scheduler = fast(type(pipe.scheduler)).from_config(pipe.scheduler.config)
    return before, call(pipe), pipe.scheduler


def same(one: Array, other: Array) -> None:
    """Pictures in [0, 1] to less than a tenth of an 8-bit level; and pictures, not one colour."""
    assert one.shape == other.shape and other.std() > 0.05
    assert float(np.abs(one - other).max()) < 0.1 / 255


def test_ddpm() -> None:
    pipe = diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler())

    def call(pipe: Any) -> Array:
        g = torch.Generator().manual_seed(1)
        return pipe(batch_size=2, generator=g, num_inference_steps=12, output_type="np").images

    before, after, _ = before_and_after(pipe, call)
    same(before, after)


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim(eta: float) -> None:
    pipe = diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler())

    def call(pipe: Any) -> Array:
        g = torch.Generator().manual_seed(1)
        return pipe(2, generator=g, eta=eta, num_inference_steps=12, output_type="np").images

    before, after, _ = before_and_after(pipe, call)
    same(before, after)


def text_pipeline(kind: str, scheduler: Any) -> Any:
    pytest.importorskip("transformers", reason="diffusers' text pipelines need transformers (pip install transformers)")
    vae = diffusers.AutoencoderKL(
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    net = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=2,
    )
    return getattr(diffusers, kind)(
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        unet=net.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def prompt(seed: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(1, 5, 8, generator=g) for name in ("prompt_embeds", "negative_prompt_embeds")}


LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = [
    ("DDIM", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    ("PNDM", {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    ("DPMSolverMultistep", {"use_karras_sigmas": True}),
    ("UniPCMultistep", {}),
    ("EulerDiscrete", {}),
    ("EulerAncestralDiscrete", {}),
    ("HeunDiscrete", {}),
    ("LCM", {}),
]


@pytest.mark.parametrize(("name", "config"), SCHEDULERS)
def test_stable_diffusion(name: str, config: dict[str, Any]) -> None:
    """Text to image: other prompts, sizes, steps and guidance through one pipeline."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(**LATENT, **config)
    pipe = text_pipeline("StableDiffusionPipeline", scheduler)

    def call(pipe: Any) -> Array:
        images = [
            pipe(
                **prompt(seed),
                num_inference_steps=steps,
                guidance_scale=scale,
                height=size,
                width=16,
                num_images_per_prompt=2,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
            ).images
            for seed, steps, scale, size in [(0, 8, 5.0, 16), (1, 5, 1.0, 24), (2, 8, 2.0, 16)]
        ]
        return np.concatenate([image.reshape(-1) for image in images])

    before, after, fast_one = before_and_after(pipe, call)
    same(before, after)
    assert type(fast_one).__name__ == f"{name}Scheduler"


@pytest.mark.parametrize(("name", "config"), SCHEDULERS)
@pytest.mark.parametrize("strength", [0.5, 0.8])
def test_stable_diffusion_from_an_image(name: str, config: dict[str, Any], strength: float) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler")(**LATENT, **config)
    pipe = text_pipeline("StableDiffusionImg2ImgPipeline", scheduler)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(7))

    def call(pipe: Any) -> Array:
        return pipe(
            **prompt(3),
            image=image,
            strength=strength,
            num_inference_steps=10,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(4),
            output_type="np",
        ).images

    before, after, _ = before_and_after(pipe, call)
    same(before, after)


def test_a_saved_pipeline_loads_without_fastdiff(tmp_path: Any) -> None:
    pipe = diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler())
    pipe.scheduler = fast(type(pipe.scheduler)).from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    back = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    assert type(back.scheduler) is diffusers.DDIMScheduler
    assert {**back.scheduler.config} == {**diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler").config}
