"""The guide op in plain torch, sums in float64: what the other executors are tested against.

May import: the table's layout, the row's reference (for its branches). Formulas: fastdiff.engine.guide.guide.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.compiler import layout as at
from fastdiff.engine.reference import branches


def guide(
    state: Tensor,
    model_out: Tensor,
    coef: Tensor,
    ids: Tensor,
    row: Tensor,
    guidance: Tensor,
    settings: Tensor,
    mix: Tensor,
    partial: Tensor,
    ticket: Tensor,
    unguided: Tensor | None = None,
    perturbed: Tensor | None = None,
    momentum: Tensor | None = None,
    *,
    rule: int,
    threshold: bool,
) -> None:
    """Write every sample's scalars; see `fastdiff.engine.guide.guide`. Deterministic; not capturable."""
    del partial, ticket  # only executors that sum in parts need them
    batch, rows = state.shape[1], coef.shape[0]
    given = settings.tolist()
    for b in range(batch):
        i = int(row[b])
        if not 0 <= i < rows or not int(ids[i, at.FLAGS]) & at.READS_MODEL:
            continue
        scalar = coef[i].tolist()
        p, q = scalar[at.P], scalar[at.Q]
        x = state[int(ids[i, at.SLOT]), b] if p != 0.0 else torch.zeros_like(state[0, b])
        weight = 1.0 + scalar[at.GAIN] * (float(guidance[b]) - 1.0)
        strength = scalar[at.PERTURB] * float(mix[b, at.MIX_S])
        apart = branches(model_out, unguided, perturbed, b, batch)
        found = list(at.PLAIN_MIX)
        running = None if momentum is None else momentum[b]
        _find(found, apart, x, p, q, weight, strength, running, given, rule)
        if threshold:
            size = _estimate(found, apart, x, p, q, weight, strength, running).abs().flatten()
            bound = float(torch.quantile(size.double(), given[at.PERCENTILE]))
            found[at.MIX_BOUND] = min(max(bound, 1.0), given[at.CEILING])
            found[at.MIX_POST] = 1.0 / found[at.MIX_BOUND]
        mix[b, : at.MIX_S] = torch.tensor(found[: at.MIX_S], dtype=torch.float32)


def _find(
    found: list[float],
    apart: tuple[Tensor, Tensor | None, Tensor | None],
    x: Tensor,
    p: float,
    q: float,
    weight: float,
    strength: float,
    running: Tensor | None,
    given: list[float],
    rule: int,
) -> None:
    """The scalars of one rule, into `found`; APG's direction, into `running`."""
    conditional, second, _ = apart
    guided = second is not None and weight != 1.0
    if rule == at.RESCALE and (guided or strength != 0.0):
        exact = tuple(None if branch is None else branch.double() for branch in apart)
        spread = _combined(exact, 1.0, weight, strength).std(correction=0)  # type: ignore[arg-type]
        if spread > 0:
            found[at.MIX_Q] = (
                given[at.PHI] * float(conditional.double().std(correction=0) / spread) + 1.0 - given[at.PHI]
            )
    elif rule == at.CFG_ZERO and second is not None and guided:
        size = float(second.double().square().sum())
        if size > 0:
            found[at.MIX_U] = float((conditional.double() * second.double()).sum()) / size
    elif rule == at.APG and second is not None and guided and running is not None:
        running.copy_(q * (conditional - second) + given[at.BETA] * running)
        estimate, direction = (p * x + q * conditional).double(), running.double()
        length, size = float(direction.norm()), float(estimate.square().sum())
        shrink = given[at.RADIUS] / length if 0.0 < given[at.RADIUS] < length else 1.0
        along = float((direction * estimate).sum()) / size if size > 0 else 0.0
        if not math.isfinite(length + along):
            return  # the row must read Fu itself to report it
        found[at.MIX_W] = 0.0
        found[at.MIX_M] = (weight - 1.0) * shrink
        found[at.MIX_P] = found[at.MIX_Q] = 1.0 - found[at.MIX_M] * (1.0 - given[at.ETA]) * along


def _combined(
    apart: tuple[Tensor, Tensor | None, Tensor | None], scale: float, weight: float, strength: float
) -> Tensor:
    """u Fu + w (Fc - u Fu) + s (Fc - Fp)."""
    conditional, second, third = apart
    raw = conditional
    if second is not None and weight != 1.0:
        raw = scale * second + weight * (conditional - scale * second)
    return raw if third is None or strength == 0.0 else raw + strength * (conditional - third)


def _estimate(
    found: list[float],
    apart: tuple[Tensor, Tensor | None, Tensor | None],
    x: Tensor,
    p: float,
    q: float,
    weight: float,
    strength: float,
    running: Tensor | None,
) -> Tensor:
    """D before its clamp, as the row will make it from these scalars."""
    raw = _combined(apart, found[at.MIX_U], 1.0 + found[at.MIX_W] * (weight - 1.0), strength)
    total = found[at.MIX_P] * p * x + found[at.MIX_Q] * q * raw
    return total if running is None else total + found[at.MIX_M] * running
