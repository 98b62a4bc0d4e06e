"""The parts of training by closed forms: averages, rates, presets, operations counted, records."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import tiny
from torch import nn

from fastdiff.files import write_atomically
from fastdiff.models.unet import UNet
from fastdiff.models.unet_config import UNetConfig
from fastdiff.training import flops, networks, objectives, optimizer, presets, records
from fastdiff.training.checkpoint import Checkpoints, Progress
from fastdiff.training.config import TrainConfig, read_value
from fastdiff.training.data.arrays import Arrays
from fastdiff.training.data.pictures import Fit
from fastdiff.training.ema import Ema, gamma_of_width
from fastdiff.training.ranks import Ranks, join
from fastdiff.training.trainer import Trainer


class Weight(nn.Module):
    """One number, as a network."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1, dtype=torch.float64))


def averaged(ema: Ema, net: Weight, values: np.ndarray) -> dict[str, float]:
    for step, value in enumerate(values):
        net.value.data.fill_(value)
        ema.update(8 * (step + 1), 8)
    return {name: float(average["value"]) for name, average in ema.averages.items()}


def test_the_exponential_average_forgets_half_in_a_halflife() -> None:
    net = Weight()
    ema = Ema(net, halflife=80, rampup=0)
    assert averaged(ema, net, np.r_[np.zeros(5), np.ones(10)])["ema"] == pytest.approx(0.5, rel=1e-12)


def test_the_ramp_makes_the_halflife_a_share_of_the_past() -> None:
    ema = Ema(Weight(), halflife=10_000, rampup=0.05)
    assert ema.decays(1_000, 8)[0] == pytest.approx(0.5 ** (8 / 50), rel=1e-12)
    assert ema.decays(1_000_000, 8)[0] == pytest.approx(0.5 ** (8 / 10_000), rel=1e-12)


def test_a_power_average_is_the_integral_of_its_profile() -> None:
    """Karras et al. 2024, eq. 1: the past weighs t^gamma, up to a constant; of values t/T it is (gamma+1)/(gamma+2)."""
    net, width = Weight(), 0.1
    gamma = gamma_of_width(width)
    assert math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(width, rel=1e-9)
    assert gamma_of_width(0.1) == pytest.approx(6.94, abs=0.01)  # the paper's table for 10 %
    steps = np.arange(1, 4001) / 4000
    found = averaged(Ema(net, 8, profiles=(width,)), net, steps)[f"power_{width}"]
    assert found == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3)
    for wrong in (0.0, 0.3):
        with pytest.raises(ValueError, match=r"within \(0, 0.2887\)"):
            gamma_of_width(wrong)


@pytest.mark.parametrize(
    ("decay", "at_half", "at_end"), [("constant", 1.0, 1.0), ("cosine", 0.5, 0.0), ("linear", 0.5, 0.0)]
)
def test_rates(decay: str, at_half: float, at_end: float) -> None:
    config = TrainConfig(images=1000, batch=10, warmup_images=100, learning_rate=2.0, decay=decay)
    assert optimizer.learning_rate(config, 0) == pytest.approx(0.2)  # the first step already learns
    assert optimizer.learning_rate(config, 500) == pytest.approx(2 * at_half)
    assert optimizer.learning_rate(config, 1000) == pytest.approx(2 * at_end, abs=1e-12)


def test_inverse_square_root_rate() -> None:
    config = TrainConfig(images=10**6, batch=10, warmup_images=100, learning_rate=1.0, decay="inverse_sqrt")
    assert [optimizer.learning_rate(config, images) for images in (100, 400, 10_000)] == pytest.approx([1.0, 0.5, 0.1])


SIZES = {"fashion32": 1_909_636, "cifar32": 59_013_379, "imagenet64": 294_501_699, "latent64": 198_117_316}


@pytest.mark.parametrize("name", presets.names())
def test_presets_have_the_size_they_say(name: str) -> None:
    """fashion32 is the shipped network's size; EDM's own are 55.7 and (with 1000 classes) 296 million."""
    config = presets.get(name)
    values = np.zeros(
        (20, config.channels or 3, config.size, config.size), np.float32 if name == "latent64" else np.uint8
    )
    labels = np.arange(20) % 10 if name == "fashion32" else None
    filled = networks.fill(config, Arrays(values + 1, labels, "x", Fit()))
    objective = networks.build_objective(filled)
    with torch.device("meta"):
        net = networks.build_network(filled, objective)
    assert sum(parameter.numel() for parameter in net.parameters()) == SIZES[name]


