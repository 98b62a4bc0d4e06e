"""From a scheduler as it stands to the table its steps run, compiled once and kept for the next object like it.

May import: NumPy, torch, compiler, and the files here that step the scheduler.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.compiler import layout as at
from fastdiff.compiler.assemble import Row
from fastdiff.compiler.capture import compile_source
from fastdiff.integrations.diffusers.rehearsal import Draw, Rehearsal, Rehearsed, reads_time, rehearse
from fastdiff.integrations.diffusers.standing import Hosted, Standing, fingerprint

KEPT = 64  # tables: a few schedulers at a few step counts, image sizes (mu) and strengths
STATE = ("prev_sample", "0")  # the field of an output that is the next state
STEEP = 4.0  # coefficient of D beyond which x and D nearly cancel
EXACT = 2e-5  # relative difference up to which a field is a combination: what a step in float32 leaves


class Mix(NamedTuple):
    """A field as x X + model_output F + denoised D + sum_k noise[k] z_k, z the draws of its own step."""

    x: float
    model_output: float
    denoised: float
    noise: tuple[float, ...] = ()


class Constant(NamedTuple):
    """A field that is no tensor, as it is."""

    value: Any


class Missing(NamedTuple):
    """A field that a row cannot give, and why."""

    reason: str


DENOISED = Mix(0.0, 0.0, 1.0)
Field = Mix | Constant | Missing


class Form(NamedTuple):
    """One row's output for tensors of given dtypes: the dtype of every field, and the draws the step makes."""

    dtypes: Mapping[str, torch.dtype | None]  # None: not a tensor
    draws: tuple[Draw, ...]


class Table:
    """The rows of a scheduler from position `first` of its timesteps on, and what its steps do besides.

    keeps_time: how a step finds its row: "index" counts in `_step_index`, "order" counts in attributes of its own,
    "value" looks the timestep up. history: rows read what earlier rows left. reads_time: an "index" step also uses the
    value of the timestep. fields: per row, what the output holds.
    on_path: it draws from a Brownian path.
    kept: per row, whether later rows read its x again.
    slots: how many normals are kept at once; slot_of: per row, where its first draw goes, the next ones after it.
    """

    def __init__(self, source: Standing) -> None:
        self.source = source
        self.first = source.first
        plan = compile_source(source)
        rows = tuple(_in_outputs(row) for row in plan.rows[1:])
        self.plan = replace(plan, rows=(plan.rows[0], *rows))
        rehearsal = rehearse(source, torch.float64, torch.float64)
        self.kind, self.tuple_fields = rehearsal.kind, rehearsal.tuple_fields
        self.state_field = STATE[0] if STATE[0] in rehearsal.steps[0].output else STATE[1]
        self.fields = tuple(self._fields(row, step) for row, step in zip(rows, rehearsal.steps, strict=True))
        for name in self.tuple_fields or rehearsal.steps[0].output:
            for field in (one.get(name) for one in self.fields):
                if isinstance(field, Missing):
                    raise TypeError(f"{field.reason}; use {source.name} itself")
        scheduler = source.fresh(lambda *_: torch.zeros(()))
        self.times = tuple(float(time) for time in source.times(scheduler))
        self.rows_at: dict[float, int] = {}
        for i, time in enumerate(self.times):
            self.rows_at.setdefault(time, i)
        self.input_scales = tuple(row.reading.c_in if row.reading is not None else 1.0 for row in rows)
        self.scales = any(scale != 1.0 for scale in self.input_scales)
        self.history = any(row.slots or len(row.outputs) > 1 for row in rows)
        counted = {key for step in rehearsal.steps for key in step.changed}
        self.keeps_time = "index" if "_step_index" in counted else "order" if counted or self.history else "value"
        self.reads_time = self.keeps_time == "index" and reads_time(source)
        self.kept = tuple(_kept(rows, i) for i in range(len(rows)))
        self.on_path = "noise_sampler" in vars(source.scheduler)
        self.states = tuple(row.x for row in rows)
        self.coef, self.ids = self._packed(rows, rehearsal)
        self._forms: dict[tuple[torch.dtype, torch.dtype], tuple[Form, ...]] = {}

    def __len__(self) -> int:
        return len(self.times)

    def __deepcopy__(self, memo: dict[int, Any]) -> Table:
        return self

    def forms(self, model_dtype: torch.dtype, sample_dtype: torch.dtype) -> tuple[Form, ...]:
        """Per row, what the scheduler itself draws and returns for these dtypes."""
        key = model_dtype, sample_dtype
        if key not in self._forms:
            steps = rehearse(self.source, *key).steps
            self._forms[key] = tuple(
                Form({name: getattr(value, "dtype", None) for name, value in step.output.items()}, step.draws)
                for step in steps
            )
        return self._forms[key]

    def _packed(
        self, rows: tuple[Row, ...], rehearsal: Rehearsal
    ) -> tuple[np.ndarray[Any, np.dtype[np.float32]], np.ndarray[Any, np.dtype[np.int32]]]:
        """The rows for the kernel: the state is emitted as it is, and noise ids are slots, few enough."""
        packed = self.plan.pack()
        coef, ids = packed.coef[1:].copy(), packed.ids[1:].copy()
        coef[:, at.EMIT_SCALE] = 1.0
        drawn, oldest = 0, 1
        used = ids[:, at.TERM_IDS :: at.TERM_IDS_STRIDE]
        for i, step in enumerate(rehearsal.steps):
            drawn += len(step.draws)
            named = used[i, : ids[i, at.TERMS]]
            if (named >= drawn).any():
                raise TypeError(f"{self.source.name}, step {i}: uses a normal that it has not drawn yet")
            oldest = max(oldest, len(step.draws), *(drawn - named))
        used %= oldest
        self.slots = oldest if drawn else 0
        counts = np.cumsum([0, *(len(step.draws) for step in rehearsal.steps)])
        self.slot_of = tuple(int(count) % oldest for count in counts[:-1])
        return coef, ids

    def _fields(self, row: Row, step: Rehearsed) -> dict[str, Field]:
        """Every field of the output but the state."""
        assert row.reading is not None
        x, raw = step.sample.numpy().reshape(-1), step.model_output.numpy().reshape(-1)
        denoised = row.reading.P * x + row.reading.Q * raw
        if row.clamp is not None:
            denoised = denoised.clip(*row.clamp)
        normals = [normal.double().numpy().reshape(-1) for normal in step.normals]
        found: dict[str, Field] = {}
        for name, value in step.output.items():
            if name == self.state_field:
                continue
            if isinstance(value, Tensor) and value.shape == step.sample.shape:
                found[name] = self._mix(name, value, [x, raw, denoised, *normals])
            elif value is None or isinstance(value, bool | int | float | str):
                found[name] = Constant(value)
            else:
                found[name] = Missing(f"{self.source.name}.step returns {name}, {type(value).__name__}: not one tensor")
        return found

    def _mix(self, name: str, value: Tensor, known: list[Any]) -> Field:
        wanted = value.double().numpy().reshape(-1)
        size = float(np.abs(wanted).max()) or 1.0
        if float(np.abs(known[2] - wanted).max()) <= EXACT * size:
            return DENOISED
        basis = np.stack(known, axis=1)
        x, raw, denoised, *noise = map(float, np.linalg.lstsq(basis, wanted, rcond=1e-12)[0])
        off = float(np.abs(basis @ np.array([x, raw, denoised, *noise]) - wanted).max()) / size
        if off > EXACT:
            return Missing(
                f"{self.source.name}.step returns {name}, which is no combination of the sample, the model output and "
                f"the noise of its step (off by {off:.1e}, relative)"
            )
        return Mix(x, raw, denoised, tuple(noise))


