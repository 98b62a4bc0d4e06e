"""diffusers' own loop over a scheduler, for the tests that run a class and its fast class side by side."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

SHAPE = (2, 3, 8, 8)
Net = Callable[[Tensor, Tensor], Tensor]


def tiny(x: Tensor, t: Tensor) -> Tensor:
    """A network: nonlinear, mixes channels, depends on the time, in the input's dtype."""
    clock = torch.sin(t.to(x.dtype) / 300).view(-1, *[1] * (x.ndim - 1))
    return torch.tanh(0.7 * x + 0.2 * x.roll(1, dims=1)) + 0.3 * clock


class Run:
    """One run: every output of `step`, and what was left of the two random streams."""

    def __init__(
        self,
        scheduler: Any,
        options: Mapping[str, Any],
        dtype: torch.dtype = torch.float32,
        shape: tuple[int, ...] = SHAPE,
        start: int = 0,
        net: Net = tiny,
        between: Callable[[int, Tensor], Tensor] = lambda i, x: x,
    ) -> None:
        """scheduler: with its timesteps set. start: the first of its timesteps. between: changes the state."""
        known = inspect.signature(scheduler.step).parameters
        self.generator = torch.Generator().manual_seed(5)
        extra = {"generator": self.generator} if "generator" in known else {}
        torch.manual_seed(9)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        x = (x * float(getattr(scheduler, "init_noise_sigma", 1.0))).to(dtype)
        times = list(scheduler.timesteps)[start:]
        times = times[: len(times) - (type(scheduler).__name__ in LISTS_THE_END)]
        self.outputs: list[Any] = []
        self.inputs: list[tuple[Tensor, Tensor]] = []
        for i, t in enumerate(times):
            more = dict(options)
            if "prev_timestep" in known:
                more["prev_timestep"] = times[i + 1] if i + 1 < len(times) else None
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            each = t.expand(len(x))
            raw = net(scaled, each)
            self.inputs.append((raw.clone(), x.clone()))
            at = each if type(scheduler).__name__ == "DDPMWuerstchenScheduler" else t
            self.outputs.append(scheduler.step(raw, at, x, **more, **extra))
            x = between(i, self.outputs[-1].prev_sample)
        self.left = self.generator.get_state(), torch.get_rng_state()


LISTS_THE_END = ("SCMScheduler", "DDPMWuerstchenScheduler")


def fields(output: Any) -> dict[str, Tensor]:
    """The tensors of an output by name."""
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def apart(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """The largest difference over all outputs and fields, relative to the largest element; their form must agree."""
    assert len(ours) == len(theirs)
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        assert type(one) is type(other) and list(one.keys()) == list(other.keys())
        for name, value in other.items():
            if not isinstance(value, Tensor):
                assert one[name] == value
                continue
            assert one[name].dtype == value.dtype and one[name].stride() == value.stride(), name
            worst = max(worst, difference(one[name], value))
    return worst


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference, over the largest element of the other."""
    off = float((one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(1e-6))
    return off if off == off else float("inf")


class Normals(TorchFunctionMode):
    """The same normals for every dtype: the k-th draw is the k-th of a fixed list, rounded."""

    def __init__(self, shape: tuple[int, ...] = SHAPE) -> None:
        super().__init__()
        self._source = torch.Generator().manual_seed(1)
        self._shape = shape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kw = kwargs or {}
        if func in (torch.randn, torch.randn_like):
            like = args[0].dtype if func is torch.randn_like else torch.float32
            return self._next(kw.get("dtype") or like)
        if func is torch.Tensor.normal_:
            return args[0].copy_(self._next(torch.float64).view(args[0].shape))
        return func(*args, **kw)

    def _next(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self._shape, dtype=torch.float64).normal_(generator=self._source).to(dtype)
