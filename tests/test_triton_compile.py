"""The Triton kernel compiled for GPUs on a machine that has none: access widths, registers, spills, precision.

Every specialisation is compiled by the launcher itself, with a stand-in for the CUDA driver, so what is checked is what
a GPU would run. That happens in another process, because this one may have been told to interpret Triton.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from typing import Any, NamedTuple

import pytest

ARCHITECTURES = (80, 90, 100)
DTYPES = ("float32", "float16", "bfloat16")


class Specialisation(NamedTuple):
    """What the launcher compiles for: the model's dtypes, where normals come from, and the shape of a sample."""

    path: str
    model_out: str
    model_in: str

    @property
    def shape(self) -> tuple[int, ...]:
        return PATHS[self.path][1]


# name -> (memory format, shape of a sample, noise given); odd shapes have no 16-byte aligned samples
PATHS: dict[str, tuple[str, tuple[int, ...], bool]] = {
    "contiguous": ("contiguous", (3, 32, 32), False),
    "given noise": ("channels_last", (3, 32, 32), True),
    "3 channels last": ("channels_last", (3, 32, 32), False),
    "16 channels last": ("channels_last", (16, 32, 32), False),
    "channels last, odd image": ("channels_last", (4, 33, 33), False),
    "contiguous, odd": ("contiguous", (3, 33, 33), False),
    "given noise, odd": ("contiguous", (3, 33, 33), True),
    "channels last, odd": ("channels_last", (3, 33, 33), False),
}
SAME = [(dtype, dtype) for dtype in DTYPES]
PAIRS = [(model_out, model_in) for model_out in DTYPES for model_in in DTYPES]
EVERY = [Specialisation(path, *pair) for path in PATHS for pair in PAIRS]
# the model's two dtypes touch nothing else, so by default their product is compiled for one architecture and path
USUAL = {
    80: [Specialisation(path, dtype, dtype) for path in PATHS for dtype in ("float32", "bfloat16")],
    90: [Specialisation(path, *pair) for path in PATHS for pair in (PAIRS if path == "contiguous" else SAME)],
    100: [Specialisation(path, dtype, dtype) for path in PATHS for dtype in ("float32", "bfloat16")],
}


# ---- in the other process


def compile_all(architecture: int, wanted: list[Specialisation]) -> list[dict[str, Any]]:
    """Launch each specialisation on a stand-in driver and describe the kernel that a GPU would have got."""
    from fastdiff.kernels import affine
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", architecture, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    driver.set_active(Driver())
    kernel, compiled = affine.affine_kernel, []

    class Launches:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: compiled.append((kernel.warmup(*args, grid=grid, **options), options))

    affine.affine_kernel = Launches()
    for specialisation in wanted:
        step = tensors(specialisation)
        affine.bind(*step)(step[1])
    return [describe(kernel, options["BLOCK"]) for kernel, options in compiled]


def tensors(specialisation: Specialisation) -> list[Any]:
    import torch

    layout, shape, given = PATHS[specialisation.path]
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    batch, terms = 2, 1

    def images(count: int, dtype: str = "float32") -> torch.Tensor:
        return torch.zeros(count, *shape, dtype=getattr(torch, dtype)).contiguous(memory_format=memory_format)

    def integers(dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(batch, dtype=dtype)

    return [
        images(6 * batch).unflatten(0, (6, batch)),
        images(2 * batch, specialisation.model_out),
        images(2 * batch, specialisation.model_in),
        torch.zeros(2 * batch),
        torch.zeros(7, 40 + 4 * terms),
        torch.zeros(7, 16 + 2 * terms, dtype=torch.int32),
        integers(torch.int32),
        integers(torch.int64),
        torch.zeros(batch),
        images(4 * batch).unflatten(0, (4, batch)) if given else None,
        images(batch),
        integers(torch.int32),
        integers(torch.int32),
    ]


def describe(kernel: Any, block: int) -> dict[str, Any]:
    import triton

    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {
        "vectors": block // (4 * 32 * 4),
        "accesses": Counter(re.findall(r"\b((?:ld|st)\.(?:global|shared|local)[\w.:]*)", ptx)),
        "doubles": len(re.findall(r"\.f64\b", ptx)),
        "local": len(re.findall(r"\.local\b", ptx)),
        "shuffles": len(re.findall(r"\bshfl\.", ptx)),
        "resources": {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)},
    }


# ---- in pytest


def compile_elsewhere(architecture: int, wanted: list[Specialisation]) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__, str(architecture)],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_good(specialisation: Specialisation, report: dict[str, Any]) -> None:
    """16-byte accesses to fp32, 8-byte ones to halves, and no other; no spill, no local memory, no f64."""
    assert report["doubles"] == 0
    assert report["local"] == 0
    assert report["resources"]["STACK"] == 0
    assert report["resources"]["LOCAL"] == 0
    accesses, vectors = Counter(report["accesses"]), report["vectors"]
    expected = Counter({"ld.global.v4.b32": 6 * vectors, "st.global.v4.b32": 4 * vectors})  # 6 slots; 3 outputs and D
    expected["ld.global.v4.b32" if specialisation.model_out == "float32" else "ld.global.v2.b32"] += 2 * vectors
    expected["st.global.v4.b32" if specialisation.model_in == "float32" else "st.global.v2.b32"] += 2 * vectors
    expected["ld.global.v4.b32"] += vectors * specialisation.path.startswith("given noise")
    bulk = Counter({name: count for name, count in accesses.items() if re.search(r"global.*(\.v\d|b16)", name)})
    if specialisation.path.endswith(", odd"):
        assert not any(".v" in name for name in bulk)
        return
    assert bulk == expected
    assert report["shuffles"] == 0
    exchanged = sum(count for name, count in accesses.items() if name.startswith("st.shared"))
    gather = 4 * vectors if specialisation.path.endswith("channels last") else 0
    assert exchanged == gather + 1  # the ticket's broadcast, and for channels_last the normals, once


def check(architecture: int, wanted: list[Specialisation], capsys: pytest.CaptureFixture[str]) -> None:
    reports = compile_elsewhere(architecture, wanted)
    assert len(reports) == len(wanted)
    registers: dict[str, set[int]] = {}
    for specialisation, report in zip(wanted, reports, strict=True):
        registers.setdefault(specialisation.path, set()).add(report["resources"]["REG"])
    with capsys.disabled():
        spread = (f"{path}: {min(counts)}-{max(counts)}" for path, counts in registers.items())
        print(f"\nTriton, sm_{architecture}, registers per thread: {'; '.join(spread)}")
    for specialisation, report in zip(wanted, reports, strict=True):
        try:
            assert_good(specialisation, report)
        except AssertionError as error:
            raise AssertionError(f"{specialisation} on sm_{architecture}: {report}") from error


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_specialisations(architecture: int, capsys: pytest.CaptureFixture[str]) -> None:
    check(architecture, USUAL[architecture], capsys)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_pair_of_model_dtypes(architecture: int, capsys: pytest.CaptureFixture[str]) -> None:
    check(architecture, EVERY, capsys)


if __name__ == "__main__":
    asked = [Specialisation(*fields) for fields in json.load(sys.stdin)]
    print(json.dumps(compile_all(int(sys.argv[1]), asked)))
