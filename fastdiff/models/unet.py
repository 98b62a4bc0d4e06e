"""The standard DDPM/ADM UNet (Ho et al. 2020; Dhariwal & Nichol 2021), equal to diffusers' `UNet2DModel`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import guided_diffusion_names
from .unet_blocks import UpLevel, normalised
from .unet_config import UNetConfig
from .unet_encoder import UNetEncoder
from .weight_files import read_safetensors, read_tensors

if TYPE_CHECKING:
    from .unet_fast import FastUNet

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


class UNet(UNetEncoder):
    """Predicts F(x, t, class): the raw network output, whose meaning is given by the Denoiser around it.

    Deterministic in eval mode; capturable; keeps channels_last inputs channels_last.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        widths = config.block_out_channels
        first, last = widths[0], len(widths) - 1
        up = widths[::-1]
        self.up_blocks = nn.ModuleList(
            UpLevel(config, kind, up[max(i - 1, 0)], up[i], up[min(i + 1, last)], i == last)
            for i, kind in enumerate(config.up_block_types)
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, first, config.norm_eps)
        self.conv_out = nn.Conv2d(first, config.out_channels * config.patch_size**2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor | float | int, class_labels: Tensor | None = None) -> Tensor:
        """Raw output for a batch of states.

        x: [B, in_channels, H, W]; t: [B] or scalar, float or int, the clock the network was trained with;
        class_labels: [B] int64, required exactly when the network has classes.
        Returns [B, out_channels, H, W]. Raises ValueError on shapes that do not fit.
        """
        x, act_time, time = self.enter(x, t, class_labels)
        x, states = self.encode(x, act_time)
        for up in self.up_blocks:
            x = up(x, states, act_time)
        return self.leave(x, time)

    def leave(self, x: Tensor, time: Tensor) -> Tensor:
        """What `forward` does after its levels."""
        patch = self.config.patch_size
        x = self.conv_out(normalised(self.conv_norm_out, x))
        x = F.pixel_shuffle(x, patch) if patch > 1 else x
        return x / time.to(x.dtype)[:, None, None, None] if self.config.time_embedding_type == "fourier" else x

    def fast(self, dtype: torch.dtype | None = None, winograd: bool = True) -> FastUNet:
        """This network for inference (fastdiff.models.unet_fast): copied weights, cast once to `dtype`, fewer kernels.

        dtype: float32, float16 or bfloat16; None is the network's own. Where it has another, TypeError.
        winograd: False on a CPU keeps the memory of the weights at twice the network's, and is slower.
        """
        from .unet_fast import FastUNet

        return FastUNet(self, dtype, winograd)

    @classmethod
    def from_diffusers(cls, source: nn.Module | str | os.PathLike[str]) -> UNet:
        """A UNet with the weights of a diffusers `UNet2DModel`, or of the folder one was saved to.

        source: the module, or a folder with config.json and diffusion_pytorch_model.safetensors (pickles are
        not read). The result is on the module's device and in its dtype; from a folder, on the CPU.
        Raises: ValueError for configurations or weights that do not fit, FileNotFoundError, TypeError.
        """
        if isinstance(source, nn.Module):
            config = getattr(source, "config", None)
            if not isinstance(config, Mapping):
                raise TypeError(
                    f"UNet.from_diffusers: got {type(source).__name__} without a `config` mapping, expected a "
                    "diffusers UNet2DModel; wrap other networks in a Denoiser"
                )
            origin = type(source).__name__
            return cls._build(_convert_config(config, origin), source.state_dict(), origin)
        folder = Path(source)
        converted = _convert_config(_read_config(folder), str(folder))
        return cls._build(converted, read_safetensors(folder / WEIGHTS_NAME), str(folder))

    @classmethod
    def from_guided_diffusion(
        cls, source: Mapping[str, Tensor] | str | os.PathLike[str], config: Mapping[str, Any]
    ) -> UNet:
        """A UNet with the weights of a guided-diffusion or improved-diffusion `UNetModel`.

        source: its state dict, or a file of it: .safetensors or .pt, of which only tensors are read. config: the flags
        it was trained with (image_size, num_channels, num_res_blocks, ...), those left out at guided-diffusion's
        defaults. Raises: ValueError for flags or weights that do not fit, FileNotFoundError.
        """
        weights = source if isinstance(source, Mapping) else read_tensors(source)
        converted, renamed = guided_diffusion_names.convert(weights, config)
        origin = "the state dict" if isinstance(source, Mapping) else str(source)
        return cls._build(converted, renamed, origin)

    def save(
        self, path: str | os.PathLike[str], dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Writes weights and configuration as one safetensors file, under a temporary name first.

        dtype: of the stored weights (default: as they are); metadata: extra strings kept beside the configuration.
        """
        self._save(Path(path), dtype, {**(metadata or {}), "unet": self.config.to_json()})

    @classmethod
    def load(cls, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> UNet:
        """Reads what `save` wrote; weights are converted to `dtype`. Raises: FileNotFoundError, ValueError."""
        return cls._load(Path(path), "unet", dtype)


def _convert_config(config: Mapping[str, Any], origin: str) -> UNetConfig:
    name = config.get("_class_name", "UNet2DModel")
    if name != "UNet2DModel":
        raise ValueError(f"UNet: {origin} is a {name}, expected UNet2DModel; wrap other networks in a Denoiser")
    return UNetConfig.from_dict(config)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a folder written by UNet2DModel.save_pretrained")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: got JSON {type(config).__name__}, expected an object")
    return config
