"""Everything a run reads and writes on the device, allocated once for a room and reused.

May import: room, ops, external, guide, guidance, branches, compiler, models.denoiser.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.compiler import layout as at
from fastdiff.compiler.plan import Plan
from fastdiff.engine import external, ops
from fastdiff.engine.branches import Outputs
from fastdiff.engine.guidance import Reduction
from fastdiff.engine.guide import GuideTensors
from fastdiff.engine.guide import bind as bind_guide
from fastdiff.engine.room import Room
from fastdiff.models.denoiser import Denoiser


class Buffers:
    """The state's registers, the network's input and time, the table, and the bound step, of the room they are for."""

    def __init__(self, room: Room) -> None:
        self.room, self.batch, self.copies, self.work = room, room.batch, room.copies, room.work
        self.memory_format = room.memory_format
        self._sample = room.shape[1:]
        device = room.device
        self.model_in = self._images(room.copies * self.batch, room.dtype, device)
        self.model_time = torch.zeros(room.copies * self.batch, dtype=torch.float32, device=device)
        coef, ids = empty_table(room.rows, room.terms, device)
        self.tensors = ops.StepTensors(
            state=self._registers(room.registers, device),
            model_out=self.model_in,
            model_in=self.model_in,
            model_time=self.model_time,
            coef=coef,
            ids=ids,
            row=torch.zeros(self.batch, dtype=torch.int32, device=device),
            seed=torch.zeros(self.batch, dtype=torch.int64, device=device),
            guidance=torch.ones(self.batch, dtype=torch.float32, device=device),
            noise=None,
            denoised=self._images(self.batch, torch.float32, device) if room.keep_denoised else None,
            status=torch.full((self.batch,), -1, dtype=torch.int32, device=device),
            ticket=torch.zeros(self.batch, dtype=torch.int32, device=device),
            mix=torch.zeros(self.batch, at.MIX, dtype=torch.float32, device=device)
            if room.work is not None or room.perturbed
            else None,
            momentum=(
                self._images(self.batch, torch.float32, device)
                if room.work is not None and room.work[0] == at.APG
                else None
            ),
        )
        self._settings = torch.zeros(at.SETTINGS, dtype=torch.float32, device=device)
        parts = self.batch if room.work is not None else 0
        self._partial = torch.zeros(parts, at.PARTS, at.SUMS, dtype=torch.float32, device=device)
        self._opening_table = empty_table(1, room.opening_terms, device)
        self._status = self.tensors.status.numpy() if device.type == "cpu" else None
        self._steps: dict[Any, tuple[ops.Step, ...]] = {}
        self.direct: ops.Step | None = None  # what `advance` did last, if it was one step that looks at its tensors
        self._opening_step: ops.Step | None = None
        self._table: tuple[Any, ...] = ()  # what the loaded table was packed from
        self.captured = 0  # grows when addresses change that a graph has captured

    @property
    def bytes(self) -> int:
        """Of all tensors here."""
        own = (*self.tensors.arguments(), self._settings, self._partial, *self._opening_table)
        return sum(t.numel() * t.element_size() for t in {id(t): t for t in own if t is not None}.values())

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
        if made is None or t.noise is None or made.shape != t.noise.shape:
            if made is not None or t.noise is not None:
                self._rebind(made)
        else:
            t.noise.copy_(made)
        self._load_table(plan, model, "noise" if init is None else opening, plan.draws if made is not None else 0)
        t.guidance.copy_(torch.tensor(guidance, dtype=torch.float32))
        if t.mix is not None:
            mix = torch.tensor(at.PLAIN_MIX, dtype=torch.float32).repeat(self.batch, 1)
            mix[:, at.MIX_S] = torch.tensor(perturbed_scale, dtype=torch.float32)
            t.mix.copy_(mix)
        if reduction is not None:
            self.set_reduction(reduction)
        if t.momentum is not None:
            t.momentum.zero_()
        t.row.zero_()
        t.status.fill_(-1)
        if init is not None:
            t.state[plan.rows[0].x].copy_(init)
        for name, image in given.items():
            t.state[plan.given[name]].copy_(image)

    def set_reduction(self, reduction: Reduction) -> None:
        """The numbers of the guidance rule that this room's work names."""
        self._settings.copy_(torch.tensor(reduction.settings, dtype=torch.float32))

    def _rebind(self, noise: Tensor | None) -> None:
        self.tensors.noise = noise
        self._steps.clear()
        self._opening_step = None
        self.captured += 1

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
        wanted = (plan, model.prediction, model.sigma_data, opening, latent_id)
        if self._table and self._table[0] is plan and self._table[1:] == wanted[1:]:
            return
        packed = plan.pack(model.prediction, model.sigma_data, opening, latent_id)
        write_rows(*self._opening_table, packed.coef[:1], packed.ids[:1])
        write_rows(self.tensors.coef, self.tensors.ids, packed.coef[1:], packed.ids[1:])
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
        self.direct = steps[0] if executor == "cpp" and len(steps) == 1 and variance is None else None
        for step in steps:
            step(*given)

    def reuse(self, executor: str) -> None:
        """Run a row that reads no output of the network."""
        steps = self._steps.get(executor)
        if steps is None:
            step = ops.bind(dataclasses.replace(self.tensors, model_out=self.model_in), executor, self.room.second)
            steps = self._steps[executor] = (step,)
        steps[0](self.model_in)

    def _bind(self, executor: str, outputs: Outputs) -> tuple[ops.Step, ...]:
        t = self.tensors
        if self.room.learns_spread and (t.variance is None or t.variance.dtype != outputs.model_out.dtype):
            with torch.inference_mode(False):  # a later call outside it writes here too
                t.variance = self._images(self.batch, outputs.model_out.dtype, t.state.device)
            self._steps.clear()
            self.captured += 1
        given = {
            "model_out": outputs.model_out,
            "unguided": outputs.unguided,
            "perturbed": outputs.perturbed,
        }
        step = ops.bind(dataclasses.replace(t, **given), executor, self.room.second)  # type: ignore[arg-type]
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


def empty_table(rows: int, terms: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """coef fp32 and ids int32 of a table, zeros: rows that are not run."""
    coef = torch.zeros(rows, at.COEF_FIXED + at.NOISE_STRIDE * terms, dtype=torch.float32, device=device)
    ids = torch.zeros(rows, at.IDS_FIXED + at.TERM_IDS_STRIDE * terms, dtype=torch.int32, device=device)
    return coef, ids


def write_rows(
    coef: Tensor, ids: Tensor, new_coef: NDArray[np.float32], new_ids: NDArray[np.int32], place: int = 0
) -> None:
    """Copy packed rows into a table from row `place` on; columns that one of the two does not have are unused."""
    for table, new in ((coef, new_coef), (ids, new_ids)):
        width = min(table.shape[1], new.shape[1])
        upload(table[place : place + len(new), :width], np.ascontiguousarray(new[:, :width]))


def upload(into: Tensor, values: NDArray[Any]) -> None:
    """Copy host values to a device without waiting for what it is doing: torch keeps pinned memory until it is read."""
    given = torch.from_numpy(values)
    if into.is_cuda:
        into.copy_(given.pin_memory(), non_blocking=True)
    else:
        into.copy_(given)
