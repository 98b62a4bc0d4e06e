"""One forward pass of a UNet: our fast form against our plain one and diffusers', eager, compiled and as a CUDA graph.

Every contender has the same random weights, sees the same input and runs in turn in one process; its output is held
against the float64 network. Floors are of the fast form's own kernels (fastdiff.models.unet_nodes), at the matrix and
copy rates measured in the same run.
"""

from __future__ import annotations

import dataclasses
import inspect
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench import measure, peers
from bench.measure import Task, Timing
from fastdiff.models import UNet
from fastdiff.models.unet_config import UNetConfig
from fastdiff.models.unet_nodes import cost
from fastdiff.models.unet_presets import PRESETS

LAST = torch.channels_last
TINY = UNetConfig(
    sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=16,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
CPU_CASES = (("ddpm-cifar10", 1), ("ddpm-cifar10", 4), ("edm-cifar10", 1), ("adm-64", 1))
GPU_CASES = tuple((name, batch) for name in PRESETS for batch in (1, 16, 64, 512))
COMPILED = (("ddpm-cifar10", 1), ("ddpm-cifar10", 64), ("edm-cifar10", 64), ("adm-64", 64))  # of those on a GPU
AUTOTUNED = (("ddpm-cifar10", 1), ("ddpm-cifar10", 64))
PATIENCE = 60.0  # seconds on a GPU after which nothing more is compiled, and twice after which nothing more is run


def run(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Measure every network and batch; one line for each contender."""
    warnings.filterwarnings("ignore", module="diffusers")
    if not peers.has_diffusers():
        print("diffusers is not installed and there is nothing to compare with: pip install diffusers")
        return
    gpu, started = device.type == "cuda", time.perf_counter()
    dtype = torch.bfloat16 if gpu else torch.float32
    rates = _matrix_rate(device, dtype, quick), _copy_rate(device)
    print(f"matrix product {rates[0] / 1e12:.3g} TFLOP/s, copy {rates[1] / 1e9:.4g} GB/s")
    for name, batch in (("tiny", 1),) if quick else GPU_CASES if gpu else CPU_CASES:
        spent = time.perf_counter() - started
        if gpu and spent > 2 * PATIENCE:
            print(f"{name} at batch {batch} is left out: {spent:.0f} s are gone")
            continue
        compiles = not quick and (spent < PATIENCE and (name, batch) in COMPILED if gpu else True)
        yield from _case(name, batch, device, dtype, quick, compiles, rates)


def _case(
    name: str, batch: int, device: torch.device, dtype: torch.dtype, quick: bool, compiles: bool,
    rates: tuple[float, float],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    watch = measure.Watch()
    config = TINY if name == "tiny" else PRESETS[name]
    peer, net = _networks(config, device)
    x, clock, labels = _inputs(config, batch, device)
    given = () if labels is None else (labels,)
    exact = _exact(net, x, clock, labels)
    for module in (peer, net):
        module.to(dtype)
    x = x.to(dtype)
    wide = x.contiguous(memory_format=LAST)
    contenders, seconds = _contenders(name, batch, peer, net, (x, wide, clock, given), compiles)

    errors = {key: float((call()[: len(exact)].double() - exact).abs().max()) for key, call in contenders.items()}
    tolerance = max(2 * errors["diffusers"], 1e-4 * float(exact.abs().max()) * (dtype == torch.float32))
    tasks = {key: Task(call) for key, call in contenders.items() if errors[key] <= tolerance}
    timings = measure.interleave(
        tasks,
        device,
        0.2 if quick else 3.0 if device.type == "cuda" else 10.0,
        least=3,
        most=200,
        warm_up=1 if quick else 2,
    )
    floors = cost(config, batch, dtype)
    base = {"bench": "unet", "network": name, "batch": batch, "shape": "x".join(map(str, x.shape))}
    base |= {"elements": x.numel(), "model_dtype": str(dtype).removeprefix("torch."), "tolerance": tolerance}
    others = watch.others()
    base |= {} if others is None else {"others": round(others, 3)}
    for key in contenders:
        line = base | {"executor": key, "error": errors[key], "gate": "green" if key in timings else "red"}
        line |= {"took": seconds[key]} if key in seconds else {}
        yield (
            line if key not in timings else line | _figures(key, timings, floors.flops, floors.floor(*rates), rates[0])
        )


def _figures(key: str, timings: dict[str, Timing], flops: int, floor: float, rate: float) -> dict[str, Any]:
    timing, best = timings[key], min(t.median for k, t in timings.items() if k in ("diffusers", "diffusers last"))
    return {
        "us": timing.median, "us_p10": timing.p10, "us_p20": timing.p20, "us_p80": timing.p80,
        "ratio_diffusers": best / timing.median, "f0_fraction": flops / rate * 1e6 / timing.median,
        "f2_fraction": floor * 1e6 / timing.median, "repetitions": timing.repetitions,
    }  # fmt: skip


def _contenders(
    name: str, batch: int, peer: nn.Module, net: UNet, inputs: tuple[Any, ...], compiles: bool
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, float]]:
    """What is timed, and the seconds that compiling took."""
    x, wide, clock, given = inputs
    gpu = x.device.type == "cuda"
    last, fast = _copy(peer).to(memory_format=LAST), net.fast(x.dtype)  # type: ignore[call-overload]
    ready = fast.prepare_times(clock)
    plain = net.to(memory_format=LAST)  # type: ignore[call-overload]
    found: dict[str, Callable[[], Tensor]] = {
        "diffusers": lambda: peer(x, clock, *given).sample,
        "diffusers last": lambda: last(wide, clock, *given).sample,
        "plain": lambda: plain(wide, clock, *given),
        "fast": lambda: ready(wide, clock, *given),
    }
    seconds: dict[str, float] = {}
    if gpu:
        # what a step graph of our sampler holds, and the same around diffusers
        for key, call in (("diffusers graph", found["diffusers last"]), ("fast graph", found["fast"])):
            found[key] = _captured(call)
    if compiles:
        modes = {"compiled": "default"} | ({"reduce-overhead": "reduce-overhead"} if gpu else {})
        if gpu and (name, batch) in AUTOTUNED:
            modes["max-autotune"] = "max-autotune"
        for key, mode in modes.items():
            found[f"diffusers {key}"], seconds[f"diffusers {key}"] = _compiled(found["diffusers last"], last, mode)
        found["fast compiled"], seconds["fast compiled"] = _compiled(found["fast"], ready, "default")
    return found, seconds


def _compiled(call: Callable[[], Tensor], module: nn.Module, mode: str) -> tuple[Callable[[], Tensor], float]:
    """The call with its module compiled, and the seconds of its first run."""
    import torch._dynamo

    torch._dynamo.reset()
    eager = module.forward
    compiled = torch.compile(eager, mode=mode, dynamic=False)

    def run() -> Tensor:
        module.forward = compiled  # type: ignore[method-assign]
        try:
            return call().clone() if mode != "default" else call()
        finally:
            module.forward = eager  # type: ignore[method-assign]

    started = time.perf_counter()
    run()
    return run, time.perf_counter() - started


def _captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    kept: list[Tensor] = []
    replay = measure.captured(lambda: kept.append(call()))

    def run() -> Tensor:
        replay()
        return kept[-1]

    return run


def _networks(config: UNetConfig, device: torch.device) -> tuple[nn.Module, UNet]:
    """diffusers' network and ours with the same random weights."""
    from diffusers import UNet2DModel

    known = inspect.signature(UNet2DModel).parameters  # the fields that are only ours are at their defaults
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name in known}
    torch.manual_seed(0)
    peer = UNet2DModel(**fields).eval().requires_grad_(False).to(device)
    return peer, UNet.from_diffusers(peer).requires_grad_(False)


def _inputs(config: UNetConfig, batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    size = config.sample_size
    assert isinstance(size, int)
    x = torch.randn(batch, config.in_channels, size, size, generator=generator).to(device)
    clock = torch.full((batch,), 250.0, device=device)
    classes = config.num_class_embeds
    return x, clock, torch.randint(classes, (batch,), generator=generator).to(device) if classes else None


def _exact(net: UNet, x: Tensor, clock: Tensor, labels: Tensor | None) -> Tensor:
    """The first sample in float64, by another copy."""
    wide = _copy(net).double()
    one = None if labels is None else labels[:1]
    return wide(x[:1].double(), clock[:1], one)


def _copy(module: nn.Module) -> Any:
    import copy

    return copy.deepcopy(module)


def _matrix_rate(device: torch.device, dtype: torch.dtype, quick: bool) -> float:
    """FLOP/s of a square product: 8192 on a GPU, 2048 on a CPU."""
    n = 256 if quick else 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    c = torch.empty_like(a)
    task = Task(lambda: torch.mm(a, b, out=c), clock="device" if device.type == "cuda" else "wall")
    task.sample(device)
    return 2.0 * n**3 / Timing.of([task.sample(device) for _ in range(5)]).median * 1e6


def _copy_rate(device: torch.device) -> float:
    if device.type == "cuda":
        return measure.gpu_copy_bandwidth() * 1e9
    task, size = measure.copy_task(1 << 28, device, 1), 1 << 28
    return size / Timing.of([task.sample(device) for _ in range(5)]).median * 1e6
