"""Calls of the tiny pipelines and how far apart two are: for the tests of `accelerate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import tiny_pipelines as tiny

pytest.importorskip("diffusers")
pytest.importorskip("transformers", reason="diffusers' text pipelines need transformers (pip install transformers)")

LATENT = 2e-5
KINDS = list(tiny.MAKERS)
TEXT = [kind for kind in KINDS if "Diffusion" in kind or "Flux" in kind]
SD = "StableDiffusionPipeline"


def apart(one: Any, other: Any) -> float:
    """Largest difference of latents, over the largest element."""
    one, other = (torch.as_tensor(value).double() for value in (one, other))
    return float((one - other).abs().max() / other.abs().max())


def call(pipe: Any, seed: int = 1, **more: Any) -> Any:
    """The latents of one call, or what output_type in `more` says."""
    options = tiny.arguments(type(pipe).__name__, seed=seed)
    options["output_type"] = "latent" if "Diffusion" in type(pipe).__name__ or "Flux" in type(pipe).__name__ else "np"
    made = pipe(**{**options, **more})
    return made[0] if isinstance(made, tuple) else made.images


def watching(log: list[Any], change: bool) -> Any:
    """A callback that notes what it is given and what the pipeline looks like, and changes the run."""

    def seen(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        guided = getattr(pipe, "do_classifier_free_guidance", None)
        network = type(getattr(pipe, "unet", None) or pipe.transformer).__name__
        index = getattr(pipe.scheduler, "step_index", None)
        log.append(((i, float(t), guided, network, type(pipe.scheduler).__name__, index), dict(tensors)))
        log[-1][1]["latents"] = tensors["latents"].clone()
        if change and i == 1:
            tensors["latents"] = tensors["latents"] * 0.9
        if change and i == 2:
            tensors["latents"].mul_(1.1)
        if change and i == 2 and type(pipe).__name__ == SD:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    return seen
