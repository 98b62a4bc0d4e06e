"""Everything a run reads and writes on the device, allocated once per shape and reused.

May import: ops, external, guide, guidance, branches, compiler, models.denoiser.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.compiler import layout as at
from fastdiff.compiler.plan import Plan
from fastdiff.engine import external, ops
from fastdiff.engine.branches import Outputs
from fastdiff.engine.guidance import Reduction
from fastdiff.engine.guide import GuideTensors
from fastdiff.engine.guide import bind as bind_guide
from fastdiff.models.denoiser import Denoiser


class Buffers:
    """The state's registers, the network's input and time, the table, and the bound step.

    key: what they fit. copies: of the network's input, one per branch. work: the guidance rule
    to run before each row, and whether it thresholds. perturbed: a perturbed branch has a scale of its own.
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
        work: tuple[int, bool] | None = None,
        perturbed: bool = False,
    ) -> None:
        if len(shape) < 2 or min(shape) < 1:
            raise ValueError(f"shape must be [batch, *sample] with every size >= 1, got {tuple(shape)}")
        self.key = (id(plan), shape, copies, keep_denoised, work, perturbed)
        self.batch, self.copies = shape[0], copies
        self.work = work
        self._learns_spread, self._uses_e = plan.learns_spread, plan.uses_second_estimate
        self.memory_format = memory_format if len(shape) == 4 else torch.contiguous_format
        self._sample = shape[1:]
        self.model_in = self._images(copies * self.batch, dtype, device)
        self.model_time = torch.zeros(copies * self.batch, dtype=torch.float32, device=device)
        opening, *rows = (len(row.noise) for row in plan.rows)
        coef, ids = _empty_table(len(rows), max(rows), device)
        self.tensors = ops.StepTensors(
            state=self._registers(plan.registers, device),
            model_out=self.model_in,
            model_in=self.model_in,
            model_time=self.model_time,
            coef=coef,
            ids=ids,
            row=torch.zeros(self.batch, dtype=torch.int32, device=device),
            seed=torch.zeros(self.batch, dtype=torch.int64, device=device),
            guidance=torch.ones(self.batch, dtype=torch.float32, device=device),
            noise=None,
            denoised=self._images(self.batch, torch.float32, device) if keep_denoised else None,
            status=torch.full((self.batch,), -1, dtype=torch.int32, device=device),
            ticket=torch.zeros(self.batch, dtype=torch.int32, device=device),
            mix=torch.zeros(self.batch, at.MIX, dtype=torch.float32, device=device)
            if work is not None or perturbed
            else None,
            momentum=(
                self._images(self.batch, torch.float32, device) if work is not None and work[0] == at.APG else None
            ),
        )
        self._settings = torch.zeros(at.SETTINGS, dtype=torch.float32, device=device)
        parts = self.batch if work is not None else 0
        self._partial = torch.zeros(parts, at.PARTS, at.SUMS, dtype=torch.float32, device=device)
        # the opening row has a table of its own: it draws the latents, which would widen a deterministic plan's
        self._opening_table = _empty_table(1, opening + 1, device)
        self._status = self.tensors.status.numpy() if device.type == "cpu" else None
        self._steps: dict[Any, tuple[ops.Step, ...]] = {}
        self._opening_step: ops.Step | None = None
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
        noise: external.Noise,
        given: Mapping[str, Tensor],
        executor: str,
        perturbed_scale: Sequence[float] = (0.0,),
        reduction: Reduction | None = None,
    ) -> None:
        """Load a run: table, seeds, guidance, state, noise and tensors given; every sample at the opening row."""
        t = self.tensors
        if init is not None:
            self._check_image("init", init)
        self._check_given(plan, given)
        t.seed.copy_(seeds)
        made = external.fill(noise, plan, t, lambda count: self._registers(count, t.state.device), executor)
        if (made is None) != (t.noise is None):
            self._steps.clear()
            self._opening_step = self.graph = None
            t.noise = made
        elif made is not None and t.noise is not None:
            t.noise.copy_(made)
        self._load_table(plan, model, "noise" if init is None else opening, plan.draws if made is not None else 0)
        t.guidance.copy_(torch.tensor(guidance, dtype=torch.float32))
        if t.mix is not None:
            mix = torch.tensor(at.PLAIN_MIX, dtype=torch.float32).repeat(self.batch, 1)
            mix[:, at.MIX_S] = torch.tensor(perturbed_scale, dtype=torch.float32)
            t.mix.copy_(mix)
        if reduction is not None:
            self._settings.copy_(torch.tensor(reduction.settings, dtype=torch.float32))
        if t.momentum is not None:
            t.momentum.zero_()
        t.row.zero_()
        t.status.fill_(-1)
        if init is not None:
            t.state[plan.rows[0].x].copy_(init)
        for name, image in given.items():
            t.state[plan.given[name]].copy_(image)

    def _check_given(self, plan: Plan, given: Mapping[str, Tensor]) -> None:
        if set(given) != set(plan.given):
            wanted = f"given={{{', '.join(f'{name!r}: tensor' for name in plan.given)}}}" if plan.given else "no given="
            raise ValueError(
                f"{plan.solver} takes {wanted}, got {', '.join(sorted(given)) or 'none'}; "
                f"give a tensor of shape {(self.batch, *self._sample)} for each name"
            )
        for name, image in given.items():
            self._check_image(f"given[{name!r}]", image)

    def _check_image(self, name: str, image: Tensor) -> None:
        expected = (self.batch, *self._sample)
        if not isinstance(image, Tensor):
            raise TypeError(f"{name} must be a tensor of shape {expected}, got {type(image).__name__}")
        if tuple(image.shape) != expected or not image.is_floating_point():
            raise ValueError(
                f"{name} must be a floating-point tensor of shape {expected}, got {image.dtype} {tuple(image.shape)}"
            )
        if not bool(image.isfinite().all()):
            raise ValueError(f"{name} holds inf or nan; give a finite image or state")

    def _load_table(self, plan: Plan, model: Denoiser, opening: str, latent_id: int) -> None:
        wanted = (id(plan), model.prediction, model.sigma_data, opening, latent_id)
        if self._table == wanted:
            return
        packed = plan.pack(model.prediction, model.sigma_data, opening, latent_id)
        tables = ((self._opening_table, slice(0, 1)), ((self.tensors.coef, self.tensors.ids), slice(1, None)))
        for (coef, ids), rows in tables:
            coef.copy_(torch.from_numpy(packed.coef[rows, : coef.shape[1]]))
            ids.copy_(torch.from_numpy(packed.ids[rows, : ids.shape[1]]))
        self._table = wanted

    def open(self, executor: str) -> None:
        """Run the opening row: the first state and the first network input; then every sample is at row 0."""
        if self._opening_step is None:
            coef, ids = self._opening_table
            opening = dataclasses.replace(self.tensors, coef=coef, ids=ids, denoised=None, variance=None)
            self._opening_step = ops.bind(opening, executor, uses_e=False)
        self._opening_step(self.model_in)
        self.tensors.row.zero_()

    def advance(self, executor: str, outputs: Outputs) -> None:
        """Run the guidance rule, if there is one, and the row; bound at the first outputs of their kind."""
        *given, variance = outputs.model_out, outputs.unguided, outputs.perturbed, outputs.variance
        key = (executor, outputs.model_out.dtype, *(None if g is None else g.shape[0] for g in given))
        steps = self._steps.get(key)
        if steps is None:
            steps = self._steps[key] = self._bind(executor, outputs)
        if self.tensors.variance is not None:
            if variance is None:
                raise ValueError(
                    "this plan's noise has a learned spread, and the network returned no variance; wrap one that "
                    "returns [B, 2C, ...] in Denoiser(..., learned_variance=True)"
                )
            self.tensors.variance.copy_(variance[: self.batch])
        for step in steps:
            step(*given)

    def _bind(self, executor: str, outputs: Outputs) -> tuple[ops.Step, ...]:
        t = self.tensors
        if self._learns_spread and (t.variance is None or t.variance.dtype != outputs.model_out.dtype):
            with torch.inference_mode(False):  # a later call outside it writes here too
                t.variance = self._images(self.batch, outputs.model_out.dtype, t.state.device)
            self._steps.clear()
        given = {
            "model_out": outputs.model_out,
            "unguided": outputs.unguided,
            "perturbed": outputs.perturbed,
        }
        step = ops.bind(dataclasses.replace(t, **given), executor, self._uses_e)  # type: ignore[arg-type]
        if self.work is None:
            return (step,)
        own = {name: getattr(t, name) for name in ("state", "coef", "ids", "row", "guidance", "ticket", "momentum")}
        assert t.mix is not None
        tensors = GuideTensors(**(own | given), settings=self._settings, mix=t.mix, partial=self._partial)
        found = bind_guide(tensors, *self.work, executor)
        return (found, step)

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


def _empty_table(rows: int, terms: int, device: torch.device) -> tuple[Tensor, Tensor]:
    coef = torch.zeros(rows, at.COEF_FIXED + at.NOISE_STRIDE * terms, dtype=torch.float32, device=device)
    ids = torch.zeros(rows, at.IDS_FIXED + at.TERM_IDS_STRIDE * terms, dtype=torch.int32, device=device)
    return coef, ids
