"""What pictures are compared by: the shipped classifier, pooled pixels, or a function of the user's.

May import: models, data.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fastdiff.models.classifier import classify, load_classifier

from ..data.idx import FASHION_CLASSES
from ..data.source import scaled

# uint8 [N, C, H, W] -> (predicted classes [N] or None, features [N, F])
Features = Callable[[Tensor], tuple[Tensor | None, Tensor]]
POOLED = 8


def resolve(name: str, shape: tuple[int, ...], class_names: tuple[str, ...]) -> str:
    """What "auto" stands for: "fashion" for a model of its shape and classes, else "pixels"."""
    if name != "auto":
        return name
    same = [n.lower() for n in class_names] == [n.lower() for n in FASHION_CLASSES]
    return "fashion" if shape == (1, 32, 32) and same else "pixels"


def get(name: str, shape: tuple[int, ...]) -> Features:
    """The features called `name`.

    "fashion": 128 features and the class, by the classifier that comes with the package, for its 1x32x32 pictures;
    "pixels": the picture pooled to 8x8, a crude measure that needs no network; "package.module:function": a function
    that takes uint8 [N, C, H, W] (fp32 of sets of float values) and returns features [N, F], or a pair of predicted
    classes [N] and features.
    Raises: ValueError for pictures of another shape or a function that is not there.
    """
    if name == "fashion":
        if shape != (1, 32, 32):
            raise ValueError(f"features 'fashion' are of 1x32x32 pictures, got {'x'.join(map(str, shape))}; use pixels")
        net = load_classifier()
        return lambda pictures: classify(net, pictures)
    if name == "pixels":
        return _pooled
    return _own(name)


def _pooled(pictures: Tensor) -> tuple[None, Tensor]:
    return None, functional.adaptive_avg_pool2d(scaled(pictures), POOLED).flatten(1)


def _own(name: str) -> Features:
    module, separator, function = name.partition(":")
    if not separator:
        raise ValueError(f"features must be auto, fashion, pixels or package.module:function, got {name!r}")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"features {name!r} cannot be had: {error}") from error

    def call(pictures: Tensor) -> tuple[Tensor | None, Tensor]:
        with torch.no_grad():
            answer = found(pictures)
        predicted, features = answer if isinstance(answer, tuple) else (None, answer)
        if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != len(pictures):
            raise ValueError(f"features {name!r} must return a tensor [{len(pictures)}, F], got {features!r:.100}")
        return predicted, features.float().cpu()

    return call
