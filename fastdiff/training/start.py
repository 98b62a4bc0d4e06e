"""Where a new run's weights come from, if not from its seed. May import: config, networks, models, objectives."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn

from fastdiff.models.denoiser import Denoiser
from fastdiff.models.unet import UNet

from .config import TrainConfig
from .networks import denoiser
from .objectives import Objective

_MEANING = ("prediction", "schedule", "sigma_data", "null_label")
_FREE = ("sample_size", "dropout")  # of a UNet's configuration: its weights mean the same with others


def start_from(given: Denoiser, config: TrainConfig, objective: Objective, net: nn.Module) -> None:
    """Copy the weights of `given`, which `config.init` names, into `net`.

    Raises: ValueError listing each difference that would make the weights mean something else in this run: the
    network's configuration, prediction, schedule, sigma_data and null label.
    """
    theirs, ours = _meaning(given), _meaning(denoiser(config, objective, net))
    wrong = [f"  {name}: {theirs[name]!r} there, {ours[name]!r} here" for name in ours if theirs[name] != ours[name]]
    if wrong:
        raise ValueError(
            f"the weights of init={config.init} do not fit this run:\n"
            + "\n".join(wrong)
            + "\nChannels and classes are those of the data. Set classes, drop_label, network NAME=VALUE or "
            "objective_options NAME=VALUE to what the weights were trained with, start from others, or leave init out."
        )
    net.load_state_dict(given.net.state_dict())  # type: ignore[attr-defined]


def _meaning(model: Denoiser) -> dict[str, Any]:
    net = model.net
    assert isinstance(net, UNet)
    shape = {name: value for name, value in asdict(net.config).items() if name not in _FREE}
    return shape | {name: getattr(model, name) for name in _MEANING}
