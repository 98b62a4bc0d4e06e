"""The way down of the DDPM/ADM UNet, which the UNet and the classifier of noised images share.

May import: unet_blocks, unet_config, unet_inputs, weight_files; files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastdiff.files import write_atomically

from .unet_blocks import DownLevel, FourierTime, MidLevel, PositionalTime, TimeMLP
from .unet_config import UNetConfig
from .unet_inputs import check_inputs, expand_time
from .weight_files import read_metadata, read_safetensors

N = TypeVar("N", bound="UNetEncoder")

# Names that attention layers had in diffusers before 0.15; hub checkpoints of that age still carry them.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class UNetEncoder(nn.Module):
    """Embedding of the clock and of labels, first convolution, levels on the way down, and the middle."""

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

    def encode(self, x: Tensor, act_time: Tensor) -> tuple[Tensor, list[Tensor]]:
        """From the first state: what the middle says, and the state after every block on the way to it."""
        states = [x]
        for down in self.down_blocks:
            states += down(states[-1], act_time)
        x = states[-1]
        return x if self.mid_block is None else self.mid_block(x, act_time), states

    @classmethod
    def outline(cls: type[N], config: UNetConfig) -> N:
        """A network of this configuration on the device meta: names and shapes, no numbers."""
        with _NoInitialValues(), torch.device("meta"):
            return cls(config)

    @classmethod
    def _build(cls: type[N], config: UNetConfig, weights: Mapping[str, Tensor], origin: str) -> N:
        net = cls.outline(config)
        renamed = {_modern(key): value.detach().clone() for key, value in weights.items()}
        expected = {key: value.shape for key, value in net.state_dict().items()}
        wrong = [key for key in expected if key in renamed and renamed[key].shape != expected[key]]
        missing, extra = sorted(expected.keys() - renamed.keys()), sorted(renamed.keys() - expected.keys())
        if missing or extra or wrong:
            raise ValueError(
                f"{cls.__name__}: weights of {origin} do not fit its configuration: missing {missing[:3]}, not "
                f"expected {extra[:3]}, of other shape {wrong[:3]} (first three of each); check that both come from "
                "one model"
            )
        net.load_state_dict(renamed, assign=True)
        return net.requires_grad_(True).eval()

    def _save(self, path: Path, dtype: torch.dtype | None, strings: Mapping[str, str]) -> None:
        tensors = {key: value.detach().to("cpu", dtype).contiguous() for key, value in self.state_dict().items()}
        write_atomically(path, lambda temporary: save_file(tensors, temporary, dict(strings)))

    @classmethod
    def _load(cls: type[N], path: Path, key: str, dtype: torch.dtype) -> N:
        """key: of the metadata, where the configuration is."""
        metadata = read_metadata(path)
        if key not in metadata:
            raise ValueError(f"{path}: holds no `{key}` configuration, expected a file written by {cls.__name__}.save")
        return cls._build(UNetConfig.from_json(metadata[key]), read_safetensors(path), str(path)).to(dtype)


class _NoInitialValues(TorchFunctionMode):
    """Leaves tensors as they are where torch.nn.init would fill them: on meta its normals load all of torch._dynamo."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _modern(key: str) -> str:
    parts = key.split(".")
    if "attentions" in parts and len(parts) > 1 and parts[-2] in _OLD_NAMES:
        parts[-2] = _OLD_NAMES[parts[-2]]
    return ".".join(parts)
