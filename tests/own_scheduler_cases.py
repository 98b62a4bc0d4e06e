"""Schedulers that somebody wrote: for the tests of captures."""

from __future__ import annotations

from typing import Any

import torch


class Own:
    """The base of the others: its steps are still to be written."""

    def __init__(self) -> None:
        self.timesteps: list[float] = []
        self.old: Any = None

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = [float(steps - i) for i in range(steps)]
        self.old = None

    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        raise NotImplementedError


class InPlace(Own):
    """Writes into its arguments, as torch code does to save memory."""

    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        model_output.mul_(0.5).add_(sample, alpha=0.1)
        if self.old is not None:
            model_output -= 0.2 * self.old
        self.old = model_output
        return sample.mul_(0.9).add_(model_output)


class DrawsFromItsOwn(Own):
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        normal = torch.randn(sample.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return 0.9 * sample + 0.1 * model_output + 0.3 * normal
