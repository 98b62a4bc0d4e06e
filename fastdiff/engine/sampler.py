"""The loop: model, row, model, row. Binds a plan to a model and a device and owns the buffers.

May import: arguments, buffers, branches, guidance, seeds, graphs, backends, adaptive, compiler, models.denoiser.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff.compiler import layout
from fastdiff.compiler.adaptive import AdaptivePlan
from fastdiff.compiler.assemble import Row
from fastdiff.compiler.brownian import on_path
from fastdiff.compiler.guided import muted
from fastdiff.compiler.plan import Plan
from fastdiff.engine import adaptive, backends
from fastdiff.engine.arguments import batch_shape, check_alike, check_fits, number_per_sample
from fastdiff.engine.branches import PERTURBED, Branches, arrange
from fastdiff.engine.buffers import Buffers
from fastdiff.engine.external import Noise
from fastdiff.engine.graphs import StepGraph
from fastdiff.engine.guidance import APG, DynamicThreshold, Reduction, Rule, reduction
from fastdiff.engine.seeds import per_sample as seeds_of
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
    """

    nfe: int
    seconds: float
    model_seconds: float | None
    backend: str
    adaptive: adaptive.Counts | None = None


class Sampler:
    """Runs a plan with a model: D = P x + Q F after each evaluation, then one fused row (fastdiff.engine.ops).

    backend: "auto" or an executor of `fd.backends()`. graph: "auto" captures model + row into one CUDA graph where
    there is a GPU, True insists, False never. memory_format: of the state and the network's input. guide: a network for
    the unguided branch (autoguidance: a weaker model); perturbed: one for the perturbed branch. Deterministic: a
    sample depends on its seed, not on the batch it is in, as far as the network treats each sample alone. One thread
    at a time: the buffers are kept between calls.
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
    ) -> None:
        if graph not in (True, False, "auto"):
            raise ValueError(f"graph must be 'auto', True or False, got {graph!r}")
        check_fits(plan, model)
        for name, other in (("guide", guide), ("perturbed", perturbed)):
            if other is not None:
                check_alike(name, other, model)
        self.plan = plan
        packed = plan.pack(model.prediction, model.sigma_data)  # an undefined prediction fails here, not in the loop
        times = None if isinstance(plan, AdaptivePlan) else torch.from_numpy(packed.coef[:, layout.EMIT_TIME].copy())
        self.model, self.guide, self.perturbed = _ready(model, times), guide, perturbed
        self.backend = backends.choose(model.device) if backend == "auto" else backend
        backends.require(self.backend, model.device)
        captures = model.device.type == "cuda" and self.backend in ("triton", "cuda")
        if graph is True and not captures:
            raise ValueError(
                "graph=True needs a CUDA device and executor 'triton' or 'cuda', "
                f"got {model.device} and {self.backend!r}"
            )
        self.graph = captures and graph is not False
        self._insist = graph is True
        self.memory_format = memory_format
        self._idle = threading.Lock()
        self._variants: dict[tuple[bool, int], Plan] = {}
        self._batch_plan: tuple[int, Plan] | None = None
        self.last_run: RunStats | None = None
        self._buffers: Buffers | None = None

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
        given: the tensors [B, *S] the solver asks for by name (mean_reverting: {"mu": the degraded images}). callback:
        called after each row. Raises ValueError or TypeError for arguments that do not fit and FloatingPointError,
        naming the row, when the network returns inf or nan.
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
                if isinstance(self.plan, AdaptivePlan):
                    plan = self._of_batch(self.plan, shape[0], noise, reduces)
                else:
                    plan = self._variant(path, reduces)
                buffers = self._prepare(plan, shape, branches, callback is not None, reduces)
                with torch.inference_mode(False), torch.no_grad():
                    buffers.start(
                        plan,
                        self.model,
                        seeds,
                        weights,
                        init,
                        opening,
                        noise,
                        given or {},
                        self.backend,
                        scales,
                        reduces,
                    )
                if isinstance(self.plan, AdaptivePlan):
                    return self._run_adaptive(self.plan, buffers, branches, callback, progress, path)
                return self._run(buffers, branches, callback, progress)
        finally:
            self._idle.release()

    def _run(
        self,
        buffers: Buffers,
        branches: Branches,
        callback: Callable[[RowInfo], None] | None,
        progress: bool,
    ) -> Tensor:
        started = time.perf_counter()
        rows = tqdm(range(self.plan.nfe), disable=not progress, desc=self.plan.solver, unit="row")
        model_seconds = self._loop(buffers, branches, rows, callback)
        self._check_finite(buffers)
        result = self._result(buffers)
        self.last_run = RunStats(self.plan.nfe, time.perf_counter() - started, model_seconds, self.backend)
        return result

    def _run_adaptive(
        self,
        plan: AdaptivePlan,
        buffers: Buffers,
        branches: Branches,
        callback: Callable[[RowInfo], None] | None,
        progress: bool,
        path: bool,
    ) -> Tensor:
        started, spent = time.perf_counter(), 0.0
        buffers.open(self.backend)
        graph = self._graph_for(buffers, branches, callback) if self.graph else None
        bar = tqdm(disable=not progress, desc=plan.solver, unit="row")

        def advance(row: Row) -> None:
            nonlocal spent
            bar.update()
            if graph is not None:
                graph.replay()
                return
            before = time.perf_counter()
            outputs = branches.evaluate(row, buffers.model_in, buffers.model_time, buffers.memory_format)
            spent += time.perf_counter() - before
            buffers.advance(self.backend, outputs)

        def report(row: int, levels: tuple[Level | None, ...], state: Tensor) -> None:
            if callback is not None and buffers.tensors.denoised is not None:
                noisiest = max((level for level in levels if level is not None), key=lambda level: level.rho)
                callback(RowInfo(row, 0, noisiest, buffers.tensors.denoised, state, levels))

        with bar:
            counts = adaptive.solve(plan, buffers, self.model, self.backend, path, advance, report)
        result = self._result(buffers)
        model_seconds = spent if self.model.device.type == "cpu" else None
        seconds = time.perf_counter() - started
        self.last_run = RunStats(max(counts.nfe), seconds, model_seconds, self.backend, counts)
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

    def _variant(self, on_a_path: bool, reduces: Reduction | None) -> Plan:
        """The plan as this run needs it, made once."""
        rows = 0 if reduces is None else reduces.muted
        if (on_a_path, rows) not in self._variants:
            plan = on_path(self.plan) if on_a_path else self.plan
            self._variants[on_a_path, rows] = muted(plan, rows) if rows else plan
        return self._variants[on_a_path, rows]

    def _prepare(
        self, plan: Plan, shape: torch.Size, branches: Branches, keep_denoised: bool, reduces: Reduction | None
    ) -> Buffers:
        copies, perturbed = len(branches.names), PERTURBED in branches.names
        work = None if reduces is None else reduces.work
        wanted = (id(plan), shape, copies, keep_denoised, work, perturbed)
        if self._buffers is None or self._buffers.key != wanted:
            with torch.inference_mode(False):
                self._buffers = Buffers(
                    plan, shape, copies, keep_denoised, self.model.device, self.model.dtype, self.memory_format,
                    work, perturbed,
                )  # fmt: skip
        return self._buffers

    def _loop(
        self,
        buffers: Buffers,
        branches: Branches,
        rows: Any,
        callback: Callable[[RowInfo], None] | None,
    ) -> float | None:
        buffers.open(self.backend)
        if self.graph:
            graph = self._graph_for(buffers, branches, callback)
            if graph is not None:
                for _ in rows:
                    graph.replay()
                return None
        spent = 0.0
        for i in rows:
            row = self.plan.rows[i + 1]
            before = time.perf_counter()
            outputs = branches.evaluate(row, buffers.model_in, buffers.model_time, buffers.memory_format)
            spent += time.perf_counter() - before
            buffers.advance(self.backend, outputs)
            if self.model.device.type == "cpu":
                self._check_finite(buffers)
            if callback is not None:
                assert row.level is not None and buffers.tensors.denoised is not None
                state = buffers.tensors.state[row.outputs[0].dest]
                callback(RowInfo(i, self.plan.nfe, row.level, buffers.tensors.denoised, state))
        return spent if self.model.device.type == "cpu" else None

    def _graph_for(
        self, buffers: Buffers, branches: Branches, callback: Callable[[RowInfo], None] | None
    ) -> StepGraph | None:
        """The step graph, or None where this run must be eager; ValueError or the capture's error if it may not be."""
        differ = not branches.same_in(self.plan.rows[1:])
        if isinstance(self.plan, AdaptivePlan):
            differ = self.plan.partly_guided
        if callback is not None or differ:
            if self._insist:
                why = "a callback" if callback is not None else "rows that leave out a branch and run a smaller batch"
                raise ValueError(f"{why} cannot be part of one captured step; use graph='auto'")
            return None
        try:
            return StepGraph.of(buffers, branches, self.plan.rows[1], self.backend)
        except RuntimeError as error:
            if self._insist or isinstance(error, torch.OutOfMemoryError):
                raise
            self.graph = False
            warnings.warn(
                f"the network cannot be captured in a CUDA graph, running eagerly: {error}. "
                "graph=False silences this; the usual causes are a host sync (.item()) or a CPU tensor in its forward",
                stacklevel=4,
            )
            return None

    def _check_finite(self, buffers: Buffers) -> None:
        worst = buffers.first_failure()
        if worst is None:
            return
        sample, row = worst
        level = self.plan.rows[row + 1].level
        where = "" if level is None else f", time={level.time:.6g}, sigma/alpha={level.rho:.4g}"
        raise FloatingPointError(
            f"the network returned inf or nan at row {row} of {self.plan.nfe} (sample {sample}{where}); "
            "no image was made. Check its weights, its input range and dtype (float16 overflows before bfloat16)"
        )


def _ready(model: Denoiser, times: Tensor | None) -> Denoiser:
    """The model, its network made ready for these times where it offers `prepare_times` (models.unet_fast)."""
    prepare = getattr(model.net, "prepare_times", None)
    if prepare is None or times is None:
        return model
    with torch.inference_mode(False), torch.no_grad():
        return model.around(prepare(model.as_time(times)))
