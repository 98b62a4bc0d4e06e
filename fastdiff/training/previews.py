"""Looks at a run on the way: the loss of the averaged weights on fixed draws, a grid of samples, the weights' file.

May import: config, data, networks, objectives, ema, ranks, step; engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastdiff import images as pictures
from fastdiff.compiler.build import plan as build_plan
from fastdiff.engine.sampler import Sampler

from .config import TrainConfig
from .data import Source
from .data.loader import Loader
from .ema import Ema
from .networks import build_network, denoiser, draws_latents, metadata, with_head, without_head
from .objectives import Objective
from .ranks import Ranks, whole

_FIXED = 0x5EED  # of the draws of an evaluation, the same in every run
_GRID = 8  # samples of a class


@dataclass
class Previews:
    """The averaged weights as a network of their own, made when first needed.

    All processes call each method together; the first one computes and writes.
    """

    config: TrainConfig
    objective: Objective
    ema: Ema
    ranks: Ranks
    run: Path

    def network(self, average: str = "ema") -> torch.nn.Module | None:
        """The network (with its head) that holds an average, in eval mode; None where this is not the first process."""
        weights = {name: whole(tensor) for name, tensor in self.ema.averages[average].items()}
        if not self.ranks.first:
            return None
        if not hasattr(self, "_net"):
            # The caller's generator goes on as if nothing had been drawn.
            with torch.random.fork_rng(devices=[]):
                net = with_head(build_network(self.config, self.objective), self.objective, self.config.seed)
            self._net = net.eval().requires_grad_(False).to(self.ranks.device)
        return self.ema.copy_to(self._net, weights)

    def evaluate(self, source: Source) -> dict[str, float]:
        """Mean loss of the averaged weights over `eval_count` images with the same draws every time.

        Of a classifier the accuracy too: the share whose label is its first guess. Empty where this is not the first
        process.
        """
        net = self.network()
        if net is None:
            return {}
        count = min(self.config.eval_count, len(source))
        loader = Loader(source, _FIXED, min(count, 64), scale=self.config.scale, device=self.ranks.device)
        sums = {"loss": 0.0}
        # No torch.no_grad: the weights want no gradient, but implicit score matching takes one of the input.
        for first in range(0, count, loader.batch):
            batch = loader.read(first).split(count - first)[0]  # the last one may be smaller
            part = self.objective.loss(_plain(net), batch.pictures, batch.labels, batch.seeds, 0)
            sums["loss"] += float(part.mean.detach()) * len(batch.seeds)
            if part.correct is not None:
                sums["accuracy"] = sums.get("accuracy", 0.0) + float(part.correct.sum())
        return {name: total / count for name, total in sums.items()}

    def sample(self, images: int) -> Path | None:
        """Draw a grid with fixed seeds into samples/: a row for each of the first ten classes, or two rows.

        Of what is no picture, as latents, an .npy: fp32 [B, C, H, W] in the units of the set, for its decoder.
        """
        net = self.network()
        if net is None:
            return None
        model = denoiser(self.config, self.objective, without_head(net))
        classes = min(10, self.config.classes or 0)
        labels = torch.arange(max(1, classes)).repeat_interleave(_GRID if classes else 2 * _GRID)
        plan = build_plan("dpmpp_2m", model.schedule, self.config.sample_steps, "karras")
        conditions: dict[str, Any] = {}
        if classes:
            conditions["cond"] = {"class_labels": labels.to(self.ranks.device)}
            if model.null_label is not None and self.config.guidance != 1.0:
                conditions["uncond"] = {
                    "class_labels": torch.full_like(conditions["cond"]["class_labels"], model.null_label)
                }
                conditions["guidance"] = self.config.guidance
        x = Sampler(plan, model).sample((len(labels), *(model.shape or ())), seed=0, **conditions)
        names = [self.config.class_names[i] if self.config.class_names else str(i) for i in labels] if classes else []
        folder = self.run / "samples"
        folder.mkdir(exist_ok=True)
        if draws_latents(self.config):
            out = folder / f"{images:012d}.npy"
            pictures.save_array(out, (x.float() / self.config.scale).cpu().numpy())
        else:
            out = folder / f"{images:012d}.png"
            pictures.save(out, pictures.to_pixels(x), names, _GRID)
        return out

    def save_weights(self, images: int) -> None:
        """Write every average as a file for `fd.load`, or of a classifier `fd.models.load_noisy_classifier`.

        model.safetensors, model-power_0.1.safetensors.
        """
        failure: OSError | None = None
        for average in self.ema.averages:
            net = self.network(average)
            if net is None:
                continue
            name = "model.safetensors" if average == "ema" else f"model-{average}.safetensors"
            facts = metadata(self.config, self.objective, images)
            try:
                without_head(net).save(self.run / name, getattr(torch, self.config.weights_dtype), facts)
            except (OSError, SafetensorError) as error:
                failure = OSError(f"could not write {self.run / name}: {error}")
        if failure is not None:  # only now, as the others gather every average too
            raise failure


def _plain(net: torch.nn.Module):  # type: ignore[no-untyped-def]
    def call(x: Tensor, time: Tensor, cond: Tensor | None) -> object:
        return net(x, time) if cond is None else net(x, time, cond)

    return call
