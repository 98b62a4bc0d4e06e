"""The loop of a k-diffusion function: model, callback, draw, row.

May import: engine (the row op), tables. Buffers are kept by shape and stream and lent to one run at a time, so threads,
and models that sample inside, do not meet in them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.engine import backends, ops, torch_normals
from fastdiff.errors import BackendUnavailable
from fastdiff.integrations.k_diffusion.tables import SLOPE_FIRST, Recipe, Refused

Model = Callable[..., Tensor]
Draw = Callable[[Tensor], Any]  # fills one tensor [B, *S] with the next draw

KEPT_BUFFERS = 4  # sets of buffers that wait for their next run
KEPT_STEPS = 8  # bound tables in each set


class Key(NamedTuple):
    """Which runs may follow each other in one memory.

    stream: a run returns while its kernels are queued, and only on its own stream are the next run's behind them.
    Memory that is dropped goes back to torch's allocator for the same stream, where it was made.
    """

    shape: torch.Size
    device: torch.device
    layout: torch.memory_format
    stream: int


class Memory:
    """The registers of one shape on one stream, and the tables bound to them."""

    def __init__(self, key: Key, registers: int) -> None:
        self.key = key
        shape, device, layout, _ = key
        batch = shape[0]

        def images(count: int) -> Tensor:
            return (
                torch.zeros(count * batch, *shape[1:], dtype=torch.float32, device=device)
                .to(memory_format=layout)
                .unflatten(0, (count, batch))
            )

        def integers(dtype: torch.dtype) -> Tensor:
            return torch.zeros(batch, dtype=dtype, device=device)

        with torch.inference_mode(False):
            self.state, self.noise = images(registers), images(1)
            self.row, self.status, self.ticket = (integers(torch.int32) for _ in range(3))
            self.seed, self.guidance = integers(torch.int64), torch.ones(batch, dtype=torch.float32, device=device)
        self.registers = list(self.state.unbind())
        self.slot = self.noise[0]
        self._steps: OrderedDict[Any, tuple[ops.Step, Recipe]] = OrderedDict()
        self._sigmas: OrderedDict[Any, tuple[Tensor, tuple[Tensor, ...], Recipe]] = OrderedDict()

    def step(self, recipe: Recipe, like: Tensor, external: bool) -> ops.Step:
        """The row op on this recipe's table, for model outputs of this dtype; bound at its first use."""
        key = (id(recipe), like.dtype, external)
        if key not in self._steps:
            self._steps[key] = (self._bind(recipe, like, external), recipe)  # the recipe, so that its id stays its own
            if len(self._steps) > KEPT_STEPS:
                self._steps.popitem(last=False)
        self._steps.move_to_end(key)
        return self._steps[key][0]

    def sigmas(self, recipe: Recipe, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What each model call is shown, [B]; made anew where a model has written into the last run's."""
        key = (id(recipe), dtype)
        if key not in self._sigmas or self._sigmas[key][0]._version:
            with torch.inference_mode(False):
                table = torch.tensor(recipe.sigma, dtype=dtype, device=self.state.device)
                table = table.unsqueeze(1).expand(-1, self.key.shape[0]).contiguous()
                self._sigmas[key] = (table, table.unbind(), recipe)
            if len(self._sigmas) > KEPT_STEPS:
                self._sigmas.popitem(last=False)
        return self._sigmas[key][1]

    def _bind(self, recipe: Recipe, like: Tensor, external: bool) -> ops.Step:
        packed, device = recipe.external if external else recipe.packed, self.state.device
        tensors = ops.StepTensors(
            state=self.state,
            model_out=like,
            model_in=None,
            model_time=None,
            coef=torch.from_numpy(packed.coef).to(device),
            ids=torch.from_numpy(packed.ids).to(device),
            row=self.row,
            seed=self.seed,
            guidance=self.guidance,
            noise=self.noise if external else None,
            denoised=None,
            status=self.status,
            ticket=self.ticket,
        )
        return ops.bind(tensors, backends.choose(device))


_kept: list[Memory] = []
_lock = threading.Lock()


def _stream(device: torch.device) -> int:
    """The handle of the stream that kernels go to now; 0 on a CPU, which has none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@contextmanager
def _lent(x: Tensor, registers: int) -> Iterator[Memory]:
    """Buffers of x's shape for one run on the current stream: some that wait, or new ones."""
    layout = torch.contiguous_format
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    key = Key(x.shape, x.device, layout, _stream(x.device))
    with _lock:
        found = next((m for m in _kept if m.key == key and len(m.registers) >= registers), None)
        if found is not None:
            _kept.remove(found)
    memory = found or Memory(key, registers)
    try:
        yield memory
    finally:
        with _lock:
            _kept[:] = [*_kept, memory][-KEPT_BUFFERS:]


def clear() -> None:
    """Give back the memory of all buffers that wait for their next run."""
    with _lock:
        _kept.clear()


def check_state(name: str, x: Tensor) -> None:
    """Refused unless a run can start from x."""
    if not isinstance(x, Tensor) or x.dtype not in ops.MODEL_DTYPES:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise Refused(
            f"sample_{name}: x must be a float32, float16 or bfloat16 tensor (the state is float32), got {got}"
        )
    if x.dim() < 2 or not x.numel():
        raise Refused(f"sample_{name}: x must be [batch, *sample] with at least one element, got {tuple(x.shape)}")
    try:
        backends.choose(x.device)
    except BackendUnavailable as missing:
        raise Refused(f"sample_{name}: {missing}") from missing


def run(
    recipe: Recipe,
    model: Model,
    x: Tensor,
    extra_args: Mapping[str, Any],
    callback: Callable[[int, Tensor, Tensor], None] | None,
    draw: Draw | None,
    drawn: Sequence[bool],
    seeds: Tensor | None,
    on_step: Callable[[], Any] | None,
    on_call: Callable[[], Any] | None,
) -> Tensor:
    """Sample from x [B, *S], the state at the first sigma: [B, *S] in x's dtype.

    model(x, sigma [B], **extra_args) gets a tensor of its own each time, as does callback(step, x, denoised), which
    comes between the model and the row; what either writes into x or denoised counts as in k-diffusion. draw: fills the
    slot, in the stretches between model calls that `drawn` names; without it the noise is made from `seeds` in the
    row. on_step, on_call: progress.
    """
    on_gpu = torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
    with torch.no_grad(), on_gpu, _lent(x, recipe.plan.registers) as memory:
        plan, dtype, slot = recipe.plan, x.dtype, memory.slot
        slope_first = recipe.name in SLOPE_FIRST
        external = draw is not None and any(recipe.used)
        sigmas = memory.sigmas(recipe, dtype)
        if seeds is not None:
            memory.seed.copy_(seeds)
        memory.registers[plan.rows[0].x].copy_(x)
        memory.row.fill_(0 if recipe.opens else 1)
        if draw is not None and drawn[0]:
            (draw if recipe.used[0] or draw is not torch_normals.fill else torch_normals.skip)(slot)
        if recipe.opens:
            memory.step(recipe, memory.state[0], external)(memory.state[0])
        copy = _copy_for_versions if torch.is_inference_mode_enabled() else _copy
        model_dtype: torch.dtype | None = None
        for r, row in enumerate(plan.rows[1:]):
            begins = recipe.first[r]
            if begins is not None and on_step is not None:
                on_step()
            state = memory.registers[row.x]
            shown = copy(state, dtype)
            denoised = model(shown, sigmas[r], **extra_args)
            if on_call is not None:
                on_call()
            written = shown._version
            if written:
                state.copy_(shown)
            taken = _taken(denoised, shown, recipe, r, memory.key.layout)
            if callback is not None and begins is not None:
                # the slope is there before the callback, or else what the callback makes of denoised counts
                callback(begins, shown, denoised.clone() if slope_first else denoised)
                if not slope_first:
                    taken = _taken(denoised, shown, recipe, r, memory.key.layout)
                if shown._version != written:
                    taken = taken.float() + (shown.float() - state) if slope_first else taken
                    state.copy_(shown)
            if draw is not None and drawn[r + 1]:
                (draw if recipe.used[r + 1] or draw is not torch_normals.fill else torch_normals.skip)(slot)
            if taken.dtype is not model_dtype:
                step, model_dtype = memory.step(recipe, taken, external), taken.dtype
            step(taken)
        return memory.registers[plan.result].to(dtype, copy=True)


def _copy(state: Tensor, dtype: torch.dtype) -> Tensor:
    return state.clone() if dtype == torch.float32 else state.to(dtype)


def _copy_for_versions(state: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy that knows when it is written to, which tensors made in inference mode do not."""
    with torch.inference_mode(False):
        return _copy(state, dtype)


def _taken(denoised: Any, x: Tensor, recipe: Recipe, r: int, layout: torch.memory_format) -> Tensor:
    """The model's output as the row reads it; ValueError or TypeError where it is no estimate of x."""
    if not isinstance(denoised, Tensor) or not denoised.is_floating_point():
        got = denoised.dtype if isinstance(denoised, Tensor) else type(denoised).__name__
        raise TypeError(
            f"sample_{recipe.name}: the model returned {got} in call {r}, expected the denoised x, a tensor"
        )
    if denoised.shape != x.shape or denoised.device != x.device:
        raise ValueError(
            f"sample_{recipe.name}: the model returned {tuple(denoised.shape)} on {denoised.device} in call {r}, "
            f"expected the denoised x, {tuple(x.shape)} on {x.device}"
        )
    if denoised.dtype not in ops.MODEL_DTYPES:
        denoised = denoised.float()
    return denoised.contiguous(memory_format=layout)


def from_sampler(
    recipe: Recipe,
    sampler: Callable[[Tensor, Tensor], Tensor],
    sigmas: Sequence[Tensor],
    following: Sequence[Tensor],
) -> Draw:
    """The draws of a noise sampler, called in order with sigma and sigma_next of each draw."""
    coming = zip(sigmas, following, strict=True)

    def draw(slot: Tensor) -> None:
        noise = sampler(*next(coming))
        if not isinstance(noise, Tensor) or noise.shape != slot.shape:
            got = tuple(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
            raise ValueError(
                f"sample_{recipe.name}: noise_sampler(sigma, sigma_next) returned {got}, expected {tuple(slot.shape)}"
            )
        slot.copy_(noise)

    return draw
