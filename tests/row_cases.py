"""Random table rows for the tests of the compiled executors, and what they should give in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fastdiff.compiler import layout as at
from fastdiff.engine import noise as counter_noise
from fastdiff.engine.ops import StepTensors

INF = float("inf")


@dataclass
class Case:
    """One call: its tensors, filled at random, NaN where nothing must be read or something is yet to be written."""

    shape: tuple[int, ...] = (3, 5, 7)
    batch: int = 3
    layout: torch.memory_format = torch.contiguous_format
    model_dtype: torch.dtype = torch.float32
    emit_dtype: torch.dtype | None = torch.float32
    guided: bool = True
    terms: int = 2
    injected: bool = False
    rows: int = 4
    registers: int = 7
    idle: bool = False
    seed: int = 0

    def tensors(self) -> StepTensors:
        rng = np.random.default_rng(self.seed)
        coef, ids = random_table(rng, self.rows, self.terms, self.registers)
        batch, copies = self.batch, 2 if self.guided else 1
        row = torch.from_numpy(rng.integers(0, self.rows, batch).astype(np.int32))
        if self.idle:
            row[::2] = torch.from_numpy(rng.choice([-1, self.rows, 2**30], len(row[::2])).astype(np.int32))
        generator = torch.Generator().manual_seed(self.seed)

        def image(count: int, dtype: torch.dtype, poison: bool = False) -> torch.Tensor:
            values = (
                torch.full((count, *self.shape), float("nan"))
                if poison
                else torch.randn(count, *self.shape, generator=generator)
            )
            return values.to(dtype).contiguous(memory_format=self.layout)

        state = image(self.registers * batch, torch.float32).unflatten(0, (self.registers, batch))
        for b in range(batch):
            i = int(row[b])
            read = registers_read(coef[i], ids[i]) if 0 <= i < self.rows else set()
            for register in set(range(self.registers)) - read:
                state[register, b] = float("nan")
        guidance = torch.from_numpy(rng.choice([1.0, 2.5, -0.5], batch).astype(np.float32))
        return StepTensors(
            state=state,
            model_out=image(copies * batch, self.model_dtype),
            model_in=None if self.emit_dtype is None else image(copies * batch, self.emit_dtype, poison=True),
            model_time=torch.full((copies * batch,), float("nan")),
            coef=torch.from_numpy(coef),
            ids=torch.from_numpy(ids),
            row=row,
            seed=torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, batch)),
            guidance=guidance,
            noise=image(6 * batch, torch.float32).unflatten(0, (6, batch)) if self.injected else None,
            denoised=image(batch, torch.float32, poison=True),
            status=torch.full((batch,), -1, dtype=torch.int32),
            ticket=torch.zeros(batch, dtype=torch.int32),
        )


def random_table(rng: np.random.Generator, rows: int, terms: int, registers: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows with any number of outputs, slots and terms, zeros among the coefficients, clamps, rows without a model."""
    coef = np.zeros((rows, at.COEF_FIXED + at.NOISE_STRIDE * terms), np.float32)
    ids = np.zeros((rows, at.IDS_FIXED + at.TERM_IDS_STRIDE * terms), np.int32)
    for c, d in zip(coef, ids, strict=True):
        outputs, slots = int(rng.integers(1, 4)), int(rng.integers(0, 6))
        d[at.SLOT : at.SLOT + 6] = -1
        d[at.DEST : at.DEST + 3] = -1
        d[at.SLOT] = rng.integers(registers)
        d[at.SLOT + 1 : at.SLOT + 1 + slots] = rng.integers(0, registers, slots)
        d[at.DEST : at.DEST + outputs] = rng.permutation(registers)[:outputs]
        d[at.FLAGS] = at.READS_MODEL if rng.random() < 0.8 else 0
        d[at.TERMS], d[at.SLOTS] = int(rng.integers(0, terms + 1)), slots
        c[at.P], c[at.Q], c[at.GAIN] = rng.normal(size=3)
        c[at.P] *= rng.random() < 0.7
        c[at.GAIN] = rng.choice([0.0, 1.0])
        c[at.CLAMP_LO], c[at.CLAMP_HI] = (-0.7, 0.9) if rng.random() < 0.3 else (-INF, INF)
        c[at.EMIT_SCALE], c[at.EMIT_TIME] = rng.normal(size=2)
        for o in range(outputs):
            column = at.OUTPUT + at.OUTPUT_STRIDE * o
            values = rng.normal(size=3 + slots) * (rng.random(3 + slots) < 0.7)
            values[at.OUT_DELTA] = values[at.OUT_DELTA] != 0
            if not d[at.FLAGS]:
                values[at.OUT_B] = 0
            c[column : column + 3 + slots] = values
        for t in range(d[at.TERMS]):
            c[at.NOISE + at.NOISE_STRIDE * t :][:outputs] = rng.normal(size=outputs) * (rng.random(outputs) < 0.7)
            d[at.TERM_IDS + at.TERM_IDS_STRIDE * t :][:2] = rng.integers(0, 6), rng.integers(0, 4)
    return coef, ids


