"""The row op: one schema, one set of checks, one fake implementation, and the choice of executor.

May import: fastdiff.kernels and the compiled extension (through engine.native), the reference.
An executor is chosen once, when a plan is bound to a device (`bind`); nothing falls back silently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fastdiff.compiler import layout as at
from fastdiff.engine import backends, reference

_ARGUMENTS = (
    "Tensor(a!) state, Tensor model_out, Tensor(b!)? model_in, Tensor(c!)? model_time, Tensor coef, Tensor ids, "
    "Tensor(d!) row, Tensor seed, Tensor guidance, Tensor? noise, Tensor(e!)? denoised, Tensor(f!) status, "
    "Tensor(g!) ticket, Tensor? unguided=None, Tensor? perturbed=None, Tensor? mix=None, Tensor? momentum=None, "
    "Tensor? variance=None"
)
_library = torch.library.Library("fastdiff", "DEF")
_library.define(f"affine_step({_ARGUMENTS}, *, str executor) -> ()")

MODEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Step = Callable[..., None]
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
        return _channels(self.state[0])


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


def bind(tensors: StepTensors, executor: str) -> Step:
    """Check once and return `step(model_out, unguided, perturbed)`: the hot path, no dispatcher and no allocation.

    Its tensors must keep the shapes, dtypes and memory format of those that were bound; what was None stays None.
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

        return affine.bind(**own)

    def step(model_out: Tensor, unguided: Tensor | None = None, perturbed: Tensor | None = None) -> None:
        reference.affine_step(**(own | {"model_out": model_out, "unguided": unguided, "perturbed": perturbed}))

    return step


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


def _channels(sample: Tensor) -> int:
    """1 when [B, *S] is contiguous, C when it is channels_last, 0 when it is neither."""
    if sample.is_contiguous():
        return 1
    if sample.dim() == 4 and sample.is_contiguous(memory_format=torch.channels_last):
        return sample.shape[1]
    return 0


def check(t: StepTensors) -> None:
    """Raise ValueError or TypeError unless every tensor has the shape, dtype, device and layout of `StepTensors`."""
    if t.state.dim() < 3:
        raise ValueError(f"affine_step: state must be [registers, batch, *shape], got {tuple(t.state.shape)}")
    registers, batch, *shape = t.state.shape
    sample = tuple(shape)
    if t.state.numel() == 0:
        raise ValueError(f"affine_step: state has no elements, got {tuple(t.state.shape)}; draw at least one sample")
    channels = _channels(t.state[0])
    if channels == 0 or (registers > 1 and t.state.stride(0) != t.state[0].numel()):
        raise ValueError(
            "affine_step: state must hold dense registers, contiguous or channels_last, "
            f"got strides {t.state.stride()} for shape {tuple(t.state.shape)}; allocate it with Sampler"
        )

    def expect(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shapes: tuple[tuple[int, ...], ...]) -> None:
        if tensor.dtype not in dtypes:
            raise TypeError(f"affine_step: {name} has dtype {tensor.dtype}, expected {_either(dtypes)}; cast it first")
        if tuple(tensor.shape) not in shapes:
            raise ValueError(f"affine_step: {name} has shape {tuple(tensor.shape)}, expected {_either(shapes)}")
        if tensor.device != t.state.device:
            raise ValueError(
                f"affine_step: {name} is on {tensor.device}, the state on {t.state.device}; move one of them"
            )

    def expect_image(
        name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shapes: tuple[tuple[int, ...], ...]
    ) -> None:
        expect(name, tensor, dtypes, shapes)
        if not _dense_as(tensor, channels):
            wanted = "contiguous" if channels == 1 else "channels_last"
            raise ValueError(f"affine_step: {name} must be {wanted} like the state, got strides {tensor.stride()}")

    batches = tuple((n * batch, *sample) for n in (1, 2, 3))
    stacked = 1 if t.unguided is not None else 2 if t.perturbed is not None else 3
    expect_image("model_out", t.model_out, MODEL_DTYPES, batches[:stacked])
    for name in ("unguided", "perturbed", "variance"):
        given = getattr(t, name)
        if given is not None:
            expect_image(name, given, (t.model_out.dtype,), batches[:1])
    if t.mix is not None:
        expect("mix", t.mix, (torch.float32,), ((batch, at.MIX),))
    elif t.perturbed is not None or t.model_out.shape[0] == 3 * batch:
        raise ValueError("affine_step: a perturbed branch needs mix, whose last column is its scale; got None")
    if t.momentum is not None:
        expect_image("momentum", t.momentum, (torch.float32,), batches[:1])
    if t.model_in is not None:
        expect_image("model_in", t.model_in, MODEL_DTYPES, batches)
    if t.model_time is not None:
        expect("model_time", t.model_time, (torch.float32,), ((batch,), (2 * batch,), (3 * batch,)))
    if t.denoised is not None:
        expect_image("denoised", t.denoised, (torch.float32,), batches[:1])
    if t.noise is not None:
        expect("noise", t.noise, (torch.float32,), ((t.noise.shape[0], batch, *sample),))
        if not _dense_as(t.noise.flatten(0, 1), channels):
            raise ValueError("affine_step: noise must be dense and in the state's memory format")
    for name, dtype in (("row", torch.int32), ("seed", torch.int64), ("status", torch.int32), ("ticket", torch.int32)):
        expect(name, getattr(t, name), (dtype,), ((batch,),))
    expect("guidance", t.guidance, (torch.float32,), ((batch,),))
    _check_table(t)


def _check_table(t: StepTensors) -> None:
    if t.coef.dtype != torch.float32 or t.ids.dtype != torch.int32:
        raise TypeError(f"affine_step: coef and ids must be float32 and int32, got {t.coef.dtype} and {t.ids.dtype}")
    terms = (t.coef.shape[-1] - at.COEF_FIXED) // at.NOISE_STRIDE
    rows = t.coef.shape[0]
    if t.coef.dim() != 2 or rows == 0:
        raise ValueError(f"affine_step: coef must be [rows, columns] with at least one row, got {tuple(t.coef.shape)}")
    expected = (
        (rows, at.COEF_FIXED + at.NOISE_STRIDE * terms),
        (rows, at.IDS_FIXED + at.TERM_IDS_STRIDE * terms),
    )
    if (tuple(t.coef.shape), tuple(t.ids.shape)) != expected:
        raise ValueError(
            f"affine_step: coef {tuple(t.coef.shape)} and ids {tuple(t.ids.shape)} are not one packed plan; "
            "use plan.pack()"
        )
    if not (t.coef.is_contiguous() and t.ids.is_contiguous()):
        raise ValueError("affine_step: coef and ids must be contiguous; call .contiguous() when uploading the plan")
    for name in ("coef", "ids"):
        if getattr(t, name).device != t.state.device:
            raise ValueError(f"affine_step: {name} is on {getattr(t, name).device}, the state on {t.state.device}")


def _dense_as(tensor: Tensor, channels: int) -> bool:
    if channels == 1:
        return tensor.is_contiguous()
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _either(options: tuple[object, ...]) -> str:
    return " or ".join(str(option) for option in options)
