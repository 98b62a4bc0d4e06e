"""The row op: one schema, one set of checks, one fake implementation, and the choice of executor.

May import: fastdiff.kernels and the compiled extension (through engine.native), checks, the reference.
An executor is chosen once, when a plan is bound to a device (`bind`); nothing falls back silently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdiff.compiler import layout as at
from fastdiff.engine import backends, reference
from fastdiff.engine.checks import MODEL_DTYPES, Checks, channels_of

_ARGUMENTS = (
    "Tensor(a!) state, Tensor model_out, Tensor(b!)? model_in, Tensor(c!)? model_time, Tensor coef, Tensor ids, "
    "Tensor(d!) row, Tensor seed, Tensor guidance, Tensor? noise, Tensor(e!)? denoised, Tensor(f!) status, "
    "Tensor(g!) ticket, Tensor? unguided=None, Tensor? perturbed=None, Tensor? mix=None, Tensor? momentum=None, "
    "Tensor? variance=None"
)
_library = torch.library.Library("fastdiff", "DEF")
_library.define(f"affine_step({_ARGUMENTS}, *, str executor) -> ()")

GATHERED = 1 << 14  # elements; of more a copy by torch is the quicker one

T = TypeVar("T")
Step = Callable[..., "bool | None"]
Apart = Callable[[int, Tensor, "Tensor | None", Tensor, "Tensor | None"], None]


@dataclass
class StepTensors:
    """Everything one row reads and writes; B samples of shape S, K registers, R rows.

    state: fp32 [K, B, *S], contiguous or every register channels_last; registers of the plan.
    model_out: [nB, *S] fp32/fp16/bf16, n = 1, 2 or 3: the raw network outputs Fc, Fu, Fp (conditional, unguided,
    perturbed) stacked. model_in: [nB, *S] fp32/fp16/bf16 or None; the next network input, written n times.
    model_time: fp32 [nB] or None; the next network time, written n times.
    coef, ids: the packed plan (fastdiff.compiler.layout), fp32 [R, *] and int32 [R, *].
    row: int32 [B], each sample's row, advanced by one; outside 0..R-1 the sample is left alone.
    seed: int64 [B].  guidance: fp32 [B], the scale w of F = Fu + w (Fc - Fu).
    noise: fp32 [J, B, *S] or None; given, noise id j is noise[j] instead of the counter's normals.
    denoised: fp32 [B, *S] or None; receives D.
    status: int32 [B]; the first row whose F was not finite is written where it is negative.
    ticket: int32 [B] of zeros; scratch.
    unguided, perturbed: [B, *S] like model_out or None; Fu and Fp where they come from networks of their own (Fu needs
    model_out of [B], Fp of [B] or [2B]).
    mix: fp32 [B, 8] or None; the scalars a guidance rule found for each sample (fastdiff.engine.guide).
    momentum: fp32 [B, *S] or None; M, the running direction of a rule that keeps one.
    variance: [B, *S] like model_out or None; V, what a network with a learned variance says of it.
    """

    state: Tensor
    model_out: Tensor
    model_in: Tensor | None
    model_time: Tensor | None
    coef: Tensor
    ids: Tensor
    row: Tensor
    seed: Tensor
    guidance: Tensor
    noise: Tensor | None
    denoised: Tensor | None
    status: Tensor
    ticket: Tensor
    unguided: Tensor | None = None
    perturbed: Tensor | None = None
    mix: Tensor | None = None
    momentum: Tensor | None = None
    variance: Tensor | None = None

    def arguments(self) -> tuple[Tensor | None, ...]:
        """The op's tensors, in the schema's order."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def channels(self) -> int:
        """1 for contiguous registers; the channel count C when they are channels_last."""
        return channels_of(self.state[0])


def affine_step(tensors: StepTensors, executor: str) -> None:
    """Run one table row per sample, in place, through the torch dispatcher, with every argument checked.

    With w = 1 + mix_w gain (guidance - 1), G = mix_u Fu and s = perturb mix_s (mix absent: 1, 1 and 0):
        F = G + w (Fc - G) + s (Fc - Fp);  D = mix_post clamp(mix_p P x + mix_q Q F + mix_m M, within +-mix_bound)
        E = P x + Q Fu where the row says so, else D before its clamp and mix_post
        r_o' = sum_i A[o,i] r_i + B[o] D + E[o] E + spread sum_t C[o,t] N(id_t),  spread = exp(log + slope V) or 1
    Deterministic; capturable on executors "triton" and "cuda". Raises ValueError or TypeError for an
    argument that does not fit and BackendUnavailable for an executor that is not there.
    """
    torch.ops.fastdiff.affine_step(*tensors.arguments(), executor=executor)


def bind(tensors: StepTensors, executor: str, uses_e: bool = True) -> Step:
    """Check once and return `step(model_out, unguided, perturbed)`: the hot path, no dispatcher and no allocation.

    Its tensors must keep the shapes, dtypes and memory format of those that were bound; what was None stays None. It
    returns True where it knows that all network outputs so far were finite, else None.
    uses_e: False promises that no row of any table that is copied into `coef` gives E a weight, which lets "triton"
    take its shorter kernel.
    """
    check(tensors)
    backends.require(executor, tensors.state.device)
    if executor in ("cpp", "cuda"):
        from fastdiff.engine import native

        return native.bind(tensors, executor)
    names = [field.name for field in fields(tensors)]
    own: dict[str, Any] = dict(zip(names, tensors.arguments(), strict=True))
    if executor == "triton":
        from fastdiff.kernels import affine

        return on_device(affine.bind(**own, second=uses_e), tensors.state.device)

    def step(model_out: Tensor, unguided: Tensor | None = None, perturbed: Tensor | None = None) -> None:
        reference.affine_step(**(own | {"model_out": model_out, "unguided": unguided, "perturbed": perturbed}))

    return step


