"""The loop: model, row, model, row. Binds a plan to a model and a device and owns the buffers.

May import: arguments, buffers, room, kept, held, branches, guidance, seeds, graphs, backends, adaptive, skipping,
stream, compiler, models.denoiser.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff.compiler.adaptive import AdaptivePlan
from fastdiff.compiler.assemble import Row
from fastdiff.compiler.brownian import on_path
from fastdiff.compiler.guided import muted
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.skipping import twins
from fastdiff.engine import adaptive, backends, graphs, skipping
from fastdiff.engine.arguments import batch_shape, check_alike, check_fits, number_per_sample
from fastdiff.engine.branches import PERTURBED, Branches, arrange, refuse_modes
from fastdiff.engine.buffers import Buffers
from fastdiff.engine.crowd import POSITIONS
from fastdiff.engine.external import Noise
from fastdiff.engine.guidance import APG, DynamicThreshold, Reduction, Rule, reduction
from fastdiff.engine.held import Held, Memory, memory, shelf
from fastdiff.engine.kept import Kept
from fastdiff.engine.room import Room
from fastdiff.engine.seeds import per_sample as seeds_of
from fastdiff.engine.skipping import AdaptiveSkip
from fastdiff.engine.stream import Stream
from fastdiff.models.denoiser import Condition, Denoiser
from fastdiff.process.schedules import Level


@dataclass(frozen=True)
class RowInfo:
    """What a callback receives after each row: the row, its level, D and the new state (live buffers: clone them).

    Of an adaptive run: rows is 0, since it is not known; level is the noisiest of the batch, levels has one for each
    sample (None where it is finished); the state is x / alpha.
    """

    row: int
    rows: int
    level: Level
    denoised: Tensor
    state: Tensor
    levels: tuple[Level | None, ...] = ()


@dataclass(frozen=True)
class RunStats:
    """One finished run: model evaluations, wall seconds, and the part spent in the model (None on a GPU).

    adaptive: of an adaptive run, the evaluations and steps of each sample; nfe is then the most that one needed.
    graph: "step" or "loop" where it replayed CUDA graphs, else "none". nfe_of: of each sample, where they differ.
    """

    nfe: int
    seconds: float
    model_seconds: float | None
    backend: str
    adaptive: adaptive.Counts | None = None
    graph: str = "none"
    nfe_of: tuple[int, ...] = ()


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
        kept_bytes: int = 2 << 30,
    ) -> None:
        if graph not in (True, False, "auto", "loop"):
            raise ValueError(f"graph must be 'auto', 'loop', True or False, got {graph!r}")
        check_fits(plan, model)
        for name, other in (("guide", guide), ("perturbed", perturbed)):
            if other is not None:
                check_alike(name, other, model)
        self.plan = plan
        self.model, self.guide, self.perturbed = model, guide, perturbed
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
        plan.pack(model.prediction, model.sigma_data)  # an undefined prediction fails here, not in the loop

    @torch.no_grad()
    def sample(
        self,
        shape: Sequence[int],
        seed: int | Sequence[int] | Tensor = 0,
        init: Tensor | None = None,
        noise: Noise = "white",
        cond: Condition = None,
        uncond: Condition = None,
        guidance: float | Sequence[float] | Tensor = 1.0,
        callback: Callable[[RowInfo], None] | None = None,
        progress: bool = False,
        opening: str = "state",
        rule: Rule | None = None,
        threshold: DynamicThreshold | None = None,
        perturbed_cond: Condition = None,
        perturbed_scale: float | Sequence[float] | Tensor = 0.0,
        given: Mapping[str, Tensor] | None = None,
        skip: AdaptiveSkip | None = None,
    ) -> Tensor:
        """Draw samples: fp32 [B, *S] on the model's device.

        shape: [B, *S]. seed: one per sample, or an integer s for seeds s, s+1, ... init: [B, *S], the state at the
        plan's first level, used as it is (opening="state"), or a clean image to be noised to that level
        (opening="image"). noise: "white"; "brownian", increments of one path per seed, the same path at any number of
        steps (fastdiff.compiler.brownian); a `FrameNoise`, for the frames of a video; a tensor [plan.draws, B, *S]; or
        f(id, shape) giving one draw [B, *S]. cond, uncond: conditions of the network, batch first; a negative prompt is
        an uncond. guidance: w of Fu + w (Fc - Fu), a number or one per sample; 1 evaluates cond only. rule:
        `fd.guidance.Rescale`, `APG` or `CFGZero`. threshold: a `fd.guidance.DynamicThreshold`. perturbed_scale: s of
        s (Fc - Fp), a number or one per sample, Fp from the perturbed network, or from this one on perturbed_cond.
        given: the tensors [B, *S] the solver asks for by name (mean_reverting: {"mu": the degraded images}). skip: an
        approximation, `fd.AdaptiveSkip()`: samples skip evaluations where their path is smooth. callback: called after
        each row. Raises ValueError or TypeError for arguments that do not fit and FloatingPointError, naming the row,
        when the network returns inf or nan.
        """
        shape = batch_shape(shape)
        seeds = seeds_of(seed, shape[0])
        weights = number_per_sample("guidance", guidance, shape[0])
        scales = number_per_sample("perturbed_scale", perturbed_scale, shape[0])
        reduces = reduction(rule, threshold)
        if isinstance(rule, APG) and any(scales):
            raise ValueError("rule APG projects against one branch: use it without perturbed_scale")
        branches = arrange(
            self.model, shape[0], cond, uncond, perturbed_cond,
            guided=any(w != 1.0 for w in weights), perturbed=any(scales), guide=self.guide,
            perturbed_net=self.perturbed, reads_unguided=self.plan.reads_unguided,
        )  # fmt: skip
        if not self._idle.acquire(blocking=False):
            raise RuntimeError(
                "this Sampler is drawing in another thread and has one set of buffers; use one per thread"
            )
        try:
            with self._on_device():
                path = isinstance(noise, str) and noise == "brownian"
                copies, keep_denoised = len(branches.names), callback is not None
                if skip is not None:
                    self._check_skip(skip)
                    copies = 1 + max(POSITIONS[name] for name in branches.names)
                if isinstance(self.plan, AdaptivePlan):
                    plan = self._of_batch(self.plan, shape[0], noise, reduces)
                else:
                    plan = self._variant(path, reduces, skip is not None)
                work, perturbs = None if reduces is None else reduces.work, PERTURBED in branches.names
                room = Room.of(
                    plan, shape, copies, self.model, self.memory_format, keep_denoised, work, perturbs
                )  # fmt: skip
                with self._held(room, branches) as held:
                    with torch.inference_mode(False), torch.no_grad():
                        held.buffers.start(
                            plan, self.model, seeds, weights, init, opening, noise, given or {}, self.backend, scales,
                            reduces,
                        )  # fmt: skip
                    if isinstance(self.plan, AdaptivePlan):
                        return self._run_adaptive(self.plan, held, branches, callback, progress, path)
                    if skip is not None:
                        return self._run_skipping(plan, skip, held, branches, callback)
                    return self._run(plan, held, branches, callback, progress)
        finally:
            self._idle.release()

    def stream(self, shape: Sequence[int], slots: int = 16, **options: Any) -> Stream:
        """A running batch of `slots` samples of shape [*S] for this sampler's networks (fastdiff.engine.stream).

        Requests that bring no plan run this one. options: queue, rule, threshold, table_rows.
        """
        return Stream(
            self.model, shape, slots, plan=self.plan, backend=self.backend, graph=self.graph and "auto",
            memory_format=self.memory_format, guide=self.guide, perturbed=self.perturbed, **options,
        )  # fmt: skip

    def memory(self) -> Memory:
        """What this model's samplers keep now."""
        return memory(self.model, self.kept_bytes)

    @property
    def _shelf(self) -> Kept[Held]:
        return shelf(self.model)

    @contextmanager
    def _held(self, room: Room, branches: Branches) -> Iterator[Held]:
        """Buffers of a room, and what was captured on them for these networks; not kept where the run fails."""
        key = (room, self.backend, graphs.signature(branches) if self.graph else ())
        with torch.inference_mode(False):  # a later call outside it writes here too
            held = self._shelf.lend(key, lambda: Held(room))
        yield held
        self._shelf.give_back(key, held, self.kept_bytes)

    def _run(
        self,
        plan: Plan,
        held: Held,
        branches: Branches,
        callback: Callable[[RowInfo], None] | None,
        progress: bool,
    ) -> Tensor:
        started = time.perf_counter()
        buffers, graph = held.buffers, "none"
        buffers.open(self.backend)
        replays = self._captured(held, branches, plan.rows[1:], callback) if self.graph else None
        bar = tqdm(plan.rows[1:], disable=not progress, desc=plan.solver, unit="row")
        spent = 0.0
        if replays is not None:
            graph = "loop" if self._whole else "step"
            for i, replay in enumerate(replays):
                replay()
                if not self._whole:
                    bar.update()
                    self._report(callback, i, plan, buffers)
        else:
            modes = branches.modes(plan.rows[1:])
            for i, row in enumerate(bar):
                before = time.perf_counter()
                outputs = branches.evaluate(row, buffers.model_in, buffers.model_time, buffers.memory_format, modes[i])
                spent += time.perf_counter() - before
                if outputs is None:
                    buffers.reuse(self.backend)
                else:
                    buffers.advance(self.backend, outputs)
                if self.model.device.type == "cpu":
                    self._check_finite(buffers, plan)
                self._report(callback, i, plan, buffers)
        self._check_finite(buffers, plan)
        result = self._result(buffers)
        model_seconds = spent if self.model.device.type == "cpu" and replays is None else None
        self.last_run = RunStats(plan.nfe, time.perf_counter() - started, model_seconds, self.backend, graph=graph)
        return result

    @staticmethod
    def _report(callback: Callable[[RowInfo], None] | None, i: int, plan: Plan, buffers: Buffers) -> None:
        if callback is None:
            return
        row = plan.rows[i + 1]
        assert row.level is not None and buffers.tensors.denoised is not None
        state = buffers.tensors.state[row.outputs[0].dest]
        callback(RowInfo(i, len(plan.rows) - 1, row.level, buffers.tensors.denoised, state))

    def _run_adaptive(
        self,
        plan: AdaptivePlan,
        held: Held,
        branches: Branches,
        callback: Callable[[RowInfo], None] | None,
        progress: bool,
        path: bool,
    ) -> Tensor:
        started, spent = time.perf_counter(), 0.0
        buffers = held.buffers
        buffers.open(self.backend)
        capturing = self.graph and self._captured(held, branches, plan.rows[1:2], callback) is not None
        bar = tqdm(disable=not progress, desc=plan.solver, unit="row")

        def run_row(row: Row) -> None:
            nonlocal spent
            bar.update()
            if capturing and held.graphs is not None:
                held.graphs.steps(branches, (row,), self.backend)[0]()
                return
            before = time.perf_counter()
            outputs = branches.evaluate(row, buffers.model_in, buffers.model_time, buffers.memory_format)
            spent += time.perf_counter() - before
            assert outputs is not None
            buffers.advance(self.backend, outputs)

        def report(row: int, levels: tuple[Level | None, ...], state: Tensor) -> None:
            if callback is not None and buffers.tensors.denoised is not None:
                noisiest = max((level for level in levels if level is not None), key=lambda level: level.rho)
                callback(RowInfo(row, 0, noisiest, buffers.tensors.denoised, state, levels))

        with bar:
            counts = adaptive.solve(plan, buffers, self.model, self.backend, path, run_row, report)
        result = self._result(buffers)
        model_seconds = spent if self.model.device.type == "cpu" else None
        seconds, graph = time.perf_counter() - started, "step" if capturing else "none"
        self.last_run = RunStats(max(counts.nfe), seconds, model_seconds, self.backend, counts, graph)
        return result

    def _result(self, buffers: Buffers) -> Tensor:
        result = buffers.tensors.state[self.plan.result].clone(memory_format=torch.preserve_format)
        if not bool(result.isfinite().all()):
            raise FloatingPointError(
                "the sample is inf or nan although every network output was finite: a weighted sum overflowed float32. "
                "Lower the guidance, or check the scale of the network's output"
            )
        return result

    def _of_batch(self, plan: AdaptivePlan, batch: int, noise: Noise, reduces: Reduction | None) -> Plan:
        refuse_modes(self.model, plan.solver)
        if reduces is not None and (reduces.muted or reduces.remembers):
            raise ValueError(
                f"{plan.solver} evaluates the network in steps it may reject, so a rule cannot count evaluations: use "
                "CFGZero(zero_init=0), or APG with momentum=0"
            )
        if plan.stochastic and not isinstance(noise, str):
            raise ValueError(
                f"{plan.solver} with eta > 0 draws as often as its steps turn out to need, so the noise cannot be "
                "given; use noise='white' or noise='brownian'"
            )
        if self._batch_plan is None or self._batch_plan[0] != batch:
            self._batch_plan = (batch, plan.for_batch(batch))
        return self._batch_plan[1]

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.model.device) if self.model.device.type == "cuda" else nullcontext()

    def _variant(self, on_a_path: bool, reduces: Reduction | None, skips: bool) -> Plan:
        """The plan as this run needs it, made once."""
        rows = 0 if reduces is None else reduces.muted
        if (on_a_path, rows, skips) not in self._variants:
            plan = on_path(self.plan) if on_a_path else self.plan
            plan = muted(plan, rows) if rows else plan
            self._variants[on_a_path, rows, skips] = twins(plan) if skips else plan
        return self._variants[on_a_path, rows, skips]

    def _check_skip(self, skip: AdaptiveSkip) -> None:
        if not isinstance(skip, AdaptiveSkip):
            raise TypeError(f"skip must be a fd.AdaptiveSkip, got {skip!r}")
        skipping.check_plan(self.plan)
        refuse_modes(self.model, "adaptive skipping")
        if self._insist:
            raise ValueError("adaptive skipping decides between two rows which comes next, so no graph holds them")

    def _run_skipping(
        self,
        plan: Plan,
        skip: AdaptiveSkip,
        held: Held,
        branches: Branches,
        callback: Callable[[RowInfo], None] | None,
    ) -> Tensor:
        started, buffers = time.perf_counter(), held.buffers
        buffers.open(self.backend)

        def after(i: int) -> None:
            if self.model.device.type == "cpu":
                self._check_finite(buffers, self.plan)
            self._report(callback, i, self.plan, buffers)

        nfe = skipping.solve(plan, skip, buffers, branches, self.backend, after)
        self._check_finite(buffers, self.plan)
        result = self._result(buffers)
        self.last_run = RunStats(max(nfe), time.perf_counter() - started, None, self.backend, nfe_of=nfe)
        return result

    def _captured(
        self, held: Held, branches: Branches, rows: Sequence[Row], callback: Callable[[RowInfo], None] | None
    ) -> list[Callable[[], None]] | None:
        """What replays the rows; None, with a warning, where they cannot be captured and need not be."""
        if self._whole and callback is not None:
            raise ValueError("a callback cannot be part of a captured loop; use graph='auto'")
        if held.graphs is None:
            recorder = graphs.recorder_for(self.model.device, self.backend)
            assert recorder is not None
            held.graphs = graphs.Graphs(held.buffers, branches, recorder)
        held.graphs.load(branches)
        try:
            if self._whole:
                return [held.graphs.loop(branches, rows, self.backend)]
            return held.graphs.steps(branches, rows, self.backend)
        except RuntimeError as error:
            if self._insist or isinstance(error, torch.OutOfMemoryError):
                raise
            self.graph, held.graphs = False, None
            warnings.warn(graphs.cannot_capture(error), stacklevel=5)
            return None

    def _check_finite(self, buffers: Buffers, plan: Plan) -> None:
        worst = buffers.first_failure()
        if worst is None:
            return
        sample, row = worst
        level = plan.rows[row + 1].level
        where = "" if level is None else f", time={level.time:.6g}, sigma/alpha={level.rho:.4g}"
        raise FloatingPointError(
            f"the network returned inf or nan at row {row} of {len(plan.rows) - 1} (sample {sample}{where}); "
            "no image was made. Check its weights, its input range and dtype (float16 overflows before bfloat16)"
        )
