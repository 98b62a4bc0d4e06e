"""A classifier of noised images, for classifier guidance (Dhariwal & Nichol 2021, section 4).

May import: engine.train_ops, base.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.engine import train_ops
from fastdiff.models.denoiser import Condition

from .base import Draw, Loss, Network, Objective


@dataclass(frozen=True)
class Classifier(Objective):
    """Cross-entropy of the label given the noised image: the best network answers log p(y | x) up to a constant.

    The network is called with condition None and returns logits [B, classes]; cond of `loss` holds the labels. schedule
    and prediction say how the classifier sees an image: those of the denoiser that it shall guide.
    """

    def evaluate(
        self, network: Network, x0: Tensor, cond: Condition, draw: Draw, *, dtype: torch.dtype = torch.float32
    ) -> Loss:
        labels = cond if isinstance(cond, Tensor) else (cond or {}).get("class_labels")
        if labels is None:
            raise ValueError(f"{self.name} needs the labels [{len(x0)}] as cond; got {cond!r}")
        logits = network(train_ops.noised(x0, draw.table, draw.key, dtype), draw.model_time, None)
        each = F.cross_entropy(logits.float(), labels, reduction="none")
        correct = logits.argmax(1) == labels
        return Loss((draw.weight * each).mean(), each.detach(), draw.model_time, draw.weight, draw, correct)
