"""The loop: model, row, model, row. Binds a plan to a model and a device and owns the buffers.

May import: buffers, conditions, seeds, graphs, backends, compiler, models.denoiser.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff.compiler.brownian import on_path
from fastdiff.compiler.plan import Plan
from fastdiff.engine import backends
from fastdiff.engine.buffers import Buffers
from fastdiff.engine.conditions import prepare
from fastdiff.engine.graphs import StepGraph
from fastdiff.engine.ops import MODEL_DTYPES
from fastdiff.engine.seeds import per_sample as seeds_of
from fastdiff.models.denoiser import Condition, Denoiser
from fastdiff.process.schedules import Level

Noise = str | Tensor | Callable[[int, torch.Size], Tensor]


@dataclass(frozen=True)
class RowInfo:
    """What a callback receives after each row: the row, its level, D and the new state (live buffers: clone them)."""

    row: int
    rows: int
    level: Level
    denoised: Tensor
    state: Tensor


@dataclass(frozen=True)
class RunStats:
    """One finished run: model evaluations, wall seconds, and the part spent in the model (None on a GPU)."""

    nfe: int
    seconds: float
    model_seconds: float | None
    backend: str


class Sampler:
    """Runs a plan with a model: D = P x + Q F after each evaluation, then one fused row (fastdiff.engine.ops).

    backend: "auto" or an executor of `fd.backends()`. graph: "auto" captures model + row into one CUDA graph where
    there is a GPU, True insists, False never. memory_format: of the state and the network's input. Deterministic: a
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
    ) -> None:
        if graph not in (True, False, "auto"):
            raise ValueError(f"graph must be 'auto', True or False, got {graph!r}")
        if plan.schedule is not None and plan.schedule != model.schedule:
            raise ValueError(
                f"the plan is made for schedule {plan.schedule!r}, the model was trained on {model.schedule!r}; "
                "make the plan with schedule=model.schedule"
            )
        unread = any(row.level is not None and row.reading is None for row in plan.rows)
        if plan.schedule is None and unread and model.schedule.name != "edm":
            raise ValueError(
                f"the plan has bare levels, at which the network is shown sigma, the model was trained on "
                f"{model.schedule!r}; give trace(...) schedule=model.schedule"
            )
        if model.schedule.shared is not None and any(row.reading is not None for row in plan.rows):
            raise ValueError(
                f"the plan shows the network the times of the scheduler it was captured from, the model shares times: "
                f"{model.schedule!r}; use a plan made with schedule=model.schedule"
            )
        self.plan = plan
        self.model = model
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
        self._path_plan: Plan | None = None
        self.last_run: RunStats | None = None
        self._buffers: Buffers | None = None
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
    ) -> Tensor:
        """Draw samples: fp32 [B, *S] on the model's device.

        shape: [B, *S]. seed: one per sample, or an integer s for seeds s, s+1, ... init: [B, *S], the state at the
        plan's first level, used as it is (opening="state"), or a clean image to be noised to that level
        (opening="image"). noise: "white"; "brownian", increments of one path per seed, the same path at any number of
        steps (fastdiff.compiler.brownian); a tensor [plan.draws, B, *S]; or f(id, shape) giving one draw [B, *S].
        cond, uncond: conditions of the network, batch first. guidance: w of Fu + w (Fc - Fu), a number or one per
        sample; 1 evaluates cond only. callback: called after each row. Raises ValueError or TypeError for arguments
        that do not fit and FloatingPointError, naming the row, when the network returns inf or nan.
        """
        shape = batch_shape(shape)
        seeds = seeds_of(seed, shape[0])
        weights = _guidance(guidance, shape[0])
        guided = any(w != 1.0 for w in weights)
        if guided and uncond is None:
            raise ValueError("guidance != 1 needs uncond=, the condition of the unguided branch (e.g. the null label)")
        if not self._idle.acquire(blocking=False):
            raise RuntimeError(
                "this Sampler is drawing in another thread and has one set of buffers; use one per thread"
            )
        try:
            with self._on_device():
                plan = self._on_path() if isinstance(noise, str) and noise == "brownian" else self.plan
                buffers = self._prepare(plan, shape, 2 if guided else 1, callback is not None)
                with torch.inference_mode(False), torch.no_grad():
                    buffers.start(plan, self.model, seeds, weights, init, opening, noise)
                conditions = prepare(cond, uncond if guided else None, shape[0], self.model.device)
                return self._run(buffers, conditions, callback, progress)
        finally:
            self._idle.release()

    def _run(
        self,
        buffers: Buffers,
        conditions: tuple[Any, Any],
        callback: Callable[[RowInfo], None] | None,
        progress: bool,
    ) -> Tensor:
        started = time.perf_counter()
        rows = tqdm(range(self.plan.nfe), disable=not progress, desc=self.plan.solver, unit="row")
        model_seconds = self._loop(buffers, conditions, rows, callback)
        self._check_finite(buffers)
        result = buffers.tensors.state[self.plan.result].clone(memory_format=torch.preserve_format)
        if not bool(result.isfinite().all()):
            raise FloatingPointError(
                "the sample is inf or nan although every network output was finite: a weighted sum overflowed float32. "
                "Lower the guidance, or check the scale of the network's output"
            )
        self.last_run = RunStats(self.plan.nfe, time.perf_counter() - started, model_seconds, self.backend)
        return result

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.model.device) if self.model.device.type == "cuda" else nullcontext()

    def _on_path(self) -> Plan:
        if self._path_plan is None:
            self._path_plan = on_path(self.plan)
        return self._path_plan

    def _prepare(self, plan: Plan, shape: torch.Size, copies: int, keep_denoised: bool) -> Buffers:
        wanted = (id(plan), shape, copies, keep_denoised)
        if self._buffers is None or self._buffers.key != wanted:
            with torch.inference_mode(False):
                self._buffers = Buffers(
                    plan, shape, copies, keep_denoised, self.model.device, self.model.dtype, self.memory_format
                )
        return self._buffers

    def _loop(
        self,
        buffers: Buffers,
        conditions: tuple[Any, Any],
        rows: Any,
        callback: Callable[[RowInfo], None] | None,
    ) -> float | None:
        buffers.open(self.backend)
        if self.graph:
            graph = self._graph_for(buffers, conditions[0], callback)
            if graph is not None:
                for _ in rows:
                    graph.replay()
                return None
        spent = 0.0
        for i in rows:
            row = self.plan.rows[i + 1]
            half = row.gain == 0.0 and buffers.copies == 2
            before = time.perf_counter()
            output = self._evaluate(buffers, conditions[1] if half else conditions[0], half)
            spent += time.perf_counter() - before
            buffers.bind(self.backend, output)(output)
            if self.model.device.type == "cpu":
                self._check_finite(buffers)
            if callback is not None:
                assert row.level is not None and buffers.tensors.denoised is not None
                state = buffers.tensors.state[row.outputs[0].dest]
                callback(RowInfo(i, self.plan.nfe, row.level, buffers.tensors.denoised, state))
        return spent if self.model.device.type == "cpu" else None

    def _graph_for(self, buffers: Buffers, cond: Any, callback: Callable[[RowInfo], None] | None) -> StepGraph | None:
        """The step graph, or None where this run must be eager; ValueError or the capture's error if it may not be."""
        halves = buffers.copies == 2 and any(row.gain == 0.0 for row in self.plan.rows)
        if callback is not None or halves:
            if self._insist:
                why = "a callback" if callback is not None else "rows without guidance, which run half the batch,"
                raise ValueError(f"{why} cannot be part of one captured step; use graph='auto'")
            return None
        try:
            return StepGraph.of(buffers, self.model, cond, self.backend)
        except RuntimeError as error:
            if self._insist:
                raise
            self.graph = False
            warnings.warn(
                f"the network cannot be captured in a CUDA graph, running eagerly: {error}. "
                "graph=False silences this; the usual causes are a host sync (.item()) or a CPU tensor in its forward",
                stacklevel=4,
            )
            return None

    def _evaluate(self, buffers: Buffers, cond: Any, half: bool) -> Tensor:
        x, clock = buffers.model_in, buffers.model_time
        if half:
            x, clock = x[: buffers.batch], clock[: buffers.batch]
        output = self.model(x, clock, cond)
        if output.shape != x.shape:
            raise ValueError(
                f"the network returned shape {tuple(output.shape)} for an input of shape {tuple(x.shape)}; "
                "they must be equal. A network that also predicts a variance must return its first half only"
            )
        if output.dtype not in MODEL_DTYPES or output.device != x.device:
            raise TypeError(
                f"the network returned {output.dtype} on {output.device}, expected float32, float16 or bfloat16 "
                f"on {x.device}"
            )
        return buffers.as_stored(output)

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


def batch_shape(shape: Sequence[int]) -> torch.Size:
    """`shape` if it is [batch, *sample]. Raises TypeError or ValueError otherwise."""
    if isinstance(shape, int):
        raise TypeError(f"shape must be [batch, *sample], for example (4, 3, 32, 32), got {shape}")
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"shape must be [batch, *sample] with every size >= 1, got {tuple(shape)}")
    return torch.Size(shape)


def _guidance(guidance: float | Sequence[float] | Tensor, batch: int) -> list[float]:
    values = torch.as_tensor(guidance, dtype=torch.float64).flatten().tolist()
    if len(values) not in (1, batch):
        raise ValueError(f"guidance must be one number or one per sample ({batch}), got {len(values)}")
    if not all(abs(v) <= torch.finfo(torch.float32).max for v in values):
        raise ValueError(f"guidance must be finite in float32, got {guidance}")
    return values * batch if len(values) == 1 else values
