"""Error at each noise level, and the bound on the likelihood that follows. May import: models, process, data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.models.denoiser import Denoiser
from fastdiff.process import predictions
from fastdiff.process.schedules import Level

from ..data.source import scaled

_RANGE = (1e-3, 1e3)  # of sigma/alpha, where a schedule goes to 0 or to infinity
_GREYS = 256


@dataclass(frozen=True)
class Levels:
    """Mean squared error |x0 - D|^2 of an element at each ratio sigma/alpha, and the bound in bits for an element.

    rhos, errors: [L]. bits: of diffusion, and with what the ends add; nan where the pictures are no pixels.
    """

    rhos: Tensor
    errors: Tensor
    bits: float


@torch.no_grad()
def levels(
    model: Denoiser, pictures: Tensor, labels: Tensor | None, count: int = 24, batch: int = 128, seed: int = 0
) -> Levels:
    """Denoise pictures at `count` levels, evenly spaced in log(sigma/alpha), one fresh noise for each.

    bits for an element, an upper bound of -log2 p (Kingma et al. 2021, eqs. 6, 11 and 12):
        integral of |x - D|^2 / rho^2 d ln(1/rho) + KL(N(x, rho_max^2) || N(0, rho_max^2)) - log p(x | x + rho_min n)
    The last is a softmax over the 256 grey values. pictures: uint8 [N, C, H, W] (or float, then bits is nan).
    """
    low, high = (min(max(rho, _RANGE[0]), _RANGE[1]) for rho in (model.schedule.rho_min, model.schedule.rho_max))
    # Midpoints of equal parts: the mean over them is the integral, and neither end is evaluated.
    fractions = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    rhos = torch.exp(math.log(low) + (math.log(high) - math.log(low)) * fractions)
    generator = torch.Generator().manual_seed(seed)
    errors = torch.zeros(count, dtype=torch.float64)
    ends = 0.0
    for start in range(0, len(pictures), batch):
        part = pictures[start : start + batch]
        x0 = scaled(part)
        cond = None if labels is None else {"class_labels": labels[start : start + batch].to(model.device)}
        for i, rho in enumerate(rhos.tolist()):
            noisy = x0 + rho * torch.randn(x0.shape, generator=generator)
            errors[i] += (x0 - denoise(model, noisy, rho, cond)).double().square().sum()
        if part.dtype == torch.uint8:
            ends += float(x0.double().square().sum()) / (2 * high**2)
            ends += _decoding(part, x0, low, generator)
    errors /= pictures.numel()
    nats = (math.log(high) - math.log(low)) * float((errors / rhos.square()).mean()) + ends / pictures.numel()
    return Levels(rhos, errors, nats / math.log(2) if pictures.dtype == torch.uint8 else math.nan)


def denoise(model: Denoiser, noisy: Tensor, rho: float, cond: dict[str, Tensor] | None) -> Tensor:
    """D at x = x0 + rho n, on the CPU."""
    at = predictions.coefficients(model.prediction, Level(1.0, rho), model.schedule, model.sigma_data)
    x = noisy.to(model.device)
    time = torch.full((len(x),), at.time, device=model.device)
    output = model((at.c_in * x).to(model.dtype), time, cond).float()
    if model.learned_variance:
        output = output[:, : x.shape[1]]
    return (at.P * x + at.Q * output).cpu()


def _decoding(pixels: Tensor, x0: Tensor, rho: float, generator: torch.Generator) -> float:
    """Sum of -log p(pixel | x0 + rho n), in nats."""
    noisy = (x0 + rho * torch.randn(x0.shape, generator=generator)).double().flatten()
    greys = torch.arange(_GREYS, dtype=torch.float64) / 127.5 - 1.0
    total = 0.0
    for values, chosen in zip(noisy.split(1 << 16), pixels.flatten().long().split(1 << 16), strict=True):
        logits = -(values[:, None] - greys).square() / (2 * rho**2)
        total += float(torch.nn.functional.cross_entropy(logits, chosen, reduction="sum"))
    return total
