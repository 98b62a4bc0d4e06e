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
from fastdiff.engine.ops import MODEL_DTYPES, Step

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

        return triton_guide.bind(**own, rule=rule, threshold=threshold)

    def find(model_out: Tensor, unguided: Tensor | None = None, perturbed: Tensor | None = None) -> None:
        given = {"model_out": model_out, "unguided": unguided, "perturbed": perturbed}
        reference_guide.guide(**(own | given), rule=rule, threshold=threshold)

    return find


def check(t: GuideTensors, rule: int) -> None:
    """Raise ValueError or TypeError unless every tensor has the shape, dtype and device of `GuideTensors`."""
    if rule not in (at.PLAIN, at.RESCALE, at.APG, at.CFG_ZERO):
        raise ValueError(f"guide: rule must be 0 to 3 (PLAIN, RESCALE, APG, CFG_ZERO), got {rule}")
    if t.state.dim() < 3 or t.state.numel() == 0:
        raise ValueError(f"guide: state must be [registers, batch, *shape] and not empty, got {tuple(t.state.shape)}")
    batch, sample = t.state.shape[1], tuple(t.state.shape[2:])
    stacked = 1 if t.unguided is not None else 2 if t.perturbed is not None else 3
    expected: dict[str, tuple[tuple[torch.dtype, ...], tuple[tuple[int, ...], ...]]] = {
        "model_out": (MODEL_DTYPES, tuple((n * batch, *sample) for n in range(1, stacked + 1))),
        "unguided": ((t.model_out.dtype,), ((batch, *sample),)),
        "perturbed": ((t.model_out.dtype,), ((batch, *sample),)),
        "momentum": ((torch.float32,), ((batch, *sample),)),
        "row": ((torch.int32,), ((batch,),)),
        "guidance": ((torch.float32,), ((batch,),)),
        "settings": ((torch.float32,), ((at.SETTINGS,),)),
        "mix": ((torch.float32,), ((batch, at.MIX),)),
        "partial": ((torch.float32,), ((batch, at.PARTS, at.SUMS),)),
        "ticket": ((torch.int32,), ((batch,),)),
        "coef": ((torch.float32,), (tuple(t.coef.shape),)),
        "ids": ((torch.int32,), (tuple(t.ids.shape),)),
    }
    for name, (dtypes, shapes) in expected.items():
        tensor = getattr(t, name)
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            raise TypeError(f"guide: {name} has dtype {tensor.dtype}, expected {dtypes[0]}; cast it first")
        if tuple(tensor.shape) not in shapes:
            raise ValueError(f"guide: {name} has shape {tuple(tensor.shape)}, expected {' or '.join(map(str, shapes))}")
        if tensor.device != t.state.device:
            raise ValueError(f"guide: {name} is on {tensor.device}, the state on {t.state.device}; move one of them")
        if tensor.dim() >= 2 and not _dense_as(tensor, t.state[0]):
            raise ValueError(f"guide: {name} must be dense and laid out like the state, got strides {tensor.stride()}")
    if rule == at.APG and t.momentum is None:
        raise ValueError("guide: rule APG keeps its direction in momentum, fp32 [B, *S]; got None")


def _dense_as(tensor: Tensor, like: Tensor) -> bool:
    if like.is_contiguous() or tensor.dim() != 4:
        return tensor.is_contiguous()
    return tensor.is_contiguous(memory_format=torch.channels_last)


def _guide(*arguments: object, rule: int, threshold: bool, executor: str) -> None:
    tensors = GuideTensors(*arguments)  # type: ignore[arg-type]
    bind(tensors, rule, threshold, executor)(tensors.model_out, tensors.unguided, tensors.perturbed)


def _fake_guide(*arguments: object, rule: int, threshold: bool, executor: str) -> None:
    check(GuideTensors(*arguments), rule)  # type: ignore[arg-type]


_library.impl("guide", _guide, "CompositeExplicitAutograd")
torch.library.register_fake("fastdiff::guide", _fake_guide, lib=_library)
