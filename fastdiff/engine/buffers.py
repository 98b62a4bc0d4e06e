"""Everything a run reads and writes on the device, allocated once per shape and reused.

May import: ops, noise, compiler, models.denoiser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.compiler import layout as at
from fastdiff.compiler.plan import Plan
from fastdiff.engine import noise as counter_noise
from fastdiff.engine import ops
from fastdiff.models.denoiser import Condition, Denoiser


class Buffers:
    """The state's registers, the network's input and time, the table, and the bound step.

    key: what they fit. copies: 2 with guidance (conditional half first), else 1.
    """

    def __init__(
        self,
        plan: Plan,
        shape: torch.Size,
        copies: int,
        keep_denoised: bool,
        device: torch.device,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
    ) -> None:
        if len(shape) < 2 or min(shape) < 1:
            raise ValueError(f"shape must be [batch, *sample] with every size >= 1, got {tuple(shape)}")
        self.key = (shape, copies, keep_denoised)
        self.batch, self.copies = shape[0], copies
        self.memory_format = memory_format if len(shape) == 4 else torch.contiguous_format
        self._sample = shape[1:]
        self.model_in = self._images(copies * self.batch, dtype, device)
        self.model_time = torch.zeros(copies * self.batch, device=device)
        terms = max(len(row.noise) for row in plan.rows) + 1
        self.tensors = ops.StepTensors(
            state=self._registers(plan.registers, device),
            model_out=self.model_in,
            model_in=self.model_in,
            model_time=self.model_time,
            coef=torch.zeros(len(plan.rows), at.COEF_FIXED + at.NOISE_STRIDE * terms, device=device),
            ids=torch.zeros(
                len(plan.rows), at.IDS_FIXED + at.TERM_IDS_STRIDE * terms, dtype=torch.int32, device=device
            ),
            row=torch.zeros(self.batch, dtype=torch.int32, device=device),
            seed=torch.zeros(self.batch, dtype=torch.int64, device=device),
            guidance=torch.ones(self.batch, device=device),
            noise=None,
            denoised=self._images(self.batch, torch.float32, device) if keep_denoised else None,
            status=torch.full((self.batch,), -1, dtype=torch.int32, device=device),
            ticket=torch.zeros(self.batch, dtype=torch.int32, device=device),
        )
        self._status = self.tensors.status.numpy() if device.type == "cpu" else None
        self._steps: dict[tuple[str, torch.dtype, int], Callable[[Tensor], None]] = {}
        self._table: object = None  # what the loaded table was packed from
        self.graph: Any = None

    def start(
        self,
        plan: Plan,
        model: Denoiser,
        seeds: Tensor,
        guidance: Sequence[float],
        init: Tensor | None,
        opening: str,
        noise: str | Tensor | Callable[[int, torch.Size], Tensor],
    ) -> None:
        """Load a run: table, seeds, guidance, the given state and the given noise; every sample at the opening row."""
        t = self.tensors
        external = self._external_noise(plan, seeds, noise)
        if (external is None) != (t.noise is None):
            self._steps.clear()
        if external is not None and t.noise is not None:
            t.noise.copy_(external)
        else:
            t.noise = external
        self._load_table(plan, model, "noise" if init is None else opening, plan.draws if external is not None else 0)
        t.seed.copy_(seeds)
        t.guidance.copy_(torch.tensor(guidance, dtype=torch.float32))
        t.row.zero_()
        t.status.fill_(-1)
        if init is not None:
            expected = (self.batch, *self._sample)
            if tuple(init.shape) != expected or not init.is_floating_point():
                raise ValueError(
                    f"init must be a floating-point tensor of shape {expected}, got {init.dtype} {tuple(init.shape)}"
                )
            t.state[plan.rows[0].x].copy_(init)

    def _load_table(self, plan: Plan, model: Denoiser, opening: str, latent_id: int) -> None:
        wanted = (id(plan), model.prediction, model.sigma_data, opening, latent_id)
        if self._table == wanted:
            return
        packed = plan.pack(model.prediction, model.sigma_data, opening, latent_id)
        self.tensors.coef.copy_(torch.from_numpy(packed.coef))
        self.tensors.ids.copy_(torch.from_numpy(packed.ids))
        self._table = wanted

    def bind(self, executor: str, output: Tensor | None = None) -> Callable[[Tensor], None]:
        """The step for a model output of this dtype and batch, checked and bound once."""
        like = self.model_in if output is None else output
        key = (executor, like.dtype, like.shape[0])
        if key not in self._steps:
            self._steps[key] = ops.bind(ops.StepTensors(**dict(vars(self.tensors), model_out=like)), executor)
        return self._steps[key]

    def as_stored(self, image: Tensor) -> Tensor:
        """`image` in the state's memory format; a copy only when the network returned another."""
        return image.contiguous(memory_format=self.memory_format)

    def first_failure(self) -> tuple[int, int] | None:
        """(sample, row) of the first non-finite model output, or None."""
        status = self.tensors.status.cpu().numpy() if self._status is None else self._status
        if status.max() < 0:
            return None
        sample = int(np.where(status >= 0, status, np.iinfo(np.int32).max).argmin())
        return sample, int(status[sample])

    def _images(self, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(batch, *self._sample, dtype=dtype, device=device).to(memory_format=self.memory_format)

    def _registers(self, count: int, device: torch.device) -> Tensor:
        return self._images(count * self.batch, torch.float32, device).unflatten(0, (count, self.batch))

    def _external_noise(
        self, plan: Plan, seeds: Tensor, noise: str | Tensor | Callable[[int, torch.Size], Tensor]
    ) -> Tensor | None:
        if isinstance(noise, str):
            if noise != "white":
                raise ValueError(f"noise must be 'white', a tensor or a function f(id, shape), got {noise!r}")
            return None
        shape = torch.Size((self.batch, *self._sample))
        given = torch.stack([noise(i, shape) for i in range(plan.draws)]) if callable(noise) and plan.draws else noise
        expected = (plan.draws, *shape)
        if isinstance(given, Tensor) and tuple(given.shape) != expected:
            raise ValueError(
                f"noise must have shape {expected} ([draws, *shape] of this plan), got {tuple(given.shape)}"
            )
        device = self.tensors.state.device
        table = self._registers(plan.draws + 1, device)
        if isinstance(given, Tensor):
            table[:-1].copy_(given)
        for b, seed in enumerate(seeds.tolist()):
            latent = counter_noise.normal(seed, table[-1, b].numel(), 0, at.STREAM_LATENT)
            table[-1, b].copy_(torch.from_numpy(latent).view(self._sample))
        return table


def seeds_of(seed: int | Sequence[int] | Tensor, shape: torch.Size) -> Tensor:
    """int64 [B]: the seeds as given, one per sample, or s, s+1, ... for an integer s."""
    batch = shape[0]
    if isinstance(seed, bool) or not isinstance(seed, int | Sequence | Tensor | np.ndarray | range | np.integer):
        raise TypeError(f"seed must be an integer or one integer per sample, got {type(seed).__name__}")
    if isinstance(seed, int | np.integer):
        values = [int(seed) + i for i in range(batch)]
    else:
        values = [int(s) for s in (seed.tolist() if isinstance(seed, Tensor | np.ndarray) else seed)]
    if len(values) != batch:
        raise ValueError(f"seed must hold one integer per sample: shape {tuple(shape)} has {batch}, got {len(values)}")
    for value in values:
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"a seed is a 64-bit integer, got {value}")
    return torch.tensor([value - 2**64 if value >= 2**63 else value for value in values], dtype=torch.int64)


