"""What a pipeline's loop is to run: a table ready for the kernel, from its own scheduler or from a solver's plan.

May import: NumPy, torch, compiler, and the tables of this folder.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.compiler import layout as at
from fastdiff.compiler.plan import Packed, Plan
from fastdiff.integrations.diffusers.pipelines import Kind
from fastdiff.integrations.diffusers.standing import PASSING, Hosted, counts_writes, first_index, plain_copy
from fastdiff.integrations.diffusers.table import Draw, Table, parameters, table_of

FEW = 256  # elements


@dataclass(frozen=True, eq=False)
class Program:
    """Rows, and what belongs to each.

    opening: puts the latents, its network's output, into their registers. slots: how many normals are kept at once at
    least; 0: the kernel draws its own. states: per row, the register with the state after it. evaluated: per row, the
    register with the state before it. draws: per row, what is drawn before it; the rows name normals by their number
    among all of these. times: per row, what the scheduler's timestep is. dtype: of the state that the scheduler
    returns. stochastic: the kernel's own draws need seeds.
    """

    plan: Plan
    opening: Packed
    rows: Packed
    slots: int
    states: tuple[int, ...]
    evaluated: tuple[int, ...]
    draws: tuple[tuple[Draw, ...], ...]
    times: tuple[float, ...]
    dtype: torch.dtype
    stochastic: bool

    def __len__(self) -> int:
        return len(self.times)

    @functools.cached_property
    def terms(self) -> int:
        """The most normals that a row draws."""
        return max((packed.coef.shape[1] - at.COEF_FIXED) // at.NOISE_STRIDE for packed in (self.rows, self.opening))

    @functools.cached_property
    def drawn(self) -> tuple[int, ...]:
        """Per row, how many normals were drawn before; and how many all rows draw."""
        return tuple(int(count) for count in np.cumsum([0, *map(len, self.draws)]))

    @functools.cached_property
    def draws_plainly(self) -> bool:
        """Whether all normals are white, fp32 and the caller's generator's."""
        each = [draw for draws in self.draws for draw in draws]
        return all(draw.by_generator and draw.dtype == torch.float32 and draw.interval is None for draw in each)

    @functools.cached_property
    def input_scales(self) -> NDArray[np.float32]:
        """Per row, c_in of its network input."""
        return np.append(self.opening.coef[:, at.EMIT_SCALE], self.rows.coef[:-1, at.EMIT_SCALE])

    @functools.lru_cache(maxsize=8)  # noqa: B019 - programs are kept anyway
    def shown(self, kind: Kind, latents: torch.dtype, like: Like) -> tuple[Tensor, ...]:
        """Per row, what the network is shown: tensors that the network must not write into."""
        with torch.inference_mode(False):
            times = kind.clock(torch.tensor(self.times, dtype=torch.float32, device="cpu"), latents).to(
                device=like.device, dtype=like.dtype
            )
            return tuple(time.expand(like.shape) for time in times)


class Like(NamedTuple):
    """The form of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Start(NamedTuple):
    """A program, and the row of it that the loop begins with.

    position: which of the scheduler's timesteps that is. counted: what its `_step_index` is then, None where
    it does not count.
    """

    program: Program
    first: int
    position: int
    counted: int | None = None


