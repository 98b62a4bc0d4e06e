"""`fastdiff verify`: known answers, every sampler's table, and every executor of this machine, in a few seconds.

May import: compiler, engine. Nothing here needs a network or data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fastdiff.compiler import solvers
from fastdiff.compiler.build import plan as build_plan
from fastdiff.engine import backends, noise
from fastdiff.engine.sampler import Sampler
from fastdiff.models.denoiser import Denoiser
from fastdiff.process import schedules

# Philox-4x32-10: counter, key, output, from the known-answer file of Random123 (Salmon et al. 2011)
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
_SPECIAL = {"euler_maruyama": ("vp", "linspace")}


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    ok: bool
    sentence: str


def run() -> Iterator[Check]:
    """Every check, as it finishes."""
    for i, (counter, key, answer) in enumerate(KNOWN_ANSWERS):
        got = tuple(int(word) for word in noise.philox_block(np.array(counter), np.array(key)))
        yield Check(f"philox known answer {i}", got == answer, " ".join(f"{word:08x}" for word in got))
    for name in solvers.names():
        usual = ("rectified_flow", "linspace") if solvers.get(name).flow_only else ("edm", "karras")
        schedule, grid = _SPECIAL.get(name, usual)
        report = build_plan(name, schedule, 20, grid).verify()
        wrong = [check.sentence for check in report.checks if not check.ok]
        yield Check(f"table {name}", report.ok, "; ".join(wrong) or f"{len(report.checks)} laws hold")
    for executor, backend in backends.probe().items():
        if backend.ok and executor != "reference":
            yield _executor(executor, backend.devices[0])


def _executor(executor: str, device: str) -> Check:
    """A stochastic plan with history on this executor against the torch reference, both on the same seeds."""
    plan = build_plan("dpmpp_2m_sde", "edm", 8, "karras")

    def run_on(name: str, where: str) -> torch.Tensor:
        model = Denoiser(lambda x, t: torch.tanh(x), schedules.edm(), "edm", sigma_data=0.5, device=where)
        return Sampler(plan, model, name, graph=False).sample((3, 3, 17, 13), seed=[7, 2**63, 11]).cpu()

    expected, got = run_on("reference", "cpu"), run_on(executor, device)
    error = float((expected - got).abs().max() / expected.abs().max())
    return Check(f"executor {executor}", error <= 1e-5, f"largest difference from the reference {error:.1e} (<= 1e-5)")
