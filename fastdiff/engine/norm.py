"""The norm op: group normalisation of a sum, its affine map, a scale and shift, and SiLU, in one pass over the image.

May import: fastdiff.kernels and the compiled extension (through norm_cpu), backends, the reference. Networks call
`norm_act` and `channel_add`; torch.compile and torch's tracers see them as one operator, autograd differentiates
`norm_act`. Forward derivatives and torch.func's transforms get it in plain torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_tracing, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from fastdiff.engine import backends, norm_cpu, reference_norm
from fastdiff.engine.dispatch import dispatches, transformed
from fastdiff.engine.norm_checks import Inputs, check, check_add, check_sizes, in_rows, lies_last, row
from fastdiff.errors import BackendUnavailable

_IMAGES = "Tensor? before, Tensor? scale, Tensor? shift"
_library = torch.library.Library("fastdiff", "FRAGMENT")
_library.define(
    f"norm_act(Tensor x, Tensor weight, Tensor bias, {_IMAGES}, Tensor? residual, Tensor? skip, int groups, float eps, "
    "bool act, bool keep, *, str executor) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"norm_act_backward(Tensor grad, Tensor total, Tensor weight, Tensor bias, {_IMAGES}, Tensor stats, int groups, "
    "bool act, *, str executor) -> (Tensor, Tensor)"
)
_library.define("channel_add(Tensor x, Tensor? before, Tensor? residual, *, str executor) -> Tensor")


def norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    *,
    act: bool = True,
    before: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    executor: str | None = None,
) -> Tensor:
    """y = silu((1 + scale) (weight (u - mean) / sqrt(var + eps) + bias) + shift), u = x + residual + before.

    mean, var: of the C / groups channels of a group over all pixels of a sample (Wu & He 2018), summed in fp32.
    x: [B, C, *S] fp32/fp16/bf16 (float64 on executor "reference"), contiguous or channels_last; others are copied.
    weight, bias: [C]. before: [B, C] or [C], added to every pixel (a convolution's bias, the time of a DDPM block).
    scale, shift: [B, C] or [C], of the normalised image (Dhariwal & Nichol 2021, sec. 3). residual: like x, or [1, ...]
    for all samples. skip: [B, C', *S], further channels of u after those of x; weight and the vectors then have C + C'.
    act: SiLU or not. executor: None is the fastest on x's device of "cpp", "triton" and "reference". Returns y like u,
    in x's dtype and layout. Differentiable in every tensor. Deterministic; capturable on "triton".
    Raises ValueError or TypeError for what does not fit, BackendUnavailable for an executor that is not there.
    """
    given = Inputs(x, weight, bias, before, scale, shift, residual, skip)
    return _norm(given, groups, eps, act, False, executor)[0]


def sum_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    *,
    act: bool = True,
    before: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    executor: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, u): `norm_act` that writes the sum u too, in x's dtype, in the same pass."""
    given = Inputs(x, weight, bias, before, scale, shift, residual, skip)
    y, total = _norm(given, groups, eps, act, True, executor)[:2]
    return y, total


def channel_add(
    x: Tensor, before: Tensor | None = None, residual: Tensor | None = None, executor: str | None = None
) -> Tensor:
    """x + residual + before, arguments as of `norm_act`. Differentiable; under torch.compile it is torch's own sum."""
    if before is None and residual is None:
        return x
    if executor is None and _direct((x, before, residual)):
        known = norm_cpu.bound_sum(x, before, residual)
        if known is not None:
            total = torch.empty_like(x)
            norm_cpu.run_sum(known, x, before, residual, total)
            return total
    before = row(before, x.shape[0])
    differentiates = _needs_gradient((x, before, residual))
    if torch.compiler.is_compiling() or executor == "reference" or differentiates or transformed():
        check_add(x, before, residual, "reference")
        return reference_norm.total_of(x, before, residual, None).to(x.dtype)
    chosen = executor or choose(x.device, x.dtype)
    if not dispatches((x, before, residual)):
        return _add(x, before, residual, chosen)
    added: Tensor = torch.ops.fastdiff.channel_add(x, before, residual, executor=chosen)
    return added


@functools.cache
def choose(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The executor that None means: "triton" on a GPU and "cpp" on a CPU where they are there, else "reference"."""
    wanted = "triton" if device.type == "cuda" else "cpp"
    backend = backends.probe()[wanted]
    fits = backend.ok and device.type in (*backend.devices, "meta") and dtype != torch.float64
    return wanted if fits else "reference"


def launches(batch: int, pixels: int, channels: int, groups: int, size: int) -> int:
    """Kernels that "triton" launches for one call on images of `size` bytes an element."""
    from fastdiff.kernels import norm as triton_norm

    return triton_norm.launches(batch, pixels, channels, groups, size)


def _norm(given: Inputs, groups: int, eps: float, act: bool, keep: bool, executor: str | None) -> tuple[Tensor, ...]:
    """y, the sum where it is to be kept, and what else came with them."""
    if executor is None and _direct(given):
        known = norm_cpu.bound(given, groups, eps, act)
        if known is not None:
            y = _image(given.x, given.skip, known.last)
            total = _image(given.x, given.skip, known.last) if keep else None
            norm_cpu.run(known, given, y, total)
            return (y,) if total is None else (y, total)
    if not torch.compiler.is_compiling() and transformed():
        given = in_rows(given)
        check_sizes(given, groups, "reference")
        return reference_norm.forward(given, groups, eps, act)
    given = _dense(given)
    differentiates = _needs_gradient(given)
    keep = keep or (differentiates and not (given.residual is None and given.skip is None))
    arguments = *given, groups, eps, act, keep
    chosen = executor or "auto"
    if differentiates or dispatches(given):
        found: tuple[Tensor, ...] = torch.ops.fastdiff.norm_act(*arguments, executor=chosen)
        return found
    return _forward(*arguments, executor=chosen)  # the dispatcher costs as much as a small image


def _needs_gradient(tensors: Iterable[Tensor | None]) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:  # `any` of a generator takes twice as long
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _direct(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call on these, the image first, needs nothing but the CPU's kernel."""
    x = tensors[0]
    return (  # `dispatches` and `transformed` spelled out: a call costs as much as what it asks
        type(x) is Tensor
        and x.is_cpu
        and not is_dynamo_compiling()
        and not (_is_tracing() or _len_torch_dispatch_stack())
        and not (_are_functorch_transforms_active() or forward_ad._current_level >= 0)
        and not _needs_gradient(tensors)
        and choose(x.device, x.dtype) == "cpp"
    )


def _dense(given: Inputs) -> Inputs:
    """As `in_rows`, and the images in one memory format: channels_last where x is or its strides say so."""
    x, weight, bias, before, scale, shift, residual, skip = in_rows(given)
    if lies_last(x, residual, skip) is None:
        wanted = torch.contiguous_format
        if x.dim() == 4 and (x.is_contiguous(memory_format=torch.channels_last) or x.stride(1) == 1):
            wanted = torch.channels_last
        x = x.contiguous(memory_format=wanted)
        residual = None if residual is None else residual.contiguous(memory_format=wanted)
        skip = None if skip is None else skip.contiguous(memory_format=wanted)
    return Inputs(x, weight, bias, before, scale, shift, residual, skip)


def _forward(*arguments: Any, executor: str) -> tuple[Tensor, Tensor, Tensor]:
    given, (groups, eps, act, keep) = Inputs(*arguments[:8]), arguments[8:]
    x = given.x
    executor = choose(x.device, x.dtype) if executor == "auto" else executor
    last = check(given, groups, executor)
    _require(executor, x.device)
    if executor == "reference":
        y, total, stats = reference_norm.forward(given, groups, eps, act)
        return _like(y, last), _like(total, last) if keep else x.new_empty(0), stats
    y, total, stats = _outputs(x, given.skip, groups, keep, last)
    run: Any
    if executor == "cpp":
        run = norm_cpu.forward
    else:
        from fastdiff.kernels import norm as triton_norm

        run = triton_norm.forward
    if x.numel():
        run(given, groups, eps, act, y, total if keep else None, stats, last)
    return y, total, stats


def _image(x: Tensor, skip: Tensor | None, last: bool) -> Tensor:
    if skip is None:
        return torch.empty_like(x)
    shape = list(x.shape)
    shape[1] += skip.shape[1]
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _outputs(x: Tensor, skip: Tensor | None, groups: int, keep: bool, last: bool) -> tuple[Tensor, Tensor, Tensor]:
    y = _image(x, skip, last)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    stats = torch.empty(x.shape[0], groups, 2, dtype=wide, device=x.device)
    return y, torch.empty_like(y) if keep else x.new_empty(0), stats


def _like(image: Tensor, last: bool) -> Tensor:
    return image.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _require(executor: str, device: torch.device) -> None:
    if executor == "cuda":
        raise BackendUnavailable("norm_act has no CUDA C++ kernel", "use executor 'triton', or None for the fastest")
    if executor != "reference" or device.type != "meta":
        backends.require(executor, device)


def _fake_forward(*arguments: Any, executor: str) -> tuple[Tensor, Tensor, Tensor]:
    given, (groups, _, _, keep) = Inputs(*arguments[:8]), arguments[8:]
    return _outputs(given.x, given.skip, groups, keep, check(given, groups, executor))


def _backward(grad: Tensor, *arguments: Any, executor: str) -> tuple[Tensor, Tensor]:
    """The gradient of u, and sums over pixels [B, 3, C]: g, g n and du, with n = (u - mean) / sqrt(var + eps).

    g is the gradient of what SiLU was given; it is computed again, so the forward pass saves the statistics only.
    """
    given, (stats, groups, act) = Inputs(*arguments[:6]), arguments[6:]
    total = given.x
    executor = choose(total.device, total.dtype) if executor == "auto" else executor
    last = check(given, groups, executor)
    grad = _like(grad, last)
    if executor == "reference":
        du, sums = reference_norm.backward(grad, given, stats, groups, act)
        return _like(du, last), sums
    du = torch.empty_like(total)
    sums = torch.empty(*total.shape[:1], 3, total.shape[1], dtype=torch.float32, device=total.device)
    run: Any
    if executor == "cpp":
        run = norm_cpu.backward
    else:
        from fastdiff.kernels import norm_backward

        run = norm_backward.backward
    if total.numel():
        run(grad, given, stats, groups, act, du, sums, last)
    return du, sums if total.numel() else sums.zero_()


def _fake_backward(grad: Tensor, *arguments: Any, executor: str) -> tuple[Tensor, Tensor]:
    given, (stats, groups, _) = Inputs(*arguments[:6]), arguments[6:]
    check(given, groups, executor)
    return torch.empty_like(given.x), stats.new_empty(given.x.shape[0], 3, given.x.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, before, scale, shift, residual, skip, groups, _, act, keep = inputs
    _, total, stats = output
    if not keep and not (residual is None and skip is None):
        raise ValueError("norm_act: the gradient needs the sum; call it with keep=True, or through engine.norm")
    # of a sum that was not written x and before are enough
    saved = (total, None) if keep else (x, before)
    ctx.save_for_backward(saved[0], weight, bias, saved[1], scale, shift, stats)
    ctx.groups, ctx.act, ctx.executor, ctx.keep = groups, act, keyword_only_inputs["executor"], keep
    ctx.channels, ctx.shared = x.shape[1], residual is not None and residual.shape[0] < x.shape[0]
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (before, scale, shift)]
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, grad_total: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    total, weight, bias, before, scale, shift, stats = ctx.saved_tensors
    du: Any = grad_total if ctx.keep else None
    sums = None
    if grad is not None:
        given = grad, total, weight, bias, before, scale, shift, stats, ctx.groups, ctx.act
        own, sums = torch.ops.fastdiff.norm_act_backward(*given, executor=ctx.executor)
        du = own if du is None else own + du
    x, residual, skip = du, du, None
    if du is not None and ctx.channels < total.shape[1]:
        x = residual = du[:, : ctx.channels]
        skip = du[:, ctx.channels :]
    if ctx.shared and residual is not None:
        residual = residual.sum(0, keepdim=True)
    d_before = None
    if ctx.dtypes[0] is not None and du is not None:
        d_before = sums[:, 2] if sums is not None and not ctx.keep else du.flatten(2).sum(2, dtype=stats.dtype)
    of_vectors = _of_vectors(sums, weight, bias, scale, ctx.dtypes[1] is not None, ctx.dtypes[2] is not None)
    vectors = [
        None if value is None or dtype is None else value.to(dtype)
        for value, dtype in zip((d_before, *of_vectors[2:]), ctx.dtypes, strict=True)
    ]
    needs = ctx.needs_input_grad
    residual, skip = (residual if needs[6] else None), (skip if needs[7] else None)
    return x, *of_vectors[:2], *vectors, residual, skip, None, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    *tensors, ctx.groups, ctx.act = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_backward(ctx: Any, of_du: Tensor, of_sums: Tensor) -> tuple[Tensor | None, ...]:
    """Second derivatives, by torch from the formulas of the first; there are no third ones."""
    *tensors, stats = ctx.saved_tensors
    with torch.enable_grad():
        own = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
        grad, total, weight, bias, before, scale, shift = own
        assert grad is not None and total is not None and weight is not None and bias is not None
        made = reference_norm.statistics(total, before, stats)
        given = Inputs(total, weight, bias, before, scale, shift, None, None)
        found = reference_norm.backward(grad, given, made, ctx.groups, ctx.act)
        asked = [tensor for tensor in own if tensor is not None]
        made_of = iter(torch.autograd.grad(found, asked, (of_du, of_sums.to(found[1].dtype)), allow_unused=True))
    return *(None if tensor is None else next(made_of) for tensor in own), None, None, None


def _of_vectors(
    sums: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor | None, has_scale: bool, has_shift: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of weight, bias, scale and shift from the sums of g and g n."""
    if sums is None:
        return None, None, None, None
    g, gn = sums[:, 0], sums[:, 1]
    of_scale = gn * weight + g * bias if has_scale else None
    of_shift = g if has_shift else None
    if scale is not None:
        more = 1 + scale.to(sums.dtype)
        g, gn = g * more, gn * more
    return gn.sum(0).to(weight.dtype), g.sum(0).to(bias.dtype), of_scale, of_shift


def _add(x: Tensor, before: Tensor | None, residual: Tensor | None, executor: str) -> Tensor:
    check_add(x, before, residual, executor)
    last = lies_last(x, residual)
    if last is None:
        return reference_norm.total_of(x, before, residual, None).to(x.dtype)
    _require(executor, x.device)
    total = torch.empty_like(x)
    if not x.numel():
        return total
    if executor == "cpp":
        norm_cpu.add(x, before, residual, total, last)
    elif executor == "triton":
        from fastdiff.kernels import channel_add as triton_add

        triton_add.add(x, before, residual, total, last)
    else:
        total.copy_(reference_norm.total_of(x, before, residual, None))
    return total


def _dispatched_add(x: Tensor, before: Tensor | None, residual: Tensor | None, *, executor: str) -> Tensor:
    return _add(x, before, residual, executor)


def _fake_add(x: Tensor, before: Tensor | None, residual: Tensor | None, *, executor: str) -> Tensor:
    check_add(x, before, residual, executor)
    return torch.empty_like(x)


for _name, _run, _fake in (
    ("norm_act", _forward, _fake_forward),
    ("norm_act_backward", _backward, _fake_backward),
    ("channel_add", _dispatched_add, _fake_add),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastdiff::{_name}", _fake, lib=_library)
torch.library.register_autograd("fastdiff::norm_act", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd(
    "fastdiff::norm_act_backward", _differentiate_backward, setup_context=_save_backward, lib=_library
)