def captured(
    scheduler: Any, timestep: Tensor, options: dict[str, Any], kind: Kind, dtypes: tuple[torch.dtype, torch.dtype],
    hosted: Hosted,
) -> Start:  # fmt: skip
    """The steps of a diffusers scheduler as it stands, from `timestep` on.

    timestep: an element of its timesteps. options: further arguments of its `step`. dtypes: of the network's output
    and of the latents. Raises what `fd.capture` raises where the steps are no table, and TypeError for one that draws
    from a Brownian tree, uses a variance the network learned, or scales where the pipeline's loop does not.
    """
    own: Any = vars(type(scheduler)).get("_fast_of", type(scheduler))
    if str(scheduler.config.get("variance_type")).startswith("learned"):
        raise TypeError(
            f"accelerate: {own.__name__} uses the variance that the network predicts (variance_type="
            f"{scheduler.config['variance_type']!r}), which is not taken over; make the scheduler with its "
            "default variance_type where the network predicts none, or restore(pipe)"
        )
    plain = plain_copy(scheduler, own, hosted)
    if hasattr(plain, "is_scale_input_called"):
        plain.is_scale_input_called = True
    position = _position(scheduler.timesteps, timestep)
    first, counts = 0, hasattr(plain, "_step_index")
    if counts:
        first = plain._step_index = first_index(plain, plain.timesteps[position])
        plain._begin_index = None
    defaults = parameters(own)
    chosen = {name: value for name, value in options.items() if value != defaults.get(name, options)}
    table = table_of(plain, first, chosen, False, hosted)
    if table.keeps_time == "order" and position:
        table, first = table_of(plain, position, chosen, False, hosted), position
    if table.on_path:
        raise TypeError(
            f"accelerate: {own.__name__} draws from a Brownian tree, which starts with a run of its own; "
            f"pipe.scheduler = fast({own.__name__}).from_config(pipe.scheduler.config) makes its steps fast"
        )
    if table.scales and not kind.scales:
        raise TypeError(
            f"accelerate: {own.__name__} scales the network's input, and this pipeline's own loop does not keep the "
            "scaled input and the state apart; give it a scheduler that does not scale, such as DDIMScheduler or "
            "DPMSolverMultistepScheduler, or restore(pipe)"
        )
    row = position if table.keeps_time == "value" else 0
    return Start(_from_table(table, dtypes, kind), row, position, first if counts else None)


