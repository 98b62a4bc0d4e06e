"""The blocks of the UNet's inference form, each made from a plain block.

May import: engine.norm, packed_conv, unet_blocks. What a block leaves to add, its bias and its residual, the next
normalisation adds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.engine.norm import channel_add, norm_act, sum_norm_act
from fastdiff.models.packed_conv import PackedConv
from fastdiff.models.unet_blocks import Attention, Downsample, ResBlock, Upsample


def fixed(tensor: Tensor, dtype: torch.dtype = torch.float32, image: bool = False) -> nn.Parameter:
    """A copy that is not trained, and whose changes are counted also where it is made in inference mode."""
    with torch.inference_mode(False):
        copied = tensor.detach().to(dtype, copy=True)
        copied = copied.contiguous(memory_format=torch.channels_last if image else torch.contiguous_format)
        return nn.Parameter(copied, requires_grad=False)


def as_images(x: Tensor) -> Tensor:
    """x itself, or in channels_last where a library returned another format."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous(memory_format=torch.channels_last)


def _tokens(image: Tensor) -> Tensor:
    """[B, H W, C] of a channels_last image, without a copy."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def _image(tokens: Tensor, like: Tensor) -> Tensor:
    return tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


class Pending:
    """An image that is still a sum: image + before + residual; before [C], or longer by the channels of a skip."""

    def __init__(self, image: Tensor, before: Tensor | None = None, residual: Tensor | None = None) -> None:
        self.image, self.before, self.residual = image, before, residual
        self.total = image if before is None and residual is None else None

    def sum(self) -> Tensor:
        """The sum, added up once."""
        if self.total is None:
            before = None if self.before is None else self.before[: self.image.shape[1]]
            self.total = channel_add(self.image, before, self.residual)
        return self.total

    def norm(
        self, weight: Tensor, bias: Tensor, groups: int, eps: float, skip: Tensor | None = None, act: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The normalised sum, with the skip's channels after its own, and the sum itself with those channels."""
        if self.total is not None and skip is None:
            return norm_act(self.total, weight, bias, groups, eps, act=act), self.total
        y, total = sum_norm_act(
            self.image, weight, bias, groups, eps, act=act, before=self.before, residual=self.residual, skip=skip
        )
        if skip is None:
            self.total = total
        return y, total


class Rows:
    """The projections of the time of all blocks, gathered into one matrix."""

    def __init__(self) -> None:
        self._weights: list[Tensor] = []
        self._biases: list[Tensor] = []
        self.columns = 0
        self._kept: int | None = None

    def add(self, layer: nn.Linear, bias: Tensor | None = None) -> slice:
        """Columns for the outputs of a layer, with a further bias."""
        own = layer.bias.detach().float()
        self._weights.append(layer.weight.detach().float())
        self._biases.append(own if bias is None else own + bias.detach().float())
        self.columns += own.shape[0]
        return slice(self.columns - own.shape[0], self.columns)

    def keep(self, width: int) -> None:
        """The embedding itself in the last columns."""
        self._kept = width

    def matrix(self, width: int, device: torch.device) -> tuple[nn.Parameter, nn.Parameter]:
        """[time_dim, columns] and [columns]."""
        weights, biases = (
            [torch.zeros(0, width, dtype=torch.float32, device=device), *self._weights],
            [torch.zeros(0, dtype=torch.float32, device=device)],
        )
        biases += self._biases
        if self._kept is not None:
            weights.append(torch.eye(width, device=device))
            biases.append(torch.zeros(width, dtype=torch.float32, device=device))
        return fixed(torch.cat(weights).t()), fixed(torch.cat(biases))


class Layer(nn.Module):
    """A block from one pending sum to the next.

    after: the bias it leaves to add. saved: its sum is a skip further on. takes_skip: it reads one.
    """

    saved = False
    takes_skip = False
    channels_in = 0
    after: nn.Parameter | None
    before: nn.Parameter | None
    shortcut: nn.Parameter | None
    out: nn.Parameter | None
    far: nn.Parameter | None
    doubling: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("after", None)


