"""The row op in plain torch: slow, obvious, and what the other executors are tested against.

May import: the table's layout and the NumPy noise. Per sample b with row i = row[b], in delta form (compiler.plan):
    out_o = sum_j A[o,j] r_j + B[o] D + E[o] E + spread sum_t C[o,t] N(id_t);   D, E, spread: engine.ops.affine_step
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.compiler import layout as at
from fastdiff.engine import noise as counter_noise


def affine_step(
    state: Tensor,
    model_out: Tensor,
    model_in: Tensor | None,
    model_time: Tensor | None,
    coef: Tensor,
    ids: Tensor,
    row: Tensor,
    seed: Tensor,
    guidance: Tensor,
    noise: Tensor | None,
    denoised: Tensor | None,
    status: Tensor,
    ticket: Tensor,
    unguided: Tensor | None = None,
    perturbed: Tensor | None = None,
    mix: Tensor | None = None,
    momentum: Tensor | None = None,
    variance: Tensor | None = None,
) -> None:
    """Run one row per sample, in place; see `fastdiff.engine.ops.affine_step` for shapes and dtypes.

    Deterministic; not capturable (it reads the table on the host).
    """
    del ticket  # only executors whose blocks finish in any order need it
    batch, rows = state.shape[1], coef.shape[0]
    for b in range(batch):
        i = int(row[b])
        if not 0 <= i < rows:
            continue
        scalar, index = coef[i].tolist(), ids[i].tolist()
        outputs = [o for o in range(at.MAX_OUTPUTS) if index[at.DEST + o] >= 0]
        x = state[index[at.SLOT], b] if _reads_x(scalar, index, outputs) else torch.zeros_like(state[0, b])

        x0 = other = torch.zeros_like(x)
        if index[at.FLAGS] & at.READS_MODEL:
            found = list(at.PLAIN_MIX) if mix is None else mix[b].tolist()
            reads_e = any(scalar[at.OUTPUT + at.OUTPUT_STRIDE * o + at.OUT_E] != 0.0 for o in outputs)
            by_unguided = reads_e and bool(index[at.FLAGS] & at.E_UNGUIDED)
            weight = 1.0 + found[at.MIX_W] * scalar[at.GAIN] * (float(guidance[b]) - 1.0)
            strength = scalar[at.PERTURB] * found[at.MIX_S]
            apart = branches(model_out, unguided, perturbed, b, batch)
            raw, second, finite = _combine(apart, weight, found[at.MIX_U], strength, by_unguided)
            if not finite and status[b] < 0:
                status[b] = i
            x0 = found[at.MIX_P] * scalar[at.P] * x + found[at.MIX_Q] * scalar[at.Q] * raw
            if momentum is not None and found[at.MIX_M] != 0.0:
                x0 = x0 + found[at.MIX_M] * momentum[b]
            other = scalar[at.P] * x + scalar[at.Q] * second if by_unguided else x0
            low, high = max(scalar[at.CLAMP_LO], -found[at.MIX_BOUND]), min(scalar[at.CLAMP_HI], found[at.MIX_BOUND])
            x0 = found[at.MIX_POST] * x0.clamp(low, high)
            if denoised is not None:
                denoised[b] = x0

        spread: Tensor | float = 1.0
        if variance is not None and index[at.FLAGS] & at.SPREADS_NOISE:
            spread = torch.exp(scalar[at.SPREAD_LOG] + scalar[at.SPREAD_SLOPE] * variance[b].float())
        results = [_output(state, b, x, x0, other, spread, scalar, index, o, seed, noise) for o in outputs]
        for o, result in zip(outputs, results, strict=True):
            state[index[at.DEST + o], b] = result
        if model_in is not None and results:
            for copy in range(model_in.shape[0] // batch):
                model_in[copy * batch + b] = (scalar[at.EMIT_SCALE] * results[0]).to(model_in.dtype)
        if model_time is not None:
            model_time[b::batch] = scalar[at.EMIT_TIME]
        row[b] = i + 1


def branches(
    model_out: Tensor, unguided: Tensor | None, perturbed: Tensor | None, b: int, batch: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Fc, Fu and Fp of sample b in fp32, from the stack or from tensors of their own; None where absent."""
    count = model_out.shape[0] // batch
    second = unguided[b] if unguided is not None else model_out[batch + b] if count > 1 else None
    third = perturbed[b] if perturbed is not None else model_out[2 * batch + b] if count > 2 else None
    return model_out[b].float(), None if second is None else second.float(), None if third is None else third.float()


def _combine(
    apart: tuple[Tensor, Tensor | None, Tensor | None],
    weight: float,
    unguided_scale: float,
    strength: float,
    wants_unguided: bool,
) -> tuple[Tensor, Tensor, bool]:
    """F, Fu (Fc where there is none), and whether every branch that was read is finite."""
    conditional, unguided, perturbed = apart
    finite = bool(conditional.isfinite().all())
    raw, second = conditional, conditional
    if unguided is not None and (weight != 1.0 or wants_unguided):
        finite = finite and bool(unguided.isfinite().all())
        second = unguided
        if weight != 1.0:
            raw = unguided_scale * unguided
            raw = raw + weight * (conditional - raw)
    if perturbed is not None and strength != 0.0:
        finite = finite and bool(perturbed.isfinite().all())
        raw = raw + strength * (conditional - perturbed)
    return raw, second, finite


def _reads_x(scalar: list[float], index: list[int], outputs: list[int]) -> bool:
    reads_model = bool(index[at.FLAGS] & at.READS_MODEL)
    columns = [at.OUTPUT + at.OUTPUT_STRIDE * o for o in outputs]
    return (reads_model and scalar[at.P] != 0.0) or any(
        scalar[c + at.OUT_K] != 0.0 or scalar[c + at.OUT_DELTA] != 0.0 for c in columns
    )


def _output(
    state: Tensor,
    b: int,
    x: Tensor,
    x0: Tensor,
    other: Tensor,
    spread: Tensor | float,
    scalar: list[float],
    index: list[int],
    output: int,
    seed: Tensor,
    noise: Tensor | None,
) -> Tensor:
    column = at.OUTPUT + at.OUTPUT_STRIDE * output
    base = x if scalar[column + at.OUT_DELTA] else torch.zeros_like(x)
    total = scalar[column + at.OUT_K] * x if scalar[column + at.OUT_K] else torch.zeros_like(x)
    if scalar[column + at.OUT_B]:
        total = total + scalar[column + at.OUT_B] * (x0 - base)
    if scalar[column + at.OUT_E]:
        total = total + scalar[column + at.OUT_E] * (other - base)
    for j in range(index[at.SLOTS]):
        weight = scalar[column + at.OUT_A + j]
        if weight:
            total = total + weight * (state[index[at.SLOT + 1 + j], b] - base)
    for t in range(index[at.TERMS]):
        weight = scalar[at.NOISE + at.NOISE_STRIDE * t + output]
        if weight:
            term = at.TERM_IDS + at.TERM_IDS_STRIDE * t
            total = total + weight * spread * _normal(x, int(seed[b]), index[term], index[term + 1], b, noise)
    return total + base


def _normal(x: Tensor, seed: int, noise_id: int, stream: int, b: int, noise: Tensor | None) -> Tensor:
    if noise is not None:
        return noise[noise_id, b]
    values = counter_noise.normal(seed, x.numel(), noise_id, stream)
    return torch.from_numpy(values).to(x.device).view(x.shape)
