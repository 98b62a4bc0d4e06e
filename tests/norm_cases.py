"""What the tests of the norm op share: inputs, torch's own answer in a dtype, and the rule that errors are held to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.engine.norm_checks import Inputs

EXTRAS = ("before", "scale", "shift", "residual", "skip")
CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last


@dataclass
class Case:
    """Inputs of one call. skip: channels of it; the others are there where `extras` names them."""

    batch: int
    channels: int
    size: tuple[int, int]
    groups: int
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = CONTIGUOUS
    extras: tuple[str, ...] = ()
    skip: int = 8
    act: bool = True
    offset: float = 1.0  # mean of x
    shared: bool = False  # one residual for all samples
    seed: int = 0
    eps: float = 1e-5
    options: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.all = self.channels + (self.skip if "skip" in self.extras else 0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def image(batch: int, channels: int) -> Tensor:
            return normal(batch, channels, *self.size).to(self.dtype).contiguous(memory_format=self.layout)

        self.x = (1.5 * normal(self.batch, self.channels, *self.size) + self.offset).to(self.dtype)
        self.x = self.x.contiguous(memory_format=self.layout)
        self.weight, self.bias = 1 + 0.5 * normal(self.all), 0.5 * normal(self.all)
        made = {
            "before": lambda: normal(self.batch, self.all),
            "scale": lambda: 0.5 * normal(self.batch, self.all),
            "shift": lambda: normal(self.batch, self.all),
            "residual": lambda: image(1 if self.shared else self.batch, self.channels),
            "skip": lambda: image(self.batch, self.skip),
        }
        self.options = {name: make() if name in self.extras else None for name, make in made.items()}

    def inputs(self) -> Inputs:
        """As the executors take them."""
        return Inputs(self.x, self.weight, self.bias, *(self.options[name] for name in EXTRAS))

    def arguments(self) -> tuple[Any, ...]:
        """As the op takes them, up to `act`."""
        return *self.inputs(), self.groups, self.eps, self.act

    def in_torch(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(y, u) by torch's own functions, every step in this dtype."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(dtype)

        given = {name: None if tensor is None else cast(tensor) for name, tensor in self.options.items()}
        u = cast(self.x)
        if given["residual"] is not None:
            u = u + given["residual"]
        if given["skip"] is not None:
            u = torch.cat((u, given["skip"]), 1)
        if given["before"] is not None:
            u = u + given["before"][:, :, None, None]
        y = F.group_norm(u, self.groups, cast(self.weight), cast(self.bias), self.eps)
        if given["scale"] is not None:
            y = y * (1 + given["scale"][:, :, None, None])
        if given["shift"] is not None:
            y = y + given["shift"][:, :, None, None]
        return F.silu(y) if self.act else y, u


def error(got: Tensor, exact: Tensor) -> float:
    """The largest difference; NaN where anything is."""
    return float((got.double() - exact).abs().max())


def assert_as_good_as_torch(case: Case, y: Tensor, total: Tensor | None) -> None:
    """Errors against float64 at most twice those of torch in the same dtype; layout and dtype those of x."""
    for got, exact, own in zip((y, total), case.in_torch(torch.float64), case.in_torch(case.dtype), strict=True):
        if got is None:
            continue
        assert got.dtype == case.dtype
        assert got.is_contiguous(memory_format=case.layout)
        least = torch.finfo(case.dtype).eps * float(exact.abs().max()) / 2  # one rounding of the largest
        mine, theirs = error(got, exact), error(own, exact)
        assert mine <= max(2 * theirs, least), f"{mine} against {theirs} of torch and {least}: {case}"
