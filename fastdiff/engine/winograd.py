"""A 3x3 convolution by Winograd's minimal filtering on a CPU: a quarter of the multiplications, for transforms.

May import: the compiled extension (through native), backends. Executors are "cpp" (fp32 on a CPU) and "reference"
(torch's own convolution): on a GPU the library's convolution stays.

Lavin & Gray 2015, F(m x m, 3x3), m = 4 or 2, the image cut into tiles of m x m outputs:
    Y = A^T [(G w G^T) . (B^T d B)] A        d: the (m + 2) x (m + 2) pixels a tile sees
The products, summed over the channels, are (m + 2)^2 matrix products, and torch's own.
"""

from __future__ import annotations

import ctypes
import functools
import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.engine import backends, native
from fastdiff.engine.native import WinogradArgs

TAPS = {2: 16, 4: 36}  # matrices of each tile size
# The points of F(4x4) as csrc/cpu/winograd.h has them: 0, +-A, +-B and infinity.
_A, _B = 0.625, 1.5
# What a weight costs beside its multiplications, and a pixel of a transform, in multiplications of a large product.
_WEIGHT, _PIXEL = 20.0, 12.0
_GROUP = 1 << 22  # floats of both sides of the products at a time: they stay in the last-level cache

_library = torch.library.Library("fastdiff", "FRAGMENT")
_library.define("winograd_conv(Tensor x, Tensor weight, Tensor expanded, Tensor? bias, *, str executor) -> Tensor")
_workspace = threading.local()


def conv(x: Tensor, weight: Tensor, expanded: Tensor, bias: Tensor | None = None, executor: str = "cpp") -> Tensor:
    """y = conv2d(x, weight, bias, padding=1), through the torch dispatcher, arguments checked.

    x: [B, C_in, H, W] fp32, channels_last. weight: [C_out, C_in, 3, 3] fp32, read by executor "reference" only;
    expanded: what `expand` made of it, read by "cpp" only. bias: [C_out] or None. Returns [B, C_out, H, W], channels_last.
    Largest error against float64 about 3e-6 of the largest output, where direct summation has 1e-6. A pixel that is not
    finite spoils every output of the tiles that see it (up to m + 1 pixels away, not 1), never another sample.
    Deterministic; the same on any number of threads and for a sample anywhere in a batch, as far as torch.bmm is, which
    with MKL was so wherever it was measured. Not differentiable. Raises ValueError or TypeError for what does not fit.
    """
    found: Tensor = torch.ops.fastdiff.winograd_conv(x, weight, expanded, bias, executor=executor)
    return found


def expand(weight: Tensor, size: int) -> Tensor:
    """G w G^T: fp32 [(size + 2)^2, C_in, C_out] of a weight [C_out, C_in, 3, 3], computed in float64."""
    g = _G4 if size == 4 else _G2
    side, (outputs, inputs) = size + 2, weight.shape[:2]
    found = torch.empty(TAPS[size], inputs, outputs, dtype=torch.float32)
    for first in range(0, outputs, 64):  # float64 of the whole would be a multiple of the network's largest weight
        part = weight[first : first + 64].detach().double()
        wide = torch.einsum("pi,qj,ocij->pqco", g, g, part)
        found[:, :, first : first + 64] = wide.reshape(side * side, inputs, -1)
    return found


def tile_size(channels_in: int, channels_out: int, height: int, width: int) -> int:
    """The faster tile size for such an image, or 0 where the library's direct convolution is faster or has to do it.

    Decided by one sample's shape alone, so that its batch does not change it. Costs in multiplications per pair of
    channels: (m + 2)^2 for each tile, 9 for each pixel of a direct convolution; what reading a weight costs beside
    them, and the transforms.
    """
    if not _available() or torch.get_float32_matmul_precision() != "highest":
        return 0
    return _fastest(channels_in, channels_out, height, width)


