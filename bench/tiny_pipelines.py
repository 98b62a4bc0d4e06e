"""Pipelines of diffusers with tiny random components, made from their config classes: nothing is downloaded.

For the tests, the benchmark and the table of docs/diffusers.md. Prompts are random embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WIDTH = 8  # of the embeddings
SIZE = 16  # of the pictures


def _vae(latent_channels: int = 4, **config: Any) -> Any:
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        **config,
    ).eval()


def _unet() -> Any:
    import diffusers

    return diffusers.UNet2DModel(
        sample_size=SIZE,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ).eval()


def _conditional_unet(**config: Any) -> Any:
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=SIZE // 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        norm_num_groups=4,
        attention_head_dim=2,
        **config,
    ).eval()


def ddpm(kind: str, scheduler: Any = None) -> Any:
    """DDPMPipeline or DDIMPipeline."""
    import diffusers

    own = getattr(diffusers, kind.replace("Pipeline", "Scheduler"))
    return getattr(diffusers, kind)(_unet(), scheduler or own())


def dit(kind: str, scheduler: Any = None) -> Any:
    """DiTPipeline, its transformer with a learned variance."""
    import diffusers

    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=SIZE // 2
    )
    _settled(net)
    return diffusers.DiTPipeline(net.eval(), _vae(), scheduler or diffusers.DDIMScheduler(clip_sample=False))


def stable_diffusion(kind: str, scheduler: Any = None, **config: Any) -> Any:
    """StableDiffusionPipeline or its Img2Img; config: of the UNet."""
    import diffusers

    return getattr(diffusers, kind)(
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        unet=_conditional_unet(**config),
        scheduler=scheduler or diffusers.PNDMScheduler(**LATENT, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(kind: str, scheduler: Any = None) -> Any:
    """StableDiffusionXLPipeline or its Img2Img."""
    import diffusers

    net = _conditional_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return getattr(diffusers, kind)(
        vae=_vae(),
        unet=net,
        scheduler=scheduler or diffusers.EulerDiscreteScheduler(**LATENT, steps_offset=1),
        add_watermarker=False,
        **parts,
    )


def stable_diffusion_3(kind: str, scheduler: Any = None) -> Any:
    """StableDiffusion3Pipeline or its Img2Img."""
    import diffusers

    net = diffusers.SD3Transformer2DModel(
        sample_size=SIZE // 2,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=32,
    )
    _settled(net)
    parts = dict.fromkeys(
        ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    )
    return getattr(diffusers, kind)(
        vae=_vae(shift_factor=0.06),
        transformer=net.eval(),
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **parts,
    )


def flux(kind: str, scheduler: Any = None) -> Any:
    """FluxPipeline or its Img2Img."""
    import diffusers

    net = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    _settled(net)
    shifted = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return getattr(diffusers, kind)(
        vae=_vae(shift_factor=0.06), transformer=net.eval(), scheduler=scheduler or shifted, **parts
    )


MAKERS: dict[str, Callable[..., Any]] = {
    "DDPMPipeline": ddpm,
    "DDIMPipeline": ddpm,
    "DiTPipeline": dit,
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionImg2ImgPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "StableDiffusionXLImg2ImgPipeline": stable_diffusion_xl,
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "StableDiffusion3Img2ImgPipeline": stable_diffusion_3,
    "FluxPipeline": flux,
    "FluxImg2ImgPipeline": flux,
}


def make(kind: str, scheduler: Any = None, seed: int = 0, **config: Any) -> Any:
    """The pipeline of this class, with this scheduler or the one its models are published with."""
    torch.manual_seed(seed)
    pipe = MAKERS[kind](kind, scheduler, **config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(
    kind: str, seed: int = 0, steps: int = 6, guidance: float = 4.0, batch: int = 1, size: tuple[int, int] = (16, 16)
) -> dict[str, Any]:
    """A call's arguments, drawn from `seed`: prompts, and an image and a strength where the pipeline takes one."""
    g = torch.Generator().manual_seed(seed)
    call: dict[str, Any] = {
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "np",
    }
    if kind in ("DDPMPipeline", "DDIMPipeline"):
        return call | {"batch_size": batch}
    if kind == "DiTPipeline":
        return call | {
            "class_labels": torch.randint(1000, (batch,), generator=g).tolist(),
            "guidance_scale": guidance,
        }
    pooled = not kind.startswith(("StableDiffusionPipeline", "StableDiffusionImg2Img"))
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        call[name] = torch.randn(batch, 5, WIDTH, generator=g)
        if pooled:
            call[name.replace("prompt", "pooled_prompt")] = torch.randn(batch, WIDTH, generator=g)
    call["true_cfg_scale" if kind.startswith("Flux") else "guidance_scale"] = guidance
    if "Img2Img" in kind:
        call |= {"image": torch.rand(batch, 3, *size, generator=g), "strength": 0.6}
    if "Img2Img" not in kind or kind.startswith(("StableDiffusion3", "Flux")):
        call |= {"height": size[0], "width": size[1]}
    return call


def _settled(net: torch.nn.Module) -> None:
    """Small random weights where a transformer starts at zero, so that its output depends on its input."""
    with torch.no_grad():
        for weight in net.parameters():
            if not weight.any():
                weight.normal_(std=0.1)
