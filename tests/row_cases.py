"""Random table rows for the tests of the compiled executors, and what they should give in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fastdiff.compiler import layout as at
from fastdiff.engine import noise as counter_noise
from fastdiff.engine.ops import StepTensors

INF = float("inf")
every_pair_or_all = pytest.mark.parametrize(
    "product", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["pairs", "all"]
)


def seeds_of(count: int, product: bool, *numbers: int) -> Sequence[int]:
    """The seeds of a test's combination, whose parameters have these numbers: all, or one of them.

    The one is another for the neighbours of every parameter, so that each value of each meets every seed.
    """
    return range(count) if product else (sum(numbers) % count,)


@dataclass
class Case:
    """One call: its tensors, filled at random, NaN where nothing must be read or something is yet to be written."""

    shape: tuple[int, ...] = (3, 5, 7)
    batch: int = 3
    layout: torch.memory_format = torch.contiguous_format
    model_dtype: torch.dtype = torch.float32
    emit_dtype: torch.dtype | None = torch.float32
    guided: bool = True
    branches: str = "stacked"  # or "apart": every branch a tensor of its own
    perturbed: bool = False
    mixed: bool = False
    spread: bool = False
    terms: int = 2
    injected: bool = False
    rows: int = 4
    registers: int = 7
    idle: bool = False
    seed: int = 0

    def tensors(self) -> StepTensors:
        rng = np.random.default_rng(self.seed)
        coef, ids = random_table(rng, self.rows, self.terms, self.registers)
        if not self.spread:
            ids[:, at.FLAGS] &= ~at.SPREADS_NOISE
        batch, copies = self.batch, 1 + self.guided + self.perturbed
        apart = self.branches == "apart"
        if self.perturbed and not self.guided and not apart:
            raise ValueError("a stack of two is conditional and unguided: perturbed alone must stand apart")
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
            model_out=image((1 if apart else copies) * batch, self.model_dtype),
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
            unguided=image(batch, self.model_dtype) if apart and self.guided else None,
            perturbed=image(batch, self.model_dtype) if apart and self.perturbed else None,
            mix=torch.from_numpy(random_mix(rng, batch)) if self.mixed or self.perturbed else None,
            momentum=image(batch, torch.float32) if self.mixed else None,
            variance=image(batch, self.model_dtype) if self.spread else None,
        )


def random_mix(rng: np.random.Generator, batch: int) -> np.ndarray:
    """Per sample: identity, or every scalar of a guidance rule away from it."""
    mix = np.tile(np.array(at.PLAIN_MIX, np.float32), (batch, 1))
    for b in range(batch):
        if rng.random() < 0.7:
            mix[b] = rng.normal(size=at.MIX)
            mix[b, at.MIX_W] = rng.choice([0.0, 1.0])
            mix[b, at.MIX_M] *= rng.random() < 0.5
            mix[b, at.MIX_BOUND] = rng.choice([0.8, INF])
        mix[b, at.MIX_S] = rng.choice([0.0, 1.5])
    return mix


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
        if d[at.FLAGS]:
            d[at.FLAGS] += at.E_UNGUIDED * int(rng.integers(2)) + at.SPREADS_NOISE * int(rng.integers(2))
        d[at.TERMS], d[at.SLOTS] = int(rng.integers(0, terms + 1)), slots
        c[at.P], c[at.Q], c[at.GAIN] = rng.normal(size=3)
        c[at.P] *= rng.random() < 0.7
        c[at.GAIN], c[at.PERTURB] = rng.choice([0.0, 1.0], 2)
        c[at.SPREAD_LOG], c[at.SPREAD_SLOPE] = 0.5 * rng.normal(size=2)
        c[at.CLAMP_LO], c[at.CLAMP_HI] = (-0.7, 0.9) if rng.random() < 0.3 else (-INF, INF)
        c[at.EMIT_SCALE], c[at.EMIT_TIME] = rng.normal(size=2)
        for o in range(outputs):
            column = at.OUTPUT + at.OUTPUT_STRIDE * o
            values = rng.normal(size=at.OUT_A + slots) * (rng.random(at.OUT_A + slots) < 0.7)
            values[at.OUT_DELTA] = values[at.OUT_DELTA] != 0
            values[at.OUT_E] *= rng.random() < 0.5
            if not d[at.FLAGS]:
                values[[at.OUT_B, at.OUT_E]] = 0
            c[column : column + at.OUT_A + slots] = values
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
        x, x0, other = register[d[at.SLOT]], zero, zero
        columns = [at.OUTPUT + at.OUTPUT_STRIDE * o for o in range(3) if d[at.DEST + o] >= 0]
        if d[at.FLAGS] & at.READS_MODEL:
            mix = at.PLAIN_MIX if t.mix is None else t.mix[b].double().tolist()
            f, second = combined(t, b, c, mix)
            second = second if any(c[o + at.OUT_E] for o in columns) and d[at.FLAGS] & at.E_UNGUIDED else None
            x0 = mix[at.MIX_P] * c[at.P] * x + mix[at.MIX_Q] * c[at.Q] * f
            if t.momentum is not None:
                x0 = x0 + mix[at.MIX_M] * t.momentum[b].double()
            other = x0 if second is None else c[at.P] * x + c[at.Q] * second
            low, high = max(c[at.CLAMP_LO], -mix[at.MIX_BOUND]), min(c[at.CLAMP_HI], mix[at.MIX_BOUND])
            x0 = mix[at.MIX_POST] * x0.clamp(low, high)
            denoised[b] = x0
        spread = torch.ones_like(zero)
        if d[at.FLAGS] & at.SPREADS_NOISE:
            spread = torch.exp(c[at.SPREAD_LOG] + c[at.SPREAD_SLOPE] * t.variance[b].double())  # type: ignore[index]
        results = []
        for o, column in enumerate(columns):
            k, delta, weight, again, *a = c[column : column + at.OUTPUT_STRIDE]
            base = delta * x
            total = k * x + weight * (x0 - base) + again * (other - base) + base
            for j in range(d[at.SLOTS]):
                if any(c[p + at.OUT_A + j] for p in columns):
                    total = total + a[j] * (register[d[at.SLOT + 1 + j]] - base)
            for term in range(d[at.TERMS]):
                name, stream = d[at.TERM_IDS + 2 * term :][:2]
                total = total + c[at.NOISE + at.NOISE_STRIDE * term + o] * spread * normal(t, b, name, stream)
            results.append((d[at.DEST + o], total))
        for destination, total in results:
            state[destination, b] = total
        emitted[b] = c[at.EMIT_SCALE] * results[0][1]
    return {"state": state, "denoised": denoised, "emitted": emitted}


def combined(t: StepTensors, b: int, c: list[float], mix: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """F and Fu in float64; Fu is Fc where there is no such branch."""
    batch = t.state.shape[1]
    stack = [*t.model_out.double().split(batch), t.unguided, t.perturbed]
    conditional = stack.pop(0)[b]
    second = stack[0] if len(stack) > 2 else t.unguided
    third = stack[1] if len(stack) > 3 else t.perturbed
    w = 1.0 + mix[at.MIX_W] * c[at.GAIN] * (float(t.guidance[b]) - 1.0)
    f = unguided = conditional if second is None else second[b].double()
    if second is None or w == 1.0:
        f = conditional
    else:
        f = mix[at.MIX_U] * unguided
        f = f + w * (conditional - f)
    if third is not None:
        f = f + c[at.PERTURB] * mix[at.MIX_S] * (conditional - third[b].double())
    return f, unguided


def normal(t: StepTensors, b: int, name: int, stream: int) -> torch.Tensor:
    """Noise `name` of sample b, float64, in logical order."""
    shape = t.state.shape[2:]
    if t.noise is not None:
        return t.noise[name, b].double()
    values = counter_noise.normal(int(t.seed[b]), shape.numel(), name, stream)
    return torch.from_numpy(values.astype(np.float64)).view(shape)