def stack_conditions(
    cond: Condition, uncond: Condition, batch: int, device: torch.device
) -> tuple[Condition, Condition]:
    """(conditions of the whole network batch, conditions of its conditional half)."""
    own = _moved(cond, batch, device)
    if uncond is None:
        return own, own
    other = _moved(uncond, batch, device)
    if isinstance(own, Tensor) and isinstance(other, Tensor):
        return torch.cat([own, other]), own
    if not isinstance(own, Mapping) or not isinstance(other, Mapping) or own.keys() != other.keys():
        raise ValueError("cond and uncond must be two tensors, or two mappings with the same keys")
    both = {
        key: torch.cat([value, other[key]]) if isinstance(value, Tensor) and value.dim() else value
        for key, value in own.items()
    }
    return both, own


def _moved(cond: Condition, batch: int, device: torch.device) -> Condition:
    if cond is None:
        return None
    if isinstance(cond, Tensor):
        return _batched("cond", cond, batch, device)
    return {key: _batched(key, v, batch, device) if isinstance(v, Tensor) else v for key, v in cond.items()}


def _batched(name: str, value: Tensor, batch: int, device: torch.device) -> Tensor:
    if value.dim() and value.shape[0] != batch:
        raise ValueError(f"condition {name!r} must have one entry per sample ({batch}), got shape {tuple(value.shape)}")
    return value.to(device)
