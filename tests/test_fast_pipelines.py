"""Whole diffusers pipelines with tiny random components: the same pictures with the scheduler made fast.

The three lines of docs/diffusers.md are what changes between the two.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff.integrations.diffusers import fast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import tiny_pipelines as tiny

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers", reason="diffusers' text pipelines need transformers (pip install transformers)")

Array = np.ndarray[Any, np.dtype[np.float32]]
SD = "StableDiffusionPipeline"


pytestmark = pytest.mark.usefixtures("quiet_diffusers")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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
    pipe = tiny.make("DDPMPipeline")

    def call(pipe: Any) -> Array:
        g = torch.Generator().manual_seed(1)
        return pipe(batch_size=2, generator=g, num_inference_steps=12, output_type="np").images

    before, after, _ = before_and_after(pipe, call)
    same(before, after)


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim(eta: float) -> None:
    pipe = tiny.make("DDIMPipeline")

    def call(pipe: Any) -> Array:
        g = torch.Generator().manual_seed(1)
        return pipe(2, generator=g, eta=eta, num_inference_steps=12, output_type="np").images

    before, after, _ = before_and_after(pipe, call)
    same(before, after)


def prompt(seed: int) -> dict[str, Any]:
    return {name: value for name, value in tiny.arguments(SD, seed).items() if name.endswith("prompt_embeds")}


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
    scheduler = getattr(diffusers, f"{name}Scheduler")(**tiny.LATENT, **config)
    pipe = tiny.make(SD, scheduler)

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
    scheduler = getattr(diffusers, f"{name}Scheduler")(**tiny.LATENT, **config)
    pipe = tiny.make("StableDiffusionImg2ImgPipeline", scheduler)
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
    pipe = tiny.make("DDIMPipeline")
    pipe.scheduler = fast(type(pipe.scheduler)).from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    back = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    assert type(back.scheduler) is diffusers.DDIMScheduler
    assert {**back.scheduler.config} == {**diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler").config}
