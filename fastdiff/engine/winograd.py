"""A 3x3 convolution by Winograd's minimal filtering on a CPU: a quarter of the multiplications, for transforms.

May import: the compiled extension (through native, native_blocks), backends, onednn. Executors are "cpp" (fp32 on a
CPU) and "reference" (torch's own convolution): on a GPU the library's convolution stays.

Lavin & Gray 2015, F(m x m, 3x3), m = 4 or 2, the image cut into tiles of m x m outputs:
    Y = A^T [(G w G^T) . (B^T d B)] A        d: the (m + 2) x (m + 2) pixels a tile sees
The products, summed over the channels, are (m + 2)^2 matrix products: one 1x1 convolution in as many groups, torch's
own.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.engine import backends, native, onednn
from fastdiff.engine.native_blocks import WinogradArgs

TAPS = {2: 16, 4: 36}  # matrices of each tile size
# The points of F(4x4) as csrc/cpu/winograd.h has them: 0, +-A, +-B and infinity.
_A, _B = 0.625, 1.5
# In multiplications of a large product: reading a weight, directly and expanded, transforming a number, and the calls.
_DIRECT, _EXPANDED, _TRANSFORM, _CALLS = 9.0, 14.0, 25.0, 1.5e6
_GROUP = 1 << 22  # floats of both sides of the products at a time: they stay in the last-level cache

_library = torch.library.Library("fastdiff", "FRAGMENT")
_library.define("winograd_conv(Tensor x, Tensor weight, Tensor expanded, Tensor? bias, *, str executor) -> Tensor")


def conv(x: Tensor, weight: Tensor, expanded: Tensor, bias: Tensor | None = None, executor: str = "cpp") -> Tensor:
    """y = conv2d(x, weight, bias, padding=1), through the torch dispatcher, arguments checked.

    x: [B, C_in, H, W] fp32, channels_last. weight: [C_out, C_in, 3, 3] fp32, read by executor "reference" only;
    expanded: what `expand` made of it, read by "cpp" only. bias: [C_out] or None. Returns [B, C_out, H, W] in
    channels_last. The largest error against float64 is about 2e-6 of the largest output, as that of a direct sum over
    many channels. A pixel that is not finite may spoil all outputs of the tiles that see it, up to m pixels away and
    not one, and no other. Deterministic; a sample's output depends on nothing else in its batch and not on the number
    of threads, as far as that of `engine.onednn` does not.
    Not differentiable. Raises ValueError or TypeError for what does not fit.
    """
    found: Tensor = torch.ops.fastdiff.winograd_conv(x, weight, expanded, bias, executor=executor)
    return found


def expand(weight: Tensor, size: int) -> Tensor:
    """G w G^T of a weight [C_out, C_in, 3, 3]: fp32 [taps C_out, C_in, 1, 1], taps (size + 2)^2, found in float64."""
    g = _G4 if size == 4 else _G2
    outputs, inputs = weight.shape[:2]
    found = torch.empty(size + 2, size + 2, outputs, inputs, dtype=torch.float32, device=weight.device)
    for first in range(0, outputs, 64):  # float64 of the whole would take eight times a weight's memory more
        part = weight[first : first + 64].detach().double()
        found[:, :, first : first + 64] = torch.einsum("pi,qj,ocij->pqoc", g, g, part)
    return found.view(-1, inputs, 1, 1)


def tile_size(channels_in: int, channels_out: int, height: int, width: int) -> int:
    """The fastest tile size for such an image, or 0 where the library's direct convolution is as fast.

    Decided by one sample's shape alone, so that no batch changes a sample. Costs in multiplications per pair of
    channels: 9 for each pixel or (m + 2)^2 for each tile; then for each weight, which few pixels do not amortise, and
    for the transforms, which few channels do not.
    """
    if channels_in % 16 or channels_out % 16 or not backends.probe()["cpp"].ok:
        return 0
    return _fastest(channels_in, channels_out, height, width)


@functools.cache
def _fastest(channels_in: int, channels_out: int, height: int, width: int) -> int:
    costs = {0: 9 * (height * width + _DIRECT)}
    for size, taps in TAPS.items():
        tiles = -(-height // size) * -(-width // size)
        transforms = tiles * _TRANSFORM * (1 / channels_in + 1 / channels_out)
        costs[size] = taps * (tiles + transforms + _EXPANDED) + _CALLS / (channels_in * channels_out)
    return min(costs, key=lambda size: (costs[size], size))


def run(x: Tensor, size: int, outputs: int, multiply: Callable[[Tensor], Tensor], bias: Tensor | None = None) -> Tensor:
    """The convolution on executor "cpp", without the dispatcher or checks.

    multiply: the products, of [1, taps C_in, tiles, 1] in channels_last: a 1x1 convolution with the expanded weight. It
    sees as many tiles in every call for images of one size, whatever the batch: oneDNN keeps weights in one of two
    orders by that number, and puts a weight in the other order anew in each call, which takes 50 times as long.
    """
    batch, inputs, height, width = x.shape
    shape = batch, outputs, height, width
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if not y.numel():
        return y
    taps, tiles = TAPS[size], -(-height // size) * -(-width // size)
    into = WinogradArgs(B=batch, C=inputs, H=height, W=width, size=size, x=x.data_ptr())
    out = WinogradArgs(B=batch, C=outputs, H=height, W=width, size=size, y=y.data_ptr())
    out.bias = None if bias is None else bias.data_ptr()
    parts = -(-tiles // max(1, _GROUP // (taps * (inputs + outputs))))
    group = -(-tiles // parts)
    for part in range(batch * parts):
        begin = part % parts * group
        first, count = part // parts * tiles + begin, min(group, tiles - begin)
        if count < 1:
            continue
        v = x.new_empty((1, group, 1, taps * inputs))
        v[:, count:] = 0
        into.first, into.count, into.v = first, count, v.data_ptr()
        _launch("into", into)
        products = multiply(v.permute(0, 3, 1, 2)).contiguous(memory_format=torch.channels_last)
        out.first, out.count, out.products = first, count, products.data_ptr()
        _launch("out", out)
    return y


def check(x: Tensor, weight: Tensor, expanded: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError or TypeError unless `conv` can run."""
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"winograd_conv: x must be [B, C, H, W] in channels_last, got {tuple(x.shape)} with strides {x.stride()}; "
            "call .contiguous(memory_format=torch.channels_last)"
        )
    inputs, outputs = x.shape[1], weight.shape[0]
    shapes: list[tuple[str, Tensor, tuple[tuple[int, ...], ...]]] = [
        ("weight", weight, ((outputs, inputs, 3, 3),)),
        ("expanded", expanded, tuple((taps * outputs, inputs, 1, 1) for taps in TAPS.values())),
    ]
    if bias is not None:
        shapes.append(("bias", bias, ((outputs,),)))
    for name, tensor, expected in shapes:
        if tuple(tensor.shape) not in expected:
            wanted = " or ".join(map(str, expected))
            raise ValueError(f"winograd_conv: {name} has shape {tuple(tensor.shape)}, expected {wanted}")
    if bias is not None and not bias.is_contiguous():
        raise ValueError("winograd_conv: bias must be contiguous; call .contiguous()")
    for name, tensor in (("x", x), *((name, tensor) for name, tensor, _ in shapes)):
        if tensor.dtype != torch.float32 or tensor.device != x.device:
            raise TypeError(
                f"winograd_conv: {name} is {tensor.dtype} on {tensor.device}, expected torch.float32 on {x.device}"
            )


