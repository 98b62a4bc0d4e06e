"""Triton kernels compiled for GPUs on a machine that has none, by their launchers and with a stand-in for the driver.

A test file hands its specialisations to itself, run in another process, because this one may interpret Triton.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

ARCHITECTURES = (80, 90, 100)


class Compiled:
    """What the launchers of these kernels compile instead of launching: `compiled[name]` is the last (kernel, options).

    kernels: (module, name) of each jitted function.
    """

    def __init__(self, architecture: int, kernels: Iterable[tuple[Any, str]]) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver

        class Driver:
            get_current_target = staticmethod(lambda: GPUTarget("cuda", architecture, 32))
            get_current_device = staticmethod(lambda: 0)
            get_current_stream = staticmethod(lambda device: 0)

        driver.set_active(Driver())
        self.last: dict[str, tuple[Any, dict[str, Any]]] = {}
        for module, name in kernels:
            setattr(module, name, _Launches(self, name, getattr(module, name)))


class _Launches:
    def __init__(self, compiled: Compiled, name: str, kernel: Any) -> None:
        self.compiled, self.name, self.kernel = compiled, name, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.compiled.last[self.name] = self.kernel.warmup(*args, grid=grid, **options), options

        return launch


def describe(kernel: Any) -> dict[str, Any]:
    """Accesses to memory by kind, f64 and shuffle instructions, registers, stack and local memory."""
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
        "accesses": Counter(re.findall(r"\b((?:ld|st)\.(?:global|shared|local)[\w.:]*)", ptx)),
        "doubles": len(re.findall(r"\.f64\b", ptx)),
        "local": len(re.findall(r"\.local\b", ptx)),
        "shuffles": len(re.findall(r"\bshfl\.", ptx)),
        "resources": {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)},
    }


def elsewhere(script: str, architecture: int, wanted: Sequence[Any]) -> list[dict[str, Any]]:
    """The reports that `script`, run with the architecture and the JSON of what is wanted, prints as its last line."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script, str(architecture)],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    reports: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return reports
