"""The standard DDPM/ADM UNet (Ho et al. 2020; Dhariwal & Nichol 2021), equal to diffusers' `UNet2DModel`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastdiff.files import write_atomically

from . import guided_diffusion_names
from .unet_blocks import DownLevel, FourierTime, MidLevel, PositionalTime, TimeMLP, UpLevel, normalised
from .unet_config import UNetConfig
from .unet_inputs import check_inputs, expand_time
from .weight_files import read_metadata, read_safetensors, read_tensors

if TYPE_CHECKING:
    from .unet_fast import FastUNet

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"

# Names that attention layers had in diffusers before 0.15; hub checkpoints of that age still carry them.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class UNet(nn.Module):
    """Predicts F(x, t, class): the raw network output, whose meaning is given by the Denoiser around it.

    Deterministic in eval mode; capturable; keeps channels_last inputs channels_last.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        first, last = widths[0], len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels * config.patch_size**2, first, 3, padding=1)
        if config.time_embedding_type == "fourier":
            self.time_proj: nn.Module = FourierTime(first)
            time_features = 2 * first
        else:
            time_features = config.time_feature_dim or first
            self.time_proj = PositionalTime(time_features, config.flip_sin_to_cos, config.freq_shift)
        self.time_embedding = TimeMLP(time_features, config.time_dim)
        classes = config.num_class_embeds
        self.class_embedding = nn.Embedding(classes, config.time_dim) if classes is not None else None

        self.down_blocks = nn.ModuleList(
            DownLevel(config, kind, widths[max(i - 1, 0)], widths[i], i == last)
            for i, kind in enumerate(config.down_block_types)
        )
        self.mid_block = MidLevel(config) if config.mid_block_type is not None else None
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
        states = [x]
        for down in self.down_blocks:
            states += down(states[-1], act_time)
        x = states[-1]
        if self.mid_block is not None:
            x = self.mid_block(x, act_time)
        for up in self.up_blocks:
            x = up(x, states, act_time)
        return self.leave(x, time)

    def enter(self, x: Tensor, t: Tensor | float | int, class_labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What `forward` does before its levels: the first state, the activated time embedding, and the clock [B]."""
        check_inputs(self.config, x, class_labels)
        time = expand_time(t, x)
        features = self.time_proj(time * self.config.time_scale if self.config.time_scale != 1.0 else time)
        embedding = self.time_embedding(features.to(self.time_embedding.linear_1.weight.dtype))
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(class_labels)
        act_time = F.silu(embedding)

        patch = self.config.patch_size
        x = 2 * x - 1 if self.config.center_input_sample else x
        return self.conv_in(F.pixel_unshuffle(x, patch) if patch > 1 else x), act_time, time

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

    @classmethod
    def _build(cls, config: UNetConfig, weights: Mapping[str, Tensor], origin: str) -> UNet:
        net = outline(config)
        renamed = {_modern(key): value.detach().clone() for key, value in weights.items()}
        expected = {key: value.shape for key, value in net.state_dict().items()}
        wrong = [key for key in expected if key in renamed and renamed[key].shape != expected[key]]
        missing, extra = sorted(expected.keys() - renamed.keys()), sorted(renamed.keys() - expected.keys())
        if missing or extra or wrong:
            raise ValueError(
                f"UNet: weights of {origin} do not fit its configuration: missing {missing[:3]}, not expected "
                f"{extra[:3]}, of other shape {wrong[:3]} (first three of each); check that both come from one model"
            )
        net.load_state_dict(renamed, assign=True)
        return net.requires_grad_(True).eval()

    def save(
        self, path: str | os.PathLike[str], dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Writes weights and configuration as one safetensors file, under a temporary name first.

        dtype: of the stored weights (default: as they are); metadata: extra strings kept beside the configuration.
        """
        path = Path(path)
        tensors = {key: value.detach().to("cpu", dtype).contiguous() for key, value in self.state_dict().items()}
        strings = {**(metadata or {}), "unet": self.config.to_json()}
        write_atomically(path, lambda temporary: save_file(tensors, temporary, strings))

    @classmethod
    def load(cls, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> UNet:
        """Reads what `save` wrote; weights are converted to `dtype`. Raises: FileNotFoundError, ValueError."""
        path = Path(path)
        metadata = read_metadata(path)
        if "unet" not in metadata:
            raise ValueError(f"{path}: holds no `unet` configuration, expected a file written by UNet.save")
        return cls._build(UNetConfig.from_json(metadata["unet"]), read_safetensors(path), str(path)).to(dtype)


def outline(config: UNetConfig) -> UNet:
    """A UNet of this configuration on the device meta: names and shapes, no numbers."""
    with _NoInitialValues(), torch.device("meta"):
        return UNet(config)


class _NoInitialValues(TorchFunctionMode):
    """Leaves tensors as they are where torch.nn.init would fill them: on meta its normals load all of torch._dynamo."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


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


def _modern(key: str) -> str:
    parts = key.split(".")
    if "attentions" in parts and len(parts) > 1 and parts[-2] in _OLD_NAMES:
        parts[-2] = _OLD_NAMES[parts[-2]]
    return ".".join(parts)
