"""AdamW and its rate as a function of the images seen. May import: config."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainConfig


def build(net: nn.Module, config: TrainConfig, capturable: bool = False) -> torch.optim.AdamW:
    """torch's fused AdamW over the parameters that are trained. capturable: the rate is a tensor, for a CUDA graph."""
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    rate: Any = torch.tensor(config.learning_rate, device=trained[0].device) if capturable else config.learning_rate
    return torch.optim.AdamW(
        trained, rate, betas=(config.beta1, config.beta2), eps=config.epsilon, weight_decay=config.weight_decay,
        fused=True, capturable=capturable,
    )  # fmt: skip


def learning_rate(config: TrainConfig, images: int) -> float:
    """The rate of a step that begins after `images`: a linear rise, then constant, cosine, linear or 1/sqrt.

    inverse_sqrt: sqrt(warmup / images) after the rise (Karras et al. 2024).
    """
    rise = min(1.0, (images + config.batch) / config.warmup_images) if config.warmup_images else 1.0
    spent = min(1.0, images / config.images)
    fall = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * spent)),
        "linear": 1 - spent,
        "inverse_sqrt": min(1.0, math.sqrt(max(config.warmup_images, config.batch) / max(images, 1))),
    }[config.decay]
    return config.learning_rate * rise * fall


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Change the rate in place, also where a captured graph reads it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def state(optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """The optimizer's two moments by parameter name, made where no step has been taken: what a checkpoint holds.

    Its third entry, the count of steps, is the same for all parameters: see `steps` and `set_steps`.
    """
    found: dict[str, dict[str, Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}}
    for name, parameter in names.items():
        if not parameter.requires_grad:
            continue
        entry = optimizer.state[parameter]
        if not entry:
            entry["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            entry["exp_avg"], entry["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        for key, tensors in found.items():
            tensors[name] = entry[key].detach()
    return found


def steps(optimizer: torch.optim.Optimizer) -> int:
    """Steps taken: those of the run less those left out."""
    return max((int(entry["step"]) for entry in optimizer.state.values()), default=0)


def set_steps(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Put the count back after a resume."""
    for entry in optimizer.state.values():
        entry["step"].fill_(count)


def clip(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """The norm of the gradient over all processes' shards, which is scaled down to `largest` (0: only measured)."""
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if largest:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm
