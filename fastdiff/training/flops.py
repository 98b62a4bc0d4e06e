"""Floating-point operations of a training step, and of the device: MFU. May import: nothing of the package."""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# Dense peak of matrix products, TFLOP/s, by part of the device's name: vendors' data sheets, (16 bit, 32 bit).
_PEAKS = {
    "B200": (2250.0, 1100.0), "H200": (989.0, 494.0), "H100": (989.0, 494.0), "A100": (312.0, 156.0),
    "L40S": (362.0, 183.0), "L4": (121.0, 60.0), "A10": (125.0, 62.5), "V100": (125.0, 15.7), "4090": (165.0, 82.6),
}  # fmt: skip


def of_one_image(net: nn.Module, shape: tuple[int, ...], labelled: bool) -> float:
    """Operations of one forward and backward pass for one image, counted on a copy without data."""
    ghost = copy.deepcopy(net).to("meta")
    x = torch.empty(1, *shape, device="meta")
    labels = (torch.empty(1, dtype=torch.long, device="meta"),) if labelled else ()
    with FlopCounterMode(display=False) as counter:
        output = ghost(x, torch.empty(1, device="meta"), *labels)
        loss: Tensor = (output[0] if isinstance(output, tuple) else output).sum()
        loss.backward()
    return float(counter.get_total_flops())


def peak(device: torch.device, precision: str) -> tuple[float, str]:
    """(operations a second, where the figure is from): the data sheet's, or of a matrix product timed here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, (half, full) in _PEAKS.items():
            if part in name:
                return 1e12 * (full if precision == "fp32" else half), "data sheet"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    return max(_timed(device, kind) for kind in {dtype, torch.float32}), "a matrix product timed here"


def _timed(device: torch.device, dtype: torch.dtype, size: int = 512, rounds: int = 4) -> float:
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
