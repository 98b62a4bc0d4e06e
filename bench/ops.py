"""The step alone: one fused row against diffusers' `scheduler.step` and against the same row under torch.compile.

All contenders walk the same ten steady steps (6 to 15 of 20) on the same inputs, in turn, in one process. Ours is what
`ops.bind` returns, its row counters advancing through the real table; diffusers is called as a pipeline calls it;
the compiled row writes in place and draws its own noise. Nothing is timed whose result is wrong.
"""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdiff as fd
from bench import measure, peers
from bench.measure import Task, Timing
from fastdiff.compiler.assemble import Row
from fastdiff.engine import noise as counter_noise
from fastdiff.engine import ops

TIMED = tuple(range(6, 16))  # steps timed; the one before them runs untimed, after the inputs were put back
SHAPES = ((1, 3, 32, 32), (64, 3, 32, 32), (16, 4, 64, 64), (64, 4, 128, 128), (64, 4, 256, 256))
GPU_SHAPES = (*SHAPES[:2], (512, 3, 32, 32), *SHAPES[2:], (8, 4, 1024, 1024))

OURS_TOLERANCE = 2.0**-22  # times the sum of the magnitudes a row adds up: 4 roundings of fp32
GATE_ELEMENTS = 1 << 22  # a larger batch is checked in its first and last samples
WALK_ELEMENTS = 1 << 18  # the same for the run beside diffusers
GRAPH_CYCLES = 5  # on a GPU the ten steps repeat this often inside one CUDA graph


class Case(NamedTuple):
    """One line of the table."""

    solver: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    executor: str


@dataclass(frozen=True)
class Gate:
    """Worst absolute differences, and what they may be: of one row from float64, and of a run from diffusers' own.

    Without diffusers the second pair is 0.
    """

    error: float
    tolerance: float
    peer_error: float
    peer_tolerance: float

    @property
    def green(self) -> bool:
        """True when both hold; a NaN fails."""
        return self.error <= self.tolerance and self.peer_error <= self.peer_tolerance


class Bound:
    """A plan's steady rows bound to an executor on random inputs."""

    def __init__(
        self,
        case: Case,
        device: torch.device,
        steps: Sequence[int] = (TIMED[0] - 1, *TIMED),
        plan: fd.Plan | None = None,
        prediction: str = "eps",
    ) -> None:
        self.case, self.device = case, device
        self.plan = plan or peers.plan_of(case.solver)
        packed = self.plan.pack(prediction)
        self.steps = list(steps)
        rows = [i + 1 for i in self.steps]
        batch = case.shape[0]
        self.start = torch.randn(self.plan.registers, *case.shape, device=device)
        self.model_out = torch.randn(case.shape, device=device).to(case.dtype)
        self.tensors = ops.StepTensors(
            state=self.start.clone(),
            model_out=self.model_out,
            model_in=None,
            model_time=None,
            coef=torch.from_numpy(packed.coef[rows]).to(device),
            ids=torch.from_numpy(packed.ids[rows]).to(device),
            row=torch.zeros(batch, dtype=torch.int32, device=device),
            seed=torch.arange(batch, dtype=torch.int64, device=device),
            guidance=torch.ones(batch, device=device),
            noise=None,
            denoised=None,
            status=torch.full((batch,), -1, dtype=torch.int32, device=device),
            ticket=torch.zeros(batch, dtype=torch.int32, device=device),
        )
        self.step = ops.bind(self.tensors, case.executor, uses_e=False)
        emitting = dataclasses.replace(
            self.tensors,
            model_in=torch.zeros(case.shape, dtype=case.dtype, device=device),
            model_time=torch.zeros(batch, device=device),
        )
        self.step_and_emit = ops.bind(emitting, case.executor, uses_e=False)

    def reset(self) -> None:
        """The inputs as they were, at the first row."""
        self.tensors.state.copy_(self.start)
        self.tensors.row.zero_()

    def bytes_per_element(self) -> tuple[int, int]:
        """What a steady row must move, each register read or written and the model output once; and where it lives.

        The second number counts a register once that is both read and written.
        """
        row = self.plan.rows[TIMED[0] + 1]
        read = {row.x} | {slot for j, slot in enumerate(row.slots) if any(o.slots[j] for o in row.outputs)}
        written = {o.dest for o in row.outputs}
        width = self.model_out.element_size()
        return 4 * (len(read) + len(written)) + width, 4 * len(read | written) + width


