"""The guide op: one reduction per sample that gives a row the scalars of a guidance rule that is not linear.

May import: fastdiff.kernels and the compiled extension (through engine.native), ops, backends, the reference.
The rules and their sources are in engine/guidance.py; what a row does with the scalars is in engine/ops.py.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastdiff.compiler import layout as at
from fastdiff.engine import backends, reference_guide
from fastdiff.engine.checks import Checks
from fastdiff.engine.ops import Step, on_device

_ARGUMENTS = (
    "Tensor state, Tensor model_out, Tensor coef, Tensor ids, Tensor row, Tensor guidance, Tensor settings, "
    "Tensor(a!) mix, Tensor(b!) partial, Tensor(c!) ticket, Tensor? unguided=None, Tensor? perturbed=None, "
    "Tensor(d!)? momentum=None"
)
_library = torch.library.Library("fastdiff", "FRAGMENT")
_library.define(f"guide({_ARGUMENTS}, *, int rule, bool threshold, str executor) -> ()")


@dataclass
class GuideTensors:
    """What a guidance rule reads and writes; B samples of shape S. Names shared with StepTensors are the same tensors.

    state, model_out, coef, ids, row, guidance, unguided, perturbed: read, as the row after it will read them.
    settings: fp32 [8]: phi, eta, beta, radius, percentile, ceiling, two unused.
    mix: fp32 [B, 8]; every column but the last, the perturbed branch's scale, is written.
    partial: fp32 [B, 64, 8]; scratch: a sample is summed in parts, in an order that only its size decides.
    ticket: int32 [B] of zeros; scratch.
    momentum: fp32 [B, *S] or None; needed by rule APG, which reads and replaces it.
    """

    state: Tensor
    model_out: Tensor
    coef: Tensor
    ids: Tensor
    row: Tensor
    guidance: Tensor
    settings: Tensor
    mix: Tensor
    partial: Tensor
    ticket: Tensor
    unguided: Tensor | None = None
    perturbed: Tensor | None = None
    momentum: Tensor | None = None

    def arguments(self) -> tuple[Tensor | None, ...]:
        """The op's tensors, in the schema's order."""
        return tuple(getattr(self, field.name) for field in fields(self))


def guide(tensors: GuideTensors, rule: int, threshold: bool, executor: str) -> None:
    """Find each sample's scalars for the row it is about to run, through the torch dispatcher, arguments checked.

    With w, s, F, D as in `ops.affine_step`, sums over the elements of one sample, G = Fu + w (Fc - Fu) + s (Fc - Fp):
        PLAIN     nothing
        RESCALE   mix_q = phi std(Fc) / std(G) + 1 - phi
        CFG_ZERO  mix_u = <Fc, Fu> / <Fu, Fu>
        APG       M <- Q (Fc - Fu) + beta M, Dc = P x + Q Fc, c = min(1, radius / |M|) (1 for radius 0):
                  mix_w = 0, mix_m = (w - 1) c, mix_p = mix_q = 1 - mix_m (1 - eta) <M, Dc> / <Dc, Dc>
        threshold mix_bound = min(max(q, 1), ceiling), mix_post = 1 / mix_bound, q the `percentile` quantile
                  (linear interpolation) of |D| before its clamp, the rule above applied
    A ratio with denominator 0 leaves its scalar at 1 (APG: drops the projection); where one of APG's sums is not finite
    all are left plain, so the row reads Fu, finds the cause and reports it. Where w = 1 (and s = 0 for RESCALE) the
    rule does nothing and M stays; a sample outside its table, or in a row without a model, is left alone.
    Deterministic; capturable on executors "triton" and "cuda". Raises as `ops.affine_step`.
    """
    torch.ops.fastdiff.guide(*tensors.arguments(), rule=rule, threshold=threshold, executor=executor)


def bind(tensors: GuideTensors, rule: int, threshold: bool, executor: str) -> Step:
    """Check once and return `find(model_out, unguided, perturbed)`: no dispatcher, no allocation on the device."""
    check(tensors, rule)
    backends.require(executor, tensors.state.device)
    if executor in ("cpp", "cuda"):
        from fastdiff.engine import native

        return native.bind_guide(tensors, rule, threshold, executor)
    own: dict[str, Any] = dict(zip((field.name for field in fields(tensors)), tensors.arguments(), strict=True))
    if executor == "triton":
        from fastdiff.kernels import guide as triton_guide

        return on_device(triton_guide.bind(**own, rule=rule, threshold=threshold), tensors.state.device)

    def find(model_out: Tensor, unguided: Tensor | None = None, perturbed: Tensor | None = None) -> None:
        given = {"model_out": model_out, "unguided": unguided, "perturbed": perturbed}
        reference_guide.guide(**(own | given), rule=rule, threshold=threshold)

    return find


def check(t: GuideTensors, rule: int) -> None:
    """Raise ValueError or TypeError unless every tensor has the shape, dtype and device of `GuideTensors`."""
    if rule not in (at.PLAIN, at.RESCALE, at.APG, at.CFG_ZERO):
        raise ValueError(f"guide: rule must be 0 to 3 (PLAIN, RESCALE, APG, CFG_ZERO), got {rule}")
    given = Checks("guide", t.state)
    batch, sample = t.state.shape[1], tuple(t.state.shape[2:])
    given.branches(t.model_out, t.unguided, t.perturbed, batch, sample)
    if t.momentum is not None:
        given.image("momentum", t.momentum, (torch.float32,), ((batch, *sample),))
    elif rule == at.APG:
        raise ValueError("guide: rule APG keeps its direction in momentum, fp32 [B, *S]; got None")
    for name, dtype, shape in (
        ("row", torch.int32, (batch,)),
        ("ticket", torch.int32, (batch,)),
        ("guidance", torch.float32, (batch,)),
        ("settings", torch.float32, (at.SETTINGS,)),
        ("mix", torch.float32, (batch, at.MIX)),
        ("partial", torch.float32, (batch, at.PARTS, at.SUMS)),
    ):
        given.numbers(name, getattr(t, name), (dtype,), (shape,))
    given.table(t.coef, t.ids)


def _guide(*arguments: object, rule: int, threshold: bool, executor: str) -> None:
    tensors = GuideTensors(*arguments)  # type: ignore[arg-type]
    bind(tensors, rule, threshold, executor)(tensors.model_out, tensors.unguided, tensors.perturbed)


def _fake_guide(*arguments: object, rule: int, threshold: bool, executor: str) -> None:
    check(GuideTensors(*arguments), rule)  # type: ignore[arg-type]


_library.impl("guide", _guide, "CompositeExplicitAutograd")
torch.library.register_fake("fastdiff::guide", _fake_guide, lib=_library)
