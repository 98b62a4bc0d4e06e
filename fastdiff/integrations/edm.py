"""EDM and EDM2 networks (NVlabs' own classes, or any called as they are) as Denoisers, and the levels of their sampler.

May import: models, process. Their networks are preconditioned: net(x, sigma, class_labels) is D itself. What is equal,
and what differs: docs/edm.md.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.class_labels import check_labels
from fastdiff.models.denoiser import Denoiser, ask
from fastdiff.models.weight_files import read_tensors, unpickle
from fastdiff.process import schedules

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # their sampler's
_OTHER_CLOCKS = {"timestep", "timesteps", "noise_labels"}  # diffusers', guided-diffusion's, EDM's inner networks'
_NEEDS = (
    "a snapshot rebuilds its network with torch_utils and dnnlib of the repository that made it; put that on PYTHONPATH"
)


class Network(nn.Module):
    """`net(x, sigma, class_labels)`, with labels given as integers too and everything checked before it is called."""

    def __init__(self, net: nn.Module, force_fp32: bool = False) -> None:
        super().__init__()
        self.net = net
        self.options = {"force_fp32": True} if force_fp32 else {}
        self.channels = getattr(net, "img_channels", None)
        self.labels = getattr(net, "label_dim", None)
        device = next((parameter.device for parameter in net.parameters()), None)
        if self.labels:
            rows = F.pad(torch.eye(self.labels, device=device), (0, 0, 0, 1))  # the last one: no class
            self.register_buffer("one_hot", rows, persistent=False)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, **conditions: Any) -> Tensor:
        """D [B, C, H, W] of x [B, C, H, W] fp32 at sigma [B].

        class_labels: [B] integers up to label_dim, which is no class, or [B, label_dim] as the network itself takes
        them. Raises ValueError or TypeError for what does not fit.
        """
        if self.channels is not None and x.shape[1] != self.channels:
            raise ValueError(f"EDM network: got x of shape {tuple(x.shape)}, expected {self.channels} channels")
        if self.labels is not None:
            class_labels = self._vectors(class_labels, x.shape[0])
        given = () if class_labels is None else (class_labels,)
        output = ask(self.net, x, sigma, *given, **self.options, **conditions)
        return output[0] if isinstance(output, tuple) else output  # EDM2 may add its uncertainty, log u(sigma)

    def _vectors(self, labels: Tensor | None, batch: int) -> Tensor | None:
        if not self.labels:
            if labels is not None:
                raise ValueError(
                    "EDM network: got class_labels for a network without classes (label_dim = 0); leave them out; "
                    "as a guide give it uncond={}"
                )
            return None
        if isinstance(labels, Tensor) and labels.ndim == 2:
            if labels.shape != (batch, self.labels):
                raise ValueError(
                    f"EDM network: got class_labels of shape {tuple(labels.shape)}, expected ({batch}, {self.labels}), "
                    f"or integers ({batch},)"
                )
            return labels
        check_labels("EDM network", "class_labels", labels, batch, self.labels + 1, "no class")
        assert labels is not None
        return F.embedding(labels, self.get_buffer("one_hot"))


def wrap(
    net: nn.Module, *, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, force_fp32: bool = False
) -> Denoiser:
    """A Denoiser of a preconditioned network `net(x, sigma, class_labels)` that returns D, or (D, more).

    Read from the network where it has them: img_channels, img_resolution, label_dim, sigma_min, sigma_max and
    round_sigma; what it does with use_fp16 is its own business, x is float32. sigma_min, sigma_max: ends of the
    levels, within the network's own. force_fp32: asked of the network with every call. The Denoiser's null_label is
    the integer that stands for no class, zeros to the network. Raises TypeError for what is no module, for networks of
    diffusers and of fastdiff and for those that cannot be called so, ValueError for ends that leave nothing.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"edm.wrap needs a network, a torch module, got {type(net).__name__}; a file is for edm.load, a function "
            'for fd.Denoiser(f, fd.schedules.edm(), "x0")'
        )
    if any(kind.__module__.startswith("diffusers.") for kind in type(net).__mro__):
        raise TypeError(
            f"edm.wrap needs a network that returns D, as EDM's do, got diffusers' {type(net).__name__}, whose output "
            "its scheduler says: fd.Denoiser.from_diffusers(network, scheduler)"
        )
    _check_call(net, force_fp32)
    low, high = (_rounded(net, [end])[0] for end in _ends(net, sigma_min, sigma_max))
    size, channels = getattr(net, "img_resolution", None), getattr(net, "img_channels", None)
    return Denoiser(
        Network(net, force_fp32),
        schedules.edm(low, high),
        "x0",
        dtype=torch.float32,
        shape=(channels, size, size) if size and channels else None,
        null_label=getattr(net, "label_dim", None) or None,
    )


