"""Guidance by the gradient of a classifier of noised images (Dhariwal & Nichol 2021, section 4, Algorithms 1 and 2).

May import: denoiser, noisy_classifier, class_labels, process. It acts inside the network's call, so with every solver.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastdiff.process import predictions

from .class_labels import check_labels
from .denoiser import Denoiser
from .noisy_classifier import NoisyClassifier

LABELS = "classifier_labels"


def classifier_guided(model: Denoiser, classifier: NoisyClassifier, scale: float = 1.0) -> Denoiser:
    """The same denoiser, its x0 moved by scale (sigma^2/alpha) grad_x log p(y | x, t), which is eps - scale sigma grad.

    At scale 1 a perfect classifier makes of an unconditional denoiser the one given y. y is the condition
    "classifier_labels", int64 [B]; what else is in `cond` goes to the network: cond={"classifier_labels": y}, and
    "class_labels" beside it for a network that has classes. At alpha = 0 nothing is moved.
    One forward and backward pass of the classifier more for each call. Capturable at the times of a plan; elsewhere
    (adaptive solvers, streams) the host is asked for the level, so that a GPU runs these without a graph.
    Raises TypeError for another kind of model or classifier, ValueError for a classifier of images noised otherwise,
    a scale that is not finite and a schedule with shared times; at the call for labels that are missing or do not fit.
    """
    if not isinstance(model, Denoiser):
        raise TypeError(
            f"classifier_guided needs a Denoiser, got {type(model).__name__}; wrap the network: fd.Denoiser"
        )
    if not isinstance(classifier, NoisyClassifier):
        raise TypeError(
            f"classifier_guided needs a classifier of noised images, got {type(classifier).__name__}; load one with "
            "fd.models.load_noisy_classifier, or wrap the network: fd.models.NoisyClassifier"
        )
    if not math.isfinite(scale):
        raise ValueError(f"classifier_guided: scale must be finite, got {scale}")
    if model.schedule.shared is not None:
        raise ValueError(
            f"classifier_guided needs the level of each call, and networks on {model.schedule!r} are shown times that "
            "levels share; guide a network on the schedule without time_shared"
        )
    classifier.check_fits(model)
    return model.around(ClassifierGuided(model, classifier, scale))


class ClassifierGuided(nn.Module):
    """A denoiser's network with the gradient of a classifier in its output.

    gains: (times [R] ascending, gains [R]) on the model's device, for these times only; others give NaN.
    """

    def __init__(
        self, model: Denoiser, classifier: NoisyClassifier, scale: float, gains: tuple[Tensor, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.net, self.classifier_net = model.net, classifier.net  # modules are moved and found as parts of this one
        self.model, self.classifier, self.scale, self.gains = model, classifier, scale, gains

    def forward(
        self, x: Tensor, t: Tensor, *unnamed: Tensor, classifier_labels: Tensor | None = None, **cond: Any
    ) -> Any:
        """As the network, at x [B, *S] and t [B]."""
        if classifier_labels is None:
            raise ValueError(
                f"classifier_guided: got no {LABELS}, expected cond={{'{LABELS}': int64 [{len(x)}], ...}}; what else "
                "is in cond goes to the network"
            )
        classes = getattr(self.classifier.net, "classes", None)
        if classes is not None:
            check_labels("classifier_guided", LABELS, classifier_labels, len(x), classes)
        shift = self.gradient(x, t, classifier_labels)  # first: the network may write into x
        output = self.model(x, t, cond)
        if output.shape[1] == 2 * x.shape[1] and self.model.learned_variance:
            shift = torch.cat((shift, torch.zeros_like(shift)), 1)
        return output + shift.to(output.dtype)

    def gradient(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """What is added to F: scale k grad log p(y | x, t), the gradient by x as the network is shown it."""
        with torch.inference_mode(False), torch.enable_grad():
            own = x.detach().to(self.classifier.dtype or x.dtype, copy=True).requires_grad_()
            found = self.classifier.log_likelihood(own, t.clone(), labels.clone())
            (gradient,) = torch.autograd.grad(found.sum(), own)
        gain = (self.scale * self.gain(t)).to(gradient.dtype)
        return gain.reshape(-1, *[1] * (x.dim() - 1)) * gradient

    def gain(self, t: Tensor) -> Tensor:
        """k of each time [B]: float64, on the device of t."""
        if self.gains is None:
            return torch.from_numpy(gains_at(self.model, t.detach().double().cpu().numpy())).to(t.device)
        times, gains = self.gains
        time = t.to(times.dtype).contiguous()
        found = torch.searchsorted(times, time).clamp(max=len(times) - 1)
        return torch.where(times[found] == time, gains[found], torch.nan)

    def prepare_times(self, times: Tensor) -> nn.Module:
        """The same network for these times [R] only: their levels found now, so that no call waits for the host."""
        prepare = getattr(self.net, "prepare_times", None)
        model = self.model if prepare is None else self.model.around(prepare(times))
        times = torch.unique(times.detach().to("cpu", torch.float32).flatten())
        gains = torch.from_numpy(gains_at(self.model, times.double().numpy()))
        device = next((weight.device for weight in self.parameters()), self.model.device)
        table = times.to(device), gains.to(device)
        return ClassifierGuided(model, self.classifier, self.scale, table)

    def time_weights(self) -> Hashable:
        """Another value once what `prepare_times` makes would be another."""
        net: Any = self.net
        return net.time_weights() if hasattr(net, "prepare_times") else ()


def gains_at(model: Denoiser, shown: NDArray[np.float64]) -> NDArray[np.float64]:
    """k of `predictions.gradient_gain` for the gradient by c_in x, at the times a network is shown: [B]."""
    if model.prediction == "edm":
        sigma = np.exp(4 * shown)
        data = predictions.data_scale(model.sigma_data)
        return predictions.gradient_gain("edm", np.ones_like(sigma), sigma, data) / np.hypot(sigma, data)
    schedule = model.schedule
    if schedule.open_top:  # its clock is sigma itself, beyond its end too
        alpha, sigma = schedule.scales(shown)
    else:
        alpha, sigma = schedule.scales_at(np.clip(shown, *schedule.time_range))  # which fp32 rounds past
    return predictions.gradient_gain(model.prediction, alpha, sigma)