class Starts:
    """Where loops have begun: the last one is found again without looking at every number of the scheduler."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._hosted = Hosted()
        self._last: tuple[Seen, Any, Start] | None = None

    def of(
        self, scheduler: Any, timestep: Tensor, options: dict[str, Any], dtypes: tuple[torch.dtype, torch.dtype]
    ) -> Start:
        """As `captured`."""
        own = vars(scheduler)
        passing = own.get("_step_index"), own.get("_begin_index")
        how = passing, _position(scheduler.timesteps, timestep), options, dtypes
        if self._last is None or self._last[1] != how or not self._last[0].stands(own):
            start = captured(scheduler, timestep, options, self._kind, dtypes, self._hosted.keep(scheduler))
            self._last = Seen(scheduler), how, start
        return self._last[2]


class Seen:
    """A scheduler as it was: whether it still is, asked before every loop, so with little Python on the way.

    Its timesteps are made anew by each `set_timesteps`, so tensors of few numbers are told by the numbers.
    """

    def __init__(self, scheduler: Any) -> None:
        own = vars(scheduler)
        kept = [name for name in own if name not in PASSING]
        self._count = len(kept)
        self._read = itemgetter(*kept)
        self._values: tuple[Any, ...] = self._read(own)
        self._written = [(value, value._version) for value in self._values if counts_writes(value)]
        self._numbers: dict[int, list[Any]] = {}

    def stands(self, own: dict[str, Any]) -> bool:
        """Whether these attributes are what they were."""
        if len(own) - len(own.keys() & PASSING) != self._count:
            return False
        try:
            values = self._read(own)
        except KeyError:
            return False
        for tensor, version in self._written:
            if tensor._version != version:
                return False
        changed = [i for i, seen in enumerate(self._values) if seen is not values[i]]
        return all(self._alike(i, values[i]) for i in changed)

    def _alike(self, i: int, other: Any) -> bool:
        one = self._values[i]
        if type(one) is not type(other):
            return False
        if isinstance(one, Tensor):
            if one.dtype is not other.dtype or one.shape != other.shape:
                return False
            if one.numel() > FEW:
                return torch.equal(one, other)
            numbers = self._numbers.get(i)
            if numbers is None:
                numbers = self._numbers[i] = one.tolist()
            return bool(numbers == other.tolist())
        if isinstance(one, np.ndarray):
            return bool(np.array_equal(one, other))
        if isinstance(one, list):
            return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
        return isinstance(one, bool | int | float | str) and bool(one == other)


def _position(timesteps: Tensor, timestep: Tensor) -> int:
    """Which of the timesteps this is: by where it lies in memory, so that one on a GPU is not read."""
    offset = timestep.data_ptr() - timesteps.data_ptr()
    if not offset:
        return 0
    found = offset // max(timesteps.stride(0) * timesteps.element_size(), 1)
    if 0 <= found < len(timesteps):
        return found
    values = timesteps.tolist()
    if float(timestep) not in values:
        raise ValueError(f"accelerate: timestep {float(timestep):g} is not one of the scheduler's {values}")
    return values.index(float(timestep))


@functools.lru_cache(maxsize=64)
def _from_table(table: Table, dtypes: tuple[torch.dtype, torch.dtype], kind: Kind) -> Program:
    forms = table.forms(*dtypes)
    slots, draws = max(table.slots, 1), tuple(form.draws for form in forms)
    opening = table.plan.pack(opening="state")
    rows = Packed(table.coef.copy(), table.ids.copy())
    named = rows.ids[:, at.TERM_IDS :: at.TERM_IDS_STRIDE]
    newest = np.cumsum([len(row) for row in draws])[:, None] - 1
    named[:] = np.maximum(newest - (newest - named) % slots, 0)  # the table names slots
    rows.coef[:-1, at.EMIT_SCALE] = table.input_scales[1:]
    last = forms[-1].dtypes[table.state_field]
    assert last is not None
    plan, times = table.plan, table.times
    head = Packed(opening.coef[:1].copy(), opening.ids[:1])
    return _timed(plan, head, rows, slots, draws, times, last, kind, dtypes[1], stochastic=False)


def solved(
    plan: Plan, prediction: str, sigma_data: float | None, scale: float, kind: Kind, dtype: torch.dtype
) -> Program:
    """A solver's plan. scale: the pipeline's timesteps over the schedule's model times. dtype: of the latents."""
    packed = plan.pack(prediction, sigma_data, opening="state")
    times = tuple(float(time) * scale for time in packed.coef[:-1, at.EMIT_TIME])
    opening, rows = (Packed(packed.coef[part].copy(), packed.ids[part]) for part in (slice(0, 1), slice(1, None)))
    undrawn = ((),) * len(times)
    return _timed(plan, opening, rows, 0, undrawn, times, dtype, kind, dtype, stochastic=plan.stochastic)


def _timed(
    plan: Plan, opening: Packed, rows: Packed, slots: int, draws: Any, times: tuple[float, ...], dtype: torch.dtype,
    kind: Kind, latents: torch.dtype, stochastic: bool,
) -> Program:  # fmt: skip
    """The program, its tables emitting what the pipeline shows its network."""
    shown = kind.clock(torch.tensor(times, dtype=torch.float32, device="cpu"), latents).float().numpy()
    opening.coef[:, at.EMIT_TIME], rows.coef[:-1, at.EMIT_TIME] = shown[0], shown[1:]
    _read_latents(opening.coef[0], opening.ids[0])
    states = tuple(row.outputs[0].dest for row in plan.rows[1:])
    evaluated = tuple(row.x for row in plan.rows[1:])
    return Program(plan, opening, rows, slots, states, evaluated, draws, times, dtype, stochastic)


def _read_latents(coef: NDArray[np.float32], ids: NDArray[np.int32]) -> None:
    """Make an opening row read the latents where others read the network's output: D = F, and each output k D."""
    coef[[at.P, at.Q]], ids[at.FLAGS] = (0.0, 1.0), at.READS_MODEL
    for output in range(at.OUTPUT, at.OUTPUT + at.MAX_OUTPUTS * at.OUTPUT_STRIDE, at.OUTPUT_STRIDE):
        coef[output + at.OUT_B] = coef[output + at.OUT_K] + coef[output + at.OUT_DELTA]
        coef[[output + at.OUT_K, output + at.OUT_DELTA]] = 0.0
