"""Continuous batching: requests with a plan, seed, guidance and condition of their own join a running batch at any row
and leave when they are done.

May import: desk, seats, request, crowd, arguments, branches, guidance, graphs, backends, compiler, models.denoiser.
The row index is per sample, so a request's sample is the one it would have alone, to the rounding that the network's
batch size makes.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.compiler.plan import Plan
from fastdiff.engine import backends, graphs
from fastdiff.engine.arguments import batch_shape, check_alike, check_channels
from fastdiff.engine.branches import refuse_modes
from fastdiff.engine.crowd import Crowd
from fastdiff.engine.desk import Desk
from fastdiff.engine.guidance import DynamicThreshold, Rule, reduction
from fastdiff.engine.request import CANCELLED, DONE, FAILED, RUNNING, Request
from fastdiff.engine.seats import Left, Seat, Seats
from fastdiff.errors import QueueFull, RequestCancelled, warn
from fastdiff.models.denoiser import Condition, Denoiser

AHEAD = 2  # rows that the host may have queued on a device before it waits for the oldest
KEPT_LATENCIES = 4096


@dataclass(frozen=True)
class StreamStats:
    """What a stream has done. rows: of the batch; evaluated: entries the networks were asked about, over all rows.

    seconds: spent in rows; throughput: samples done per such second. latency: median and 95 % quantile in seconds from
    submit to sample, of the last requests. occupancy: mean share of the slots in use. plans: in the table now.
    """

    done: int
    failed: int
    cancelled: int
    rows: int
    evaluated: int
    seconds: float
    throughput: float
    latency: tuple[float, float]
    occupancy: float
    plans: int
    bytes: int


class Stream:
    """A running batch of `slots` samples of shape [*S], and a queue of those that wait for a slot.

    `submit` adds a request, from any thread. `step` runs one row of every sample; so does each turn of a loop over the
    stream, which gives requests as they are done, and `Request.result`; threads take turns. A request whose result was
    taken is not given once more. queue: requests that may wait; one more raises QueueFull. plan: what `submit` runs
    where it is given none. rule, threshold: of all requests.
    table_rows: rows of plans kept in device memory, about 300 bytes each; one plan must fit. The rest as in `Sampler`.
    in_order: the networks see the samples in the order they joined, as the frames of a video (`rolling`).
    """

    def __init__(
        self,
        model: Denoiser,
        shape: Sequence[int],
        slots: int = 16,
        *,
        queue: int = 1024,
        plan: Plan | None = None,
        backend: str = "auto",
        graph: bool | str = "auto",
        memory_format: torch.memory_format = torch.contiguous_format,
        guide: Denoiser | None = None,
        perturbed: Denoiser | None = None,
        rule: Rule | None = None,
        threshold: DynamicThreshold | None = None,
        table_rows: int = 4096,
        in_order: bool = False,
    ) -> None:
        if not isinstance(model, Denoiser):
            raise TypeError(f"a stream needs a Denoiser, got {type(model).__name__}; wrap the network: fd.Denoiser")
        for name, count in (("slots", slots), ("queue", queue), ("table_rows", table_rows)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {count!r}")
        for network in (model, guide, perturbed):
            if network is not None:
                refuse_modes(network, "a stream")
        if graph not in (True, False, "auto"):
            raise ValueError(f"graph must be 'auto', True or False, got {graph!r}")
        for name, other in (("guide", guide), ("perturbed", perturbed)):
            if other is not None:
                check_alike(name, other, model)
        self.model, self.guide, self.perturbed, self.plan = model, guide, perturbed, plan
        self.shape, self.queue_limit = batch_shape((1, *shape))[1:], queue
        check_channels(model, self.shape, batched=False)
        self.backend = backends.choose(model.device) if backend == "auto" else backend
        backends.require(self.backend, model.device)
        recorder = graphs.recorder_for(model.device, self.backend) if graph else None
        if graph is True and recorder is None:
            raise ValueError(
                "graph=True needs a CUDA device and executor 'triton' or 'cuda', "
                f"got {model.device} and {self.backend!r}"
            )
        self._insist = graph is True
        self._reduces = reduction(rule, threshold)
        self._crowd = Crowd(model, guide, perturbed)
        with torch.inference_mode(False), torch.no_grad():
            self._seats = Seats(
                model, self.shape, slots, self.backend, recorder, memory_format, self._crowd, self._reduces,
                table_rows, in_order,
            )  # fmt: skip
        self._desk = Desk(model, self.shape, plan, guide, perturbed, self._reduces, self._seats.capacity)
        self._queue: deque[Request] = deque()
        self._lock, self._turn = threading.Lock(), threading.RLock()
        self._flight: deque[tuple[Any, list[Left]]] = deque()
        self._books = threading.Lock()  # of what follows, which other threads read and take from; held for no work
        self._unclaimed: OrderedDict[Request, None] = OrderedDict()  # done, not returned by a step or by result
        self._latencies: deque[float] = deque(maxlen=KEPT_LATENCIES)
        self._counts = dict.fromkeys((DONE, FAILED, CANCELLED), 0)
        self._rows = self._used = 0
        self._seconds = 0.0
        self._closed = False

    def submit(
        self,
        plan: Plan | str | None = None,
        *,
        seed: int = 0,
        cond: Condition = None,
        uncond: Condition = None,
        guidance: float | None = None,
        init: Tensor | None = None,
        opening: str | None = None,
        noise: str = "white",
        perturbed_cond: Condition = None,
        perturbed_scale: float | None = None,
        given: Mapping[str, Tensor] | None = None,
        **names: Any,
    ) -> Request:
        """Ask for one sample. What is wrong with a request is said here, and no other request is touched.

        plan: a `Plan`, or the name of a solver, for which steps, grid and the options of `fd.plan` may follow; None:
        the stream's. cond, uncond, guidance, perturbed_cond: as in `Sampler.sample` for a batch of one; all requests of
        a stream have conditions of one structure. init: [*S] or [1, *S]; opening: "state" or "image", by default what
        `fd.sample` does for a name and `Sampler.sample` for a plan. noise: "white" or "brownian". Raises ValueError or
        TypeError for what does not fit, QueueFull, and RuntimeError where the stream is closed.
        """
        made = self._desk.work(
            plan,
            names,
            seed,
            cond,
            uncond,
            guidance,
            init,
            opening,
            noise,
            perturbed_cond,
            perturbed_scale,
            given or {},
        )
        with self._lock:
            if self._closed:
                raise RuntimeError("this stream is closed; open another one")
            if len(self._queue) >= self.queue_limit:
                raise QueueFull(
                    f"{len(self._queue)} requests wait, as many as queue= allows: run the stream (step, result) before "
                    "more are added, or give it a longer queue"
                )
            work = dataclasses.replace(made, conditions=self._crowd.check(made.branches))
            request = Request(work, self._drive, self._withdraw, self._claim)
            self._queue.append(request)
        return request

    def step(self) -> list[Request]:
        """Let requests join and leave, run one row of every sample, and return the requests that are now done.

        A request that fails does not stop the others. On a GPU a request is done when the device is, up to two rows
        later than it was queued.
        """
        with self._turn:
            self._advance()
            with self._books:
                landed = list(self._unclaimed)
                self._unclaimed.clear()
            return landed

    def __iter__(self) -> Iterator[Request]:
        """Requests as they are done, until none is left."""
        while self.pending or self._unclaimed:
            yield from self.step()

    @property
    def pending(self) -> int:
        """Requests that wait, run, or are queued on the device."""
        with self._books:
            return len(self._queue) + len(self._seats) + sum(len(lefts) for _, lefts in self._flight)

    def stats(self) -> StreamStats:
        """What was done so far."""
        with self._books:
            counts, latencies, seconds = dict(self._counts), list(self._latencies), self._seconds
            rows, used = self._rows, self._used
        done = counts[DONE]
        median, late = np.quantile(latencies, (0.5, 0.95)) if latencies else (0.0, 0.0)
        return StreamStats(
            done=done,
            failed=counts[FAILED],
            cancelled=counts[CANCELLED],
            rows=rows,
            evaluated=self._seats.evaluated,
            seconds=seconds,
            throughput=done / seconds if seconds else 0.0,
            latency=(float(median), float(late)),
            occupancy=used / (rows * self._seats.slots) if rows else 0.0,
            plans=self._seats.plans,
            bytes=self._seats.bytes,
        )

    def close(self) -> None:
        """Cancel what waits and runs; no more requests are taken."""
        with self._lock:
            self._closed = True
        with self._turn:
            for request in (*self._queue, *(seat.request for seat in self._seats)):
                self._withdraw(request)
            self._land(wait=True)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _advance(self) -> None:
        with torch.inference_mode(False), torch.no_grad(), self._on_device():
            started = time.perf_counter()
            self._admit()
            if len(self._seats):
                self._run()
            self._land()
            with self._books:
                self._seconds += time.perf_counter() - started

    def _admit(self) -> None:
        """Let those that wait join, first come, first served, while there is a slot and room in the table."""
        while True:
            with self._lock:
                if not self._queue:
                    return
                request, error = self._queue[0], None
                try:
                    if not self._seats.join(request):
                        return
                except Exception as failure:  # no memory for larger buffers: what runs goes on in those it has
                    error = failure
                self._queue.popleft()
            if error is not None:
                self._end(request, FAILED, error=error)
            else:
                request.state, request.joined = RUNNING, time.perf_counter()

    def _run(self) -> None:
        running = len(self._seats)
        try:
            left = self._row_of_all()
        except Exception as error:
            self._fail_all(error)
            return
        except BaseException:
            self._fail_all(RequestCancelled("the stream was interrupted while this request ran; submit it again"))
            raise
        mark = self._mark()
        with self._books:
            self._rows += 1
            self._used += running
            self._flight.append((mark, left))
        for seat in self._seats.failed():
            why = self._not_finite(seat, self._seats.status(seat))
            self._seats.leave(seat)
            self._end(seat.request, FAILED, error=why)

    def _row_of_all(self) -> list[Left]:
        """One row; without graphs from now on, and a warning, where the networks cannot be captured."""
        try:
            return self._seats.run()
        except graphs.NotCaptured as error:
            if self._insist:
                raise
            self._seats.recorder = None
            warn(graphs.cannot_capture(error))
            return self._seats.run()

    def _mark(self) -> Any:
        """An event of the device after all that is queued; None on a CPU, where all is done."""
        if self.model.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _land(self, wait: bool = False) -> None:
        """Settle what the device is done with; wait for it where too much is queued or nothing else is left to do."""
        while self._flight:
            event, lefts = self._flight[0]
            if event is not None and not event.query():
                if not (wait or len(self._flight) > AHEAD or not len(self._seats)):
                    break
                event.synchronize()
            with self._books:
                self._flight.popleft()
            for left in lefts:
                self._settle(left)

    def _settle(self, left: Left) -> None:
        request = left.seat.request
        status, finite = left.flags.tolist()
        if status >= 0:
            self._end(request, FAILED, error=self._not_finite(left.seat, status))
        elif not finite:
            why = "the sample is inf or nan although every network output was finite: lower the guidance"
            self._end(request, FAILED, error=FloatingPointError(why))
        else:
            self._end(request, DONE, image=left.image)

    def _end(self, request: Request, state: str, image: Tensor | None = None, error: Exception | None = None) -> None:
        request.image, request.error, request.finished = image, error, time.perf_counter()
        with self._books:
            request.state = state
            self._counts[state] += 1
            if state != CANCELLED:
                self._unclaimed[request] = None
                if len(self._unclaimed) > KEPT_LATENCIES:
                    self._unclaimed.popitem(last=False)
            if state == DONE and request.latency is not None:
                self._latencies.append(request.latency)

    def _claim(self, request: Request) -> None:
        """It was given out, so a step does not give it out too."""
        with self._books:
            self._unclaimed.pop(request, None)

    def _fail_all(self, error: Exception) -> None:
        for seat in self._seats:
            self._seats.leave(seat)
            self._end(seat.request, FAILED, error=error)

    def _not_finite(self, seat: Seat, status: int) -> FloatingPointError:
        row = status - seat.place - 1
        level = seat.work.plan.rows[row + 1].level
        assert level is not None
        return FloatingPointError(
            f"the network returned inf or nan at row {row} of {len(seat.work.needed)} (time={level.time:.6g}, "
            f"sigma/alpha={level.rho:.4g}) of the request with seed {seat.work.seed}; it has no sample, the others go "
            "on. Check the network's weights, its input range and dtype (float16 overflows before bfloat16)"
        )

    def _drive(self, request: Request) -> None:
        with self._turn:
            if not request.done:
                self._advance()  # what is done besides waits for whoever loops over the stream

    def _withdraw(self, request: Request) -> bool:
        with self._turn:
            with self._lock:
                if request in self._queue:
                    self._queue.remove(request)
                    self._end(request, CANCELLED)
                    return True
            for seat in self._seats:
                if seat.request is request:
                    self._seats.leave(seat)
                    self._end(request, CANCELLED)
                    return True
        return False

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.model.device) if self.model.device.type == "cuda" else nullcontext()
