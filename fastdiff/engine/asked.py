"""What a caller asked of one run, checked as far as it can be without the plan, and the same in parts.

May import: arguments, chunks, conditions, external, guidance, loop (types), seeds, skipping, models.denoiser.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.engine import chunks
from fastdiff.engine.arguments import number_per_sample
from fastdiff.engine.external import Noise
from fastdiff.engine.guidance import APG, DynamicThreshold, Reduction, Rescale, Rule, reduction
from fastdiff.engine.loop import RowInfo
from fastdiff.engine.seeds import per_sample as seeds_of
from fastdiff.engine.skipping import AdaptiveSkip
from fastdiff.errors import warn
from fastdiff.models.denoiser import Condition


@dataclass(frozen=True)
class Asked:
    """The arguments of `Sampler.sample`; seed int64 [B], guidance and perturbed_scale one number per sample."""

    seed: Tensor
    init: Tensor | None
    noise: Noise
    cond: Condition
    uncond: Condition
    guidance: list[float]
    callback: Callable[[RowInfo], None] | None
    progress: bool
    opening: str
    reduces: Reduction | None
    perturbed_cond: Condition
    perturbed_scale: list[float]
    given: Mapping[str, Tensor]
    skip: AdaptiveSkip | None

    @staticmethod
    def checked(
        shape: torch.Size,
        seed: int | Sequence[int] | Tensor,
        init: Tensor | None,
        noise: Noise,
        cond: Condition,
        uncond: Condition,
        guidance: float | Sequence[float] | Tensor,
        callback: Callable[[RowInfo], None] | None,
        progress: bool,
        opening: str,
        rule: Rule | None,
        threshold: DynamicThreshold | None,
        perturbed_cond: Condition,
        perturbed_scale: float | Sequence[float] | Tensor,
        given: Mapping[str, Tensor],
        skip: AdaptiveSkip | None,
    ) -> Asked:
        """Raises ValueError or TypeError for what no plan and no network could be run with."""
        seeds = seeds_of(seed, shape[0])
        weights = number_per_sample("guidance", guidance, shape[0])
        scales = number_per_sample("perturbed_scale", perturbed_scale, shape[0])
        reduces = reduction(rule, threshold)
        if isinstance(rule, Rescale | APG) and all(w == 1.0 for w in weights) and not any(scales):
            warn(
                f"rule {rule} changes what guidance does, and guidance is 1: it has no effect. Give guidance=, cond= "
                "and uncond=, or leave the rule out",
            )
        if isinstance(rule, APG) and any(scales):
            raise ValueError("rule APG projects against one branch: use it without perturbed_scale")
        if callback is not None and not callable(callback):
            raise TypeError(
                f"callback must be a function f(at), called after each row with a RowInfo, got {callback!r}"
            )
        if not isinstance(skip, AdaptiveSkip | None):
            raise TypeError(f"skip must be a fd.AdaptiveSkip, got {skip!r}")
        return Asked(
            seeds, init, noise, cond, uncond, weights, callback, progress, opening, reduces, perturbed_cond, scales,
            given, skip,
        )  # fmt: skip

    @property
    def guided(self) -> bool:
        """Whether a sample has a guidance other than 1."""
        return any(w != 1.0 for w in self.guidance)

    @property
    def perturbed(self) -> bool:
        """Whether a sample has a perturbed_scale other than 0."""
        return any(self.perturbed_scale)

    @property
    def path(self) -> bool:
        """Whether noise is increments of one Brownian path per seed."""
        return isinstance(self.noise, str) and self.noise == "brownian"

    def parts(self, size: int) -> Iterator[tuple[int, Asked]]:
        """(batch, the same asked for a part of the samples), none above `size`; ValueError where it cannot be cut."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for count, part in chunks.parts(len(self.seed), size, own):
            yield count, Asked(**part)
