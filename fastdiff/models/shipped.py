"""Networks that come with the package, and files of the same form. May import: unet, denoiser, process."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path

import torch

from fastdiff.errors import unknown_name
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.unet import UNet
from fastdiff.models.weight_files import read_metadata
from fastdiff.process import schedules

SHIPPED = ("fashion",)


def load(name: str | os.PathLike[str] = "fashion", device: torch.device | str = "cpu") -> Denoiser:
    """The denoiser called `name` (one of SHIPPED), or the one in a safetensors file with the same metadata.

    Weights are read with safetensors, never unpickled. Raises ValueError for an unknown name or a file whose
    metadata does not say what the network predicts, and FileNotFoundError for a missing file.
    """
    path = _path(name)
    metadata = read_metadata(path)
    if metadata.get("prediction") != "edm" or "sigma_data" not in metadata:
        raise ValueError(
            f"{path} does not say what its network predicts: expected metadata prediction='edm' and sigma_data, "
            f"got {sorted(metadata)}; load it with UNet.load and wrap it in fd.Denoiser yourself"
        )
    net = UNet.load(path).eval().requires_grad_(False).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    size = net.config.sample_size
    height, width = size if isinstance(size, tuple) else (size, size)
    return Denoiser(
        net,
        schedules.edm(),
        "edm",
        sigma_data=float(metadata["sigma_data"]),
        shape=(net.config.in_channels, height, width) if height and width else None,
        class_names=tuple(json.loads(metadata.get("class_names", "[]"))),
        null_label=int(metadata["null_class"]) if "null_class" in metadata else None,
    )


def _path(name: str | os.PathLike[str]) -> Path:
    if isinstance(name, str) and name in SHIPPED:
        return Path(str(resources.files("fastdiff.models.weights") / f"{name}.safetensors"))
    path = Path(name)
    if path.suffix != ".safetensors" and not path.exists():
        raise unknown_name("model", str(name), SHIPPED)
    if not path.is_file():
        raise FileNotFoundError(f"no model file {path}; give a .safetensors file or one of: {', '.join(SHIPPED)}")
    return path