class PlainLayer(Layer):
    """A block as it was, for what is not covered."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        norm = getattr(block, "norm1", None)
        self.channels_in = norm.num_channels if isinstance(norm, nn.GroupNorm) else 0

    def forward(self, state: Pending, rows: Tensor, skip: Tensor | None = None) -> Pending:
        """The embedding is in the last columns of the rows."""
        x = state.sum() if skip is None else torch.cat((state.sum(), skip), 1)
        if isinstance(self.block, Attention):
            return Pending(as_images(self.block(x)))
        width = next(self.block.parameters()).dtype
        time_dim = self.block.time_emb_proj.in_features if isinstance(self.block, ResBlock) else 0
        return Pending(as_images(self.block(x, rows[:, rows.shape[1] - time_dim :].to(width))))


class FastResBlock(Layer):
    """Two convolutions, each after a normalisation that adds what stands before it."""

    def __init__(self, block: ResBlock, dtype: torch.dtype, rows: Rows) -> None:
        super().__init__()
        self.norm1_weight, self.norm1_bias = fixed(block.norm1.weight), fixed(block.norm1.bias)
        self.norm2_weight, self.norm2_bias = fixed(block.norm2.weight), fixed(block.norm2.bias)
        self.groups, self.eps = block.norm1.num_groups, block.norm1.eps
        self.channels_in, self.channels = block.norm1.num_channels, block.norm2.num_channels
        self.scale_shift, self.resample = block.scale_shift, block.resample
        self.register_parameter("doubling", None)
        if block.resample == "up":
            self.doubling = fixed(_doubling(block.conv1.weight), dtype, image=True)
        else:
            self.conv1 = PackedConv(fixed(block.conv1.weight, dtype, image=True))
        self.conv2 = PackedConv(fixed(block.conv2.weight, dtype, image=True))
        assert block.conv1.bias is not None and block.conv2.bias is not None
        self.place = rows.add(block.time_emb_proj, None if block.scale_shift else block.conv1.bias)
        self.register_parameter("before", fixed(block.conv1.bias) if block.scale_shift else None)
        after = block.conv2.bias.detach().float()
        self.register_parameter("shortcut", None)
        if block.conv_shortcut is not None:
            self.shortcut = fixed(block.conv_shortcut.weight.detach().flatten(1).t(), dtype)
            assert block.conv_shortcut.bias is not None
            after = after + block.conv_shortcut.bias.detach().float()
        self.after = fixed(after)

    def forward(self, state: Pending, rows: Tensor, skip: Tensor | None = None) -> Pending:
        """rows: [B, columns] fp32, of which the block reads its own."""
        y, x = state.norm(self.norm1_weight, self.norm1_bias, self.groups, self.eps, skip)
        if self.resample == "down":
            y, x = F.avg_pool2d(y, 2), F.avg_pool2d(x, 2)
        if self.doubling is not None:
            h = F.conv_transpose2d(y, self.doubling, stride=2, padding=1)
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        else:
            h = self.conv1(y)
        time = rows[:, self.place]
        affine = self.norm2_weight, self.norm2_bias, self.groups, self.eps
        if self.scale_shift:
            scale, shift = time[:, : self.channels], time[:, self.channels :]
            h = norm_act(as_images(h), *affine, before=self.before, scale=scale, shift=shift)
        else:
            h = norm_act(as_images(h), *affine, before=time)
        h = as_images(self.conv2(h))
        if self.shortcut is None:
            return Pending(h, self.after, as_images(x))
        _tokens(h).flatten(0, 1).addmm_(_tokens(as_images(x)).flatten(0, 1), self.shortcut)
        return Pending(h, self.after)


class FastAttention(Layer):
    """One GEMM, the attention, and one more GEMM where there are several heads."""

    def __init__(self, block: Attention, dtype: torch.dtype, rows: Rows) -> None:
        super().__init__()
        norm = block.group_norm
        assert norm is not None
        self.norm_weight, self.norm_bias, self.groups, self.eps = (
            fixed(norm.weight), fixed(norm.bias), norm.num_groups, norm.eps,
        )  # fmt: skip
        self.channels_in, self.heads = norm.num_channels, block.heads
        layers = block.to_q, block.to_k, block.to_v, block.to_out[0]
        weights, biases = ([getattr(layer, name).detach().double() for layer in layers] for name in ("weight", "bias"))
        self.folds = block.heads == 1 and weights[0].shape[0] == norm.num_channels
        if self.folds:
            # q k^T + what is the same for every key; the rows of softmax sum to 1, so v's bias passes through it
            into = [weights[1].t() @ weights[0], weights[3] @ weights[2]]
            given = [weights[1].t() @ biases[0], torch.zeros_like(biases[2])]
            self.qkv, self.qkv_bias = fixed(torch.cat(into), dtype), fixed(torch.cat(given), dtype)
            self.register_parameter("out", None)
            self.after = fixed(weights[3] @ biases[2] + biases[3])
        else:
            self.qkv, self.qkv_bias = fixed(torch.cat(weights[:3]), dtype), fixed(torch.cat(biases[:3]), dtype)
            self.out, self.after = fixed(weights[3], dtype), fixed(biases[3])

    def forward(self, state: Pending, rows: Tensor) -> Pending:
        """Pixels are tokens; rows are not read."""
        y, x = state.norm(self.norm_weight, self.norm_bias, self.groups, self.eps, act=False)
        tokens = _tokens(y)
        parts = F.linear(tokens, self.qkv, self.qkv_bias).chunk(2 if self.folds else 3, dim=2)
        q, k, v = (parts[0], tokens, parts[1]) if self.folds else parts
        split = [part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (q, k, v)]
        h = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        if self.out is not None:
            h = F.linear(h, self.out)
        return Pending(as_images(_image(h, x)), self.after, x)


class FastDown(Layer):
    """A strided convolution. Zeros at the far edges only are taps of zero on a GPU, where a copy costs more."""

    def __init__(self, block: Downsample, dtype: torch.dtype, rows: Rows) -> None:
        super().__init__()
        weight = block.conv.weight.detach()
        self.conv = PackedConv(fixed(weight, dtype, image=True), stride=2, padding=block.padding)
        self.register_parameter("far", None)
        if not block.padding:
            self.far = fixed(F.pad(weight, (1, 0, 1, 0)), dtype, image=True)
        assert block.conv.bias is not None
        self.after = fixed(block.conv.bias)

    def forward(self, state: Pending, rows: Tensor) -> Pending:
        """Halves the image."""
        x = state.sum()
        if self.far is not None and x.device.type == "cpu":
            h = self.conv(F.pad(x, (0, 1, 0, 1)))
        elif self.far is not None:
            h = F.conv2d(x, self.far, stride=2, padding=1)
        else:
            h = self.conv(x)
        return Pending(as_images(h), self.after)


class FastUp(Layer):
    """Nearest doubling and a 3x3 convolution as one transposed convolution."""

    def __init__(self, block: Upsample, dtype: torch.dtype, rows: Rows) -> None:
        super().__init__()
        self.conv = fixed(_doubling(block.conv.weight), dtype, image=True)
        assert block.conv.bias is not None
        self.after = fixed(block.conv.bias)

    def forward(self, state: Pending, rows: Tensor) -> Pending:
        """Doubles the image."""
        return Pending(as_images(F.conv_transpose2d(state.sum(), self.conv, stride=2, padding=1)), self.after)


def uncovered(block: nn.Module) -> str:
    """Why a block has no fast form; empty where it has one."""
    if type(block) not in (ResBlock, Attention, Downsample, Upsample):
        return f"is a {type(block).__name__}, not one of this package's blocks"
    if any(module._forward_hooks or module._forward_pre_hooks for module in block.modules()):
        return "has hooks, which run with the plain block only"
    scale = getattr(block, "scale", 1.0)
    if scale != 1.0:
        return f"divides its sum by {scale:g}"
    if isinstance(block, Attention) and block.group_norm is None:
        return "attends without a normalisation before"
    return ""


def _doubling(weight: Tensor) -> Tensor:
    """[C_out, C_in, 3, 3] after nearest doubling, as [C_in, C_out, 4, 4] of a transposed convolution with stride 2.

    Pixel 2i of the doubled image sees i - 1 through tap 0 and i through taps 1 and 2; pixel 2i + 1 sees i through taps
    0 and 1 and i + 1 through tap 2.
    """
    w = weight.detach().double().transpose(0, 1)
    for dim in (2, 3):
        first, second, third = w.unbind(dim)
        w = torch.stack((third, second + third, first + second, first), dim)
    return w
