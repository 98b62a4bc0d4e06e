"""Group normalisation with SiLU on every shape of the UNets: ours against torch's two kernels and what they compile to.

Images are channels_last, as a UNet has them. Every contender's answer is held against float64 in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import measure
from bench.measure import Task
from bench.shapes import NETWORKS, Norm
from fastdiff.engine import norm

GROUPS, EPS = 32, 1e-5
CPU_ELEMENTS = 1 << 23  # of an image on a CPU
GPU_ELEMENTS = 1 << 30
CALLS = 10


def run(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Measure every distinct shape and batch, one line at a time."""
    gpu = device.type == "cuda"
    copy_gbs = measure.gpu_copy_bandwidth() if gpu else None
    for network, shapes in NETWORKS.items():
        distinct = sorted(set(shapes), key=lambda shape: shape.channels * shape.pixels, reverse=True)
        for shape in distinct[:1] if quick else distinct:
            for batch in (1,) if quick else (1, 64, 512) if gpu else (1, 16):
                elements = batch * shape.channels * shape.pixels
                if elements > (GPU_ELEMENTS if gpu else CPU_ELEMENTS):
                    continue
                compiles = not quick and shape in distinct[:1] and batch < 512
                yield _case(network, shape, batch, device, quick, compiles, copy_gbs)
        if quick:
            return


def _case(
    network: str, shape: Norm, batch: int, device: torch.device, quick: bool, compiles: bool, copy_gbs: float | None
) -> dict[str, Any]:
    watch = measure.Watch()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, shape.channels, shape.size, shape.size, generator=generator).to(device, dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.randn(shape.channels, generator=generator).to(device, dtype) for _ in range(2))

    def ours() -> Tensor:
        return norm.norm_act(x, weight, bias, GROUPS, EPS)

    def theirs(x: Tensor = x) -> Tensor:
        return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))

    contenders: dict[str, Callable[[], Tensor]] = {"us": ours, "torch_us": theirs}
    if compiles:
        compiled = torch.compile(theirs, dynamic=False)
        contenders["compiled_us"] = lambda: compiled(x)
    exact = F.silu(F.group_norm(x[:2].double(), GROUPS, weight.double(), bias.double(), EPS))
    error, own = (float((y[:2].double() - exact).abs().max()) for y in (ours(), theirs()))
    tolerance = max(2 * own, torch.finfo(dtype).eps * float(exact.abs().max()) / 2)
    line: dict[str, Any] = {
        "bench": "norm", "network": network, "batch": batch, "shape": "x".join(map(str, x.shape)),
        "elements": x.numel(), "model_dtype": str(dtype).removeprefix("torch."), "executor": norm.choose(device, dtype),
        "gate": "green" if error <= tolerance else "red", "error": error, "tolerance": tolerance,
        "bytes_per_element": 2 * x.element_size(),
    }  # fmt: skip
    if line["gate"] == "red":
        return line
    tasks = {name: _task(contender, device) for name, contender in contenders.items()}
    tasks["copy_us"] = measure.copy_task(2 * x.numel() * x.element_size(), device, CALLS)
    timings = measure.interleave(tasks, device, 0.05 if quick or device.type == "cuda" else 0.5, least=5, most=100)
    for name, timing in timings.items():
        line |= {name: timing.median, f"{name}_p10": timing.p10, f"{name}_p20": timing.p20, f"{name}_p80": timing.p80}
    line["gbs"] = line["bytes_per_element"] * x.numel() / timings["us"].median / 1e3
    beside = copy_gbs or line["bytes_per_element"] * x.numel() / timings["copy_us"].median / 1e3
    line |= {"copy_gbs": beside, "copy_fraction": line["gbs"] / beside}
    line["ratio_torch"] = timings["torch_us"].median / timings["us"].median
    if compiles:
        line["ratio_compiled"] = timings["compiled_us"].median / timings["us"].median
    line["repetitions"] = timings["us"].repetitions
    others = watch.others()
    return line | ({} if others is None else {"others": round(others, 3)})


def _task(call: Callable[[], Tensor], device: torch.device) -> Task:
    """Ten calls; on a GPU from one graph, so that no launch from Python counts."""

    def calls() -> None:
        for _ in range(CALLS):
            call()

    return Task(measure.captured(calls), CALLS, clock="device") if device.type == "cuda" else Task(calls, CALLS)
