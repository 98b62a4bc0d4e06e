"""Noise that the frames of a video share in part.

May import: ops, compiler. Drawn before the run by the row kernel itself, from named normals as all noise is:
    n_own,f = N(seed, f E + e, id, stream)      e: the element within a frame of E elements, f: the frame
    n_shared = N(seed, e, id, stream + 4)
so a sample depends on its seed alone, and a frame on no frame after it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.compiler import brownian
from fastdiff.compiler import layout as at
from fastdiff.compiler.plan import Plan
from fastdiff.engine import ops

MODES = ("mixed", "progressive")
BASES = ("white", "brownian")
Weights = Mapping[tuple[int, int], float]


@dataclass(frozen=True)
class FrameNoise:
    """Correlated noise across the frames of a sample, latents and steps alike (PYoCo, Ge et al. 2023, section 4).

    "mixed": n_f = (a n_shared + n_own,f) / sqrt(1 + a^2), covariance a^2 / (1 + a^2) between any two frames;
    "progressive": n_0 = n_own,0 and n_f = (a n_{f-1} + n_own,f) / sqrt(1 + a^2), covariance (a / sqrt(1 + a^2))^|f-g|.
    Each n_f is a unit normal. axis: of the frames in the shape [B, ...], 1 for [B, F, C, H, W] and 2 for
    [B, C, F, H, W]; both give a seed the same video. a: >= 0, how much they share; with a = 0 and axis 1 the noise is
    that of noise="white" (of "brownian" up to rounding), bit for bit. base: "white", or "brownian" for increments of
    one path per seed and frame. Takes (plan.draws + 1) times the memory of the state.
    """

    axis: int = 1
    mode: str = "mixed"
    a: float = 1.0
    base: str = "white"

    def __post_init__(self) -> None:
        if isinstance(self.axis, bool) or not isinstance(self.axis, int) or self.axis == 0:
            raise ValueError(f"FrameNoise: axis must be an axis of the shape after the batch's, got {self.axis!r}")
        if self.mode not in MODES:
            raise ValueError(f"FrameNoise: mode must be 'mixed' or 'progressive', got {self.mode!r}")
        if not isinstance(self.a, int | float) or not 0.0 <= self.a < math.inf:
            raise ValueError(f"FrameNoise: a, how much the frames share, must be finite and >= 0, got {self.a!r}")
        if self.base not in BASES:
            raise ValueError(f"FrameNoise: base must be 'white' or 'brownian', got {self.base!r}")

    def combine(self, own: Tensor, shared: Tensor) -> Tensor:
        """own [B, F, E] and shared [B, E], independent unit normals, to the frames' noise [B, F, E].

        Products and sums are separate, so that no element is rounded otherwise than its neighbours.
        """
        if self.a == 0.0:
            return own
        scale = 1.0 / math.hypot(1.0, self.a)
        frames = own * scale
        if self.mode == "mixed":
            return frames + (shared * (self.a * scale)).unsqueeze(1)
        frames[:, 0] = own[:, 0]
        for f in range(1, own.shape[1]):
            frames[:, f] += frames[:, f - 1] * (self.a * scale)
        return frames

    def draw(self, plan: Plan, tensors: ops.StepTensors, into: Tensor, executor: str) -> None:
        """Fill `into` [plan.draws + 1, B, *S]: the noise of every draw, and the latents last.

        tensors: of the run, with its seeds. Raises ValueError for an axis the shape does not have, and what
        noise="brownian" raises.
        """
        batch, *sample = tensors.state.shape[1:]
        axis = self.axis + len(sample) + 1 if self.axis < 0 else self.axis
        if not 1 <= axis <= len(sample):
            raise ValueError(
                f"FrameNoise: axis {self.axis} is not an axis after the batch of shape {(batch, *sample)}; use 1 for "
                "[batch, frames, ...], 2 for [batch, channels, frames, ...]"
            )
        count = sample.pop(axis - 1)
        size = math.prod(sample)
        own = _Normals(tensors, count * size, executor)
        shared = _Normals(tensors, size, executor)
        for target, weights in zip(into, self._names(plan), strict=True):
            common = {(index, stream + at.STREAM_SHARED): w for (index, stream), w in weights.items()}
            frames = self.combine(own.draw(weights).view(batch, count, size), shared.draw(common))
            target.copy_(frames.view(batch, count, *sample).movedim(1, axis))

    def _names(self, plan: Plan) -> list[Weights]:
        """Per draw, and for the latents last, the normals it is the sum of."""
        white: list[Weights] = [{(i, at.STREAM_STEP): 1.0} for i in range(plan.draws)]
        latent: Weights = {(0, at.STREAM_LATENT): 1.0}
        if self.base == "white" or not plan.draws:
            return [*white, latent]
        paths = brownian.draws_of(plan)
        on_path = (None if path is None else {(n, at.STREAM_BROWNIAN): w for n, w in path.items()} for path in paths)
        return [*(path or own for path, own in zip(on_path, white, strict=True)), latent]


class _Normals:
    """Weighted sums of named normals for every sample of a run, by its row kernel: [B, count]."""

    def __init__(self, tensors: ops.StepTensors, count: int, executor: str) -> None:
        batch = tensors.state.shape[1]
        self._state = torch.zeros(1, batch, count, dtype=torch.float32, device=tensors.state.device)
        self._tensors = tensors
        self._executor = executor

    def draw(self, weights: Weights) -> Tensor:
        """sum_k w_k N(seed, element, id_k, stream_k), in a buffer that the next call overwrites."""
        terms = len(weights)
        coef = torch.zeros(1, at.COEF_FIXED + at.NOISE_STRIDE * terms, dtype=torch.float32)
        ids = torch.zeros(1, at.IDS_FIXED + at.TERM_IDS_STRIDE * terms, dtype=torch.int32)
        ids[0, at.SLOT + 1 : at.SLOT + at.MAX_SLOTS] = -1
        ids[0, at.DEST + 1 : at.DEST + at.MAX_OUTPUTS] = -1
        ids[0, at.TERMS] = terms
        for t, (name, weight) in enumerate(weights.items()):
            coef[0, at.NOISE + at.NOISE_STRIDE * t] = weight
            place = at.TERM_IDS + at.TERM_IDS_STRIDE * t
            ids[0, place : place + 2] = torch.tensor(name, dtype=torch.int32)
        device = self._state.device
        step = dataclasses.replace(
            self._tensors,
            state=self._state,
            model_out=self._state[0],
            model_in=None,
            model_time=None,
            coef=coef.to(device),
            ids=ids.to(device),
            row=torch.zeros_like(self._tensors.row),
            noise=None,
            denoised=None,
            mix=None,
            momentum=None,
            variance=None,
        )
        ops.bind(step, self._executor, uses_e=False)(self._state[0])
        return self._state[0]
