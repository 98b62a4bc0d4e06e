"""The training recipe runs, goes on from its checkpoint, and writes weights that `fd.load` reads."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdiff as fd

ROOT = Path(__file__).parents[1]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng, folder = np.random.default_rng(0), tmp_path / "data"
    folder.mkdir()
    images, labels = rng.integers(0, 256, (40, 28, 28), dtype=np.uint8), np.arange(40, dtype=np.uint8) % 10
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
        (folder / f"train-{name}-ubyte").write_bytes(header + array.tobytes())
    return folder


def run_recipe(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "recipes" / "fashion.py"), "--batch", "8", "--threads", "1", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.long
def test_trains_resumes_and_ships(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = run_recipe("--data", str(data), "--out", str(out), "--images", "16")
    assert first.returncode == 0, first.stderr
    assert "1,909,636 parameters" in first.stdout and "done      16 images" in first.stdout
    second = run_recipe("--data", str(data), "--out", str(out), "--images", "24", "--resume", "auto")
    assert "going on after 16" in second.stdout and "done      24 images" in second.stdout, second.stderr

    model = fd.load(out)
    assert model.prediction == "edm" and model.null_label == 10 and model.shape == (1, 32, 32)
    shipped = fd.load("fashion")
    assert model.class_names[7] == "sneaker" and model.net.config == shipped.net.config
    labels = torch.tensor([3, 7])
    x = fd.sample(model, (2, 1, 32, 32), steps=2, cond=labels, uncond=torch.full_like(labels, 10), guidance=2.0)
    assert torch.isfinite(x).all()


def test_missing_data_says_what_is_wanted(tmp_path: Path) -> None:
    finished = run_recipe("--data", str(tmp_path), "--out", str(tmp_path / "run"), "--images", "16")
    assert finished.returncode == 2 and "expected pictures, IDX files or tar shards" in finished.stderr
