"""UNets that benchmarks and `fastdiff info --unet` know by name. May import: unet_config."""

from __future__ import annotations

from pathlib import Path

from fastdiff.errors import unknown_name
from fastdiff.models.unet_config import UNetConfig

PRESETS: dict[str, UNetConfig] = {
    # google/ddpm-cifar10-32 (Ho et al. 2020)
    "ddpm-cifar10": UNetConfig(
        sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2, attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
    ),
    # the size of DDPM++ on CIFAR-10 (Karras et al. 2022): its channels, blocks and attention, in this UNet's wiring
    "edm-cifar10": UNetConfig(
        sample_size=32, block_out_channels=(256, 256, 256), layers_per_block=4, attention_head_dim=256,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet", upsample_type="resnet", time_embedding_dim=512, norm_eps=1e-6,
    ),
    # ADM on ImageNet-64 (Dhariwal & Nichol 2021), as in Karras et al. 2022
    "adm-64": UNetConfig(
        sample_size=64, block_out_channels=(192, 384, 576, 768), layers_per_block=3, attention_head_dim=64,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift", num_class_embeds=1000,
        attn_norm_num_groups=32,
    ),
}  # fmt: skip


def config_of(name: str) -> UNetConfig:
    """A preset, or the configuration in a file: a `config.json` of a UNet2DModel, or safetensors of `UNet.save`.

    Raises: ValueError for a name that is neither, FileNotFoundError, and what reading the file raises.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if path.suffix == ".safetensors":
        from fastdiff.models.weight_files import read_metadata

        metadata = read_metadata(path)
        if "unet" not in metadata:
            raise ValueError(f"{path}: holds no `unet` configuration, expected a file written by UNet.save")
        return UNetConfig.from_json(metadata["unet"])
    if path.suffix == ".json" or path.exists():
        return UNetConfig.from_json(path.read_text(encoding="utf-8"))
    raise unknown_name("UNet", name, PRESETS)
