"""Networks that come with the package, and files of the same form.

May import: unet, noisy_classifier, denoiser, process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fastdiff.errors import unknown_name
from fastdiff.models.denoiser import Denoiser, device_here
from fastdiff.models.noisy_classifier import METADATA, NoisyClassifier, UNetClassifier
from fastdiff.models.unet import UNet
from fastdiff.models.weight_files import read_metadata
from fastdiff.process import schedules

SHIPPED = ("fashion",)
N = TypeVar("N", bound=nn.Module)


def load(name: str | os.PathLike[str] = "fashion", device: torch.device | str = "cpu") -> Denoiser:
    """The denoiser called `name` (one of SHIPPED), or that of a run's folder or a safetensors file like a run's.

    Classes without names are called by their numbers. Weights are read with safetensors, never unpickled. Raises
    ValueError for an unknown name or a file whose metadata does not say what the network predicts, and
    FileNotFoundError for a missing file.
    """
    device, path = device_here(device), file_of(name)
    metadata = read_metadata(path)
    if METADATA in metadata:
        raise ValueError(
            f"{path} holds a classifier of noised images, which draws nothing itself, expected a denoiser; it guides "
            "one: fd.models.classifier_guided(model, fd.models.load_noisy_classifier(...))"
        )
    trained = _trained(path, metadata)
    net = _ready(UNet.load(path), device)
    size = net.config.sample_size
    height, width = size if isinstance(size, tuple) else (size, size)
    return Denoiser(
        net,
        **trained,
        shape=(net.config.in_channels, height, width) if height and width else None,
        null_label=int(metadata["null_class"]) if "null_class" in metadata else None,
        learned_variance=metadata.get("learned_variance") == "true",
    )


def load_noisy_classifier(name: str | os.PathLike[str], device: torch.device | str = "cpu") -> NoisyClassifier:
    """The classifier that `fastdiff train --objective classifier` made, of a run's folder or a safetensors file.

    Weights are in fp32 and want no gradient. Raises as `load` does, and ValueError for the file of a denoiser.
    """
    device, path = device_here(device), file_of(name)
    metadata = read_metadata(path)
    if METADATA not in metadata:
        raise ValueError(
            f"{path} holds no classifier of noised images, expected what fastdiff train --objective classifier wrote; "
            "a denoiser is loaded with fd.load"
        )
    trained = _trained(path, metadata)
    return NoisyClassifier(_ready(UNetClassifier.load(path), device), **trained)


def _ready(net: N, device: torch.device) -> N:
    """A network to be asked, not trained, where it is to run."""
    return net.eval().requires_grad_(False).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _trained(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file says of the images its network was trained on: arguments of a Denoiser and of a NoisyClassifier."""
    schedule, sigma_data = _schedule(path, metadata), metadata.get("sigma_data")
    names = json.loads(metadata.get("class_names", "[]")) or map(str, range(int(metadata.get("classes", "0"))))
    return {
        "schedule": schedule,
        "prediction": metadata["prediction"],
        "sigma_data": None if sigma_data is None else float(sigma_data),
        "class_names": tuple(names),
    }


def _schedule(path: Path, metadata: Mapping[str, str]) -> schedules.Schedule:
    """The schedule a file says it was trained on; EDM's where it names only the prediction, as older files do."""
    prediction = metadata.get("prediction")
    if prediction is None or (prediction == "edm" and "sigma_data" not in metadata):
        raise ValueError(
            f"{path} does not say what its network predicts: expected metadata prediction (and sigma_data for 'edm'), "
            f"got {sorted(metadata)}; load it with UNet.load and wrap it in fd.Denoiser yourself"
        )
    if "schedule" in metadata:
        return schedules.Schedule.from_dict(json.loads(metadata["schedule"]))
    if prediction != "edm":
        raise ValueError(f"{path} names no schedule for prediction {prediction!r}; expected metadata schedule, as JSON")
    return schedules.edm()


def file_of(name: str | os.PathLike[str]) -> Path:
    """The weights that `load` reads for this name, folder or file; raises as it does where there are none."""
    if isinstance(name, str) and name in SHIPPED:
        return Path(str(resources.files("fastdiff.models.weights") / f"{name}.safetensors"))
    path = Path(name)
    if path.is_dir():
        path = path / "model.safetensors"
        if not path.exists():
            raise FileNotFoundError(
                f"no weights in {path.parent} yet: a run of fastdiff train writes model.safetensors with each "
                "checkpoint (save_images) and at its end; let it go on, or start it again with --resume auto. A "
                "diffusers network is loaded with diffusers, and fd.Denoiser.from_diffusers"
            )
    if path.suffix != ".safetensors" and not path.exists():
        if len(path.parts) > 1:
            raise FileNotFoundError(
                f"no folder or file {path}; give the folder of a run, a .safetensors file or one of: "
                f"{', '.join(SHIPPED)}. A diffusers network is loaded with diffusers, and fd.Denoiser.from_diffusers"
            )
        raise ValueError(f"{unknown_name('model', str(name), SHIPPED)} There is no folder of a run {str(name)!r} here.")
    if not path.is_file():
        raise FileNotFoundError(f"no model file {path}; give a .safetensors file or one of: {', '.join(SHIPPED)}")
    return path