def registers_read(c: np.ndarray, d: np.ndarray) -> set[int]:
    """The registers a row may look at: those with a coefficient that is not zero."""
    columns = [at.OUTPUT + at.OUTPUT_STRIDE * o for o in range(3) if d[at.DEST + o] >= 0]
    read = {int(d[at.SLOT + 1 + j]) for j in range(d[at.SLOTS]) if any(c[o + at.OUT_A + j] for o in columns)}
    if (d[at.FLAGS] and c[at.P]) or any(c[o + at.OUT_K] or c[o + at.OUT_DELTA] for o in columns):
        read.add(int(d[at.SLOT]))
    return read


def expected(t: StepTensors) -> dict[str, torch.Tensor]:
    """state, denoised and emitted input (before its rounding) in float64; entries nobody writes are as they were."""
    batch, (rows, _) = t.state.shape[1], t.coef.shape
    state, denoised = t.state.double(), t.denoised.double()  # type: ignore[union-attr]
    emitted = torch.full_like(denoised, float("nan"))
    for b in range(batch):
        i = int(t.row[b])
        if not 0 <= i < rows:
            continue
        c, d = t.coef[i].double().tolist(), t.ids[i].tolist()
        read = registers_read(np.array(c), np.array(d))
        zero = torch.zeros(t.state.shape[2:], dtype=torch.float64)
        register = {-1: zero} | {r: state[r, b].clone() if r in read else zero for r in range(len(state))}
        x, x0 = register[d[at.SLOT]], zero
        if d[at.FLAGS]:
            f = t.model_out[b].double()
            w = 1.0 + c[at.GAIN] * (float(t.guidance[b]) - 1.0)
            if w != 1.0 and len(t.model_out) == 2 * batch:
                other = t.model_out[batch + b].double()
                f = other + w * (f - other)
            x0 = (c[at.P] * x + c[at.Q] * f).clamp(c[at.CLAMP_LO], c[at.CLAMP_HI])
            denoised[b] = x0
        results = []
        for o in range(3):
            if d[at.DEST + o] < 0:
                continue
            k, delta, weight, *a = c[at.OUTPUT + at.OUTPUT_STRIDE * o :][:8]
            base = delta * x
            total = k * x + weight * (x0 - base) + base
            for j in range(d[at.SLOTS]):
                if any(c[at.OUTPUT + at.OUTPUT_STRIDE * p + at.OUT_A + j] for p in range(3)):
                    total = total + a[j] * (register[d[at.SLOT + 1 + j]] - base)
            for term in range(d[at.TERMS]):
                name, stream = d[at.TERM_IDS + 2 * term :][:2]
                total = total + c[at.NOISE + 4 * term + o] * normal(t, b, name, stream)
            results.append((d[at.DEST + o], total))
        for destination, total in results:
            state[destination, b] = total
        emitted[b] = c[at.EMIT_SCALE] * results[0][1]
    return {"state": state, "denoised": denoised, "emitted": emitted}


def normal(t: StepTensors, b: int, name: int, stream: int) -> torch.Tensor:
    """Noise `name` of sample b, float64, in logical order."""
    shape = t.state.shape[2:]
    if t.noise is not None:
        return t.noise[name, b].double()
    values = counter_noise.normal(int(t.seed[b]), shape.numel(), name, stream)
    return torch.from_numpy(values.astype(np.float64)).view(shape)
