"""The norm kernels compiled for GPUs on a machine that has none: access widths, registers, spills, precision."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from compiled import ARCHITECTURES, Compiled, describe, elsewhere

from fastdiff.engine.norm_checks import Inputs

FORWARD = ("whole_kernel", "looped_kernel", "parts_kernel", "mapped_kernel")
BACKWARD = ("alone_kernel", "shared_sums_kernel", "shared_kernel")


class Specialisation(NamedTuple):
    """A kernel, and what its launcher compiles it for. extras: "sum" (before, residual and total), "skip", "map"."""

    kernel: str
    shape: tuple[int, ...]
    groups: int
    dtype: str
    last: bool = True
    extras: tuple[str, ...] = ()


# Shapes of the UNets: DDPM at 32x32 and beside a skip at 16x16, ADM at 64x64 (6 channels a group), SD-1.5 (10 of them)
WANTED = [
    *[Specialisation("whole_kernel", (1, 128, 32, 32), 32, dtype, True, ("sum",)) for dtype in ("float32", "bfloat16")],
    Specialisation("whole_kernel", (1, 128, 32, 32), 32, "float16"),
    Specialisation("whole_kernel", (1, 384, 16, 16), 32, "bfloat16", True, ("sum", "skip")),
    Specialisation("whole_kernel", (1, 128, 32, 32), 32, "bfloat16", False),
    Specialisation("whole_kernel", (1, 192, 64, 64), 32, "bfloat16", True, ("sum",)),
    Specialisation("looped_kernel", (64, 320, 64, 64), 32, "bfloat16", True, ("sum", "map")),
    *[
        Specialisation(kernel, (1, 320, 64, 64), 32, dtype, True, ("sum", "map"))
        for kernel in ("parts_kernel", "mapped_kernel")
        for dtype in ("float32", "bfloat16")
    ],
    *[Specialisation("alone_kernel", (2, 128, 32, 32), 32, dtype) for dtype in ("float32", "bfloat16")],
    *[Specialisation(kernel, (1, 320, 64, 64), 32, "bfloat16", True, ("map",)) for kernel in BACKWARD[1:]],
]


def compile_all(architecture: int, wanted: list[Specialisation]) -> list[dict[str, Any]]:
    """In the other process: launch each specialisation and describe the kernel that a GPU would have got."""
    from fastdiff.kernels import norm, norm_backward

    kernels = [*((norm, name) for name in FORWARD), *((norm_backward, name) for name in BACKWARD)]
    compiled = Compiled(architecture, kernels)
    reports = []
    for one in wanted:
        launch(one, norm, norm_backward)
        kernel, options = compiled.last[one.kernel]
        elements = options["PX"] * options["CH"] // (32 * kernel.metadata.num_warps)
        reports.append(
            {"elements": elements, "full": options["CH"] == options["CG"] * options["NG"]} | describe(kernel)
        )
    return reports


def launch(one: Specialisation, norm: Any, norm_backward: Any) -> None:
    layout = torch.channels_last if one.last else torch.contiguous_format
    batch, channels, *_ = one.shape

    def image(width: int = channels) -> torch.Tensor:
        image = torch.zeros(batch, width, *one.shape[2:], dtype=getattr(torch, one.dtype))
        return image.contiguous(memory_format=layout)

    def rows(wanted: bool) -> torch.Tensor | None:
        return torch.zeros(batch, channels) if wanted else None

    weight, bias, stats = torch.zeros(channels), torch.zeros(channels), torch.zeros(batch, one.groups, 2)
    before, scale, shift = rows("sum" in one.extras), rows("map" in one.extras), rows("map" in one.extras)
    if one.kernel in BACKWARD:
        sums = torch.zeros(batch, 3, channels)
        given = Inputs(image(), weight, bias, before, scale, shift)
        norm_backward.backward(image(), given, stats, one.groups, True, image(), sums, one.last)
        return
    skip = image(channels // 3) if "skip" in one.extras else None
    x = image(channels if skip is None else channels - channels // 3)
    residual, total = (torch.zeros_like(x), image()) if before is not None else (None, None)
    given = Inputs(x, weight, bias, before, scale, shift, residual, skip)
    norm.forward(given, one.groups, 1e-5, True, image(), total, stats, one.last)


def assert_good(one: Specialisation, report: dict[str, Any]) -> None:
    """No spill, no local memory, no f64; images in accesses as wide as consecutive channels of a program allow."""
    assert report["doubles"] == 0
    assert report["local"] == 0
    assert report["resources"]["STACK"] == 0
    assert report["resources"]["LOCAL"] == 0
    assert report["resources"]["REG"] <= 128
    bulk = Counter({name: n for name, n in report["accesses"].items() if re.search(r"global", name)})
    wide = sum(count for name, count in bulk.items() if ".v4" in name)
    if report["full"] and "skip" not in one.extras:
        assert wide > 0, bulk


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_norm_kernels(architecture: int, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = WANTED if architecture == 90 else [one for one in WANTED if one.dtype == "bfloat16" and one.last][::2]
    reports = elsewhere(__file__, architecture, wanted)
    with capsys.disabled():
        spread = (f"{one.kernel} {one.dtype}: {r['resources']['REG']}" for one, r in zip(wanted, reports, strict=True))
        print(f"\nTriton, sm_{architecture}, registers per thread: {'; '.join(spread)}")
    for one, report in zip(wanted, reports, strict=True):
        print(one, report)
        try:
            assert_good(one, report)
        except AssertionError as error:
            raise AssertionError(f"{one} on sm_{architecture}: {report}") from error


if __name__ == "__main__":
    asked = [Specialisation(*fields) for fields in json.load(sys.stdin)]
    print(json.dumps(compile_all(int(sys.argv[1]), asked)))