@functools.cache
def _fastest(channels_in: int, channels_out: int, height: int, width: int) -> int:
    costs = {0: 9 * (height * width + _WEIGHT / 2)}
    for size, taps in TAPS.items():
        tiles = -(-height // size) * -(-width // size)
        costs[size] = taps * (tiles * (1 + _PIXEL / channels_in + _PIXEL / channels_out) + _WEIGHT)
    return min(costs, key=lambda size: (costs[size], size))


@functools.cache
def _available() -> bool:
    """Whether the transforms are there, and torch's batched product is the library's that was measured."""
    return backends.probe()["cpp"].ok and torch.backends.mkl.is_available()


def run(x: Tensor, expanded: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same on executor "cpp" for tensors that `check` takes, without the dispatcher."""
    batch, inputs, height, width = x.shape
    taps, _, outputs = expanded.shape
    size = 4 if taps == 36 else 2
    y = torch.empty((batch, outputs, height, width), dtype=x.dtype, memory_format=torch.channels_last)
    tiles = batch * -(-height // size) * -(-width // size)
    if not tiles:
        return y
    group = min(tiles, max(1, _GROUP // (taps * (inputs + outputs))))
    space = _space(taps * group * (inputs + outputs))
    into = WinogradArgs(B=batch, C=inputs, H=height, W=width, size=size, x=x.data_ptr(), v=space.data_ptr())
    out = WinogradArgs(B=batch, C=outputs, H=height, W=width, size=size, y=y.data_ptr())
    out.bias = None if bias is None else bias.data_ptr()
    for first in range(0, tiles, group):
        count = min(group, tiles - first)
        v = space[: count * taps * inputs].view(count, taps, inputs)
        products = space[v.numel() :][: taps * count * outputs].view(taps, count, outputs)
        into.first = out.first = first
        into.count = out.count = count
        out.products = products.data_ptr()
        _launch("into", into)
        torch.bmm(v.transpose(0, 1), expanded, out=products)
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
    shapes = [("weight", weight, ((outputs, inputs, 3, 3),))]
    shapes.append(("expanded", expanded, tuple((taps, inputs, outputs) for taps in TAPS.values())))
    if bias is not None:
        shapes.append(("bias", bias, ((outputs,),)))
    for name, tensor, expected in shapes:
        if tuple(tensor.shape) not in expected:
            wanted = " or ".join(map(str, expected))
            raise ValueError(f"winograd_conv: {name} has shape {tuple(tensor.shape)}, expected {wanted}")
    if not (expanded.is_contiguous() and (bias is None or bias.is_contiguous())):
        raise ValueError("winograd_conv: expanded and bias must be contiguous; take what expand(weight, size) returns")
    for name, tensor in (("x", x), *((name, tensor) for name, tensor, _ in shapes)):
        if tensor.dtype != torch.float32 or tensor.device != x.device:
            raise TypeError(
                f"winograd_conv: {name} is {tensor.dtype} on {tensor.device}, expected torch.float32 on {x.device}"
            )


def _space(floats: int) -> Tensor:
    """This thread's room for both sides of the products, kept: fresh memory costs a page fault every 4 KiB."""
    found: Tensor | None = getattr(_workspace, "floats", None)
    if found is None or found.numel() < floats:
        with torch.inference_mode(False):  # a normal tensor may be written in either mode
            found = _workspace.floats = torch.empty(floats, dtype=torch.float32)
    return found


def _launch(which: str, args: WinogradArgs) -> None:
    library = native.load()
    code = getattr(library, f"fastdiff_winograd_{which}_cpu")(ctypes.addressof(args))
    if code:
        raise RuntimeError(f"winograd_conv on cpp: {library.fastdiff_error(code).decode()} (code {code})")


def _points() -> Tensor:
    """G of F(4, 3): 1, p, p^2 over the product of the distances from the other points, for each point p."""
    points = [0.0, _A, -_A, _B, -_B]
    rows = []
    for i, p in enumerate(points):
        distances = 1.0
        for k, other in enumerate(points):
            distances *= p - other if k != i else 1.0
        rows.append([1.0 / distances, p / distances, p * p / distances])
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)


_G4 = _points()
_G2 = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64)


def _conv(x: Tensor, weight: Tensor, expanded: Tensor, bias: Tensor | None, *, executor: str) -> Tensor:
    check(x, weight, expanded, bias)
    if executor not in ("reference", "cpp"):
        raise ValueError(f"winograd_conv: executor must be 'reference' or 'cpp', got {executor!r}")
    backends.require(executor, x.device)
    if executor == "cpp":
        return run(x, expanded, bias)
    return F.conv2d(x, weight, bias, padding=1).contiguous(memory_format=torch.channels_last)


def _fake(x: Tensor, weight: Tensor, expanded: Tensor, bias: Tensor | None, *, executor: str) -> Tensor:
    check(x, weight, expanded, bias)
    return x.new_empty((x.shape[0], weight.shape[0], *x.shape[2:])).contiguous(memory_format=torch.channels_last)


_library.impl("winograd_conv", _conv, "CompositeExplicitAutograd")
torch.library.register_fake("fastdiff::winograd_conv", _fake, lib=_library)
