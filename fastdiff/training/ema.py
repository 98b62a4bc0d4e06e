"""Averages of the weights over the images seen: exponential with a half-life, and power functions.

May import: ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .ranks import local


class Ema:
    """The averages of a network's parameters, in their dtype, sharded as they are.

    exponential: decay 2^(-batch / h) with h = min(halflife, rampup * images), as Karras et al. 2022's code.
    power: beta = (1 - 1/t)^(gamma + 1), t = images / batch (Karras et al. 2024, eq. 2), one average per relative width
    in `profiles`; gamma solves width = sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3))).
    `weights` is the first: the exponential one.
    """

    def __init__(self, net: nn.Module, halflife: int, rampup: float = 0.05, profiles: tuple[float, ...] = ()) -> None:
        self.halflife, self.rampup, self.profiles = halflife, rampup, profiles
        self._gammas = [gamma_of_width(width) for width in profiles]
        self._parameters = dict(net.named_parameters())
        self.averages = {name: self._copy() for name in ("ema", *(f"power_{width:g}" for width in profiles))}

    @property
    def weights(self) -> dict[str, Tensor]:
        """The average that samples are drawn with, by parameter name."""
        return self.averages["ema"]

    @torch.no_grad()
    def update(self, images: int, batch: int) -> None:
        """Take in the parameters after a step of `batch` images, `images` in all. Elementwise, no host sync."""
        now = [local(parameter.detach()) for parameter in self._parameters.values()]
        for decay, average in zip(self.decays(images, batch), self.averages.values(), strict=True):
            torch._foreach_lerp_([local(tensor) for tensor in average.values()], now, 1.0 - decay)

    def decays(self, images: int, batch: int) -> list[float]:
        """The factor of each average at this point of a run."""
        halflife = min(float(self.halflife), self.rampup * images) if self.rampup else float(self.halflife)
        time = max(1.0, images / batch)
        return [0.5 ** (batch / max(halflife, 1e-8)), *((1 - 1 / time) ** (gamma + 1) for gamma in self._gammas)]

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds of it; the tensors themselves."""
        return self.averages

    def copy_to(self, net: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
        """Put an average (gathered) into a network of the same form."""
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.copy_(weights[name])
        return net

    def _copy(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._parameters.items()}


def gamma_of_width(width: float) -> float:
    """The exponent whose power-function average has this relative standard deviation (Karras et al. 2024, Alg. 2).

    Raises: ValueError outside (0, 0.289): sqrt(1/12) is the width of the plain mean.
    """
    if not 0 < width < math.sqrt(1 / 12):
        raise ValueError(f"ema_profiles are relative widths within (0, 0.2887), got {width}")
    low, high = 0.0, 1e8
    for _ in range(200):
        middle = 0.5 * (low + high)
        spread = math.sqrt((middle + 1) / ((middle + 2) ** 2 * (middle + 3)))
        low, high = (middle, high) if spread > width else (low, middle)
    return 0.5 * (low + high)