def check(bound: Bound, device: torch.device) -> Gate:
    """Hold the first and the last timed row against float64, and a run up to there against diffusers."""
    worst: list[tuple[float, float]] = []
    chosen = _samples(bound.case.shape, GATE_ELEMENTS)
    for index in (bound.steps.index(TIMED[0]), bound.steps.index(TIMED[-1])):
        worst.append(_row_error(bound, index, chosen, device))
    # a NaN is the worst there is, and max() would lose it
    error, tolerance = max(worst, key=lambda pair: (pair[0] != pair[0], pair[0] / pair[1]))
    peer = _run_error(bound, device) if peers.has_diffusers() else (0.0, 0.0)
    bad_row = int(bound.tensors.status.max())
    return Gate(error, tolerance, *peer) if bad_row < 0 else Gate(float("nan"), 0.0, float("nan"), 0.0)


def _row_error(bound: Bound, index: int, chosen: list[int], device: torch.device) -> tuple[float, float]:
    """(error, tolerance) of one row on random registers, from the paper's formula or, where that is long, the table."""
    case, plan, t = bound.case, bound.plan, bound.tensors
    i = bound.steps[index]
    row = plan.rows[i + 1]
    t.state.copy_(bound.start)
    t.row.fill_(index)
    x, f = bound.start[row.x][chosen].double(), bound.model_out[chosen].double()
    slots = [bound.start[slot][chosen].double() for slot in row.slots]
    normals = [_normals(term, tuple(chosen), case.shape).to(device).double() for term in row.noise]
    for output in row.outputs:
        if output.dest not in (row.x, *row.slots):
            t.state[output.dest].fill_(float("nan"))
    bound.step(bound.model_out)

    wanted = peers.applied(row, x, f, slots, normals)
    if case.solver in peers.FORMULAS:
        old, z = [*slots, 0.0][0], [*normals, 0.0][0]
        wanted = list(peers.formula(case.solver, plan.levels, i, x, f, old, z)[: len(wanted)])
    given = [t.state[output.dest][chosen].double() for output in row.outputs]
    errors = [float((a - b).abs().max()) for a, b in zip(given, wanted, strict=True)]
    worst = max(errors, key=lambda error: (error != error, error))
    return worst, OURS_TOLERANCE * _magnitude(row, x, f, slots, normals)


def _run_error(bound: Bound, device: torch.device) -> tuple[float, float]:
    """(error, tolerance) of a run from the first row to the last timed one, with diffusers' beside it."""
    plan, shape = bound.plan, bound.case.shape
    chosen, steps = _samples(shape, WALK_ELEMENTS), TIMED[-1] + 1
    packed = plan.pack("eps")
    table = dataclasses.replace(
        bound.tensors,
        state=torch.full_like(bound.start, float("nan")),
        coef=torch.from_numpy(packed.coef[1:]).to(device),
        ids=torch.from_numpy(packed.ids[1:]).to(device),
        row=torch.zeros_like(bound.tensors.row),
    )
    table.state[plan.rows[1].x] = bound.start[0]

    def outputs(i: int) -> Tensor:
        # another one in every step: with a constant eps samplers of all orders agree
        return bound.model_out.roll(i, -1)

    step, ours = ops.bind(table, bound.case.executor, uses_e=False), []
    for i in range(steps):
        step(outputs(i))
        ours.append(table.state[plan.rows[i + 1].outputs[0].dest][chosen].double())

    def normals(i: int) -> Tensor:
        return _normals(plan.rows[i + 1].noise[0], tuple(chosen), shape).to(device)

    seen = [outputs(i)[chosen].float() for i in range(steps)]
    theirs = peers.walk(bound.case.solver, plan.levels, bound.start[0][chosen], seen, normals)
    differences = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)]
    worst = max(range(steps), key=lambda i: (differences[i] != differences[i], differences[i]))
    scale = float(theirs[worst].abs().max())
    return differences[worst] * scale, peers.WALK_TOLERANCE * scale


