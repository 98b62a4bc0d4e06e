"""The buffers of a pipeline's loop, and the calls that run its rows: kept from call to call where they fit.

May import: torch, engine, and the program. Tables have room for more rows and terms than one program needs, so that
another number of steps, schedule or guidance finds the same addresses, and a captured step the same graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.compiler import layout as at
from fastdiff.compiler.plan import Packed
from fastdiff.engine import backends, ops
from fastdiff.engine.graphs import recorder_for
from fastdiff.engine.guide import GuideTensors
from fastdiff.engine.guide import bind as bind_guide
from fastdiff.integrations.diffusers.ahead import MOST_AHEAD
from fastdiff.integrations.diffusers.program import Program, Start

Form = tuple[int, bool, bool]  # of a step: how many calls of the network, whether it guides, whether it rescales
ROWS, TERMS, REGISTERS, SLOTS = 64, 4, 4, 2  # the least room a desk has


class Needs(NamedTuple):
    """What a desk is made for. shape: of the latents, batch first. copies: of the network's input, of this dtype."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    copies: int


class Desk:
    """State, network input and time, tables, noise and guidance of one loop.

    model_in: [copies * B, *S]. model_time: fp32 [copies * B]. noise: normals, [B, *S] each.
    """

    def __init__(self, needs: Needs, program: Program) -> None:
        self.needs = needs
        self.batch, self.channels = needs.shape[:2]
        self._rows, terms = max(ROWS, 1 << len(program).bit_length()), max(TERMS, program.terms)  # one for the opening
        self._width = at.COEF_FIXED + at.NOISE_STRIDE * terms
        self._ids_width = at.IDS_FIXED + at.TERM_IDS_STRIDE * terms
        self._room, self._slots = max(REGISTERS, program.plan.registers), self._slots_for(program)
        self.executor = backends.choose(needs.device)
        with torch.inference_mode(False):  # a later call outside it writes here too
            self._allocate()
        self._steps: dict[Any, tuple[ops.Step, ...]] = {}
        self._form: Form | None = None  # of the last steps, and the network's dtype
        self._dtype: torch.dtype | None = None
        self._now: tuple[ops.Step, ...] = ()
        self._loaded: Start | None = None
        self._guided: tuple[float, float] | None = None
        self.recorder = recorder_for(needs.device, self.executor)
        self.recorded: dict[Any, Any] = {}
        # of a step that is one row: how an output is taken from what a call of the network returned, and the row
        self.direct: dict[Form, tuple[Callable[[Any], Tensor], ops.Step]] = {}

    def _slots_for(self, program: Program) -> int:
        """As many as the rows draw where they are small and on the host (see ahead.py), else as many as are kept."""
        if not program.slots:
            return 0
        many = max(ROWS, program.drawn[-1])
        small = self.needs.device.type == "cpu" and many * self.needs.shape.numel() <= MOST_AHEAD
        return many if program.drawn[-1] and small else max(SLOTS, program.slots)

    def _allocate(self) -> None:
        device, batch = self.needs.device, self.batch

        def zeros(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        copies, sample = self.needs.copies * batch, tuple(self.needs.shape[1:])
        noise = zeros(self._slots, batch, *sample)
        self.noise = noise.unbind()
        self.model_in = zeros(copies, *sample, dtype=self.needs.dtype)
        self.model_time = zeros(copies)
        self.tensors = ops.StepTensors(
            state=zeros(self._room, batch, *sample),
            model_out=self.model_in[:batch],
            model_in=self.model_in,
            model_time=self.model_time,
            coef=zeros(self._rows, self._width),
            ids=zeros(self._rows, self._ids_width, dtype=torch.int32),
            row=zeros(batch, dtype=torch.int32),
            seed=zeros(batch, dtype=torch.int64),
            guidance=zeros(batch),
            noise=noise if self._slots else None,
            denoised=None,
            status=zeros(batch, dtype=torch.int32),
            ticket=zeros(batch, dtype=torch.int32),
            mix=torch.tensor(at.PLAIN_MIX, dtype=torch.float32, device=device).repeat(batch, 1),
        )
        self._settings = zeros(at.SETTINGS)
        self._partial = zeros(batch, at.PARTS, at.SUMS)
        self._registers = self.tensors.state.unbind()
        self._branches = self.model_in.split(batch)
        row = self.tensors.row
        self._rewind: Callable[[int], Any] = row.numpy().fill if row.is_cpu else row.fill_  # NumPy is quicker about it
        self._open = ops.bind(replace(self.tensors, mix=None), self.executor, uses_e=False)

    def inputs(self, count: int, stacked: bool) -> list[Tensor]:
        """What each of `count` calls of the network is given: the state, or both branches of it where one asks both."""
        if not stacked:
            return list(self._branches[:count])
        return [self.model_in]

    def fits(self, needs: Needs, program: Program) -> bool:
        """Whether this program runs here for these needs."""
        if needs != self.needs:
            return False
        if self._loaded is not None and self._loaded.program is program:
            return True
        return (
            len(program) < self._rows
            and program.plan.registers <= self._room
            and at.COEF_FIXED + at.NOISE_STRIDE * program.terms <= self._width
            and bool(program.slots) == bool(self._slots)
            and program.slots <= self._slots
        )

    def open(self, start: Start, latents: Tensor) -> None:
        """Begin at this row with these latents: the first state, network input and time."""
        program, first = start.program, start.first
        if self._loaded is None or self._loaded.program is not program or self._loaded.first != first:
            self._load(program, first)
            self._loaded = start
        self._rewind(first)
        self._open(latents.contiguous())

    def _load(self, program: Program, first: int) -> None:
        """The table, a row later than the program's, and the opening in the row before `first`."""
        opening = Packed(program.opening.coef.copy(), program.opening.ids)
        if first:
            opening.coef[0, [at.EMIT_SCALE, at.EMIT_TIME]] = program.rows.coef[first - 1, [at.EMIT_SCALE, at.EMIT_TIME]]
        for begin, part in ((1, program.rows), (first, opening)):
            rows = slice(begin, begin + len(part.coef))
            self.tensors.coef[rows, : part.coef.shape[1]].copy_(torch.from_numpy(part.coef))
            ids = part.ids.copy()
            if self._slots:
                ids[:, at.TERM_IDS :: at.TERM_IDS_STRIDE] %= self._slots
            self.tensors.ids[rows, : ids.shape[1]].copy_(torch.from_numpy(ids))

    def guide(self, scale: float, rescale: float) -> None:
        """The guidance scale, and phi of its rescaling, from here on."""
        if self._guided != (scale, rescale):
            self.tensors.guidance.fill_(scale)
            self._settings[at.PHI].fill_(rescale)
            self._guided = scale, rescale

    def state(self, register: int) -> Tensor:
        """A register."""
        return self._registers[register]

    def put(self, program: Program, row: int, latents: Tensor) -> None:
        """Other latents than this row was to begin with."""
        self._registers[program.evaluated[row]].copy_(latents)
        shown = latents.float() * float(program.input_scales[row])
        self.model_in.view(self.needs.copies, *self.needs.shape).copy_(shown)

    def advance(self, conditional: Tensor, unguided: Tensor | None, form: Form) -> None:
        """Run the next row of every sample on the network's outputs: Fc or a stack, and Fu where it is apart."""
        if form is not self._form or conditional.dtype is not self._dtype:
            key = conditional.dtype, form
            if key not in self._steps:
                self._steps[key] = self._bind(conditional, unguided, form[2])
            self._now, self._form, self._dtype = self._steps[key], form, conditional.dtype
        for step in self._now:
            step(conditional, unguided)

    @property
    def row(self) -> ops.Step | None:
        """The step that the last row took, if it was a single one that looks at its tensors itself."""
        return self._now[0] if self.executor == "cpp" and len(self._now) == 1 else None

    def row_within(self, whole: Tensor, conditional: Tensor) -> ops.Step | None:
        """`row` for a network's whole output, of which the last row was given the first channels."""
        if self.row is None:
            return None
        return ops.bind_within(replace(self.tensors, model_out=conditional, mix=None), self.executor, whole)

    def _bind(self, conditional: Tensor, unguided: Tensor | None, rescaled: bool) -> tuple[ops.Step, ...]:
        tensors = replace(self.tensors, model_out=conditional, unguided=unguided)
        if not rescaled:
            return (ops.bind(replace(tensors, mix=None), self.executor),)
        assert tensors.mix is not None
        shared = ("state", "coef", "ids", "row", "guidance", "ticket", "mix")
        found = GuideTensors(
            **{name: getattr(tensors, name) for name in shared},
            model_out=conditional, unguided=unguided, settings=self._settings, partial=self._partial,
        )  # fmt: skip
        return bind_guide(found, at.RESCALE, False, self.executor), ops.bind(tensors, self.executor)