def bind_within(tensors: StepTensors, executor: str, whole: Tensor) -> Step | None:
    """`bind` for a step that is given `whole` [nB, C', *S'], model_out being the first C channels, contiguous.

    No operation of torch comes before the row: it reads what is contiguous where it is, and gathers what is not. None
    where only a copy will do: on other executors, of large outputs, of some channels of several samples.
    """
    batch, cut = tensors.state.shape[1], whole.shape != tensors.model_out.shape
    if executor != "cpp" or tensors.channels > 1 or tensors.unguided is not None or (cut and batch != 1):
        return None
    if not whole.is_contiguous() and whole.numel() > GATHERED:
        return None
    check(tensors)
    from fastdiff.engine import native

    return native.bind_within(tensors, whole)


def on_device(step: Callable[..., T], device: torch.device) -> Callable[..., T]:
    """A step that Triton launches, on its tensors' device whichever is current."""
    if device.type != "cuda":
        return step

    def guarded(*outputs: Tensor | None) -> T:
        with torch.cuda.device(device):
            return step(*outputs)

    return guarded


def reads_in_place(executor: str, dtype: torch.dtype) -> bool:
    """Whether `bind_apart`'s step reads an x of this dtype where the caller has it."""
    return executor == "cpp" and dtype == torch.float32


def bind_apart(tensors: StepTensors, executor: str) -> Apart:
    """Check once and return `step(i, model_out, x, first, denoised)`: row i of a batch of one on the caller's tensors.

    For loops that are somebody else's, whose tensors are other ones each time. Each must have the shape, dtype, device
    and memory format of the one that was bound. x: fp32, the row's x, where `reads_in_place`; None: x is in its
    register. first: like model_in, receives the first output, whose register is then undefined. denoised may be None.
    """
    check(tensors)
    if tensors.state.shape[1] != 1 or tensors.model_in is None:
        raise ValueError(f"bind_apart: expected a batch of one and model_in, got state {tuple(tensors.state.shape)}")
    backends.require(executor, tensors.state.device)
    if executor in ("cpp", "cuda"):
        from fastdiff.engine import native

        return native.bind_apart(tensors, executor)

    def step(i: int, model_out: Tensor, x: Tensor | None, first: Tensor, denoised: Tensor | None) -> None:
        tensors.row.fill_(i)
        bind(replace(tensors, model_out=model_out, model_in=first, denoised=denoised), executor)(model_out)

    return step


def _affine_step(*arguments: object, executor: str) -> None:
    tensors = StepTensors(*arguments)  # type: ignore[arg-type]
    bind(tensors, executor)(tensors.model_out, tensors.unguided, tensors.perturbed)


def _fake_affine_step(*arguments: object, executor: str) -> None:
    check(StepTensors(*arguments))  # type: ignore[arg-type]


_library.impl("affine_step", _affine_step, "CompositeExplicitAutograd")
torch.library.register_fake("fastdiff::affine_step", _fake_affine_step, lib=_library)


def check(t: StepTensors) -> None:
    """Raise ValueError or TypeError unless every tensor has the shape, dtype, device and layout of `StepTensors`."""
    given = Checks("affine_step", t.state)
    batch, sample = t.state.shape[1], tuple(t.state.shape[2:])
    one, several = ((batch, *sample),), tuple((n * batch, *sample) for n in (1, 2, 3))
    given.branches(t.model_out, t.unguided, t.perturbed, batch, sample)
    if t.variance is not None:
        given.image("variance", t.variance, (t.model_out.dtype,), one)
    if t.mix is not None:
        given.numbers("mix", t.mix, (torch.float32,), ((batch, at.MIX),))
    elif t.perturbed is not None or t.model_out.shape[0] == 3 * batch:
        raise ValueError("affine_step: a perturbed branch needs mix, whose last column is its scale; got None")
    if t.momentum is not None:
        given.image("momentum", t.momentum, (torch.float32,), one)
    if t.model_in is not None:
        given.image("model_in", t.model_in, MODEL_DTYPES, several)
    if t.model_time is not None:
        given.numbers("model_time", t.model_time, (torch.float32,), ((batch,), (2 * batch,), (3 * batch,)))
    if t.denoised is not None:
        given.image("denoised", t.denoised, (torch.float32,), one)
    if t.noise is not None:
        if tuple(t.noise.shape[1:]) != (batch, *sample):
            raise ValueError(f"affine_step: noise has shape {tuple(t.noise.shape)}, expected [draws, *{one[0]}]")
        given.image("noise", t.noise.flatten(0, 1), (torch.float32,), ((t.noise.shape[0] * batch, *sample),))
    for name, dtype in (("row", torch.int32), ("seed", torch.int64), ("status", torch.int32), ("ticket", torch.int32)):
        given.numbers(name, getattr(t, name), (dtype,), ((batch,),))
    given.numbers("guidance", t.guidance, (torch.float32,), ((batch,),))
    given.table(t.coef, t.ids)
