"""What every objective is: a frozen description that turns images and a network into a loss.

May import: process, the table's layout, engine.train_draws, models.denoiser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastdiff.compiler import layout as at
from fastdiff.engine import train_draws
from fastdiff.engine.train_draws import Rows
from fastdiff.models.denoiser import Condition, Denoiser
from fastdiff.process import predictions, schedules
from fastdiff.process.schedules import Schedule

from . import counters, times

Array = NDArray[np.float64]
Network = Callable[[Tensor, Tensor, Condition], Any]


@dataclass(frozen=True)
class Draw:
    """All that is random in a step, on one device: the same numbers for a sample in any batch and any process.

    key: int64 [B], names the sample's noises. time: float64 [B], on the schedule's clock. model_time: fp32 [B], what
    the network is shown. table: fp32 [B, 8], the columns of engine.train_ops. weight: fp32 [B], of the squared error,
    times importance: fp32 [B], 1 unless the times are importance-sampled. dropped: bool [B], whose label is left out.
    """

    key: Tensor
    time: Tensor
    model_time: Tensor
    table: Tensor
    weight: Tensor
    importance: Tensor
    dropped: Tensor

    def to(self, device: torch.device) -> Draw:
        """The same draw on a device, copied without waiting."""
        if self.key.device == device:
            return self
        moved = {entry.name: getattr(self, entry.name).to(device, non_blocking=True) for entry in fields(self)}
        return Draw(**moved)


@dataclass(frozen=True)
class Loss:
    """mean: the scalar to differentiate. per_sample: fp32 [B], each sample's error before its weight, detached.

    level: fp32 [B], the model time. weight: fp32 [B]. Where nothing else is added, mean = mean(weight * per_sample).
    correct: bool [B], of a classifier, whether the label is its first guess.
    """

    mean: Tensor
    per_sample: Tensor
    level: Tensor
    weight: Tensor
    draw: Draw = field(repr=False)
    correct: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Objective:
    """Schedule and draws; what is computed from them is for subclasses.

    schedule: a Schedule, its name, or what its to_dict wrote. prediction: what the network learns to predict.
    sigma_data: of "edm" only. times: their distribution (objectives.times). flip: mirror images left to right with
    probability 1/2. drop_label, null_label: with this probability the label is replaced (Ho & Salimans 2022, Alg. 1).
    """

    name: str
    schedule: Schedule = field(default_factory=schedules.linear)
    prediction: str = "eps"
    sigma_data: float | None = None
    times: times.Times = field(default_factory=times.Uniform)
    flip: bool = False
    drop_label: float = 0.0
    null_label: int | None = None

    def __post_init__(self) -> None:
        given = self.schedule
        found = schedules.get(given) if isinstance(given, str) else given
        found = Schedule.from_dict(found) if isinstance(found, Mapping) else found
        if not isinstance(found, Schedule):
            raise ValueError(f"{self.name}: schedule must be a schedule, its name or its to_dict(), got {given!r}")
        object.__setattr__(self, "schedule", found)
        object.__setattr__(self, "times", times.get(self.times))
        # refuses what it does not know, and sigma_data that is not "edm"'s
        predictions.coefficients(self.prediction, schedules.Level(1.0, 1.0), None, self.sigma_data)
        if not 0 <= self.drop_label <= 1:
            raise ValueError(f"{self.name}: drop_label is a probability, got {self.drop_label!r}")
        if self.drop_label > 0 and self.null_label is None:
            raise ValueError(f"{self.name}: drop_label needs null_label, the label that stands for none")

    @property
    def learned_variance(self) -> bool:
        """Whether the network returns [B, 2C, ...]: its prediction, and what it says of the variance."""
        return False

    @property
    def capturable(self) -> bool:
        """Whether `evaluate` waits for nothing on the host, so that a CUDA graph can hold it."""
        return True

    def loss(
        self,
        network: Network,
        x0: Tensor,
        cond: Condition,
        seeds: Tensor,
        step: int,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Loss:
        """The loss of one batch; see `Loss`.

        network: network(x_in, model_time, cond) -> F. x0: [B, *S], floating in [-1, 1] or uint8. cond: int64 labels
        [B], a mapping with "class_labels" or other conditions, or None. seeds: int64 [B] on the CPU, the global index
        of each sample mixed with the run's seed; step: counts the draws of a sample. dtype: of x_in.
        """
        if seeds.shape != (len(x0),):
            raise ValueError(f"seeds must be int64 [{len(x0)}], got {seeds.dtype} {list(seeds.shape)}")
        return self.evaluate(network, x0, cond, self.draw(seeds, step).to(x0.device), dtype=dtype)

    def draw(self, seeds: Tensor, step: int) -> Draw:
        """What is random of a step, on the CPU and in float64 until the end; for loops that capture the rest."""
        if train_draws.ready() and self._rows is not None:
            found = counters.rows(self._rows, seeds.cpu(), int(step), self.flip, self.drop_label)
            key, chosen, shown, table, weight, dropped = found
            return Draw(key, chosen, shown, table, weight, torch.ones_like(weight), dropped)
        key, uniform = counters.draws(seeds.cpu(), int(step))
        time = np.asarray(self.times.at(uniform[:, 0], self.schedule), dtype=np.float64)
        mirrored = uniform[:, 2] < 0.5 if self.flip else None
        return self.at(time, key, mirrored, torch.from_numpy(uniform[:, 3] < self.drop_label))

    def at(
        self, time: Array, key: Tensor, mirrored: NDArray[np.bool_] | None = None, dropped: Tensor | None = None
    ) -> Draw:
        """The draw with these times [B] on the schedule's clock and these keys; none mirrored or dropped if None."""
        table, shown, weight = self.columns(time)
        if mirrored is not None:
            table[:, at.FLIP] = mirrored
        importance = self.times.importance(time, self.schedule) * np.ones_like(time)
        return Draw(
            key=key,
            time=torch.from_numpy(time),
            model_time=torch.from_numpy(np.asarray(shown, dtype=np.float32)),
            table=torch.from_numpy(table.astype(np.float32)),
            weight=torch.from_numpy((weight * importance).astype(np.float32)),
            importance=torch.from_numpy(importance.astype(np.float32)),
            dropped=torch.zeros(len(time), dtype=torch.bool) if dropped is None else dropped,
        )

    @cached_property
    def _rows(self) -> Rows | None:
        """What `at` says of each time there can be, where these are few and as likely as each other."""
        choices = self.times.choices(self.schedule) if self.times.chosen() else None
        if choices is None:
            return None
        every = self.at(np.array(choices, dtype=np.float64), torch.zeros(len(choices), dtype=torch.int64))
        read = every.time, every.model_time, every.table, every.weight
        return Rows(*(tensor.contiguous() for tensor in read))

    def columns(self, time: Array) -> tuple[Array, Array, Array]:
        """Of these times, in float64: the rows of the table [B, 8], what the network is shown [B], the weights [B]."""
        schedule = self.schedule
        alpha, sigma = schedule.scales_at(time)
        table = np.zeros((len(time), at.TRAIN_COLUMNS))
        answer = predictions.targets(self.prediction, alpha, sigma, self.sigma_data)
        table[:, at.TARGET_X0], table[:, at.TARGET_Z] = answer
        if self.prediction == "edm":
            spread = predictions.data_scale(self.sigma_data)
            c_in, shown = 1 / np.hypot(sigma, spread * alpha), np.log(sigma / alpha) / 4
            table[:, at.INPUT_X0], table[:, at.INPUT_Z] = c_in * alpha, c_in * sigma
        else:
            shown = schedule.model_time(time)
            table[:, at.INPUT_X0], table[:, at.INPUT_Z] = alpha, sigma
        return table, shown, np.ones_like(time)

    def observe(self, time: Tensor, loss: Tensor) -> None:
        """Tell the distribution of times what was lost where; only "loss_second_moment" listens.

        time: draw.time. loss: weight / importance * per_sample. Of all processes, in one order: they then go on alike.
        """
        self.times.observe(time.cpu().numpy(), loss.detach().double().cpu().numpy(), self.schedule)

    def evaluate(
        self, network: Network, x0: Tensor, cond: Condition, draw: Draw, *, dtype: torch.dtype = torch.float32
    ) -> Loss:
        """The loss of a draw that is on x0's device."""
        raise NotImplementedError

    def denoiser(self, net: nn.Module | Callable[..., Any], **known: Any) -> Denoiser:
        """The network as samplers want it; known: more keywords of Denoiser."""
        return Denoiser(
            net,
            self.schedule,
            self.prediction,
            sigma_data=self.sigma_data,
            null_label=self.null_label,
            learned_variance=self.learned_variance,
            **known,
        )

    def to_dict(self) -> dict[str, Any]:
        """The objective as JSON values, for `objectives.from_dict`."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {key: value.to_dict() if hasattr(value, "to_dict") else value for key, value in values.items()}

    def condition(self, cond: Condition, dropped: Tensor) -> Condition:
        """cond with the label replaced of the samples that drop it."""
        if self.drop_label == 0 or cond is None:
            return cond
        if isinstance(cond, Mapping):
            if "class_labels" not in cond:
                raise ValueError(f"drop_label replaces the condition 'class_labels'; got only {sorted(cond)}")
            return {**cond, "class_labels": self._drop(cond["class_labels"], dropped)}
        return self._drop(cond, dropped)

    def _drop(self, labels: Tensor, dropped: Tensor) -> Tensor:
        if labels.is_floating_point() or labels.dim() != 1:
            raise ValueError(f"drop_label needs integer labels [B], got {labels.dtype} {list(labels.shape)}")
        assert self.null_label is not None
        return labels.masked_fill(dropped, self.null_label)
