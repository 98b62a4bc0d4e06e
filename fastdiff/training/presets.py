"""Configurations to start from, by name. May import: config, data.idx.

Sizes and settings are those of the papers they name; where a paper counts steps they are here in images.
"""

from __future__ import annotations

from fastdiff.errors import unknown_name

from .config import TrainConfig
from .data.idx import FASHION_CLASSES

_PRESETS = {
    # The network that comes with the package: 1.9 million parameters, minutes to hours on a CPU.
    "fashion32": TrainConfig(
        channels=1, resize="pad", class_names=FASHION_CLASSES,
        network={
            "patch_size": 2, "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
            "block_out_channels": [64, 96], "layers_per_block": 1, "attention_head_dim": 32, "norm_num_groups": 8,
            "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8,
        },
        objective_options={"times": {"name": "lognormal", "mean": -0.7, "std": 1.3}},
        images=830_848, batch=128, learning_rate=1e-3, warmup_images=38_400, beta2=0.99, weight_decay=0.01,
        ema_halflife=88_700, math_attention=True, weights_dtype="float16",
    ),
    # Karras et al. 2022, Table 7, on a DDPM++ (Song et al. 2021) without its extra resampling: 59 million parameters.
    "cifar32": TrainConfig(
        flip=True,
        network={
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [256, 256, 256], "layers_per_block": 4, "attention_head_dim": 256,
            "norm_num_groups": 32, "dropout": 0.13,
        },
        images=200_000_000, batch=512, learning_rate=1e-3, warmup_images=10_000_000, decay="constant",
        ema_halflife=500_000, save_images=2_000_000, log_images=50_000, sample_images=2_000_000,
    ),
    # Karras et al. 2022, Table 7, on the ADM of Dhariwal & Nichol 2021: 295 million parameters.
    "imagenet64": TrainConfig(
        size=64, flip=True,
        network={
            "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
            "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
            "block_out_channels": [192, 384, 576, 768], "layers_per_block": 3, "attention_head_dim": 64,
            "norm_num_groups": 32, "dropout": 0.1, "resnet_time_scale_shift": "scale_shift",
            "downsample_type": "resnet", "upsample_type": "resnet",
        },
        images=2_500_000_000, batch=4096, learning_rate=1e-4, warmup_images=10_000_000, decay="constant",
        ema_halflife=50_000_000, save_images=10_000_000, log_images=200_000, sample_images=10_000_000,
    ),
    # Latents [4, 64, 64] of 512-pixel pictures; flow matching with logit-normal times (Esser et al. 2024).
    "latent64": TrainConfig(
        size=64, channels=4, resize="none", scale=0.18215,
        network={
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [192, 384, 576, 768], "layers_per_block": 2, "attention_head_dim": 64,
            "norm_num_groups": 32, "resnet_time_scale_shift": "scale_shift",
        },
        objective="flow", objective_options={"times": "logitnormal"},
        images=400_000_000, batch=1024, learning_rate=1e-4, warmup_images=10_000_000, decay="constant",
        ema_halflife=5_000_000, save_images=5_000_000, log_images=100_000,
    ),
}  # fmt: skip


def names() -> list[str]:
    """Presets that `get` knows."""
    return list(_PRESETS)


def get(name: str) -> TrainConfig:
    """The preset of this name. Raises: ValueError naming those there are."""
    if name not in _PRESETS:
        raise unknown_name("preset", name, names())
    return _PRESETS[name].change(preset=name)
