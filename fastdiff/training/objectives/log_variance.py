"""The log-variance head of EDM2: how hard each level is, learned beside the network. May import: torch only."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class WithLogVariance(nn.Module):
    """A network that returns (F, u): u [B] is a linear function of random Fourier features of the model time.

    u starts at 0, where the loss is the plain one (Karras et al. 2024, section 2.5). Sampling needs `net` alone.
    net: network(x, time, cond) -> F. features: their number. scale: multiplies the model time first; for a clock that
    counts to 1000 take 1e-3. seed: of the random frequencies, which are buffers.
    """

    def __init__(self, net: nn.Module, features: int = 128, scale: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        self.net = net
        generator = torch.Generator().manual_seed(seed)
        frequencies = 2 * math.pi * scale * torch.randn(features, generator=generator)
        self.frequencies: Tensor
        self.phases: Tensor
        self.register_buffer("frequencies", frequencies)
        self.register_buffer("phases", 2 * math.pi * torch.rand(features, generator=generator))
        self.head = nn.Linear(features, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, time: Tensor, cond: Any = None) -> tuple[Tensor, Tensor]:
        """F as the network returns it, and u [B]."""
        features = math.sqrt(2.0) * torch.cos(time.float()[:, None] * self.frequencies + self.phases)
        return self.net(x, time, cond), self.head(features.to(self.head.weight.dtype)).flatten().float()
