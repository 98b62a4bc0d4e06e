"""An allocation of the extension that fails is an error of the call, not the end of the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from guided_cases import BACKENDS

SCRIPT = """
import ctypes, re, resource, sys
from row_cases import Case
from fastdiff.engine import native

library = native.load()
tensors = Case(shape=(64, 64), batch=1, rows=1, registers=3, terms=20000).tensors()
step = native.bind(tensors, "cpp")
some = (ctypes.c_double * 4096)()
at, huge = ctypes.addressof(some), 1 << 40


def block(kind, pointers, **sizes):
    return kind(**{name: at for name in pointers.split()}, **sizes)


norm = {"B": 1, "C": huge, "C1": huge, "P": 1, "groups": 1}
image = {"B": 1, "C": huge, "H": 1, "W": 1}
blocks = {
    "norm": block(native.NormArgs, "x weight bias y", **norm),
    "norm_backward": block(native.NormArgs, "x weight bias y grad sums stats", **norm),
    "attention": block(native.AttentionArgs, "q k v out stats", B=1, T=1 << 20, H=1, d=1 << 20),
    "winograd_into": block(native.WinogradArgs, "x v", **image, first=0, count=1, size=4),
    "winograd_convolution": block(native.WinogradTrainArgs, "x y weight", **image, N=64, block=1),
    "winograd_gradient": block(native.WinogradTrainArgs, "x y weight", **image, N=64, block=1),
}
now = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) << 10
resource.setrlimit(resource.RLIMIT_AS, (now + (32 << 20),) * 2)
for name, args in blocks.items():
    code = getattr(library, f"fastdiff_{name}_cpu")(ctypes.addressof(args))
    print(name, type(native.failed(name, code)).__name__, library.fastdiff_error(code).decode())
try:
    step(tensors.model_out)
except MemoryError as error:
    print(error)
"""


@pytest.mark.skipif("cpp" not in BACKENDS or sys.platform != "linux", reason="needs the extension and RLIMIT_AS")
def test_every_op_survives_a_buffer_that_cannot_be_had() -> None:
    """Buffers beyond RLIMIT_AS, in threads of the pool too."""
    tests = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {tests!r})\n{SCRIPT}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    *ops, row = run.stdout.splitlines()
    names = ("norm", "norm_backward", "attention", "winograd_into", "winograd_convolution", "winograd_gradient")
    assert ops == [f"{name} MemoryError memory ran out for a buffer of the op" for name in names]
    assert row == "affine_step on cpp: memory ran out for a buffer of the op (code 8)"
