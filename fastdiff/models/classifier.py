"""The small classifier that judges samples of the shipped Fashion-MNIST network. May import: nothing of the package."""

from __future__ import annotations

import os
from importlib import resources
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

DROPOUT = 0.2


class FashionClassifier(nn.Module):
    """[B, 1, 32, 32] in [-1, 1] -> ([B, 10] logits, [B, 128] features).

    Four 3x3 convolutions with batch norm, a global average (the features of the Fréchet distance), a linear layer.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 64, 128, 128)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x)))
            if index < 2:
                x = F.max_pool2d(x, 2)
        features = x.mean(dim=(2, 3))
        return self.head(F.dropout(features, DROPOUT, self.training)), features


def load_classifier(path: str | os.PathLike[str] | None = None) -> FashionClassifier:
    """The trained classifier, in fp32 and eval mode: the shipped one, or that of a safetensors file."""
    if path is None:
        path = Path(str(resources.files("fastdiff.models.weights") / "fashion_classifier.safetensors"))
    net = FashionClassifier().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    net.load_state_dict(load_file(path))
    return net.eval()


def scaled(images: Tensor) -> Tensor:
    """uint8 -> [-1, 1] fp32, channels_last."""
    return (images.float() / 127.5 - 1.0).to(memory_format=torch.channels_last)


@torch.no_grad()
def classify(net: FashionClassifier, images: Tensor, batch: int = 500) -> tuple[Tensor, Tensor]:
    """Predicted classes [N] and features [N, 128] of uint8 images [N, 1, 32, 32]."""
    outputs = [net(scaled(chunk)) for chunk in images.split(batch)]
    return torch.cat([logits.argmax(dim=1) for logits, _ in outputs]), torch.cat([features for _, features in outputs])