def test_operations_are_counted() -> None:
    """A 3x3 convolution of 5 channels to 7 on 8x8: 2 x 9 x 5 x 7 x 64 forward, twice that back (input and weight)."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 7, 3, padding=1)

        def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    first, second = 2 * 9 * 3 * 5 * 64, 2 * 9 * 5 * 7 * 64
    assert flops.of_one_image(Net(), (3, 8, 8), False) == 3 * first + 3 * second - first  # no gradient for the input
    rate, source = flops.peak(torch.device("cpu"), "fp32")
    assert rate > 1e8 and source == "a matrix product timed here"


def test_the_clock_of_an_objective_spans_a_thousand() -> None:
    scales = {name: networks.clock_scale(objectives.get(name)) for name in ("edm", "ddpm", "flow")}
    assert scales == {"edm": 16.0, "ddpm": 1.0, "flow": 1000.0}


def test_records_forget_what_a_resume_repeats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "images": images}) for images in (8, 16, 24)]
    path.write_text("\n".join(lines) + '\n{"kind": "tra')  # cut short by a kill
    records.forget_after(path, 16)
    assert path.read_text().splitlines() == lines[:2]
    records.forget_after(tmp_path / "none.jsonl", 0)


def test_a_line_that_does_not_fit_on_the_disk_is_lost_whole(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said, before = records.Records(tmp_path, 0, 64, False), resource.getrlimit(resource.RLIMIT_FSIZE)
    said.write("train", 8, name="x" * 5000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        said.write("train", 16, name="x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said.write("train", 24)
    said.close()
    read = [json.loads(line)["images"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert read == [8, 24]
    assert f"a line of {tmp_path / 'metrics.jsonl'} is lost: [Errno 27]" in capfd.readouterr().err


def test_numbers_go_to_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert folder == str(tmp_path / "tensorboard")
            seen.append(purge_step)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

        def flush(self) -> None:
            seen.append("flush")

        def close(self) -> None:
            seen.append("close")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    said = records.Records(tmp_path, 16, 24, tensorboard=True)  # what came after 16 images comes again
    said.write("train", 24, loss=0.5, where="here")
    said.close()
    assert seen == [17, ("train/loss", 0.5, 24), "flush", "close"]


def test_values_of_the_command_line() -> None:
    assert read_value("batch", "1e3") == 1000.0 and TrainConfig().change(batch=1000.0).batch == 1000
    assert read_value("compile", "yes") is True and read_value("micro_batch", "none") is None
    assert read_value("data", "007") == "007" and read_value("class_names", "ape,bee") == ("ape", "bee")
    for name, wrong in (("batch", 1.5), ("compile", 1), ("class_names", 3), ("network", []), ("learning_rate", "fast")):
        with pytest.raises(TypeError, match=f"{name} must be"):
            TrainConfig().change(**{name: wrong})
    for name, low in (("batch", 0), ("clip_norm", -1), ("drop_label", 1.0), ("learning_rate", 0.0)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            TrainConfig().change(**{name: low})
    with pytest.raises(ValueError, match="cannot be combined with fp16"):
        TrainConfig(graph=True, precision="fp16")


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="torch sees 0"):
        join("cuda") if not torch.cuda.is_available() else pytest.fail("torch sees 0")


def test_damaged_checkpoints_push_out_no_whole_one(tmp_path: Path) -> None:
    tensors = {"net/a": torch.ones(3)}
    checkpoints = Checkpoints(tmp_path, Ranks(0, 1, torch.device("cpu")), keep=1)
    checkpoints.save(tensors, Progress(images=300))
    next(checkpoints.latest().glob("*.distcp")).write_bytes(b"")
    for images in (200, 250):
        checkpoints.save(tensors, Progress(images=images))
        assert checkpoints.latest().name == f"{images:012d}"
    names = {path.name for path in checkpoints.folder.iterdir()}
    assert names == {f"{250:012d}", f"{300:012d}"}


def test_what_is_renamed_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file or folder is synchronised before its name is its own: weights, texts, checkpoints."""
    synced: set[int] = set()
    early = []
    fsync, replace = os.fsync, os.replace

    def seen(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def renamed(old: str | Path, new: Path) -> None:
        inside = Path(old).iterdir() if Path(old).is_dir() else []
        early.extend(path for path in (Path(old), *inside) if path.stat().st_ino not in synced)
        replace(old, new)

    monkeypatch.setattr(os, "fsync", seen)
    monkeypatch.setattr(os, "replace", renamed)
    write_atomically(tmp_path / "a.txt", lambda path: path.write_text("a"))
    config = UNetConfig(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
    )
    UNet(config).save(tmp_path / "b.safetensors")
    Checkpoints(tmp_path, Ranks(0, 1, torch.device("cpu"))).save({"net/a": torch.ones(3)}, Progress(images=8))
    assert len(synced) >= 6 and early == []


def test_the_log_is_on_the_disk_before_a_checkpoint_counts(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a checkpoint gets its name, what a power cut leaves of the log has all lines up to it."""
    log, on_disk, behind = tmp_path / "run" / "metrics.jsonl", "", []
    fsync, replace = os.fsync, os.replace

    def seen(handle: int) -> None:
        nonlocal on_disk
        fsync(handle)
        if log.is_file() and os.fstat(handle).st_ino == log.stat().st_ino:
            on_disk = log.read_text()

    def renamed(old: str | Path, new: Path) -> None:
        if Path(new).parent.name == "checkpoints" and Path(new).name.isdigit():
            images = [json.loads(line)["images"] for line in log.read_text().splitlines()]
            there = [json.loads(line)["images"] for line in on_disk.splitlines()]
            behind.append([each for each in images if each <= int(Path(new).name) and each not in there])
        replace(old, new)

    monkeypatch.setattr(os, "fsync", seen)
    monkeypatch.setattr(os, "replace", renamed)
    Trainer(tiny(data, images=48, log_images=8, save_images=16), tmp_path / "run").train()
    assert behind == [[], [], []] and len(on_disk.splitlines()) == 6


def test_a_step_asks_the_other_processes_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and the wish to stop go in one message: twelve steps more are twelve messages more."""
    asked: list[list[float]] = []
    monkeypatch.setattr(Ranks, "_reduce", lambda self, values, how: asked.append(values) or values)
    counts = []
    for images in (96, 192):
        asked.clear()
        options = {"log_images": 1000, "save_images": 1000, "async_save": False}
        Trainer(tiny(data, images=images, **options), tmp_path / str(images)).train()
        counts.append(len(asked))
    assert counts[1] - counts[0] == 12
    assert sum(len(values) == 2 for values in asked) == 24
