"""The parts of training by closed forms: averages, rates, presets, operations counted, records."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastdiff.training import flops, networks, objectives, optimizer, presets, records
from fastdiff.training.config import TrainConfig, read_value
from fastdiff.training.data.arrays import Arrays
from fastdiff.training.data.pictures import Fit
from fastdiff.training.ema import Ema, gamma_of_width
from fastdiff.training.ranks import join


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


def test_numbers_go_to_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path / "tensorboard")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

        def flush(self) -> None:
            seen.append("flush")

        def close(self) -> None:
            seen.append("close")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    said = records.Records(tmp_path, 0, 8, tensorboard=True)
    said.write("train", 8, loss=0.5, where="here")
    said.close()
    assert seen == [("train/loss", 0.5, 8), "flush", "close"]


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
