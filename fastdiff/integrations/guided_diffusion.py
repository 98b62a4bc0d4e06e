"""guided-diffusion and improved-diffusion networks as Denoisers, with their schedules and respacing strings.

May import: models, process. Their networks are net(x, t, y=labels), t the index of the training step, and return eps,
or eps and what they say of the variance. What is equal, and what differs: docs/guided_diffusion.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fastdiff.errors import unknown_name
from fastdiff.models.class_labels import check_labels
from fastdiff.models.denoiser import Denoiser, ask
from fastdiff.models.unet import UNet
from fastdiff.process import schedules
from fastdiff.process.schedules import Schedule


class Network(nn.Module):
    """`net(x, t * scale, y=labels)`, checked before it is called; labels are checked where net.num_classes is known."""

    def __init__(self, net: Callable[..., Any], scale: float) -> None:
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, **conditions: Any) -> Tensor:
        """The network's output [B, C or 2C, H, W] at x [B, C, H, W] and training step t [B]."""
        if hasattr(self.net, "num_classes"):
            check_labels("guided-diffusion network", "y", y, x.shape[0], self.net.num_classes)
        if y is not None:
            conditions["y"] = y
        output: Tensor = ask(self.net, x, t if self.scale == 1.0 else t * self.scale, **conditions)
        return output


def schedule(noise_schedule: str = "linear", diffusion_steps: int = 1000) -> Schedule:
    """Their schedule of this name: "linear", whose ends are 0.1 and 20 over the number of steps, or "cosine"."""
    if isinstance(diffusion_steps, bool) or not isinstance(diffusion_steps, int) or diffusion_steps < 1:
        raise ValueError(f"diffusion_steps must be an integer of at least 1, got {diffusion_steps!r}")
    if noise_schedule == "linear":
        return schedules.linear(diffusion_steps, 0.1 / diffusion_steps, 20.0 / diffusion_steps)
    if noise_schedule == "cosine":
        return schedules.cosine(diffusion_steps)
    raise unknown_name("noise_schedule", noise_schedule, ("linear", "cosine"))


def wrap(
    net: nn.Module | Callable[..., Any],
    *,
    noise_schedule: str = "linear",
    diffusion_steps: int = 1000,
    learn_sigma: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
) -> Denoiser:
    """A Denoiser of a network `net(x, t, y=labels)`, described by the flags it was trained with.

    learn_sigma: it returns [B, 2C, ...], and fd.plan("ddpm", variance="learned_range") uses what it says of the
    variance. rescale_timesteps: it is shown t * 1000 / diffusion_steps. Raises ValueError or TypeError for flags that
    do not fit.
    """
    if not callable(net):
        raise TypeError(f"guided_diffusion.wrap needs a network net(x, t, y=...), got {type(net).__name__}")
    process = schedule(noise_schedule, diffusion_steps)
    return Denoiser(
        Network(net, _scale(rescale_timesteps, diffusion_steps)),
        process,
        "x0" if predict_xstart else "eps",
        learned_variance=learn_sigma,
    )


def load(source: Mapping[str, Tensor] | str | os.PathLike[str], flags: Mapping[str, Any]) -> Denoiser:
    """The Denoiser of a checkpoint, its weights in our UNet; neither package is needed.

    source: a state dict or a file of one, .pt or .safetensors, of which only tensors are read. flags: those of its
    training script, as their README lists them for each checkpoint. Labels are given as cond={"class_labels": ...}.
    Raises ValueError for flags or weights that do not fit, FileNotFoundError.
    """
    net = UNet.from_guided_diffusion(source, flags).requires_grad_(False)
    steps = flags.get("diffusion_steps", 1000)
    process = schedule(flags.get("noise_schedule", "linear"), steps)
    net.config = replace(net.config, time_scale=_scale(flags.get("rescale_timesteps", False), steps))
    size = net.config.sample_size
    assert isinstance(size, int)
    return Denoiser(
        net,
        process,
        "x0" if flags.get("predict_xstart", False) else "eps",
        shape=(net.config.in_channels, size, size),
        learned_variance=net.config.out_channels > net.config.in_channels,
    )


def respaced(sections: str | Sequence[int], diffusion_steps: int = 1000) -> list[int]:
    """The training steps that their `timestep_respacing` keeps, descending: a grid for fd.plan.

    "250" or "10,15,20": as many of each of the equal sections of the training steps, the first and the last of a
    section included (its first alone where it has one). "ddimN": every k-th step from 0, the k that gives N.
    "": every step. Raises ValueError for what gives no such steps.
    """
    if isinstance(sections, str) and sections.startswith("ddim"):
        return _every(sections, diffusion_steps)
    counts = _counts(sections, diffusion_steps)
    size, longer = divmod(diffusion_steps, len(counts))
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if count > length:
            raise ValueError(
                f"respacing {sections!r}: section {section} of {len(counts)} has {length} of the {diffusion_steps} "
                f"training steps, {count} are asked of it"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        at = 0.0
        for _ in range(count):  # a running sum, as theirs is, so that halves round alike
            kept.append(start + round(at))
            at += stride
        start += length
    if not kept:
        raise ValueError(f"respacing {sections!r} keeps no step at all")
    return sorted(set(kept), reverse=True)


def _scale(rescale_timesteps: bool, diffusion_steps: int) -> float:
    return 1000.0 / diffusion_steps if rescale_timesteps else 1.0


def _every(sections: str, diffusion_steps: int) -> list[int]:
    wanted = sections.removeprefix("ddim")
    for stride in range(1, diffusion_steps):
        kept = range(0, diffusion_steps, stride)
        if str(len(kept)) == wanted:
            return list(kept)[::-1]
    near = sorted({len(range(0, diffusion_steps, stride)) for stride in range(1, diffusion_steps)})
    close = [str(n) for n in near if wanted.isdigit() and abs(n - int(wanted)) <= 0.1 * int(wanted)]
    hint = f"; near it: ddim{', ddim'.join(close)}" if close else ""
    raise ValueError(
        f"respacing {sections!r}: no whole stride leaves so many of {diffusion_steps} training steps{hint}"
    )


def _counts(sections: str | Sequence[int], diffusion_steps: int) -> list[int]:
    if isinstance(sections, str):
        parts: Sequence[Any] = [part.strip() for part in sections.split(",")] if sections else [diffusion_steps]
    else:
        parts = list(sections)
    counts = [int(part) if str(part).isdigit() else -1 for part in parts]
    if not counts or min(counts) < 0:
        raise ValueError(
            f"respacing must be numbers of steps such as '250' or '10,15,20', or 'ddim25', got {sections!r}"
        )
    return counts