def _check_call(net: nn.Module, force_fp32: bool) -> None:
    """TypeError for a module that is plainly no net(x, sigma, class_labels): by its signature, clock or origin."""
    try:
        signature = inspect.signature(net.forward)
    except ValueError:  # none to look at
        return
    bare = getattr(net.forward, "__func__", None) is nn.Module.forward and type(net).__call__ is nn.Module.__call__
    if bare:
        why = "it has no forward"
    elif type(net).__module__.startswith("fastdiff.models."):
        why = "its output is raw"
    else:
        why = _misfit(signature, bool(getattr(net, "label_dim", None)), force_fp32)
    if why:
        raise TypeError(
            "edm.wrap needs a network that is called as net(x, sigma, class_labels) and returns D, as EDM's EDMPrecond "
            f"and VPPrecond do, got {type(net).__name__}: {why}. The raw network inside of an EDMPrecond is "
            "fd.Denoiser(net, fd.schedules.edm(), 'edm'), one of another kind fd.Denoiser(net, schedule, prediction)"
        )


def _misfit(signature: inspect.Signature, labelled: bool, force_fp32: bool) -> str:
    """What of a forward does not fit the call; "" where all does."""
    for name in list(signature.parameters)[1:2]:
        if name in _OTHER_CLOCKS:
            return f"it has {name!r} for sigma"
    try:
        signature.bind(*[None] * (3 if labelled else 2), **({"force_fp32": True} if force_fp32 else {}))
    except TypeError as error:
        return str(error)
    return ""


def load(
    path: str | os.PathLike[str], net: nn.Module | None = None, *, trust: bool = False, key: str | None = None,
    **options: Any,
) -> Denoiser:  # fmt: skip
    """The Denoiser of a network in a file, on the CPU.

    With `net`, the network as its class builds it: its weights, from .safetensors or from torch.save(state_dict()), of
    which only tensors are read; key: which entry of the file they are. Without: an NVlabs snapshot (network-*.pkl),
    which holds its own source code and runs it when it is read: only with trust=True. options: of `wrap`.
    Raises FileNotFoundError, ValueError, ModuleNotFoundError where a snapshot needs their repository.
    """
    if net is not None:
        net.load_state_dict(read_tensors(path, key))
        return wrap(net.eval(), **options)
    if os.fspath(path).endswith(".safetensors"):
        raise ValueError(f"{path} holds weights and no network: give edm.load the network too, as its class builds it")
    snapshot = unpickle(path, trust, _NEEDS)
    if isinstance(snapshot, Mapping):
        entry = key or "ema"
        if entry not in snapshot:
            raise ValueError(
                f"{path} holds {sorted(map(str, snapshot))}, expected a network as {entry!r}; say which: key="
            )
        snapshot = snapshot[entry]
    if not isinstance(snapshot, nn.Module):
        raise ValueError(f"{path} holds a {type(snapshot).__name__}, expected a network; give edm.load one to fill")
    return wrap(snapshot.eval().requires_grad_(False), **options)


def levels(
    model: Denoiser, steps: int = 18, *, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> list[float]:
    """The levels of NVlabs' samplers, as a grid: Karras et al. 2022, eq. 5, each rounded as the network rounds it.

    For networks that were trained on few levels (iDDPM's); for the others this is grid="karras". Levels that round to
    one are given once. Raises TypeError for a model that `wrap` did not make, ValueError for ends that do not fit.
    """
    if not isinstance(model, Denoiser) or not isinstance(model.net, Network):
        raise TypeError(f"edm.levels needs what edm.wrap or edm.load returns, got {type(model).__name__}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
    low, high = _ends(model.net.net, sigma_min, sigma_max)
    between = np.linspace(high ** (1 / rho), low ** (1 / rho), steps) ** rho
    between[0] = high
    return list(dict.fromkeys(_rounded(model.net.net, between.tolist())))


def _ends(net: nn.Module, sigma_min: float, sigma_max: float) -> tuple[float, float]:
    low = max(float(sigma_min), float(getattr(net, "sigma_min", 0.0)))
    high = min(float(sigma_max), float(getattr(net, "sigma_max", np.inf)))
    if not 0.0 < low < high < np.inf:
        raise ValueError(
            f"sigma_min={sigma_min} and sigma_max={sigma_max} leave the levels {low} to {high} of this network, which "
            "must be 0 < low < high; choose others"
        )
    return low, high


def _rounded(net: nn.Module, sigmas: list[float]) -> list[float]:
    """The levels as the network rounds them."""
    round_sigma = getattr(net, "round_sigma", None)
    if round_sigma is None:
        return sigmas
    parameter = next(net.parameters(), None)
    device = None if parameter is None else parameter.device
    rounded: list[float] = round_sigma(torch.tensor(sigmas, dtype=torch.float64, device=device)).double().tolist()
    return rounded
