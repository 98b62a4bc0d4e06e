"""One optimizer step over a batch: forward, backward in micro-batches, clipping, AdamW, average.

May import: config, data.loader, ema, objectives, optimizer, ranks, checkpoint (Progress).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import optimizer as optimizers
from .checkpoint import Progress
from .config import TrainConfig
from .data.loader import Batch
from .ema import Ema
from .objectives import Loss, Objective
from .objectives.times import Times
from .ranks import Ranks, synchronise

AMP = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DROPOUT = 0x2545F4914F6CDD1D  # spreads (seed, step, rank) over the seeds of torch's own generator


@dataclass(frozen=True)
class Outcome:
    """loss: mean over the batch; norm: of its gradient, both over all processes; rate: of learning.

    taken: whether the weights were changed. per_sample, level: [B], of this process's share. stop: whether any process
    was asked to stop by the end of the step.
    """

    loss: float
    norm: float
    rate: float
    taken: bool
    per_sample: Tensor
    level: Tensor
    stop: bool = False


class NotFinite(FloatingPointError):
    """The loss or its gradient is not a number."""


class Step:
    """Trains `net` by `objective`; `wrapped` is the same net as the processes share it (DDP, FSDP or itself).

    Deterministic in (weights, batch, progress): torch's generator, of which dropout draws, is seeded in each step.
    """

    def __init__(
        self,
        config: TrainConfig,
        net: nn.Module,
        wrapped: nn.Module,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        ema: Ema,
        ranks: Ranks,
    ) -> None:
        self.config, self.wrapped, self.objective = config, wrapped, objective
        self.network = torch.compile(wrapped) if config.compile else wrapped
        self.optimizer, self.ema, self.ranks = optimizer, ema, ranks
        self.parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.precision == "fp16")
        self._listens = type(objective.times).observe is not Times.observe
        self.micro = config.at_once(ranks.world)

    def run(self, batch: Batch, progress: Progress, asked: Callable[[], bool] = lambda: False) -> Outcome:
        """Take one step and count it in `progress`. asked: whether this process was asked to stop."""
        rate = self.prepare(progress)
        parts = batch.split(self.micro)
        losses = []
        for i, part in enumerate(parts):
            synchronise(self.wrapped, last=i == len(parts) - 1)
            loss = self.objective.loss(self.call, part.pictures, part.labels, part.seeds, 0, dtype=self.dtype)
            # Every micro-batch counts by its samples, so that their number does not change the gradient.
            self.scaler.scale(loss.mean * (len(part.seeds) / len(batch.seeds))).backward()
            losses.append(loss)
        self.scaler.unscale_(self.optimizer)
        norm = float(optimizers.clip(self.parameters, self.config.clip_norm))
        means = [
            loss.mean.detach() * (len(part.seeds) / len(batch.seeds)) for loss, part in zip(losses, parts, strict=True)
        ]
        taken = math.isfinite(norm)
        if taken:  # decided by the norm, which all processes share
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if taken:
            self.observe(losses, progress)
        samples, levels = (
            torch.cat(parts) for parts in zip(*((loss.per_sample, loss.level) for loss in losses), strict=True)
        )
        # as late as can be, so that a signal during the step ends it, and in one message with the loss
        total, stops = self.ranks.totals(float(torch.stack(means).sum()), float(asked()))
        outcome = Outcome(total / self.ranks.world, norm, rate, taken, samples, levels, stops > 0)
        return self.count(outcome, progress)

    def prepare(self, progress: Progress) -> float:
        """Set the rate, and the seed of dropout, of the step that begins now."""
        rate = optimizers.learning_rate(self.config, progress.images)
        optimizers.set_rate(self.optimizer, rate)
        place = progress.step * self.ranks.world + self.ranks.rank
        torch.manual_seed((self.config.seed * 0x9E3779B9 + place * _DROPOUT) & (2**63 - 1))
        return rate

    def count(self, outcome: Outcome, progress: Progress) -> Outcome:
        """Enter a step that was taken or left out, and update the average."""
        batch, before = self.config.batch, progress.scaler.get("scale", math.inf)
        progress.images += batch
        progress.step += 1
        if outcome.taken:
            self.ema.update(progress.images, batch)
        elif not (self.scaler.is_enabled() and outcome.loss < math.inf and 1 <= self.scaler.get_scale() < before):
            # With fp16 a finite loss that overflows backwards only lowers the scale, while that can help.
            progress.skips += 1
        progress.scaler = self.scaler.state_dict()
        return outcome

    def restore(self, progress: Progress) -> None:
        """Take up what a checkpoint says beside its tensors."""
        optimizers.set_steps(self.optimizer, progress.updates)
        self.scaler.load_state_dict(progress.scaler)
        if progress.times:
            self.objective.times.restore(progress.times)

    def observe(self, losses: list[Loss], progress: Progress) -> None:
        """Tell times that listen every loss of the batch, in the order of the samples, in every process."""
        if not self._listens:
            return
        times = torch.cat([loss.draw.time for loss in losses]).double()
        lost = torch.cat([loss.weight / loss.draw.importance * loss.per_sample for loss in losses]).double()
        found = self.ranks.gather(torch.stack([times, lost]).cpu())
        self.objective.observe(*torch.cat(found, dim=1))
        progress.times = self.objective.times.state()

    def call(self, x: Tensor, time: Tensor, cond: Any) -> Any:
        """The network in the precision and memory format of the run."""
        if self.config.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        kinds = [SDPBackend.MATH] if self.config.math_attention else None
        amp = torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32)
        if kinds is None:
            with amp:
                return self.network(x, time) if cond is None else self.network(x, time, cond)
        with amp, sdpa_kernel(kinds):
            return self.network(x, time) if cond is None else self.network(x, time, cond)

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        return AMP[self.config.precision]