def _in_outputs(row: Row) -> Row:
    """The row in the model output itself, D := F, where x and D nearly cancel: steps up from nearly clean data."""
    reading = row.reading
    steep = any(abs(output.denoised) > STEEP for output in row.outputs)
    if reading is None or not steep or row.clamp is not None or row.estimate is not None:
        return row
    outputs = tuple(
        replace(output, x=output.x + output.denoised * reading.P, denoised=output.denoised * reading.Q)
        for output in row.outputs
    )
    return replace(row, outputs=outputs, reading=replace(reading, P=0.0, Q=1.0))


def _kept(rows: tuple[Row, ...], i: int) -> bool:
    """Whether a row after i reads x of row i from its register."""
    register = rows[i].x
    for row, following in zip(rows[i:], rows[i + 1 :], strict=False):
        if any(output.dest == register for output in row.outputs):
            return False
        if register in following.slots:
            return True
    return False


_tables: OrderedDict[Hashable, Table] = OrderedDict()
_compiling = threading.Lock()


def table_of(plain: Any, first: int, options: Mapping[str, Any], follows: bool, hosted: Hosted) -> Table:
    """The table of this scheduler from this position on, from the cache where it was compiled before.

    plain: the scheduler as it stands, on the host. options: further arguments of `step`. Raises what `fd.capture`
    raises where it is no table.
    """
    name = type(plain).__name__
    key = (fingerprint(plain, hosted), first, tuple(sorted(options.items())), follows)
    with _compiling:
        table = _tables.get(key)
        if table is None:
            source = Standing(plain, name, len(plain.timesteps), dict(options), {}, first=first, follows=follows)
            table = _tables[key] = Table(source)
            while len(_tables) > KEPT:
                _tables.popitem(last=False)
        _tables.move_to_end(key)
    return table


@functools.cache
def parameters(kind: type) -> Mapping[str, Any]:
    """The further arguments of a class's `step` and their defaults, in order."""
    known = inspect.signature(kind.step).parameters  # type: ignore[attr-defined]
    own = ("self", "model_output", "timestep", "sample")
    return {name: one.default for name, one in known.items() if name not in own}
