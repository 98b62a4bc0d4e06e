"""A network with everything a sampler must know of it: its schedule, what it predicts, how it is called.

May import: process. The engine calls it; it never samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.from_diffusers import describe, image_channels
from fastdiff.process import predictions, schedules
from fastdiff.process.schedules import Schedule

Condition = Mapping[str, Any] | Tensor | None


class Misfit(TypeError):
    """A call that does not fit the network's signature; what the network itself raises is none."""


def ask(net: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """net(*given, **named). Raises Misfit, which says what the network takes, where the call does not fit it."""
    try:
        return net(*given, **named)
    except TypeError as error:
        try:
            takes = inspect.signature(net.forward if isinstance(net, nn.Module) else net)
        except (TypeError, ValueError):
            raise error from None
        try:
            takes.bind(*given, **named)
        except TypeError as misfit:
            names = "".join(f", {name}=..." for name in named)
            raise Misfit(
                f"the network takes {takes} and was called with {len(given)} tensors in order{names}: {misfit}. "
                "It must take the state and the time; what else it takes is given by name in cond={...}"
            ) from error
        raise


def device_here(device: torch.device | str) -> torch.device:
    """The device. Raises ValueError where it is a GPU and torch sees none."""
    found = torch.device(device)
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {str(found)!r} was asked for, and torch sees no CUDA device here; use 'cpu', or a machine with a "
            "GPU and a CUDA build of torch"
        )
    return found


class Denoiser:
    """Wraps `net(x, t, **cond)`, any module or callable that returns F, an `.sample`, or a tuple whose first item is F.

    x0 = P x + Q F with P, Q from `prediction` at each level (fastdiff.process.predictions).

    net: called with x [B, *S] in the network's dtype and t [B]. schedule: the one it was trained on, or its name.
    prediction: "eps", "x0", "v", "score", "flow" or "edm", which is the raw network inside EDM's preconditioning: one
    that returns D already, as NVlabs' own classes do, is "x0" on schedules.edm(). sigma_data: of "edm" only.
    time_dtype: of t; torch.long rounds, for networks that look their time up in a table. shape, class_names,
    null_label: what is known of the samples [*S] and of class labels, for callers that choose them.
    learned_variance: the network returns [B, 2C, ...], F and then what it says of the variance. Conditions may be a
    mapping of keyword arguments or one tensor, given as the third positional argument; their first dimension is the
    batch.
    """

    def __init__(
        self,
        net: nn.Module | Callable[..., Any],
        schedule: Schedule | str,
        prediction: str = "eps",
        *,
        sigma_data: float | None = None,
        time_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        shape: tuple[int, ...] | None = None,
        class_names: tuple[str, ...] = (),
        null_label: int | None = None,
        learned_variance: bool = False,
    ) -> None:
        if isinstance(net, Denoiser):
            raise TypeError(f"Denoiser: {net} is one already; use it as it is, or wrap its network, net.net")
        if not callable(net):
            raise TypeError(f"Denoiser: net must be a module or function net(x, t, **cond), got {type(net).__name__}")
        if prediction not in predictions.names():
            raise predictions.unknown(prediction)
        if sigma_data is not None and prediction != "edm":
            raise ValueError(f"sigma_data belongs to prediction 'edm', got it with {prediction!r}; leave it out")
        self.net = net
        self.schedule = schedules.get(schedule) if isinstance(schedule, str) else schedule
        if not isinstance(self.schedule, Schedule):
            raise TypeError(
                f"Denoiser: schedule must be a name or what fd.schedules.NAME() returns, got {schedule!r}; of your own "
                "betas: fd.schedules.from_betas(betas)"
            )
        if not isinstance(time_dtype, torch.dtype):
            raise TypeError(f"Denoiser: time_dtype must be a torch dtype such as torch.long, got {time_dtype!r}")
        self.prediction = prediction
        self.sigma_data = sigma_data
        self.time_dtype = time_dtype
        self.shape = shape
        self.class_names = class_names
        self.null_label = null_label
        self.learned_variance = learned_variance
        parameter = next(iter(net.parameters()), None) if isinstance(net, nn.Module) else None
        self.device = device_here(device or (parameter.device if parameter is not None else "cpu"))
        self.dtype = dtype or (parameter.dtype if parameter is not None else torch.float32)
        if self.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"Denoiser: the network's dtype must be float32, float16 or bfloat16, got {self.dtype}")

    def __repr__(self) -> str:
        name = getattr(self.net, "__name__", type(self.net).__name__)
        return f"Denoiser({name}, {self.schedule.name}, {self.prediction}, {self.dtype} on {self.device})"

    def __call__(self, x: Tensor, time: Tensor, cond: Condition = None) -> Tensor:
        """The raw output F of the network at input x (already scaled by c_in) and model time [B]."""
        clock = time if self.time_dtype == time.dtype else self.as_time(time)
        output = ask(self.net, x, clock, cond) if isinstance(cond, Tensor) else ask(self.net, x, clock, **(cond or {}))
        if isinstance(output, tuple | list):
            output = output[0]
        output = getattr(output, "sample", output)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the network returned {type(output).__name__}, expected a tensor, a tuple or an output.sample"
            )
        return output.resolve_neg() if output.is_neg() else output

    @property
    def channels(self) -> int | None:
        """C of samples [C, H, W], where `shape` or a network whose input is the sample alone says it; else None."""
        if self.shape is not None:
            return self.shape[0] if len(self.shape) == 3 else None
        return image_channels(self.net)

    @classmethod
    def from_diffusers(cls, pipe_or_unet: Any, scheduler: Any = None) -> Denoiser:
        """The network of a diffusers pipeline, or a network and a scheduler, with what the scheduler's config says.

        Schedule and prediction are the config's. Conditions are the network's own keyword arguments:
        cond={"encoder_hidden_states": ...}. Raises TypeError or ValueError where the config names what is not known.
        """
        found = describe(pipe_or_unet, scheduler)
        return cls(
            found.call,
            found.schedule,
            found.prediction,
            sigma_data=found.sigma_data,
            shape=found.shape,
            learned_variance=found.learned_variance,
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Denoiser:
        """The same denoiser with its network moved and cast (a module is moved in place, as torch does)."""
        device = None if device is None else device_here(device)
        net = self.net.to(device=device, dtype=dtype) if isinstance(self.net, nn.Module) else self.net
        return self.around(net, device, dtype)

    def around(
        self,
        net: nn.Module | Callable[..., Any],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Denoiser:
        """All that is known of this network, said of another."""
        return Denoiser(
            net,
            self.schedule,
            self.prediction,
            sigma_data=self.sigma_data,
            time_dtype=self.time_dtype,
            device=device or self.device,
            dtype=dtype or self.dtype,
            shape=self.shape,
            class_names=self.class_names,
            null_label=self.null_label,
            learned_variance=self.learned_variance,
        )

    def as_time(self, time: Tensor) -> Tensor:
        """Times as the network is shown them."""
        return (time if self.time_dtype.is_floating_point else time.round()).to(self.time_dtype)
