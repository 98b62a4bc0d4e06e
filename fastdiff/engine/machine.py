"""What this machine and this install are, for `fastdiff info` and for benchmark records.

May import: backends, native. GPU facts come from NVML (nvidia-ml-py) and are left out where there is no driver.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from fastdiff.engine import backends, native


def describe() -> str:
    """Versions, machine, and every executor as ok or as reason and fix."""
    lines = [f"fastdiff   {version('fastdiff')}"]
    lines += [f"{name:<10} {version(name)}" for name in ("torch", "triton", "numpy")]
    lines.append(f"python     {platform.python_version()} on {platform.system()} {platform.machine()}")
    lines.append(f"cpu        {cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {cpu_isa()}")
    lines += [f"gpu        {line}" for line in gpus()] or ["gpu        none"]
    for name, backend in backends.probe().items():
        state = f"ok on {' and '.join(backend.devices)}"
        if not backend.ok:
            state = f"not here: {backend.reason}. To fix it: {backend.fix}"
        lines.append(f"backend    {name:<10} {state}")
    lines.append(
        "graphs     are of the program that captured them: sampler.memory() there says how many and their bytes"
    )
    return "\n".join(lines)


def version(package: str) -> str:
    """The installed version of a package, or 'not installed'."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def cpu_isa() -> str:
    """The vector instructions the cpp executor runs on, or those torch found where it is not built."""
    if backends.probe()["cpp"].ok:
        return native.cpu_instruction_set()
    return str(torch.backends.cpu.get_cpu_capability()).lower()


def gpus() -> list[str]:
    """One line per NVIDIA GPU: name, memory, driver, power limit; empty without a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, no permission: in each case there is nothing to list
        return []
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        lines = []
        for i in range(pynvml.nvmlDeviceGetCount()):
            device = pynvml.nvmlDeviceGetHandleByIndex(i)
            memory = pynvml.nvmlDeviceGetMemoryInfo(device).total / 2**30
            lines.append(f"{pynvml.nvmlDeviceGetName(device)}, {memory:.0f} GiB, driver {driver}")
        return lines
    finally:
        pynvml.nvmlShutdown()
