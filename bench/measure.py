"""Timing that can be believed: warm-ups, interleaved repetitions, medians with spread, and facts about the machine.

A repetition runs every contender once, in rotating order, so that whatever disturbs the machine disturbs all of them.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff.engine.machine import cpu_isa, cpu_name

ROOT = Path(__file__).resolve().parent.parent
BUSY_LOAD = 1.0  # load average at the start above which nothing is recorded; on a GPU, per four cores
BUSY_OTHERS = 0.1  # share of the processors taken by others during a case above which it is not recorded
COPY_BYTES = 2 << 30  # of the big copy on a GPU, read plus written
_SLEEP_CYCLES = 400_000  # keeps the GPU busy while the host queues what is timed: 0.2 ms or more


@dataclass(frozen=True)
class Timing:
    """Microseconds per call over `repetitions` samples: the median and three quantiles."""

    median: float
    p10: float
    p20: float
    p80: float
    repetitions: int

    @staticmethod
    def of(samples: list[float]) -> Timing:
        """The statistics of samples in microseconds."""
        p10, p20, median, p80 = np.quantile(samples, (0.1, 0.2, 0.5, 0.8)).tolist()
        return Timing(median, p10, p20, p80, len(samples))


@dataclass
class Task:
    """One contender: `run` makes `calls` calls and is timed, `prepare` puts its inputs back and is not.

    clock: "wall" includes the host (and waits for the GPU at the end); "device" is the time between two CUDA events,
    with the work queued beforehand, so that no launch gap counts.
    """

    run: Callable[[], Any]
    calls: int = 1
    prepare: Callable[[], Any] = field(default=lambda: None)
    clock: str = "wall"

    def sample(self, device: torch.device) -> float:
        """Run once; microseconds per call."""
        self.prepare()
        seconds = _device_seconds(self.run) if self.clock == "device" else _wall_seconds(self.run, device)
        return seconds * 1e6 / self.calls


def interleave(
    tasks: Mapping[str, Task], device: torch.device, budget: float, least: int = 15, most: int = 400, warm_up: int = 3
) -> dict[str, Timing]:
    """Time every task A, B, C, A, B, C, ... for about `budget` seconds, at least `least` and at most `most` rounds."""
    names = list(tasks)
    gc.collect()
    gc.disable()
    try:
        for _ in range(max(1, warm_up) - 1):
            for name in names:
                tasks[name].sample(device)
        started = time.perf_counter()
        for name in names:
            tasks[name].sample(device)
        rounds = int(min(most, max(least, budget / max(time.perf_counter() - started, 1e-9))))
        samples: dict[str, list[float]] = {name: [] for name in names}
        for i in range(rounds):
            shift = i % len(names)
            for name in names[shift:] + names[:shift]:
                samples[name].append(tasks[name].sample(device))
    finally:
        gc.enable()
    return {name: Timing.of(values) for name, values in samples.items()}


def cold(run: Callable[[], Any], prepare: Callable[[], Any], rounds: int = 30) -> Timing:
    """Microseconds of one call with the GPU's L2 cache overwritten before each; the event's own time is included."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    size = max(2 * getattr(properties, "L2_cache_size", 0), 1 << 26)
    flush = torch.empty(size, dtype=torch.uint8, device="cuda")
    samples = []
    for _ in range(rounds):
        prepare()
        flush.zero_()
        samples.append(_device_seconds(run) * 1e6)
    return Timing.of(samples)


def captured(calls: Callable[[], Any]) -> Callable[[], None]:
    """A CUDA graph of what `calls` launches, and the function that replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph.replay


def copy_task(size: int, device: torch.device, calls: int = 10) -> Task:
    """torch's copy_ between two buffers that reads and writes `size` bytes altogether."""
    source = torch.rand(max(size // 8, 1), device=device)
    target = torch.empty_like(source)

    def run() -> None:
        for _ in range(calls):
            target.copy_(source)

    return Task(run, calls, lambda: target.copy_(source), "device" if device.type == "cuda" else "wall")


def gpu_copy_bandwidth() -> float:
    """GB/s read plus written of a copy too large for any cache."""
    task = copy_task(COPY_BYTES, torch.device("cuda"), calls=5)
    return COPY_BYTES / Timing.of([task.sample(torch.device("cuda")) for _ in range(10)]).median / 1e3


class Watch:
    """How much of the processors others used since this was made: /proc/stat less this process and its children."""

    def __init__(self) -> None:
        self._start = self._now()

    def others(self) -> float | None:
        """Share of all processors, 0 to 1; None where /proc is not there."""
        now = self._now()
        if now is None or self._start is None:
            return None
        wall, busy, own = (b - a for a, b in zip(self._start, now, strict=True))
        return max(0.0, (busy - own) / max(wall, 1e-9) / (os.cpu_count() or 1))

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            first = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        ticks = [int(value) for value in first]
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, sum(os.times()[:4])


def page_faults(task: Task) -> float:
    """Pages the operating system hands out during one call: what fresh temporaries cost beside their traffic."""
    import resource

    task.prepare()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    task.run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / task.calls


def load() -> float:
    """The load average of the last minute."""
    return os.getloadavg()[0]


def load_limit(device: torch.device) -> float:
    """The highest load average at which results are recorded."""
    return BUSY_LOAD * (max(1.0, (os.cpu_count() or 1) / 4) if device.type == "cuda" else 1.0)


def settle(limit: float, patience: float = 150.0) -> None:
    """Wait while the load average is above `limit` and only remembers what has ended, an earlier benchmark say."""
    end = time.perf_counter() + patience
    while load() > limit and time.perf_counter() < end:
        watch = Watch()
        time.sleep(3.0)
        if (watch.others() or 0.0) > BUSY_OTHERS:
            return


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    """Hardware, versions, commit and time: the columns every recorded line begins with."""
    facts = {
        "run": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
        "device": device.type,
        "machine": _gpu_name() if device.type == "cuda" else f"{cpu_name()} ({os.cpu_count()} cores, {cpu_isa()})",
        "threads": threads,
        "load": round(load(), 2),
        "python": platform.python_version(),
    }
    facts |= {name: _version(name) for name in ("torch", "diffusers", "triton", "numpy", "k-diffusion", "torchsde")}
    return facts | (gpu_state() if device.type == "cuda" else {})


def gpu_state() -> dict[str, Any]:
    """Clocks, power, temperature, throttling and driver as NVML reports them now; empty when it cannot be asked."""
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return {
            "driver": _text(pynvml.nvmlSystemGetDriverVersion()),
            "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "watts": round(pynvml.nvmlDeviceGetPowerUsage(handle) / 1000),
            "watts_limit": round(pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000),
            "celsius": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "throttle": hex(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
        }
    except Exception:  # NVML raises its own errors, and none of them should end a benchmark
        return {}


def _wall_seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _device_seconds(run: Callable[[], Any]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_SLEEP_CYCLES)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _gpu_name() -> str:
    return torch.cuda.get_device_name(torch.cuda.current_device())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    code = ("fastdiff", "csrc", "kernels", "setup.py", "bench/*.py")
    try:
        head, changed = (
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--", *code))
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if changed else "")  # a plus: not as committed


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
