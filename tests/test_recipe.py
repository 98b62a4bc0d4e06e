"""The training recipe runs, goes on from its checkpoint, and writes weights that `fd.load` reads."""

from __future__ import annotations

import copy
import math
import os
import runpy
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from guided_cases import latents

import fastdiff as fd

RECIPE = Path(__file__).parents[1] / "recipes" / "fashion.py"
OPTIONS = ("--batch", "8", "--threads", "1")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng, folder = np.random.default_rng(0), tmp_path / "data"
    folder.mkdir()
    images, labels = rng.integers(0, 256, (40, 28, 28), dtype=np.uint8), np.arange(40, dtype=np.uint8) % 10
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
        (folder / f"train-{name}-ubyte").write_bytes(header + array.tobytes())
    return folder


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The recipe in this process, which has torch; its exit status."""
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *OPTIONS, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(RECIPE), run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.long
@pytest.mark.usefixtures("single_thread")
def test_trains_resumes_and_ships(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a shell, and again from its checkpoint; the weights sample as their network does, called by hand."""
    out = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(RECIPE.parents[1])}
    command = [sys.executable, str(RECIPE), *OPTIONS, "--data", str(data), "--out", str(out), "--images", "16"]
    first = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert first.returncode == 0, first.stderr
    assert "1,909,636 parameters" in first.stdout and "done      16 images" in first.stdout
    assert run_here(monkeypatch, "--data", str(data), "--out", str(out), "--images", "24", "--resume", "auto") == 0
    second = capsys.readouterr()
    assert "going on after 16" in second.out and "done      24 images" in second.out, second.err

    model = fd.load(out)
    assert model.prediction == "edm" and model.null_label == 10 and model.shape == (1, 32, 32)
    shipped = fd.load("fashion")
    assert model.class_names[7] == "sneaker" and model.net.config == shipped.net.config
    labels = torch.tensor([3, 7])
    options = {"cond": labels, "uncond": torch.full_like(labels, 10), "guidance": 2.0, "seed": [5, 6]}
    x = fd.sample(model, (2, 1, 32, 32), "ddim", 2, "karras", **options)
    torch.testing.assert_close(x.double(), two_steps(model, labels, [5, 6]), rtol=0, atol=1e-4 * float(x.abs().max()))


@torch.no_grad()
def two_steps(model: fd.Denoiser, labels: torch.Tensor, seeds: list[int]) -> torch.Tensor:
    """Karras et al. 2022, Table 1 and Algorithm 1 without its second slope, guided by 2, in float64."""
    s, t, _ = (level.sigma for level in fd.plan("ddim", "edm", 2, "karras").levels)
    net, data = copy.deepcopy(model.net).double(), model.sigma_data

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        total = math.hypot(sigma, data)
        time = torch.full((len(x),), math.log(sigma) / 4, dtype=torch.float64)
        unguided, guided = (net(x / total, time, given) for given in (torch.full_like(labels, 10), labels))
        return (data / total) ** 2 * x + sigma * data / total * (unguided + 2.0 * (guided - unguided))

    x = s * latents(seeds, (1, 32, 32))
    return denoise(t / s * x + (1 - t / s) * denoise(x, s), t)


def test_missing_data_says_what_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(monkeypatch, "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--images", "16") == 2
    assert "expected pictures, IDX files, tar shards or parquet files" in capsys.readouterr().err
