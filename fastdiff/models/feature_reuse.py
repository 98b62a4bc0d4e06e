"""An approximation: the deep levels of a UNet run in every k-th call only, and the calls between use what they said.

May import: unet, models.denoiser. DeepCache (Ma et al. 2024, section 3): what enters the outermost up levels changes
little from step to step, so it is kept from the last call that went all the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .denoiser import Denoiser
from .unet import UNet

DEEP = 0  # the mode of a call that goes all the way; of one that does not: the batch of the call it follows


class FeatureReuse(nn.Module):
    """A UNet whose calls are deep or shallow, as `mode` says; deep ones give what the UNet gives, bit for bit.

    `levels` outer levels run in every call. A shallow call uses the features of the last deep one of batch `mode`, the
    first entries where its own batch is smaller.
    """

    def __init__(self, net: UNet, every: int, levels: int) -> None:
        super().__init__()
        self.net, self.every, self.levels = net, every, levels
        self.mode = DEEP
        self._features: dict[tuple[int, ...], Tensor] = {}

    def modes(self, batches: Sequence[int]) -> list[int]:
        """The mode of each call of a run, whose batches these are; 0: the network is not called."""
        modes, calls, deep = [], 0, 0
        for batch in batches:
            again = batch > 0 and (calls % self.every == 0 or batch > deep)
            deep, calls = (batch, 1) if again else (deep, calls + (batch > 0))
            modes.append(DEEP if again else deep)
        return modes

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """As `UNet.forward`. Raises RuntimeError for a shallow call without a deep one before it."""
        net, outer, shape = self.net, self.levels, x.shape
        x, act_time, time = net.enter(x, t, class_labels)
        states = [x]
        for down in net.down_blocks[:outer]:
            states += down(states[-1], act_time)
        if self.mode == DEEP:
            for down in net.down_blocks[outer:]:
                states += down(states[-1], act_time)
            x = states[-1] if net.mid_block is None else net.mid_block(states[-1], act_time)
            for up in net.up_blocks[:-outer]:
                x = up(x, states, act_time)
            self._keep(shape, x)
        else:
            states.pop()  # the state that the next level would begin with
            x = self._kept(shape)
        for up in net.up_blocks[-outer:]:
            x = up(x, states, act_time)
        return net.leave(x, time)

    def _keep(self, shape: torch.Size, x: Tensor) -> None:
        kept = self._features.get(tuple(shape))
        if kept is None or kept.dtype != x.dtype or kept.device != x.device:
            with torch.inference_mode(False):  # at one address, which graphs may hold
                kept = self._features[tuple(shape)] = torch.empty_like(x)
        kept.copy_(x)

    def _kept(self, shape: torch.Size) -> Tensor:
        kept = self._features.get((self.mode, *shape[1:]))
        if kept is None or self.mode < shape[0]:
            raise RuntimeError(f"a shallow call on {tuple(shape)} needs a deep one of as large a batch before it")
        return kept[: shape[0]]


def reuse_features(model: Denoiser, every: int = 3, levels: int = 1) -> Denoiser:
    """The same denoiser with its UNet's deep levels evaluated in every `every`-th row of a run only: an approximation.

    levels: outer levels that are evaluated in every row. Off the engine's loop it gives what the UNet gives. Raises
    TypeError for a network that is not a `fd.models.UNet` and ValueError for numbers that do not fit it.
    """
    if not isinstance(model, Denoiser) or not isinstance(model.net, UNet):
        got = type(model.net if isinstance(model, Denoiser) else model).__name__
        raise TypeError(f"reuse_features needs a Denoiser around fd.models.UNet, whose levels it knows, got {got}")
    depth = len(model.net.down_blocks)
    for name, value, most in (("every", every, None), ("levels", levels, depth - 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
            bound = "" if most is None else f" and at most {most}, one less than the network has"
            raise ValueError(f"reuse_features: {name} must be an integer >= 1{bound}, got {value!r}")
    return model.around(FeatureReuse(model.net, every, levels).train(model.net.training))
