"""What a UNet may be given: one set of checks for it and for its inference form.

May import: class_labels, unet_config.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .class_labels import check_labels
from .unet_config import UNetConfig


def check_inputs(config: UNetConfig, x: Tensor, class_labels: Tensor | None) -> None:
    """ValueError or TypeError unless a UNet of this configuration takes x [B, C, H, W] and these labels."""
    step = config.patch_size * 2 ** (len(config.block_out_channels) - 1)
    if x.ndim != 4 or x.shape[1] != config.in_channels or x.shape[2] % step or x.shape[3] % step:
        raise ValueError(
            f"UNet: got x of shape {tuple(x.shape)}, expected [B, {config.in_channels}, H, W] "
            f"with H and W multiples of {step}"
        )
    null = "the null label of the unguided branch, no class, if the network was trained with dropped labels"
    check_labels("UNet", "class_labels", class_labels, x.shape[0], config.num_class_embeds, null)


def expand_time(t: Tensor | float | int, x: Tensor) -> Tensor:
    """The clock [B] of a batch, from one time for all or one for each; ValueError for another number of them."""
    time = torch.as_tensor(t, device=x.device)
    if time.ndim > 1 or time.numel() not in (1, x.shape[0]):
        raise ValueError(f"UNet: got t of shape {tuple(time.shape)}, expected a scalar or ({x.shape[0]},)")
    return time.expand(x.shape[0])
