"""The run of a fast scheduler: which row a step is, its draws, its output.

May import: torch, errors, engine, and the other files of this folder. `Run.step` is the hot path: it asks the device
for nothing, and what does not change from step to step is made ready before (`Registers.ready`).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, empty_like, is_grad_enabled

from fastdiff.compiler.capture.source import check_interface
from fastdiff.engine import torch_normals
from fastdiff.engine.ops import MODEL_DTYPES
from fastdiff.integrations.diffusers.place import Place
from fastdiff.integrations.diffusers.registers import Ready, Registers
from fastdiff.integrations.diffusers.standing import OURS, Hosted, first_index, look, plain_copy, unchanged
from fastdiff.integrations.diffusers.table import Draw, Table, parameters, table_of

NOWHERE = -1  # no step index


class Run:
    """What a fast scheduler does since its last `set_timesteps`.

    One step at a time: a lock keeps two threads apart. Where steps count on from each other, another thread may go on
    where one stopped, and is refused where it does anything else.
    _expected: the `_step_index` at which the next step, in this thread, is the next row whatever its timestep.
    """

    def __init__(self, scheduler: Any, kind: type, before: Run | None = None) -> None:
        self.kind, self.name = kind, kind.__name__
        self.defaults = parameters(kind)
        special = ("return_dict", "generator", "variance_noise")
        self._forms, self._by_generator, self._by_noise = (name in self.defaults for name in special)
        self.hosted: Hosted = Hosted() if before is None else before.hosted.keep(scheduler)
        self.options: dict[str, Any] = {}
        self.follows = False
        if before is None:
            check_interface(plain_copy(scheduler, kind, self.hosted), self.name, {})
        self._settle(scheduler, None)
        self.registers: Registers | None = None if before is None else before.registers
        self._forget()

    def _settle(self, scheduler: Any, position: int | None) -> None:
        """The table and the timesteps of the scheduler as it stands."""
        self._take_table(self._table(scheduler, position))
        self.place = Place(scheduler, self.name, self.hosted)
        self._looked = look(scheduler)

    def _take_table(self, table: Table) -> None:
        """_last: the row after which the next one is looked up again, -1 for every one."""
        self.table = table
        self._expected = NOWHERE
        self._counts = table.keeps_time == "index"
        self._last = -1 if table.reads_time else len(table) - 1

    def _forget(self) -> None:
        """No step was taken yet, and nothing is bound."""
        self._seen: dict[str, Any] = {}
        self.next: int | None = None
        self._expected = NOWHERE
        self._owner: int | None = None
        self._fitted_to_nothing()
        self._ready: tuple[Ready, ...] = ()
        self._lock = threading.Lock()

    def _fitted_to_nothing(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._simple = False

    @property
    def scales(self) -> bool:
        """Whether `scale_model_input` does anything."""
        return self.table.scales

    def scale(self, scheduler: Any, sample: Tensor, timestep: Any) -> Tensor:
        """`scale_model_input` of a scheduler that scales: c_in of the row times the sample."""
        with self._lock:
            row = self._row(scheduler, timestep)
            if hasattr(scheduler, "is_scale_input_called"):
                scheduler.is_scale_input_called = True
            return sample * self.table.input_scales[row]

    def step(self, scheduler: Any, model_output: Tensor, timestep: Any, sample: Tensor, options: dict[str, Any]) -> Any:
        """One step of the original class: the row on these tensors, and its output in the original's form."""
        with self._lock:
            full, generator, given = True, None, None
            if options:
                if self._forms:
                    full = options.pop("return_dict", True)
                if options:
                    generator = options.pop("generator", None) if self._by_generator else None
                    given = options.pop("variance_noise", None) if self._by_noise else None
            if options or self._seen or self.follows:
                self._choose(scheduler, timestep, options)
            expected, row = self._expected, self.next
            if expected < 0 or scheduler._step_index != expected or get_ident() != self._owner or row is None:
                row = self._row(scheduler, timestep)
            if not self._simple or not (
                sample.shape == self._shape == model_output.shape
                and sample.dtype is self._sample_dtype
                and model_output.dtype is self._model_dtype
                and sample.is_contiguous()
                and model_output.is_contiguous()
                and sample.is_cpu
                and model_output.is_cpu
            ):
                model_output = self._adapt(model_output, sample)
            if is_grad_enabled() and (model_output.requires_grad or sample.requires_grad):
                raise RuntimeError(
                    f"{self.name}: a fast scheduler's step has no gradient, and its input requires one; call it under "
                    f"torch.no_grad(), or use {self.name} itself where you differentiate through a step"
                )
            x, call, dtype, draws, short, whole = self._ready[row]
            make, reads_denoised = whole if full else short
            if draws or self.table.on_path:
                self._draw(scheduler, draws, (model_output, timestep, sample), generator, given)
            like = sample if self._simple else self._like
            prev = empty_like(like) if dtype is None else empty_like(like, dtype=dtype)
            denoised = None
            if reads_denoised:
                single = self._sample_dtype is torch.float32
                denoised = empty_like(like) if single else empty_like(like, dtype=torch.float32)
            if x is None:
                call(row, model_output, sample, prev, denoised)
            else:
                x.copy_(sample)
                call(row, model_output, None, prev, denoised)
            self.next = row + 1
            if self._counts:
                self._expected = index = scheduler._step_index + 1
                scheduler._step_index = index
                if row >= self._last:
                    self._expected = NOWHERE
            return make(prev, denoised, sample, model_output)

    def _row(self, scheduler: Any, timestep: Any) -> int:
        """The row of this step; at the first one, the table from where the scheduler stands."""
        if self.next is None:
            first = self.place.start(scheduler, self.kind, timestep, self.table)
            if first != self.table.first or not unchanged(self._looked, scheduler):
                self._settle(scheduler, first)
                self._fitted_to_nothing()
            self.next = 0
        table = self.table
        if table.keeps_time == "value":
            return self.place.by_value(table, timestep)
        thread = get_ident()
        if self._owner != thread:
            self._take(thread, timestep)
        row = self.place.counted(table, scheduler, timestep, self.next)
        if row != self.next and table.history:
            raise RuntimeError(
                f"{self.name}: step called out of order: it stands at step {self.next} of {len(table)} and was asked "
                f"for step {row}, which needs what the steps before it left; call set_timesteps to begin again"
            )
        return row

    def _take(self, thread: int, timestep: Any) -> None:
        """Let a thread go on with the run, from the step where it stands."""
        if self._owner is not None and not self.place.is_at(self.table, self.next or 0, timestep):
            raise RuntimeError(
                f"{self.name}: two threads step one scheduler, and its steps count on from each other; give each "
                "thread a copy of its own, copy.deepcopy(scheduler), or call set_timesteps in the thread that goes on"
            )
        self._owner = thread

    def _choose(self, scheduler: Any, timestep: Any, options: dict[str, Any]) -> None:
        """Another table where arguments of `step` change the coefficients."""
        follows = False
        if "prev_timestep" in self.defaults:
            previous = options.pop("prev_timestep", None)
            follows = self.place.follows(self.table, timestep, previous, self.follows)
        for name, value in options.items():
            if name not in self.defaults:
                raise TypeError(f"{self.name}.step() got an unexpected keyword argument {name!r}")
            if isinstance(value, Tensor):
                raise TypeError(
                    f"{self.name}.step: {name} is a tensor, and a row has numbers; give a float, or use {self.name} "
                    "itself for this"
                )
        if options == self._seen and follows == self.follows:
            return
        chosen = {name: value for name, value in options.items() if value != self.defaults[name]}
        if chosen != self.options or follows != self.follows:
            if self.table.history and self.next:
                raise ValueError(
                    f"{self.name}: step options changed within a run, from {self.options} to {chosen}, and its steps "
                    "depend on each other; give every step the same ones, or call set_timesteps to begin again"
                )
            before = self.options, self.follows
            self.options, self.follows = chosen, follows
            try:
                self._take_table(self._table(scheduler, self.table.first))
            except BaseException:
                self.options, self.follows = before
                raise
            self._fitted_to_nothing()
        self._seen = dict(options)

    def _table(self, scheduler: Any, position: int | None) -> Table:
        """The table of the scheduler from this position on; None: where a run begins that nothing was said of."""
        plain = plain_copy(scheduler, self.kind, self.hosted)
        timesteps = getattr(plain, "timesteps", None)
        if timesteps is None or len(timesteps) == 0:
            raise ValueError(f"{self.name} has no timesteps; call set_timesteps with one step or more")
        if hasattr(plain, "is_scale_input_called"):
            plain.is_scale_input_called = True
        if hasattr(plain, "_step_index"):
            position = plain._step_index = first_index(plain, plain.timesteps[0]) if position is None else position
            plain._begin_index = None
        return table_of(plain, position or 0, self.options, self.follows, self.hosted)

    def _adapt(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The model output in the sample's memory format, and everything made ready for tensors like these."""
        key = sample.shape, sample.stride(), sample.dtype, sample.device, model_output.dtype
        if key != self._key:
            self._fit(model_output, sample)
            self._key = key
        assert self.registers is not None
        if model_output.shape != sample.shape or model_output.device != sample.device:
            raise ValueError(
                f"{self.name}.step: model_output is {tuple(model_output.shape)} on {model_output.device}, the sample "
                f"{tuple(sample.shape)} on {sample.device}; a row needs them alike (cut a learned variance off)"
            )
        if self.registers.lies(model_output):
            return model_output
        return self.registers.new(model_output.dtype).copy_(model_output)

    def _fit(self, model_output: Tensor, sample: Tensor) -> None:
        """Registers for samples like this one, and every row ready for these dtypes."""
        for name, tensor in (("sample", sample), ("model_output", model_output)):
            if tensor.dtype not in MODEL_DTYPES:
                raise TypeError(
                    f"{self.name}.step: {name} is {tensor.dtype}; a fast scheduler computes in float32 and takes "
                    f"float32, float16 and bfloat16. Cast it, or use {self.name} itself"
                )
        held, table = self.registers, self.table
        if table.history and self.next and held is not None:
            if not held.holds(sample):
                raise ValueError(
                    f"{self.name}.step: the sample is {tuple(sample.shape)} on {sample.device}, this run began with "
                    f"{tuple(held.shape)} on {held.device}; call set_timesteps to begin another run"
                )
        elif held is None or not held.fits(table, sample):
            held = self.registers = Registers(table, sample)
        self._ready = held.ready(model_output.dtype, sample)
        self._shape, self._sample_dtype, self._model_dtype = sample.shape, sample.dtype, model_output.dtype
        self._like = held.new(sample.dtype)
        self._simple = sample.is_cpu and sample.is_contiguous() and held.contiguous

    def _draw(
        self,
        scheduler: Any,
        draws: tuple[tuple[Draw, Tensor], ...],
        arguments: tuple[Tensor, Any, Tensor],
        generator: Any,
        given: Tensor | None,
    ) -> None:
        """The step's normals, drawn as the original draws them."""
        assert self.registers is not None
        sample = arguments[2]
        if self.table.on_path and self.next == 0:
            self._path(scheduler, arguments, generator)
        if given is not None and generator is not None:
            raise ValueError(f"{self.name}.step: generator and variance_noise are both given; give one of them")
        for draw, noise in draws:
            if given is not None:
                if given.shape != sample.shape:
                    raise ValueError(
                        f"{self.name}.step: variance_noise is {tuple(given.shape)}, the sample {tuple(sample.shape)}"
                    )
                noise.copy_(given)
                continue
            if draw.interval is not None:
                noise.copy_(self._path(scheduler, arguments, generator)(*draw.interval))
                continue
            source = generator if draw.by_generator else None
            alone = source is None or (isinstance(source, torch.Generator) and source.device.type == sample.device.type)
            if alone and draw.dtype == torch.float32 and self.registers.contiguous:
                torch_normals.fill(noise, source)
                continue
            from diffusers.utils.torch_utils import randn_tensor

            noise.copy_(randn_tensor(sample.shape, source, device=sample.device, dtype=draw.dtype))

    def _path(self, scheduler: Any, arguments: tuple[Tensor, Any, Tensor], generator: Any) -> Callable[..., Tensor]:
        """The Brownian noise sampler of a scheduler that has one: the one its own first step makes."""
        if scheduler.noise_sampler is None:
            original: Any = object.__new__(self.kind)
            own = {key: value for key, value in vars(scheduler).items() if key not in (OURS, "_internal_dict")}
            original.__dict__.update(copy.deepcopy(own), _internal_dict=vars(scheduler)["_internal_dict"])
            asked = {"generator": generator} if "generator" in self.defaults else {}
            original.step(*arguments, **asked)
            scheduler.noise_sampler = original.noise_sampler
        return scheduler.noise_sampler

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_lock", "_like", "_ready", "_key", "_owner", "_seen", "_simple", "_looked", "hosted")
        return {key: value for key, value in vars(self).items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        self.hosted = Hosted()
        self._looked = {}
        self.__dict__.update(state)
