"""The row op in plain torch: slow, obvious, and what the other executors are tested against.

May import: the table's layout and the NumPy noise. Per sample b with row i = row[b]:
    D = P x + Q F;   out_o = sum_j A[o,j] r_j + B[o] D + sum_t C[o,t] N(id_t)      in delta form (design of the table)
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

        x0 = torch.zeros_like(x)
        if index[at.FLAGS] & at.READS_MODEL:
            raw, finite = _guided(model_out, b, batch, 1.0 + scalar[at.GAIN] * (float(guidance[b]) - 1.0))
            x0 = (scalar[at.P] * x + scalar[at.Q] * raw).clamp(scalar[at.CLAMP_LO], scalar[at.CLAMP_HI])
            if not finite and status[b] < 0:
                status[b] = i
            if denoised is not None:
                denoised[b] = x0

        results = [_output(state, b, x, x0, scalar, index, o, seed, noise) for o in outputs]
        for o, result in zip(outputs, results, strict=True):
            state[index[at.DEST + o], b] = result
        if model_in is not None and results:
            for copy in range(model_in.shape[0] // batch):
                model_in[copy * batch + b] = (scalar[at.EMIT_SCALE] * results[0]).to(model_in.dtype)
        if model_time is not None:
            model_time[b::batch] = scalar[at.EMIT_TIME]
        row[b] = i + 1


def _guided(model_out: Tensor, b: int, batch: int, weight: float) -> tuple[Tensor, bool]:
    conditional = model_out[b].float()
    if weight == 1.0 or model_out.shape[0] == batch:
        return conditional, bool(conditional.isfinite().all())
    unconditional = model_out[batch + b].float()
    finite = bool(conditional.isfinite().all()) and bool(unconditional.isfinite().all())
    return unconditional + weight * (conditional - unconditional), finite


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
    for j in range(index[at.SLOTS]):
        weight = scalar[column + at.OUT_A + j]
        if weight:
            total = total + weight * (state[index[at.SLOT + 1 + j], b] - base)
    for t in range(index[at.TERMS]):
        weight = scalar[at.NOISE + at.NOISE_STRIDE * t + output]
        if weight:
            term = at.TERM_IDS + at.TERM_IDS_STRIDE * t
            total = total + weight * _normal(x, int(seed[b]), index[term], index[term + 1], b, noise)
    return total + base


def _normal(x: Tensor, seed: int, noise_id: int, stream: int, b: int, noise: Tensor | None) -> Tensor:
    if noise is not None:
        return noise[noise_id, b]
    values = counter_noise.normal(seed, x.numel(), noise_id, stream)
    return torch.from_numpy(values).to(x.device).view(x.shape)
