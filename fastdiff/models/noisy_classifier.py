"""A classifier of noised images (Dhariwal & Nichol 2021, section 4): its network, and what guidance must know of it.

May import: the UNet's encoder and blocks, denoiser, process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.process import predictions
from fastdiff.process.schedules import Schedule

from .denoiser import Denoiser
from .unet_blocks import normalised, set_to_zero
from .unet_config import UNetConfig
from .unet_encoder import UNetEncoder

METADATA = "classifier"  # the key of a file's metadata that says what it holds, and how it is made


class UNetClassifier(UNetEncoder):
    """log p(y | x, t) up to a constant: linear(mean over pixels of silu(norm(h))), h what the UNet's middle says.

    config: as of a UNet; num_class_embeds: the classes it tells apart; what is of the way up is not read.
    Deterministic in eval mode; capturable. Raises ValueError where there are fewer than two classes.
    """

    def __init__(self, config: UNetConfig) -> None:
        classes = config.num_class_embeds or 0
        if classes < 2:
            raise ValueError(
                f"UNetClassifier: num_class_embeds is {config.num_class_embeds}, expected 2 or more classes"
            )
        super().__init__(replace(config, num_class_embeds=None))
        width = config.block_out_channels[-1]
        self.classes = classes
        self.norm_out = nn.GroupNorm(config.norm_num_groups, width, config.norm_eps)
        self.head = nn.Linear(width, classes)
        set_to_zero(self.head)

    def forward(self, x: Tensor, t: Tensor | float | int) -> Tensor:
        """x: [B, in_channels, H, W]; t: [B] or scalar, the clock it was trained with -> logits [B, classes]."""
        x, act_time, _ = self.enter(x, t, None)
        x, _ = self.encode(x, act_time)
        return self.head(normalised(self.norm_out, x).mean((2, 3)))

    def save(
        self, path: str | os.PathLike[str], dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """As `UNet.save`; the file's metadata say that it is a classifier."""
        config = replace(self.config, num_class_embeds=self.classes)
        self._save(Path(path), dtype, {**(metadata or {}), METADATA: config.to_json()})

    @classmethod
    def load(cls, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> UNetClassifier:
        """Reads what `save` wrote; weights are converted to `dtype`. Raises: FileNotFoundError, ValueError."""
        return cls._load(Path(path), METADATA, dtype)


class NoisyClassifier:
    """Wraps `net(x, t)` -> logits [B, classes] with how it sees an image: as a denoiser of these three does.

    schedule, prediction, sigma_data: of the noised images it was trained on, as `Denoiser` has them; x is scaled by
    c_in for "edm" only. class_names: of the logits, in order.
    """

    def __init__(
        self,
        net: nn.Module | Callable[[Tensor, Tensor], Tensor],
        schedule: Schedule,
        prediction: str = "eps",
        *,
        sigma_data: float | None = None,
        class_names: tuple[str, ...] = (),
    ) -> None:
        self.net, self.schedule, self.prediction, self.sigma_data = net, schedule, prediction, sigma_data
        self.class_names = class_names

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the network's weights; None of one without, which takes x as it is."""
        parameter = next(self.net.parameters(), None) if isinstance(self.net, nn.Module) else None
        return None if parameter is None else parameter.dtype

    def log_likelihood(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """log p(y | x, t): [B]. x: as the network is shown it, [B, *S]; time: [B]; labels: int64 [B]."""
        logits = self.net(x, time)
        return logits.log_softmax(1).gather(1, labels[:, None])[:, 0]

    def check_fits(self, model: Denoiser) -> None:
        """Raise ValueError unless the denoiser is shown its images as this classifier is."""
        theirs, ours = _view(model), _view(self)
        wrong = [f"{name}: {theirs[name]!r} there, {ours[name]!r} here" for name in ours if theirs[name] != ours[name]]
        if wrong:
            raise ValueError(
                "the classifier was trained on images noised otherwise than the denoiser sees them: "
                + "; ".join(wrong)
                + ". Train one with --objective-options schedule=, prediction= and sigma_data= those of the denoiser"
            )


def _view(model: Denoiser | NoisyClassifier) -> dict[str, Any]:
    """What decides how a network is shown an image: inside EDM's preconditioning that is sigma_data alone."""
    if model.prediction == "edm":
        data = predictions.data_scale(model.sigma_data)
        return {"inside EDM's preconditioning": True, "schedule": None, "sigma_data": data}
    return {"inside EDM's preconditioning": False, "schedule": model.schedule, "sigma_data": None}
