"""A line of the benchmark's results as a run writes it: for the tests of its tables and gates."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import table


def fact_line(**changes: object) -> dict[str, object]:
    facts = dict.fromkeys(table.COLUMNS, "") | {
        "run": "2026-01-02T03:04:05Z",
        "commit": "abc1234",
        "device": "cpu",
        "machine": "A CPU (2 cores)",
        "threads": "2",
        "load": "0.1",
        "torch": "2.13.0",
        "diffusers": "0.42.1",
        "bench": "ops",
        "solver": "ddim",
        "shape": "1x3x32x32",
        "model_dtype": "float32",
        "executor": "cpp",
        "bytes_per_element": 12,
        "gbs": 30,
        "copy_fraction": 1.01,
        "ratio_diffusers": 50,
        "ratio_compiled": 10,
        "error": 1e-7,
        "tolerance": 1e-6,
    }
    for time in ("us", "emit_us", "diffusers_us", "compiled_us"):
        facts |= {time: 2.5, f"{time}_p20": 2.0, f"{time}_p80": 3.0}
    return facts | changes
