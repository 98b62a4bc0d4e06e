"""The parts of the DDPM/ADM UNet: residual, attention and resampling blocks.

Parameter names follow diffusers, so that its weights load unchanged.
All blocks keep the memory format of their input and are deterministic and capturable.
May import: engine.norm, engine.attention, engine.winograd_train.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.engine.attention import attention
from fastdiff.engine.norm import choose, norm_act
from fastdiff.engine.winograd_train import conv3x3

from .unet_config import UNetConfig


def set_to_zero(layer: nn.Module) -> None:
    """Makes the residual branch that ends in `layer` start as nothing (Ho et al. 2020, released code)."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def normalised(
    norm: nn.GroupNorm,
    x: Tensor,
    before: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: bool = True,
) -> Tensor:
    """silu(norm(x + before) (1 + scale) + shift), in one pass where that is there and x is channels_last.

    before, scale, shift: [B, C]. torch.compile fuses torch's own functions, and hooks want the module called.
    """
    fused = not x.is_meta and choose(x.device, x.dtype) != "reference"
    fused = fused and x.is_contiguous(memory_format=torch.channels_last)
    if fused and not (torch.compiler.is_compiling() or norm._forward_hooks or norm._forward_pre_hooks):
        affine = norm.weight, norm.bias, norm.num_groups, norm.eps
        return norm_act(x, *affine, act=act, before=before, scale=scale, shift=shift)
    h = norm(x if before is None else x + before[:, :, None, None])
    h = h if scale is None else h * (1 + scale[:, :, None, None])
    h = h if shift is None else h + shift[:, :, None, None]
    return F.silu(h) if act else h


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps the image's size, and trains on a CPU by `engine.winograd_train`."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__(channels_in, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, channels_in, H, W] -> [B, channels, H, W]."""
        return conv3x3(x, self.weight, self.bias)


class PositionalTime(nn.Module):
    """Sinusoids of the clock: sin(t·w_k), cos(t·w_k), w_k = 10000^(-k/(dim/2 - shift)) (Ho et al. 2020, App. B)."""

    def __init__(self, dim: int, flip: bool, shift: float) -> None:
        super().__init__()
        self.dim, self.flip, self.shift = dim, flip, shift

    def forward(self, t: Tensor) -> Tensor:
        """t: [B] -> [B, dim] fp32."""
        half = self.dim // 2
        k = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(k * (-math.log(10000.0) / (half - self.shift)))
        pair = (angles.cos(), angles.sin()) if self.flip else (angles.sin(), angles.cos())
        return F.pad(torch.cat(pair, dim=1), (0, self.dim % 2))


class FourierTime(nn.Module):
    """Random Fourier features of the log clock: sin(2 pi w ln t), cos(2 pi w ln t) (Song et al. 2021, App. C)."""

    def __init__(self, dim: int, scale: float = 16.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim) * scale, requires_grad=False)

    def forward(self, t: Tensor) -> Tensor:
        """t: [B], positive -> [B, 2*dim] fp32."""
        angles = t.float().log()[:, None] * self.weight.float()[None, :] * 2 * math.pi
        return torch.cat((angles.sin(), angles.cos()), dim=1)


class TimeMLP(nn.Module):
    """Two linear layers with a SiLU between: [B, width_in] -> [B, width]."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(embedding)))


class ResBlock(nn.Module):
    """h = conv(silu(norm(x))) with the time added or as scale and shift; x + conv(silu(norm(h))).

    Ho et al. 2020, App. B; scale-shift and resampling inside the block from Dhariwal & Nichol 2021, sec. 3.
    """

    def __init__(
        self, config: UNetConfig, channels_in: int, channels: int, resample: str | None = None, scale: float = 1.0
    ) -> None:
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        self.scale_shift = config.resnet_time_scale_shift == "scale_shift"
        self.resample, self.scale = resample, scale
        self.norm1 = nn.GroupNorm(groups, channels_in, eps)
        self.conv1 = Conv3x3(channels_in, channels)
        self.time_emb_proj = nn.Linear(config.time_dim, channels * (2 if self.scale_shift else 1))
        self.norm2 = nn.GroupNorm(groups, channels, eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = Conv3x3(channels, channels)
        self.conv_shortcut = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else None
        set_to_zero(self.conv2)

    def _resize(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x: Tensor, act_time: Tensor) -> Tensor:
        """x: [B, channels_in, H, W]; act_time: [B, time_dim], SiLU already applied -> [B, channels, H', W']."""
        h = self._resize(normalised(self.norm1, x))
        x = self._resize(x)
        h = self.conv1(h)
        time = self.time_emb_proj(act_time)
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = normalised(self.norm2, h, scale=scale, shift=shift)
        else:
            h = normalised(self.norm2, h, before=time)
        h = self.conv2(self.dropout(h))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return x + h if self.scale == 1.0 else (x + h) / self.scale


class Attention(nn.Module):
    """x + W_o softmax(q k^T / sqrt(d)) v over the pixels of norm(x) (Vaswani et al. 2017)."""

    def __init__(
        self, channels: int, head_dim: int, groups: int | None, eps: float, dropout: float = 0.0, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.heads, self.scale = channels // head_dim, scale
        # When head_dim does not divide the channels, diffusers keeps whole heads only.
        width = self.heads * head_dim
        self.group_norm = nn.GroupNorm(groups, channels, eps) if groups is not None else None
        self.to_q = nn.Linear(channels, width)
        self.to_k = nn.Linear(channels, width)
        self.to_v = nn.Linear(channels, width)
        self.to_out = nn.ModuleList([nn.Linear(width, channels), nn.Dropout(dropout)])
        set_to_zero(self.to_out[0])

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, channels, H, W] -> same shape."""
        h = x if self.group_norm is None else normalised(self.group_norm, x, act=False)
        h = h.flatten(2).transpose(1, 2)
        h = attention(self.to_q(h), self.to_k(h), self.to_v(h), self.heads)
        h = self.to_out[1](self.to_out[0](h))
        h = x + h.transpose(1, 2).unflatten(2, x.shape[2:])
        return h if self.scale == 1.0 else h / self.scale


