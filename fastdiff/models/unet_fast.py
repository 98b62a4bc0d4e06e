"""The UNet for inference: the same weights and outputs in a quarter of the kernels.

May import: process, engine.norm. Made from a plain UNet by `net.fast()`; what it does not cover runs the plain block.
- channels_last throughout; each group normalisation is one `norm_act`, which also adds what the block before it left to
  add (its bias, its residual), writes that sum, and reads a skip beside it, so no concatenation is copied;
- a shortcut adds onto its convolution's output in the epilogue of its GEMM;
- q, k and v are one GEMM; with one head the matrix of the output is folded into that of v and the matrix of the keys
  into that of q: softmax(x A x^T) x B;
- nearest doubling and the 3x3 convolution after it are one transposed convolution, 16 taps for each 36;
- on a CPU the convolutions' weights are put into the library's order once, not at each call; in fp32 the 3x3 ones run
  by Winograd's minimal filtering where that is faster (engine.winograd);
- the projections of the time of all blocks are one GEMM in fp32; `prepare_times` has it done for every row of a plan.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.packed_conv import PackedConv
from fastdiff.models.unet_fast_blocks import (
    FastAttention,
    FastDown,
    FastResBlock,
    FastUp,
    Layer,
    Pending,
    PlainLayer,
    Rows,
    as_images,
    fixed,
    uncovered,
)
from fastdiff.models.unet_inputs import check_inputs, expand_time

if TYPE_CHECKING:
    from fastdiff.models.unet import UNet


class FastUNet(nn.Module):
    """A UNet's inference form: its own copy of the weights, cast once to `dtype`; fp32 where a cast would cost digits.

    Called like the UNet it is made from; outputs agree with it (fp32 to 1e-4 of the largest). Deterministic;
    capturable; torch.compile traces it. No gradients, no dropout. fallbacks: the blocks that run as they were, and why.
    What it derives from its weights follows their changes (load_state_dict, copy_, `.to`, other tensors put in their
    place), except a write into `weight.data`, which torch does not count: `repack` after one. It cannot be cast to
    half precision or float64, which would cast what has to be fp32: a call then raises TypeError.
    winograd: in fp32 on a CPU, 3x3 convolutions by Winograd's minimal filtering where it is faster (engine.winograd),
    which for weights of n bytes keeps 1.8 n or 4 n beside them, where the library's order takes n.
    """

    def __init__(self, net: UNet, dtype: torch.dtype | None = None, winograd: bool = True) -> None:
        super().__init__()
        dtype = dtype or net.conv_in.weight.dtype
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"UNet.fast: dtype must be float32, float16 or bfloat16, got {dtype}; cast the UNet first")
        self.config = net.config
        assert net.conv_in.bias is not None and net.conv_out.bias is not None
        # the first of the parameters, whose dtype is taken for the network's
        self.conv_out = fixed(net.conv_out.weight, dtype, image=True)
        self.conv_in = PackedConv(fixed(net.conv_in.weight, dtype, image=True))
        self.conv_in_bias = fixed(net.conv_in.bias)
        self.conv_out_bias = fixed(net.conv_out.bias, dtype)
        self.norm_weight, self.norm_bias = fixed(net.conv_norm_out.weight), fixed(net.conv_norm_out.bias)
        self.time_proj, self.time_embedding = net.time_proj, _copied(net.time_embedding)
        self.class_embedding = None if net.class_embedding is None else _copied(net.class_embedding)
        self.fallbacks: dict[str, str] = {}
        rows = Rows()
        levels: list[tuple[str, nn.Module]] = [(f"down_blocks.{i}", level) for i, level in enumerate(net.down_blocks)]
        levels += [] if net.mid_block is None else [("mid_block", net.mid_block)]
        levels += [(f"up_blocks.{i}", level) for i, level in enumerate(net.up_blocks)]
        layers = [layer for name, level in levels for layer in self._level(name, level, dtype, rows)]
        _pad_to_skips(layers)
        self.layers: Sequence[Layer] = nn.ModuleList(layers)  # type: ignore[assignment]
        if self.fallbacks:
            rows.keep(net.config.time_dim)  # plain blocks project the embedding themselves
        self.rows_weight, self.rows_bias = rows.matrix(net.config.time_dim, net.conv_in.weight.device)
        for module in self.modules():
            if isinstance(module, PackedConv):
                module.winograd = winograd
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FastUNet:
        """Raises TypeError for mode=True: it gives no gradients."""
        if mode:
            raise TypeError(
                "UNet.fast: this form is for inference and gives no gradients; train the UNet it was made from, and "
                "make it anew with net.fast() afterwards"
            )
        return super().train(False)

    def forward(self, x: Tensor, t: Tensor | float | int, class_labels: Tensor | None = None) -> Tensor:
        """As `UNet.forward`; x of another dtype is cast."""
        self.check(x, class_labels)
        time = expand_time(t, x)
        return self.run(x, time, self.project(time, class_labels))

    def check(self, x: Tensor, class_labels: Tensor | None) -> None:
        """Raise what the UNet raises for such inputs, and TypeError where the weights have been cast since."""
        check_inputs(self.config, x, class_labels)
        self.check_dtype()

    def check_dtype(self) -> None:
        """Raise TypeError where the weights have been cast since."""
        dtype = self.norm_weight.dtype
        if dtype != torch.float32:
            how = f"net.to({dtype}).fast() or net.fast({dtype})" if dtype.itemsize == 2 else "the UNet itself"
            raise TypeError(
                f"UNet.fast: the weights were cast to {dtype} after fast(), also those of the norms and of the time, "
                f"which must be float32; for {dtype} use {how}"
            )

    def project(self, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """What every block takes from the time: fp32 [B, columns], in one GEMM after the embedding's two."""
        scale = self.config.time_scale
        embedding = self.time_embedding(self.time_proj(time * scale if scale != 1.0 else time))
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(class_labels)
        return torch.addmm(self.rows_bias, F.silu(embedding), self.rows_weight)

    def prepare_times(self, times: Tensor) -> nn.Module:
        """The same network for these times [R] only, everything it takes from the time computed now; others give NaN.

        With classes it returns itself: a row then depends on the label too.
        """
        self.check_dtype()
        return self if self.class_embedding is not None else PreparedUNet(self, times)

    def repack(self) -> None:
        """Derive anew, at the next call, what was derived from weights that were written through `.data` since."""
        torch.autograd.graph.increment_version([w for w in self.parameters() if not w.is_inference()])

    def time_weights(self) -> Hashable:
        """Another value once the weights that `prepare_times` computes with are others, or elsewhere."""
        return tuple(
            (w.data_ptr(), 0 if w.is_inference() else w._version, w.device, w.dtype) for w in self._of_the_time()
        )

    def _of_the_time(self) -> list[Tensor]:
        modules = self.time_proj, self.time_embedding
        own = [weight for module in modules for weight in (*module.parameters(), *module.buffers())]
        return [*own, self.rows_weight, self.rows_bias]

    def run(self, x: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        """The network on x [B, in_channels, H, W] with the rows that `project` gave."""
        patch = self.config.patch_size
        x = x.to(self.conv_in.weight.dtype).contiguous(memory_format=torch.channels_last)
        x = 2 * x - 1 if self.config.center_input_sample else x
        x = self.conv_in(F.pixel_unshuffle(x, patch) if patch > 1 else x)
        state = Pending(as_images(x), self.conv_in_bias)
        states = [state]
        for layer in self.layers:
            state = layer(state, rows, states.pop().sum()) if layer.takes_skip else layer(state, rows)
            if layer.saved:
                states.append(state)
        config = self.config
        y, _ = state.norm(self.norm_weight, self.norm_bias, config.norm_num_groups, config.norm_eps)
        y = F.conv2d(y, self.conv_out, self.conv_out_bias, padding=1)
        y = F.pixel_shuffle(y, patch) if patch > 1 else y
        return y / time.to(y.dtype)[:, None, None, None] if config.time_embedding_type == "fourier" else y

    def _level(self, name: str, level: nn.Module, dtype: torch.dtype, rows: Rows) -> Iterator[Layer]:
        """The blocks of a level in the order they run."""
        attentions, down = list(getattr(level, "attentions", [])), name.startswith("down")
        for i, block in enumerate(level.resnets):  # type: ignore[arg-type]
            attends = i < len(attentions)
            layer = self._layer(f"{name}.resnets.{i}", block, dtype, rows)
            layer.saved, layer.takes_skip = down and not attends, name.startswith("up")
            yield layer
            if attends:
                layer = self._layer(f"{name}.attentions.{i}", attentions[i], dtype, rows)
                layer.saved = down
                yield layer
        for kind in ("downsamplers", "upsamplers"):
            for i, block in enumerate(getattr(level, kind, [])):
                layer = self._layer(f"{name}.{kind}.{i}", block, dtype, rows)
                layer.saved = down
                yield layer

    def _layer(self, name: str, block: nn.Module, dtype: torch.dtype, rows: Rows) -> Layer:
        reason = uncovered(block)
        if reason:
            self.fallbacks[name] = reason
            return PlainLayer(_copied(block, dtype))
        kinds = {"ResBlock": FastResBlock, "Attention": FastAttention, "Downsample": FastDown, "Upsample": FastUp}
        return kinds[type(block).__name__](block, dtype, rows)


class PreparedUNet(nn.Module):
    """A FastUNet for a few times, whose rows are looked up: two small kernels instead of an embedding and its GEMMs."""

    edges: Tensor
    table: Tensor

    def __init__(self, net: FastUNet, times: Tensor) -> None:
        super().__init__()
        device = net.conv_in.weight.device
        times = torch.unique(times.detach().to("cpu", torch.float32).flatten())
        self.net = net
        # kept, so that `time_weights` stays another value for others: none comes to lie at their addresses
        self._made_of = [weight.detach() for weight in net._of_the_time()]
        # t is in (just below t_i, t_i] exactly when it is t_i; the intervals between lead to a row of NaN
        below = torch.nextafter(times, torch.full_like(times, -torch.inf))
        self.register_buffer("edges", torch.stack((below, times), 1).flatten().to(device))
        rows = net.project(times.to(device))
        table = torch.full((2 * len(times) + 1, rows.shape[1]), torch.nan, dtype=torch.float32, device=device)
        table[1::2] = rows
        self.register_buffer("table", table)

    def forward(self, x: Tensor, t: Tensor | float | int, class_labels: Tensor | None = None) -> Tensor:
        """As the network it is made from, at the times it is made for."""
        self.net.check(x, class_labels)
        time = expand_time(t, x)
        found = torch.searchsorted(self.edges, time.to(torch.float32).contiguous())
        return self.net.run(x, time, self.table.index_select(0, found))


def _pad_to_skips(layers: Sequence[Layer]) -> None:
    """A bias that is added beside a skip is 0 on the skip's channels."""
    for before, layer in itertools.pairwise(layers):
        if layer.takes_skip and before.after is not None:
            before.after = fixed(F.pad(before.after, (0, layer.channels_in - before.after.shape[0])))


def _copied(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.inference_mode(False):  # as `fixed`
        return copy.deepcopy(module).to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
