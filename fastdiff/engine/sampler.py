"""Binds a plan to a model and a device: checks what is asked, finds buffers and graphs for it, and runs the loop.

May import: asked, arguments, idle, chunks, loop, held, kept, room, branches, guidance, graphs, backends, memory,
skipping, stream, compiler, models.denoiser.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastdiff.compiler import layout
from fastdiff.compiler.adaptive import AdaptivePlan
from fastdiff.compiler.assemble import Row
from fastdiff.compiler.brownian import on_path
from fastdiff.compiler.guided import muted
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.skipping import twins
from fastdiff.engine import backends, chunks, graphs, held, idle, memory, skipping
from fastdiff.engine.arguments import (
    batch_shape,
    check_alike,
    check_channels,
    check_fits,
    settle_guidance,
    settle_perturbation,
)
from fastdiff.engine.asked import Asked
from fastdiff.engine.branches import PERTURBED, Branches, arrange, claimed, refuse_modes
from fastdiff.engine.crowd import POSITIONS
from fastdiff.engine.external import Noise
from fastdiff.engine.guidance import DynamicThreshold, Rule
from fastdiff.engine.held import Held, Memory
from fastdiff.engine.kept import Kept
from fastdiff.engine.loop import Loop, RowInfo, RunStats
from fastdiff.engine.room import Room
from fastdiff.engine.skipping import AdaptiveSkip
from fastdiff.engine.stream import Stream
from fastdiff.errors import warn
from fastdiff.models.denoiser import Condition, Denoiser


class Sampler:
    """Runs a plan with a model: D = P x + Q F after each evaluation, then one fused row (fastdiff.engine.ops).

    backend: "auto" or an executor of `fd.backends()`. graph: "auto" captures model + row into one CUDA graph where
    there is a GPU, True insists, "loop" captures all rows of a run into one and insists, False never. memory_format: of
    the state and the network's input. guide: a network for the unguided branch (autoguidance: a weaker model);
    perturbed: one for the perturbed branch. kept_bytes: buffers and graphs are kept for later runs of this model, of
    any sampler, up to so many bytes; those used longest ago go first. Deterministic: a sample depends on its seed, not
    on the batch it is in, as far as the network treats each sample alone. One thread at a time.
    """

    def __init__(
        self,
        plan: Plan,
        model: Denoiser,
        backend: str = "auto",
        graph: bool | str = "auto",
        memory_format: torch.memory_format = torch.contiguous_format,
        guide: Denoiser | None = None,
        perturbed: Denoiser | None = None,
        kept_bytes: int = 1 << 30,
    ) -> None:
        if graph not in (True, False, "auto", "loop"):
            raise ValueError(f"graph must be 'auto', 'loop', True or False, got {graph!r}")
        check_fits(plan, model)
        for name, other in (("guide", guide), ("perturbed", perturbed)):
            if other is not None:
                check_alike(name, other, model)
        self.plan = plan
        packed = plan.pack(model.prediction, model.sigma_data)  # an undefined prediction fails here, not in the loop
        adaptive = isinstance(plan, AdaptivePlan)
        self._times = None if adaptive else torch.from_numpy(packed.coef[:, layout.EMIT_TIME].copy())
        self._any_time, self.model = model, _ready(model, self._times)
        self.guide, self.perturbed = guide, perturbed
        self.backend = backends.choose(model.device) if backend == "auto" else backend
        backends.require(self.backend, model.device)
        captures = graphs.recorder_for(model.device, self.backend) is not None
        if graph in (True, "loop") and not captures:
            raise ValueError(
                f"graph={graph!r} needs a CUDA device and executor 'triton' or 'cuda', "
                f"got {model.device} and {self.backend!r}"
            )
        self.graph = captures and graph is not False
        self._insist, self._whole = graph in (True, "loop"), graph == "loop"
        self.kept_bytes = kept_bytes
        self.memory_format = memory_format
        self._idle = threading.Lock()
        self._variants: dict[tuple[bool, int, bool], Plan] = {}
        self._batch_plan: tuple[int, Plan] | None = None
        self.last_run: RunStats | None = None

    @torch.no_grad()
    def sample(
        self,
        shape: Sequence[int],
        seed: int | Sequence[int] | Tensor = 0,
        init: Tensor | None = None,
        noise: Noise = "white",
        cond: Condition = None,
        uncond: Condition = None,
        guidance: float | Sequence[float] | Tensor | None = None,
        callback: Callable[[RowInfo], None] | None = None,
        progress: bool = False,
        opening: str = "state",
        rule: Rule | None = None,
        threshold: DynamicThreshold | None = None,
        perturbed_cond: Condition = None,
        perturbed_scale: float | Sequence[float] | Tensor | None = None,
        given: Mapping[str, Tensor] | None = None,
        skip: AdaptiveSkip | None = None,
        max_batch: int | str | None = None,
    ) -> Tensor:
        """Draw samples: fp32 [B, *S] on the model's device.

        shape: [B, *S]. seed: one per sample, or an integer s for seeds s, s+1, ... init: [B, *S], the state at the
        plan's first level, used as it is (opening="state"), or a clean image to be noised to that level
        (opening="image"). noise: "white"; "brownian", increments of one path per seed, the same path at any number of
        steps (fastdiff.compiler.brownian); a `FrameNoise`, for the frames of a video; a tensor [plan.draws, B, *S]; or
        f(id, shape) giving one draw [B, *S]. cond, uncond: conditions of the network, batch first; a negative prompt is
        an uncond. guidance: w of Fu + w (Fc - Fu), a number or one per sample; 1 or None evaluate cond only. rule:
        `fd.guidance.Rescale`, `APG` or `CFGZero`. threshold: a `fd.guidance.DynamicThreshold`. perturbed_scale: s of
        s (Fc - Fp), a number or one per sample, Fp from the perturbed network, or from this one on perturbed_cond; 0 or
        None evaluate neither.
        given: the tensors [B, *S] the solver asks for by name (mean_reverting: {"mu": the degraded images}). skip: an
        approximation, `fd.AdaptiveSkip()`: samples skip evaluations where their path is smooth. max_batch: draw in
        batches of at most so many, the same samples; "auto": as many as fit in memory, by estimate. callback: called
        after each row. Raises ValueError or TypeError for arguments that do not fit, FloatingPointError, naming the
        row, when the network returns inf or nan, and BatchTooLarge, with the batch that would fit, when memory runs
        out.
        """
        shape = batch_shape(shape)
        check_channels(self.model, shape, batched=True)
        weights = settle_guidance(guidance, uncond, self.plan.reads_unguided)
        scales = settle_perturbation(perturbed_scale, perturbed_cond)
        asked = Asked.checked(
            shape, seed, init, noise, cond, uncond, weights, callback, progress, opening, rule, threshold,
            perturbed_cond, scales, given or {}, skip,
        )  # fmt: skip
        idle.warn_of(self.plan, asked.path, asked.guided, asked.perturbed)
        if not self._idle.acquire(blocking=False):
            raise RuntimeError(
                "this Sampler is drawing in another thread and has one set of buffers; use one per thread"
            )
        try:
            self.model = _ready(self._any_time, self._times)  # its weights may have changed since the last run
            with self._on_device(), claimed((self.model, self.guide, self.perturbed)):
                size = self._at_once(shape, asked, max_batch)
                if size >= shape[0]:
                    result, self.last_run = self._draw(shape, asked)
                    return result
                return self._in_parts(shape, asked, size)
        finally:
            self._idle.release()

    def stream(self, shape: Sequence[int], slots: int = 16, **options: Any) -> Stream:
        """A running batch of `slots` samples of shape [*S] for this sampler's networks (fastdiff.engine.stream).

        Requests that bring no plan run this one. options: queue, rule, threshold, table_rows.
        """
        return Stream(
            self._any_time, shape, slots, plan=self.plan, backend=self.backend, graph=self.graph and "auto",
            memory_format=self.memory_format, guide=self.guide, perturbed=self.perturbed, **options,
        )  # fmt: skip

    def memory(self) -> Memory:
        """What this model's samplers keep now."""
        return held.memory(self.model, self.kept_bytes)

    def release(self) -> None:
        """Give back what this model's samplers keep; their next runs make it again."""
        self._shelf.clear()

    def _at_once(self, shape: torch.Size, asked: Asked, max_batch: int | str | None) -> int:
        """The largest batch to draw at once."""
        if max_batch is None:
            return shape[0]
        if max_batch == "auto":
            return min(shape[0], max(1, self._largest(shape, asked)))
        if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
            raise ValueError(f"max_batch must be an integer >= 1, 'auto' or None, got {max_batch!r}")
        return max_batch

    def _in_parts(self, shape: torch.Size, asked: Asked, size: int) -> Tensor:
        if asked.callback is not None:
            raise ValueError(f"a callback sees a batch as a whole, this one of {shape[0]} is drawn {size} at a time")
        drawn, runs = [], []
        for count, part in asked.parts(size):
            result, run = self._draw(torch.Size((count, *shape[1:])), part)
            drawn.append(result)
            runs.append(run)
        self.last_run = chunks.together(runs)
        return torch.cat(drawn)

    def _draw(self, shape: torch.Size, asked: Asked) -> tuple[Tensor, RunStats]:
        """One batch; BatchTooLarge, with an estimate of what would fit, where memory runs out."""
        try:
            return self._run(shape, asked)
        except Exception as error:
            if not memory.ran_out(error):
                raise
            memory.let_go(error, self.model.device)
            why = str(error)
        self._shelf.clear()
        room = self._room(self._plan_for(shape, asked), shape, asked, self._branches(shape[0], asked))
        raise chunks.too_large(room, self._largest(shape, asked), why)

    def _run(self, shape: torch.Size, asked: Asked) -> tuple[Tensor, RunStats]:
        branches = self._branches(shape[0], asked)
        plan = self._plan_for(shape, asked)
        room = self._room(plan, shape, asked, branches)
        with self._held(room, branches) as own:
            with torch.inference_mode(False), torch.no_grad():
                own.buffers.start(
                    plan, self.model, asked.seed, asked.guidance, asked.init, asked.opening, asked.noise, asked.given,
                    self.backend, asked.perturbed_scale, asked.reduces,
                )  # fmt: skip
            own.buffers.open(self.backend)
            adaptive = isinstance(self.plan, AdaptivePlan)
            base = plan if asked.skip is None and not adaptive else self.plan
            loop = Loop(base, own, branches, self.backend, asked.callback, asked.progress)
            if asked.skip is not None:
                return loop.with_skips(plan, asked.skip)
            rows = plan.rows[1:2] if adaptive else plan.rows[1:]
            replays = self._captured(own, branches, rows, asked.callback) if self.graph else None
            if isinstance(self.plan, AdaptivePlan):
                return loop.with_own_steps(self.plan, asked.path, replays is not None)
            if replays is None:
                return loop.eager()
            return loop.whole(replays[0]) if self._whole else loop.replayed(replays)

    def _branches(self, batch: int, asked: Asked) -> Branches:
        return arrange(
            self.model, batch, asked.cond, asked.uncond, asked.perturbed_cond,
            guided=asked.guided, perturbed=asked.perturbed, guide=self.guide, perturbed_net=self.perturbed,
            reads_unguided=self.plan.reads_unguided,
        )  # fmt: skip

    def _room(self, plan: Plan, shape: torch.Size, asked: Asked, branches: Branches) -> Room:
        copies = len(branches.names)
        if asked.skip is not None:
            copies = 1 + max(POSITIONS[name] for name in branches.names)
        work, perturbs = None if asked.reduces is None else asked.reduces.work, PERTURBED in branches.names
        keep_denoised = asked.callback is not None
        return Room.of(plan, shape, copies, self.model, self.memory_format, keep_denoised, work, perturbs)

    def _largest(self, shape: torch.Size, asked: Asked) -> int:
        """The largest batch of this shape that fits, by estimate."""
        plan, branches = self._plan_for(shape, asked), self._branches(shape[0], asked)
        room = self._room(plan, shape, asked, branches)
        parts = dict(next(asked.parts(n)) for n in (1, 2))
        return chunks.largest(room, lambda n: self._branches(n, parts[n]), self.plan.rows[1])

    @property
    def _shelf(self) -> Kept[Held]:
        return held.shelf(self.model)

    @contextmanager
    def _held(self, room: Room, branches: Branches) -> Iterator[Held]:
        """Buffers of a room, and what was captured on them for these networks; not kept where the run fails."""
        key = (room, self.backend, graphs.signature(branches) if self.graph else ())
        with torch.inference_mode(False):  # a later call outside it writes here too
            own = self._shelf.lend(key, lambda: Held(room))
        yield own
        self._shelf.give_back(key, own, self.kept_bytes)

    def _plan_for(self, shape: torch.Size, asked: Asked) -> Plan:
        """The plan as this run needs it, made once."""
        if asked.skip is not None:
            skipping.check_plan(self.plan)
            refuse_modes(self.model, "adaptive skipping")
            if self._insist:
                raise ValueError("adaptive skipping finds out while it runs which row comes next: use graph='auto'")
        if isinstance(self.plan, AdaptivePlan):
            return self._of_batch(self.plan, shape[0], asked)
        key = (asked.path, 0 if asked.reduces is None else asked.reduces.muted, asked.skip is not None)
        if key not in self._variants:
            plan = on_path(self.plan) if asked.path else self.plan
            plan = muted(plan, key[1]) if key[1] else plan
            self._variants[key] = twins(plan) if asked.skip is not None else plan
        return self._variants[key]

    def _of_batch(self, plan: AdaptivePlan, batch: int, asked: Asked) -> Plan:
        refuse_modes(self.model, plan.solver)
        if asked.reduces is not None and (asked.reduces.muted or asked.reduces.remembers):
            raise ValueError(
                f"{plan.solver} evaluates the network in steps it may reject, so a rule cannot count evaluations: use "
                "CFGZero(zero_init=0), or APG with momentum=0"
            )
        if plan.stochastic and not isinstance(asked.noise, str):
            raise ValueError(
                f"{plan.solver} with eta > 0 draws as often as its steps turn out to need, so the noise cannot be "
                "given; use noise='white' or noise='brownian'"
            )
        if self._batch_plan is None or self._batch_plan[0] != batch:
            self._batch_plan = (batch, plan.for_batch(batch))
        return self._batch_plan[1]

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.model.device) if self.model.device.type == "cuda" else nullcontext()

    def _captured(
        self, own: Held, branches: Branches, rows: Sequence[Row], callback: Callable[[RowInfo], None] | None
    ) -> list[Callable[[], None]] | None:
        """What replays the rows; None, with a warning, where they cannot be captured and need not be."""
        if self._whole and callback is not None:
            raise ValueError("a callback cannot be part of a captured loop; use graph='auto'")
        if own.graphs is None:
            recorder = graphs.recorder_for(self.model.device, self.backend)
            assert recorder is not None
            own.graphs = graphs.Graphs(own.buffers, branches, recorder)
        own.graphs.load(branches)
        try:
            if self._whole and not isinstance(self.plan, AdaptivePlan):
                return [own.graphs.loop(branches, rows, self.backend)]
            return own.graphs.steps(branches, rows, self.backend)
        except graphs.NotCaptured as error:
            if self._insist:
                raise
            self.graph, own.graphs = False, None
            warn(graphs.cannot_capture(error))
            return None


_Prepared = OrderedDict[bytes, tuple[Hashable, Denoiser]]  # by times, with the weights they were computed from
_prepared: weakref.WeakKeyDictionary[Denoiser, _Prepared] = weakref.WeakKeyDictionary()
_preparing = threading.Lock()
KEPT_TIMES = 8  # of a model, so that samplers of one plan share its buffers and graphs


def _ready(model: Denoiser, times: Tensor | None) -> Denoiser:
    """The model, its network made ready for these times where it offers `prepare_times` (models.unet_fast)."""
    prepare = getattr(model.net, "prepare_times", None)
    if prepare is None or times is None:
        return model
    net: Any = model.net
    key, weights = times.numpy().tobytes(), net.time_weights()
    with _preparing:
        made = _prepared.setdefault(model, OrderedDict())
        if key not in made or made[key][0] != weights:
            with torch.inference_mode(False), torch.no_grad():
                made[key] = weights, model.around(prepare(model.as_time(times)))
            while len(made) > KEPT_TIMES:
                made.popitem(last=False)
        made.move_to_end(key)
        return made[key][1]