def _magnitude(row: Row, x: Tensor, f: Tensor, slots: list[Tensor], normals: list[Tensor]) -> float:
    """Largest sum of magnitudes any output of the row adds up: what its rounding error is relative to."""
    assert row.level is not None
    top_x, top_f, *tops = (float(value.abs().max()) for value in (x, f, *slots, *normals))
    denoised = (top_x + row.level.sigma * top_f) / row.level.alpha
    return max(
        abs(o.x) * top_x
        + abs(o.denoised) * denoised
        + sum(abs(c) * top for c, top in zip((*o.slots, *o.noise), tops, strict=True))
        for o in row.outputs
    )


def _samples(shape: tuple[int, ...], elements: int) -> list[int]:
    batch, size = shape[0], torch.Size(shape[1:]).numel()
    count = min(batch, max(1, elements // size))
    return [*range((count + 1) // 2), *range(batch - count // 2, batch)]


@functools.lru_cache(maxsize=32)
def _normals(term: tuple[int, int], samples: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    size = torch.Size(shape[1:]).numel()
    drawn = [torch.from_numpy(counter_noise.normal(seed, size, *term)) for seed in samples]
    return torch.stack(drawn).view(-1, *shape[1:])


def _tasks(bound: Bound, device: torch.device) -> Iterator[tuple[str, Task]]:
    """Everything timed in turn on one case."""
    steps = bound.steps
    gpu = device.type == "cuda"
    walk = steps if gpu else steps[1:]
    for name, step in (("us", bound.step), ("emit_us", bound.step_and_emit)):
        yield name, _ours(bound, step, len(walk), gpu)
    if not gpu:
        for name, width in zip(("copy_us", "copy_near_us"), bound.bytes_per_element(), strict=True):
            yield name, measure.copy_task(width * bound.model_out.numel(), device, len(walk))

    if peers.has_diffusers():
        yield "diffusers_us", _diffusers(bound, device)
    rows = [peers.CompiledRow(bound.plan.rows[i + 1], device) for i in steps]
    registers, f = list(bound.start.clone()), bound.model_out
    rows[0].check(registers, f)
    timed = rows if gpu else rows[1:]

    def restart() -> None:
        for register, start in zip(registers, bound.start, strict=True):
            register.copy_(start)
        rows[0](registers, f)

    def walk_rows() -> None:
        for row in timed:
            row(registers, f)

    restart()
    yield "compiled_us", Task(walk_rows, len(timed), restart)
    if gpu:
        yield "compiled_graph_us", Task(measure.captured(walk_rows), len(timed), restart, "device")


def _diffusers(bound: Bound, device: torch.device) -> Task:
    """`scheduler.step` as a pipeline calls it, its timesteps on the CPU."""
    case = bound.case
    scheduler, generator = peers.scheduler_of(case.solver), torch.Generator(device).manual_seed(0)
    extra = {"generator": generator} if case.solver in peers.NOISY else {}
    first = TIMED[0] - 1

    @torch.inference_mode()
    def steps(x: Tensor, which: range) -> Tensor:
        for i in which:
            x = scheduler.step(bound.model_out, scheduler.timesteps[i], x, return_dict=False, **extra)[0]
        return x

    sample = early = steps(bound.start[0], range(first))
    back = peers.place(scheduler)

    def seek() -> None:
        nonlocal sample
        back()
        sample = steps(early, range(first, first + 1))

    return Task(lambda: steps(sample, range(TIMED[0], TIMED[-1] + 1)), len(TIMED), seek)


def _ours(bound: Bound, step: Callable[[Tensor], None], calls: int, gpu: bool) -> Task:
    model_out = bound.model_out

    def walk() -> None:
        for _ in range(calls):
            step(model_out)

    if gpu:
        return Task(measure.captured(walk), calls, bound.reset, "device")

    def reset() -> None:
        bound.reset()
        step(model_out)

    return Task(walk, calls, reset)


def measure_case(case: Case, device: torch.device, budget: float, least: int, copy_gbs: float | None) -> dict[str, Any]:
    """One line of results; without figures when the gate is red."""
    watch = measure.Watch()
    bound = Bound(case, device, TIMED * GRAPH_CYCLES) if device.type == "cuda" else Bound(case, device)
    elements, (width, near) = bound.model_out.numel(), bound.bytes_per_element()
    gate = check(bound, device)
    line: dict[str, Any] = {
        "bench": "ops",
        "solver": case.solver,
        "shape": "x".join(map(str, case.shape)),
        "elements": elements,
        "model_dtype": str(case.dtype).removeprefix("torch."),
        "executor": case.executor,
        "gate": "green" if gate.green else "red",
        "error": gate.error,
        "tolerance": gate.tolerance,
        "diffusers_error": gate.peer_error,
        "diffusers_tolerance": gate.peer_tolerance,
        "bytes_per_element": width,
    }
    if not gate.green:
        return line
    tasks = dict(_tasks(bound, device))
    timings = measure.interleave(tasks, device, budget, least)
    for name, timing in timings.items():
        line |= spread(name, timing)
    if device.type == "cuda":
        once = measure.captured(lambda: bound.step(bound.model_out))
        line |= spread("cold_us", measure.cold(once, bound.reset))
        line |= measure.gpu_state()
    us = timings["us"].median
    line["gbs"] = width * elements / us / 1e3
    line["copy_gbs"] = copy_gbs or width * elements / timings["copy_us"].median / 1e3
    line["copy_fraction"] = line["gbs"] / line["copy_gbs"]
    if "copy_near_us" in timings:
        line["copy_near_fraction"] = line["gbs"] / (near * elements / timings["copy_near_us"].median / 1e3)
    if "diffusers_us" in timings:
        line["ratio_diffusers"] = timings["diffusers_us"].median / us
        line["diffusers_page_faults"] = round(measure.page_faults(tasks["diffusers_us"]))
    line["ratio_compiled"] = min(t.median for n, t in timings.items() if n.startswith("compiled")) / us
    line["repetitions"] = timings["us"].repetitions
    others = watch.others()
    return line | ({} if others is None else {"others": round(others, 3)})


def spread(name: str, timing: Timing) -> dict[str, float]:
    """The columns of one time."""
    quantiles = {f"{name}_p10": timing.p10, f"{name}_p20": timing.p20, f"{name}_p80": timing.p80}
    return {name: timing.median} | quantiles


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The table's cases on a device; quick: one tiny case."""
    found = executors(device)
    if quick:
        return [Case("ddim", SHAPES[0], torch.float32, found[0])]
    shapes = GPU_SHAPES if device.type == "cuda" else SHAPES
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    return [Case(s, shape, d, e) for s in peers.SOLVERS for shape in shapes for d in dtypes for e in found]


def executors(device: torch.device) -> list[str]:
    """Those worth measuring on a device."""
    order = ("triton", "cuda") if device.type == "cuda" else ("cpp",)
    found = [name for name in order if fd.backends()[name].ok and device.type in fd.backends()[name].devices]
    return found or ["reference"]


def run(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Measure every case, one line at a time."""
    warnings.filterwarnings("ignore", module="diffusers")
    torch.manual_seed(0)
    gpu = device.type == "cuda"
    copy_gbs = measure.gpu_copy_bandwidth() if gpu else None
    budget, least = (0.1, 3) if quick else (0.25, 5) if gpu else (4.0, 8)
    with torch.no_grad():
        for case in cases(device, quick):
            started = time.perf_counter()
            line = measure_case(case, device, budget, least, copy_gbs)
            yield line | {"took": round(time.perf_counter() - started, 1)}
