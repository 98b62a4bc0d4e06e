"""The CUDA kernels as the compiler sees them, with no GPU: registers, spills, and the width of its memory accesses."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest

ARCHITECTURES = {"sm_80": pytest.mark.slow, "sm_90": ()}  # the same kernels; one of the two takes half a minute
SOURCES = sorted(Path(__file__).resolve().parent.parent.glob("csrc/cuda/*.cu"))
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "-cubin", "-Xptxas", "-v")
# Of the 65536 registers of a multiprocessor, for each kernel by a part of its mangled name: three blocks of 256 threads
# for a plain step, two for one with extras; a sample's parts six, a ranked sample one of 1024.
MOST_REGISTERS = {
    r"affine_step_kernel.*ELb0EEE": 80,
    r"affine_step_kernel.*ELb1EEE": 128,
    r"guide_kernel": 40,
    r"threshold_kernel": 64,
    r"measure_kernel": 40,
    r"train_kernel": 64,  # four blocks of 256
}
# The 16-byte accesses (loads, stores) of each kernel for aligned tensors. A step loads x, the network's output, its
# second branch and five slots, for three sets of outputs, which it stores; extras load the third branch and M too.
WIDE_ACCESSES = {
    r"affine_step_kernel.*ELb0EEE": (3 * 7, 1 + 2 + 3),
    r"affine_step_kernel.*ELb1EEE": (3 * 9, 1 + 2 + 3),
    r"guide_kernel.*RuleE1E": (3, 0),  # Fc, Fu, Fp
    r"guide_kernel.*RuleE2E": (4, 1),  # Fc, Fu, x, M; M
    r"guide_kernel.*RuleE3E": (2, 0),  # Fc, Fu
    r"threshold_kernel": (5, 0),  # Fc, Fu, Fp, x, M
    r"measure_kernel.*QuantityE0E": (3, 0),  # the error, the state before and after
    r"measure_kernel.*QuantityE1E": (2, 1),  # the state now and before; before
    r"train_kernel.*ELb0EEE": (1, 1),  # images of fp32; x_in
    r"train_kernel.*ELb1EEE": (2, 1),  # images and F; the gradient
}


def tool(name: str) -> str | None:
    """A CUDA tool: on PATH, of the toolkit in its usual place, or the copy that comes with Triton."""
    folders = [Path("/usr/local/cuda/bin")]
    try:
        import triton

        folders.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    except ImportError:
        pass
    return shutil.which(name) or next((str(f / name) for f in folders if (f / name).exists()), None)


NVCC, CUOBJDUMP = tool("nvcc"), tool("cuobjdump")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(NVCC is None, reason="no nvcc: install the CUDA toolkit to check the CUDA kernels here"),
]


T = TypeVar("T")


def of_kernel(table: dict[str, T], name: str) -> T:
    """The one entry of `table` whose pattern the kernel's name holds."""
    (found,) = [value for pattern, value in table.items() if re.search(pattern, name)]
    return found


def label(case: tuple[Path, str]) -> str:
    return f"{case[0].stem}-{case[1]}"


CASES = [pytest.param((s, a), marks=marks) for s in SOURCES for a, marks in ARCHITECTURES.items()]


@pytest.fixture(scope="module", params=CASES, ids=label)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The cubin of one source for one architecture, and ptxas' report."""
    source, architecture = request.param
    cubin = tmp_path_factory.mktemp("cuda") / f"{source.stem}.{architecture}.cubin"
    done = subprocess.run(
        [str(NVCC), *FLAGS, f"-arch={architecture}", "-o", str(cubin), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    yield cubin, done.stderr


def test_registers_and_no_local_memory(compiled: tuple[Path, str], record_property: pytest.RecordProperty) -> None:
    cubin, report = compiled
    kernels = re.findall(r"Compiling entry function '(\w+)'", report)
    stack = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    assert kernels
    assert len(kernels) == len(registers) == len(stack)
    for name, count in zip(kernels, registers, strict=True):
        print(f"{cubin.name}: {count} registers, {name}")
        record_property(name, count)
        assert count <= of_kernel(MOST_REGISTERS, name), report
    assert all(numbers == ("0", "0", "0") for numbers in stack), report


def test_wide_accesses_and_no_double_precision(compiled: tuple[Path, str]) -> None:
    if CUOBJDUMP is None:
        pytest.skip("no cuobjdump: install the CUDA toolkit or triton")
    listing = subprocess.run([CUOBJDUMP, "-sass", str(compiled[0])], capture_output=True, text=True, check=True).stdout
    kernels = {}
    for part in listing.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        kernels[name] = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)", body, re.MULTILINE)
    assert kernels
    for name, instructions in kernels.items():
        double = "" if "measure_kernel" in name else r"D(ADD|MUL|FMA|SETP)|F2F\.F64|"  # its sums are meant to be
        assert not [i for i in instructions if re.match(double + "LDL|STL", i)], name
    vector = {name: body for name, body in kernels.items() if "ILb1E" in name}
    assert vector, "no kernel for aligned tensors among " + ", ".join(kernels)
    for name, body in vector.items():
        loads, stores = of_kernel(WIDE_ACCESSES, name)
        assert sum(i.startswith("LDG") and ".128" in i for i in body) >= loads, name
        assert sum(i.startswith("STG") and ".128" in i for i in body) >= stores, name
