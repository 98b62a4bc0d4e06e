"""The CUDA kernel as the compiler sees it, with no GPU: registers, spills, and the width of its memory accesses."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ARCHITECTURES = ("sm_80", "sm_90")
SOURCES = sorted(Path(__file__).resolve().parent.parent.glob("csrc/cuda/*.cu"))
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "-cubin", "-Xptxas", "-v")
# Three blocks of 256 threads to a multiprocessor, which has 65536 registers.
MOST_REGISTERS = 80


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
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc: install the CUDA toolkit to check the CUDA kernel here")


def label(case: tuple[Path, str]) -> str:
    return f"{case[0].stem}-{case[1]}"


@pytest.fixture(scope="module", params=[(s, a) for s in SOURCES for a in ARCHITECTURES], ids=label)
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
    assert all(numbers == ("0", "0", "0") for numbers in stack), report
    assert max(registers) <= MOST_REGISTERS, report


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
        assert not [i for i in instructions if re.match(r"D(ADD|MUL|FMA|SETP)|LDL|STL|F2F\.F64", i)], name
    vector = {name: body for name, body in kernels.items() if "ILb1E" in name}
    assert vector, "no kernel for aligned tensors among " + ", ".join(kernels)
    for name, body in vector.items():
        # x, the model output, its second branch, five slots; three sets of outputs.
        assert sum(i.startswith("LDG") and ".128" in i for i in body) >= 3 * 7, name
        assert sum(i.startswith("STG") and ".128" in i for i in body) >= 1 + 2 + 3, name
