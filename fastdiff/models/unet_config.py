"""What a UNet is made of: the fields of diffusers' `UNet2DModel` configuration, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")

_CHOICES: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional", "fourier"),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "act_fn": ("silu", "swish"),
    "class_embed_type": (None,),
}
_POSITIVE = ("in_channels", "out_channels", "layers_per_block", "norm_num_groups", "patch_size")
_OPTIONAL_POSITIVE = (
    "time_embedding_dim",
    "time_feature_dim",
    "attention_head_dim",
    "attention_heads",
    "attn_norm_num_groups",
    "num_class_embeds",
)
_TUPLES = ("down_block_types", "up_block_types", "block_out_channels")
_IGNORED = ("num_train_timesteps",)


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a UNet; names and defaults are those of diffusers' `UNet2DModel`.

    Four fields diffusers lacks. `time_scale`: the clock is multiplied by it before the sinusoidal embedding,
    which suits clocks of order one such as EDM's ln(sigma)/4. `patch_size`: p x p pixels become p*p channels
    at the input and back at the output (Hoogeboom et al. 2023, sec. 3.3), so no level works at full resolution.
    `attention_heads`: as many heads at every level, instead of heads of `attention_head_dim` channels.
    `time_feature_dim`: width of the sinusoidal embedding, where it is not that of the first level.

    Raises: ValueError or TypeError naming the field, what it held and what is supported.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    time_scale: float = 1.0
    patch_size: int = 1
    attention_heads: int | None = None
    time_feature_dim: int | None = None

    def __post_init__(self) -> None:
        for name in _TUPLES:
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)):
                raise TypeError(f"UNetConfig.{name}: got {value!r}, expected a list or tuple with one entry per level")
            object.__setattr__(self, name, tuple(value))
        self._check_numbers()
        self._check_choices()
        self._check_levels()
        self._check_channels()

    def _check_numbers(self) -> None:
        for name in _POSITIVE + _OPTIONAL_POSITIVE:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL_POSITIVE:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"UNetConfig.{name}: got {value!r}, expected a positive int")
            if value < 1:
                raise ValueError(f"UNetConfig.{name}: got {value}, expected at least 1")
        if self.downsample_padding not in (0, 1):
            raise ValueError(f"UNetConfig.downsample_padding: got {self.downsample_padding!r}, expected 0 or 1")

    def _check_choices(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"UNetConfig.{name}: got {value!r}, supported: {list(allowed)}; "
                    "for other networks wrap your own module in a Denoiser"
                )
        for name, allowed in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            for level, value in enumerate(getattr(self, name)):
                if value not in allowed:
                    raise ValueError(
                        f"UNetConfig.{name}[{level}]: got {value!r}, supported: {list(allowed)}; "
                        "for other networks wrap your own module in a Denoiser"
                    )

    def _check_levels(self) -> None:
        counts = {name: len(getattr(self, name)) for name in _TUPLES}
        if len(set(counts.values())) != 1 or not self.block_out_channels:
            raise ValueError(f"UNetConfig: got {counts} entries, expected one per level in each of the three")

    def _check_channels(self) -> None:
        groups = self.norm_num_groups
        for level, channels in enumerate(self.block_out_channels):
            if isinstance(channels, bool) or not isinstance(channels, int):
                raise TypeError(f"UNetConfig.block_out_channels[{level}]: got {channels!r}, expected an int")
            if channels < 1 or channels % groups:
                raise ValueError(
                    f"UNetConfig.block_out_channels[{level}]: got {channels}, expected a positive multiple of "
                    f"norm_num_groups={groups}; change either"
                )
            self._check_heads(level, channels)
        attn_groups, mid = self.attn_norm_num_groups, self.block_out_channels[-1]
        if attn_groups is not None and mid % attn_groups:
            raise ValueError(f"UNetConfig.attn_norm_num_groups: got {attn_groups}, expected a divisor of {mid}")

    def _check_heads(self, level: int, channels: int) -> None:
        head, heads = self.attention_head_dim, self.attention_heads
        if not self._attends(level):
            return
        if heads is not None and channels % heads:
            raise ValueError(
                f"UNetConfig.attention_heads: got {heads}, expected a divisor of the {channels} channels "
                f"of level {level}, which has attention"
            )
        if heads is None and head is not None and head > channels:
            raise ValueError(
                f"UNetConfig.attention_head_dim: got {head}, expected at most the {channels} channels "
                f"of level {level}, which has attention"
            )

    def _attends(self, level: int) -> bool:
        last = len(self.block_out_channels) - 1
        middle = level == last and self.mid_block_type is not None and self.add_attention
        return middle or "Attn" in self.down_block_types[level] or "Attn" in self.up_block_types[last - level]

    def head_dim(self, channels: int) -> int:
        """Channels of one attention head where there are `channels` in all."""
        return channels // self.attention_heads if self.attention_heads else self.attention_head_dim or channels

    @property
    def time_dim(self) -> int:
        """Width of the time embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Reads a mapping with diffusers' keys; keys starting with `_` are ignored.

        Raises: ValueError for a key this UNet does not know or a value it does not support.
        """
        known = {field.name for field in fields(cls)}
        given = {k: v for k, v in config.items() if not k.startswith("_") and k not in _IGNORED}
        unknown = sorted(set(given) - known)
        if unknown:
            raise ValueError(
                f"UNetConfig: got unknown entries {unknown}, expected those of UNet2DModel: {sorted(known)}"
            )
        for name in ("down_block_types", "up_block_types"):
            if isinstance(given.get(name), (list, tuple)):
                given[name] = tuple(str(kind).removeprefix("UNetRes") for kind in given[name])
        return cls(**given)

    def to_json(self) -> str:
        """One line of JSON that `from_json` reads back to an equal configuration."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> UNetConfig:
        """Inverse of `to_json`. Raises: ValueError when `text` is not a JSON object of known entries."""
        try:
            config = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"UNetConfig: not valid JSON ({error}); expected what to_json() wrote") from error
        if not isinstance(config, dict):
            raise ValueError(f"UNetConfig: got JSON {type(config).__name__}, expected an object")
        return cls.from_dict(config)
