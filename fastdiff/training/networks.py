"""The network of a run, made to fit the data, and its blocks. May import: config, data, models, objectives."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fastdiff.models.denoiser import Denoiser
from fastdiff.models.noisy_classifier import UNetClassifier
from fastdiff.models.unet import UNet
from fastdiff.models.unet_blocks import Attention, ResBlock
from fastdiff.models.unet_config import UNetConfig
from fastdiff.models.unet_encoder import UNetEncoder

from . import objectives
from .config import TrainConfig
from .data import Source
from .data.source import root_mean_square
from .objectives import Objective

_EDM_CLOCK = 16.0  # EDM's clock ln(sigma)/4 spans about 3; the embedding wants hundreds
_CLOCK = 1000.0
FILLED = ("channels", "classes", "class_names", "objective_options", "drop_label")  # by `fill`


def fill(config: TrainConfig, source: Source, sigma_data: float | None = None) -> TrainConfig:
    """The configuration with all that the data decide: channels, classes, their names, and EDM's sigma_data.

    sigma_data: that of the weights the run starts from, which keep their meaning with it alone.
    Raises: ValueError where names and classes do not agree, and where a classifier cannot be trained as asked.
    """
    options = dict(config.objective_options)
    draft = objectives.get(config.objective, **options)
    if draft.prediction == "edm" and "sigma_data" not in options:
        options["sigma_data"] = sigma_data or _scale(config, source)
    classifies = isinstance(draft, objectives.Classifier)
    if classifies:
        _check_classifier(config, source)
    names = source.class_names or config.class_names
    if names and source.num_classes and len(names) != source.num_classes:
        if config.class_names and not source.class_names and not config.preset:
            raise ValueError(f"class_names has {len(names)} names, but the data have {source.num_classes} classes")
        names = ()
    return config.change(
        channels=source.shape[0],
        classes=source.num_classes,
        class_names=names if source.num_classes else (),
        objective_options=options,
        drop_label=config.drop_label if source.num_classes and not classifies else 0.0,
    )


def _check_classifier(config: TrainConfig, source: Source) -> None:
    name = f"objective {config.objective!r}"
    if (source.num_classes or 0) < 2:
        raise ValueError(
            f"{name} learns to tell classes apart, and {config.data or 'the data'} has {source.num_classes or 'none'}: "
            "give pictures in a subfolder for each class, or a file with labels, and leave classes=0 out"
        )
    if config.sample_images:
        raise ValueError(f"{name} trains a classifier, which draws no samples: set sample_images=0")
    if config.init:
        raise ValueError(f"{name} trains a classifier, and init={config.init} is a denoiser: leave init out")


def _scale(config: TrainConfig, source: Source) -> float:
    """The root mean square of the data as the network is shown them."""
    return round(root_mean_square(source) * (1.0 if _is_pixels(source) else config.scale), 4)


def _is_pixels(source: Source) -> bool:
    """Whether the pictures are uint8."""
    return source.fetch(np.zeros(1, np.int64))[0].dtype == torch.uint8


def build_objective(config: TrainConfig) -> Objective:
    """The objective of a filled configuration."""
    options = dict(config.objective_options)
    if config.classes and config.drop_label > 0:
        options |= {"drop_label": config.drop_label, "null_label": config.classes}
    return objectives.get(config.objective, flip=config.flip, **options)


def build_network(config: TrainConfig, objective: Objective) -> UNet | UNetClassifier:
    """The UNet of a filled configuration, or the way down of it with a head, its weights drawn from the run's seed."""
    channels, rows = config.channels or 3, config.classes or 0
    given: dict[str, Any] = {
        "sample_size": config.size,
        "in_channels": channels,
        "out_channels": channels * (2 if objective.learned_variance else 1),
        "num_class_embeds": rows + (objective.drop_label > 0) if rows else None,
        "time_scale": clock_scale(objective),
    }
    torch.manual_seed(config.seed)
    shape = UNetConfig.from_dict(given | config.network)
    return UNetClassifier(shape) if isinstance(objective, objectives.Classifier) else UNet(shape)


def with_head(net: UNetEncoder, objective: Objective, seed: int) -> nn.Module:
    """What is trained: the network, and beside it the head that learns each level's variance, if the objective asks."""
    if not getattr(objective, "log_variance", False):
        return net
    torch.manual_seed(seed)
    return objectives.WithLogVariance(net, scale=clock_scale(objective) / _CLOCK, seed=seed)


def without_head(net: nn.Module) -> UNet | UNetClassifier:
    """The network that samples are drawn with, or guided by."""
    inner = net.net if isinstance(net, objectives.WithLogVariance) else net
    assert isinstance(inner, UNet | UNetClassifier)
    return inner


def clock_scale(objective: Objective) -> float:
    """What the model time is multiplied by before its sinusoids, so that it spans about a thousand."""
    if objective.prediction == "edm":
        return _EDM_CLOCK
    if objective.schedule.steps is not None:
        return 1.0
    low, high = objective.schedule.time_range
    return _CLOCK / (high - low)


def blocks(net: nn.Module) -> list[nn.Module]:
    """The parts that are sharded, or computed again, one by one."""
    return [module for module in net.modules() if isinstance(module, ResBlock | Attention)]


def recompute(net: nn.Module, math_attention: bool) -> None:
    """Keep only the inputs of each block for the backward pass, and compute the rest again there (Chen et al. 2016).

    math_attention: by torch's plain formula of attention, there too, where what chose it for forward has ended.
    """
    for block in blocks(net):
        forward = functools.partial(_in_math, block.forward) if math_attention else block.forward
        block.forward = functools.partial(checkpoint, forward, use_reentrant=False)


def _in_math(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    with sdpa_kernel([SDPBackend.MATH]):
        return forward(*inputs, **named)


def denoiser(config: TrainConfig, objective: Objective, net: nn.Module) -> Denoiser:
    """The network as samplers want it."""
    shape = (config.channels or 3, config.size, config.size)
    return objective.denoiser(net, shape=shape, class_names=config.class_names)


def draws_latents(config: TrainConfig) -> bool:
    """Whether samples are arrays in the units of the set, not pictures: by their scale and channels."""
    return config.scale != 1.0 or config.channels not in (1, 3)


def metadata(config: TrainConfig, objective: Objective, images: int) -> dict[str, str]:
    """What model.safetensors says of itself, for `fd.load` and `load_noisy_classifier`."""
    facts = {
        "prediction": objective.prediction,
        "schedule": json.dumps(objective.schedule.to_dict()),
        "class_names": json.dumps(config.class_names),
        "classes": str(config.classes or 0),
        "value_range": "latents, times latent_scale" if draws_latents(config) else "[-1, 1]",
        "images_seen": str(images),
        "learned_variance": str(objective.learned_variance).lower(),
    }
    if draws_latents(config):
        facts["latent_scale"] = repr(config.scale)
    if objective.sigma_data is not None:
        facts["sigma_data"] = repr(objective.sigma_data)
    if objective.null_label is not None:
        facts["null_class"] = str(objective.null_label)
    return facts