def _launch(which: str, args: WinogradArgs) -> None:
    library = native.load()
    code = getattr(library, f"fastdiff_winograd_{which}_cpu")(ctypes.addressof(args))
    if code:
        raise native.failed("winograd_conv on cpp", code)


def _points() -> Tensor:
    """G of F(4, 3): 1, p, p^2 over the product of the distances from the other points, for each point p."""
    points = [0.0, _A, -_A, _B, -_B]
    rows = []
    for i, p in enumerate(points):
        distances = 1.0
        for k, other in enumerate(points):
            distances *= p - other if k != i else 1.0
        rows.append([1.0 / distances, p / distances, p * p / distances])
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64, device="cpu")


_G4 = _points()
_G2 = torch.tensor(
    [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64, device="cpu"
)


def _conv(x: Tensor, weight: Tensor, expanded: Tensor, bias: Tensor | None, *, executor: str) -> Tensor:
    check(x, weight, expanded, bias)
    if executor not in ("reference", "cpp"):
        raise ValueError(f"winograd_conv: executor must be 'reference' or 'cpp', got {executor!r}")
    backends.require(executor, x.device)
    if executor == "cpp":
        size = next(size for size, taps in TAPS.items() if len(expanded) == taps * len(weight))
        return run(x, size, len(weight), functools.partial(_multiply, expanded=expanded, taps=TAPS[size]), bias)
    return F.conv2d(x, weight, bias, padding=1).contiguous(memory_format=torch.channels_last)


def _multiply(v: Tensor, expanded: Tensor, taps: int) -> Tensor:
    if not onednn.available():
        return F.conv2d(v, expanded, groups=taps)
    how = onednn.How(0, 1, taps)
    return onednn.conv(v, onednn.pack(expanded, how, v.shape), how)


def _fake(x: Tensor, weight: Tensor, expanded: Tensor, bias: Tensor | None, *, executor: str) -> Tensor:
    check(x, weight, expanded, bias)
    return x.new_empty((x.shape[0], weight.shape[0], *x.shape[2:])).contiguous(memory_format=torch.channels_last)


_library.impl("winograd_conv", _conv, "CompositeExplicitAutograd")
torch.library.register_fake("fastdiff::winograd_conv", _fake, lib=_library)
