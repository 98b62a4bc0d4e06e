"""A convolution for inference: on a CPU its weights are put into the library's order, or Winograd's, once.

May import: engine.winograd, engine.onednn, engine.norm. Where this torch has no operators for that it is torch's plain
convolution of the same weights. torch.compile takes it as one operator.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.engine import onednn, winograd
from fastdiff.engine.dispatch import dispatches, transformed
from fastdiff.engine.onednn import How

KEPT = 3  # copies of one weight

_library = torch.library.Library("fastdiff", "FRAGMENT")
_library.define("packed_conv(Tensor x, Tensor weight, int layer, int stride, int padding) -> Tensor")
_numbers = itertools.count()
_layers: weakref.WeakValueDictionary[int, PackedConv] = weakref.WeakValueDictionary()


class PackedConv(nn.Module):
    """conv(x) without bias, x channels_last. weight: [C_out, C_in, k, k]; a second copy of it is kept for a CPU.

    winograd: whether a CPU may run it by `engine.winograd`, where that is faster for the image's shape; the copy is
    then 1.8 or 4 times as large as the weight, and one for each size of image, of which the KEPT made last stay. A
    sample's output depends on nothing else in its batch, as far as that of the library's convolutions does not.
    Deterministic; capturable on a GPU. The copy follows the weight: it is made again after a change of it that torch
    counts, as all but those through `.data` are (`FastUNet.repack`); a weight that was made in inference mode, whose
    changes it never counts, is read as it is.
    """

    winograd = False

    def __init__(self, weight: nn.Parameter, stride: int = 1, padding: int = 1) -> None:
        super().__init__()
        self.weight = weight
        self.stride, self.padding = stride, padding
        self.number = next(_numbers)
        # by tile size, or 0 for the library's order, and tiles
        self._packed: dict[tuple[int, int], tuple[Tensor, int, Tensor]] = {}
        _layers[self.number] = self

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C_in, H, W] -> [B, C_out, H', W'], in channels_last where the library keeps it."""
        packs = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
        if not packs or (not torch.compiler.is_compiling() and transformed()):
            return F.conv2d(x, self.weight, stride=self.stride, padding=self.padding)
        if not dispatches((x, self.weight)):
            return self.packed(x, self.weight)
        found: Tensor = torch.ops.fastdiff.packed_conv(x, self.weight, self.number, self.stride, self.padding)
        return found

    def packed(self, x: Tensor, weight: Tensor) -> Tensor:
        """The same by the weight's copy in the library's order."""
        if not x.numel() or not onednn.available() or weight.is_inference():  # whose changes torch does not count
            return F.conv2d(x, weight, stride=self.stride, padding=self.padding)
        size = self._tile_size(x, weight)
        if not size:
            return self._library(0, x, weight, How(self.padding, self.stride))

        def multiply(v: Tensor) -> Tensor:
            return self._library(size, v, weight, How(0, 1, winograd.TAPS[size]))

        return winograd.run(x.contiguous(memory_format=torch.channels_last), size, len(weight), multiply)

    def _library(self, size: int, x: Tensor, weight: Tensor, how: How) -> Tensor:
        """The library's convolution with its copy of the weight, or of that expanded for tiles of this size."""
        key = size, x.shape[2] if size else 0
        kept = self._packed.get(key)
        if kept is None or kept[1] != weight._version or kept[0].data_ptr() != weight.data_ptr():
            with torch.inference_mode(False):
                of = weight.detach()  # kept too, so that no other weight comes to lie at its address
                packed = onednn.pack(winograd.expand(of, size) if size else of, how, x.shape)
            kept = of, weight._version, packed
            others = [
                (other, one)
                for other, one in self._packed.items()
                if other != key and one[1] == kept[1] and one[0].data_ptr() == of.data_ptr()
            ]
            self._packed = dict([*others[1 - KEPT :], (key, kept)])
        return onednn.conv(x, kept[2], how)

    def _tile_size(self, x: Tensor, weight: Tensor) -> int:
        """Of the Winograd convolution that is the fastest for such an image, or 0."""
        outputs, inputs, *taps = weight.shape
        if not self.winograd or taps != [3, 3] or (self.stride, self.padding) != (1, 1):
            return 0
        return winograd.tile_size(inputs, outputs, *x.shape[2:])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": {}}  # it is neither copied nor stored

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.number = next(_numbers)
        _layers[self.number] = self


def _run(x: Tensor, weight: Tensor, layer: int, stride: int, padding: int) -> Tensor:
    return _layers[layer].packed(x, weight).contiguous(memory_format=torch.channels_last)


def _fake(x: Tensor, weight: Tensor, layer: int, stride: int, padding: int) -> Tensor:
    return F.conv2d(x, weight, stride=stride, padding=padding).contiguous(memory_format=torch.channels_last)


_library.impl("packed_conv", _run, "CompositeExplicitAutograd")
torch.library.register_fake("fastdiff::packed_conv", _fake, lib=_library)