class Downsample(nn.Module):
    """Strided 3x3 convolution; padding 0 means one row and column at the far edges only."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, act_time: Tensor) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor, act_time: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def build_attention(config: UNetConfig, channels: int) -> Attention:
    """Attention of a down or up level."""
    return Attention(channels, config.head_dim(channels), config.norm_num_groups, config.norm_eps)


class DownLevel(nn.Module):
    """Residual blocks of one resolution, each with attention if asked, then a halving except at the last level."""

    def __init__(self, config: UNetConfig, kind: str, channels_in: int, channels: int, last: bool) -> None:
        super().__init__()
        count, attends = config.layers_per_block, kind == "AttnDownBlock2D"
        widths = [channels_in] + [channels] * (count - 1)
        self.resnets = nn.ModuleList(ResBlock(config, width, channels) for width in widths)
        self.attentions = nn.ModuleList(build_attention(config, channels) for _ in range(count if attends else 0))
        resblock = kind == "ResnetDownsampleBlock2D" or (attends and config.downsample_type == "resnet")
        self.downsamplers = nn.ModuleList()
        if not last:
            self.downsamplers.append(
                ResBlock(config, channels, channels, "down")
                if resblock
                else Downsample(channels, config.downsample_padding)
            )

    def forward(self, x: Tensor, act_time: Tensor) -> list[Tensor]:
        """x: [B, channels_in, H, W] -> the state after every block, the last one being the input of the next level."""
        states = []
        for index, block in enumerate(self.resnets):
            x = block(x, act_time)
            if self.attentions:
                x = self.attentions[index](x)
            states.append(x)
        for layer in self.downsamplers:
            states.append(layer(x, act_time))
        return states


class MidLevel(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels, scale = config.block_out_channels[-1], config.mid_block_scale_factor
        groups = config.attn_norm_num_groups
        if groups is None and config.resnet_time_scale_shift == "default":
            groups = config.norm_num_groups
        head_dim = config.head_dim(channels)
        self.resnets = nn.ModuleList(ResBlock(config, channels, channels, scale=scale) for _ in range(2))
        self.attentions = nn.ModuleList()
        if config.add_attention:
            self.attentions.append(Attention(channels, head_dim, groups, config.norm_eps, scale=scale))

    def forward(self, x: Tensor, act_time: Tensor) -> Tensor:
        x = self.resnets[0](x, act_time)
        for layer in self.attentions:
            x = layer(x)
        return self.resnets[1](x, act_time)


class UpLevel(nn.Module):
    """Residual blocks on (state, saved state), each with attention if asked, then a doubling except at the last."""

    def __init__(
        self, config: UNetConfig, kind: str, channels_below: int, channels: int, channels_skip: int, last: bool
    ) -> None:
        super().__init__()
        count, attends = config.layers_per_block + 1, kind == "AttnUpBlock2D"
        self.resnets = nn.ModuleList()
        for index in range(count):
            state = channels_below if index == 0 else channels
            skip = channels_skip if index == count - 1 else channels
            self.resnets.append(ResBlock(config, state + skip, channels))
        self.attentions = nn.ModuleList(build_attention(config, channels) for _ in range(count if attends else 0))
        resblock = kind == "ResnetUpsampleBlock2D" or (attends and config.upsample_type == "resnet")
        self.upsamplers = nn.ModuleList()
        if not last:
            self.upsamplers.append(ResBlock(config, channels, channels, "up") if resblock else Upsample(channels))

    def forward(self, x: Tensor, states: list[Tensor], act_time: Tensor) -> Tensor:
        """x: [B, channels_below, H, W]; states: saved on the way down, consumed from the end."""
        for index, block in enumerate(self.resnets):
            x = block(torch.cat((x, states.pop()), dim=1), act_time)
            if self.attentions:
                x = self.attentions[index](x)
        for layer in self.upsamplers:
            x = layer(x, act_time)
        return x
