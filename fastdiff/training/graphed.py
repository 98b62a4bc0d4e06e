"""The whole step as one CUDA graph: noising, forward, backward, clipping and AdamW with no launch by the host.

May import: step and what it imports. What the host decides (times, rate, decay of the average) goes in through buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from . import optimizer as optimizers
from .checkpoint import Progress
from .data.loader import Batch
from .objectives import Draw
from .step import Outcome, Step

WARM_UP = 3  # eager steps before the capture, so that everything lazy has happened


class GraphedStep(Step):
    """As `Step`, one process on one GPU. The first steps run eagerly; then the captured one is replayed.

    A gradient that is not finite leaves the weights as they are: the fused optimizer reads a flag on the device.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._replay: Callable[[], None] | None = None

    def run(self, batch: Batch, progress: Progress, asked: Callable[[], bool] = lambda: False) -> Outcome:
        """Take one step and count it in `progress`. asked: as of `Step`."""
        if progress.step < WARM_UP and self._replay is None:
            return super().run(batch, progress, asked)
        rate = self.prepare(progress)
        draws = [self.objective.draw(part.seeds, 0) for part in batch.split(self.micro)]
        if self._replay is None:
            self._hold(batch, draws)
            self._replay = captured(self._body)
        self._copy(batch, draws)
        self._replay()
        loss, norm = (float(value) for value in torch.stack([self.loss, self.norm]).cpu())
        taken = bool(torch.isfinite(self.norm))
        if taken:
            self.observe(self.losses, progress)
        samples, levels = self.per_sample.clone(), torch.cat([draw.model_time for draw in draws])
        return self.count(Outcome(loss, norm, rate, taken, samples, levels, asked()), progress)

    def _hold(self, batch: Batch, draws: list[Draw]) -> None:
        device = self.ranks.device
        self._pictures = batch.pictures.clone()
        self._labels = None if batch.labels is None else batch.labels.clone()
        self._draws = [draw.to(device) for draw in draws]
        self.optimizer.found_inf = torch.zeros((), device=device)  # type: ignore[attr-defined]

    def _copy(self, batch: Batch, draws: list[Draw]) -> None:
        self._pictures.copy_(batch.pictures, non_blocking=True)
        if self._labels is not None and batch.labels is not None:
            self._labels.copy_(batch.labels, non_blocking=True)
        for held, draw in zip(self._draws, draws, strict=True):
            for entry in fields(held):
                value = getattr(held, entry.name)
                if isinstance(value, Tensor):
                    value.copy_(getattr(draw, entry.name), non_blocking=True)

    def _body(self) -> None:
        """What is captured; the results lie in `loss`, `losses`, `norm` and `per_sample`."""
        losses, means, total = [], [], len(self._pictures)
        parts = Batch(self._pictures, self._labels, torch.empty(total)).split(self.micro)
        for part, draw in zip(parts, self._draws, strict=True):
            loss = self.objective.evaluate(self.call, part.pictures, part.labels, draw, dtype=self.dtype)
            (loss.mean * (len(part.pictures) / total)).backward()
            means.append(loss.mean.detach() * (len(part.pictures) / total))
            losses.append(replace(loss, mean=means[-1]))  # without what backward needed
        self.norm = optimizers.clip(self.parameters, self.config.clip_norm)
        self.optimizer.found_inf.copy_(~torch.isfinite(self.norm))  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.loss, self.losses = torch.stack(means).sum(), losses
        self.per_sample = torch.cat([loss.per_sample for loss in losses])


def captured(body: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of what `body` launches, and the function that replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph.replay
