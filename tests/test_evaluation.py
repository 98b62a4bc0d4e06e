"""Measures of samples against closed forms, the likelihood bound against an entropy, and `fastdiff eval`."""

from __future__ import annotations

import argparse
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from tiny_runs import tiny

import fastdiff as fd
from fastdiff import cli
from fastdiff.cli.evaluate import _settings
from fastdiff.models.exact import Points
from fastdiff.models.shipped import file_of
from fastdiff.process.schedules import Level
from fastdiff.training.data import open_data
from fastdiff.training.evaluation import evaluate, features
from fastdiff.training.evaluation.distances import nearest, precision_recall, sliced_wasserstein
from fastdiff.training.evaluation.fid import fid
from fastdiff.training.evaluation.likelihood import levels


def test_precision_and_recall_by_hand() -> None:
    """On a line, k = 1: balls of the real set reach 1, 1 and 2; those of the samples 0.5, 0.5 and 6.5."""
    real, samples = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.5], [1.0], [7.5]])
    assert precision_recall(samples, real, 1) == (2 / 3, 1.0)
    assert precision_recall(samples[:2], real, 1) == (1.0, 2 / 3)
    points = torch.randn(1500, 4, generator=torch.Generator().manual_seed(0))
    assert precision_recall(points, points) == (1.0, 1.0)
    assert precision_recall(points, points + 100) == (0.0, 0.0)
    with pytest.raises(ValueError, match="N above 3"):
        precision_recall(points[:3], points)


def test_sliced_wasserstein_of_a_shift_and_in_one_dimension() -> None:
    generator = torch.Generator().manual_seed(0)
    points, shift = torch.randn(50, 2, 3, generator=generator), torch.randn(2, 3, generator=generator)
    # of a shift m each direction gives (m . axis)^2, whose mean over the sphere is |m|^2 / d
    assert sliced_wasserstein(points, points + shift, 20_000) == pytest.approx(
        float(shift.norm()) / math.sqrt(6), rel=0.01
    )
    a, b = torch.randn(40, 1, generator=generator), 2 * torch.randn(40, 1, generator=generator) + 1
    exact = float((a.sort(0).values - b.sort(0).values).square().mean().sqrt())
    assert sliced_wasserstein(a, b) == pytest.approx(exact, rel=1e-6)
    assert exact >= wasserstein_distance(a.flatten(), b.flatten())  # that one is of order 1
    assert sliced_wasserstein(a.repeat(3, 1), a) == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="one shape of sample"):
        sliced_wasserstein(points, a)


def test_the_nearest_picture_is_found_and_measured() -> None:
    rng = np.random.default_rng(0)
    known = torch.from_numpy(rng.integers(0, 256, (20_000, 1, 3, 3), dtype=np.uint8))
    asked = known[[19_000, 17, 3]].clone()
    asked[1, 0, 0, 0] ^= 1
    gaps, index = nearest(asked, known)
    assert index.tolist() == [19_000, 17, 3]
    torch.testing.assert_close(gaps, torch.tensor([0, 1 / 3, 0], dtype=torch.float64))


def two_greys() -> fd.Denoiser:
    """The exact denoiser of pictures whose every pixel is grey 64 or 192, each with probability 1/2."""
    exact = Points(np.array([[64 / 127.5 - 1], [192 / 127.5 - 1]]))

    def net(x: torch.Tensor, time: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        sigma = float(time[0])
        return exact(x.reshape(-1, 1).double(), Level(1.0, sigma)).reshape(x.shape).float()

    # at EDM's own least sigma, 0.002, telling a grey from its neighbours costs 0.2 bits
    return fd.Denoiser(net, fd.schedules.edm(5e-4, 80.0), "x0", shape=(1, 8, 8))


def test_the_bound_is_the_entropy_where_the_denoiser_is_exact() -> None:
    """One bit a pixel. EDM's range ends at 80, where KL(x) = x^2 / (2 80^2) is 1e-4 nats."""
    pixels = torch.randint(2, (40, 1, 8, 8), generator=torch.Generator().manual_seed(1)) * 128 + 64
    found = levels(two_greys(), pixels.byte(), None, count=120)
    assert found.bits == pytest.approx(1.0, abs=0.03)
    # far from the data the best guess is the mean: the error is the variance, (64 / 127.5)^2, less what is left
    assert float(found.errors[-1]) == pytest.approx((64 / 127.5) ** 2, rel=0.02)
    assert float(found.errors[0]) < 1e-12
    assert math.isnan(levels(two_greys(), pixels / 127.5 - 1, None, count=3).bits)


def test_a_worse_denoiser_has_more_bits() -> None:
    pixels = (torch.randint(2, (20, 1, 8, 8), generator=torch.Generator().manual_seed(1)) * 128 + 64).byte()
    exact = two_greys()
    blurred = exact.around(lambda x, time: 0.9 * exact.net(x, time))
    assert levels(blurred, pixels, None).bits > levels(exact, pixels, None).bits + 0.5


def test_the_report_of_a_perfect_sampler(tmp_path: Path) -> None:
    """Samples of the exact denoiser of 64-pixel noise: no further from the test set than training pictures are."""
    rng = np.random.default_rng(0)
    for name in ("train", "test"):
        np.save(tmp_path / f"{name}.npy", (rng.integers(0, 2, (400, 1, 8, 8)) * 128 + 64).astype(np.uint8))
    sets = [open_data(tmp_path / f"{name}.npy") for name in ("train", "test")]
    model = two_greys()
    plan = fd.plan("dpmpp_2m", model.schedule, 12, "karras")
    report = evaluate(model, plan, *sets, samples=400, likelihood=40)
    test, training, drawn = report.rows
    assert report.features == "pixels" and [row.count for row in report.rows] == [400, 400, 400]
    assert drawn.distance == pytest.approx(training.distance, rel=0.15)
    assert drawn.wasserstein == pytest.approx(training.wasserstein, rel=0.3)
    assert drawn.nearest == pytest.approx(test.nearest, rel=0.05) and math.isnan(training.nearest)
    assert report.bits == pytest.approx(1.0, abs=0.15)
    assert "samples" in str(report) and json.loads(json.dumps(report.to_dict()))["rows"][0]["distance"] is None
    with pytest.raises(ValueError, match="open them at its size"):
        evaluate(model, plan, sets[0], open_data(tmp_path / "test.npy", size=4))


def test_float_sets_are_measured_in_the_units_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pictures as values that training multiplied by 0.25: samples are as near as those of pixels."""
    rng = np.random.default_rng(0)
    for name in ("train", "test"):
        greys = rng.integers(0, 2, (300, 1, 8, 8)) * 128 + 64
        np.save(tmp_path / f"{name}.npy", ((greys / 127.5 - 1) / 0.25).astype(np.float32))
    sets = [open_data(tmp_path / f"{name}.npy") for name in ("train", "test")]
    plan = fd.plan("dpmpp_2m", two_greys().schedule, 12, "karras")
    report = evaluate(two_greys(), plan, *sets, samples=300, likelihood=4, scale=0.25)
    test, training, drawn = report.rows
    assert drawn.distance == pytest.approx(training.distance, rel=0.15)
    assert drawn.wasserstein == pytest.approx(training.wasserstein, rel=0.3)
    assert drawn.nearest == pytest.approx(test.nearest, rel=0.05)
    assert test.nearest == pytest.approx(128 * math.sqrt(21 / 64))  # grey levels, where 21 of 64 pixels differ
    assert report.levels[-1][1] == pytest.approx((64 / 127.5) ** 2, rel=0.05) and math.isnan(report.bits)
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.SimpleNamespace())
    with pytest.raises(ValueError, match="are of pixels, and these sets hold float values"):
        evaluate(two_greys(), plan, *sets, fid=True)


def test_what_cannot_be_measured_is_refused_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[evaluate.__module__], "draw", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    for count in (3, 8):
        np.save(tmp_path / f"{count}.npy", np.zeros((count, 1, 8, 8), np.uint8))
    few, enough = (open_data(tmp_path / f"{count}.npy") for count in (3, 8))
    model = two_greys()
    plan = fd.plan("dpmpp_2m", model.schedule, 12, "karras")
    with pytest.raises(ValueError, match="3 samples are too few to measure: precision and recall need 4 or more"):
        evaluate(model, plan, enough, enough, samples=3)
    with pytest.raises(ValueError, match="3 test pictures are too few"):
        evaluate(model, plan, enough, few, samples=8)
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        evaluate(model, plan, enough, enough, samples=8, fid=True)
    named = fd.Denoiser(model.net, model.schedule, "x0", shape=(1, 8, 8), class_names=("a", "b"))
    with pytest.raises(ValueError, match=r"has 2 classes, and its errors by level need the labels .* or likelihood 0"):
        evaluate(named, plan, enough, enough, samples=8)


def mean_of_pixels(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (pictures.float().mean((1, 2, 3)) > 127).long(), pictures.float().mean((2, 3))


def test_features_of_the_user_and_what_cannot_be_had() -> None:
    name = f"{__name__}:mean_of_pixels"
    sys.modules.setdefault(__name__, types.SimpleNamespace(mean_of_pixels=mean_of_pixels))
    pictures = torch.full((4, 3, 2, 2), 200, dtype=torch.uint8)
    predicted, found = features.get(name, (3, 2, 2))(pictures)
    assert predicted.tolist() == [1] * 4 and found.tolist() == [[200.0] * 3] * 4
    for bad, words in (
        ("nothing", "package.module:function"),
        ("no.such:thing", "cannot be had"),
        ("fashion", "of 1x32x32"),
    ):
        with pytest.raises(ValueError, match=words):
            features.get(bad, (3, 2, 2))
    with pytest.raises(ValueError, match=r"must return a tensor \[4, F\]"):
        features.get("torch:sum", (3, 2, 2))(pictures)


def test_fid_asks_for_its_package_and_hands_it_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        fid(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, 1, 4, 4, dtype=torch.uint8))

    def calculate_metrics(input1: object, input2: object, **options: object) -> dict[str, float]:
        assert options["fid"] is True and len(input1) == 2 and input1[1].shape == (3, 4, 4)  # type: ignore[arg-type,index]
        return {"frechet_inception_distance": float(input1[1].float().mean() - input2[0].float().mean())}  # type: ignore[index]

    monkeypatch.setitem(sys.modules, "torch_fidelity", types.SimpleNamespace(calculate_metrics=calculate_metrics))
    assert fid(torch.full((2, 1, 4, 4), 9, dtype=torch.uint8), torch.full((3, 1, 4, 4), 4, dtype=torch.uint8)) == 5.0


def test_eval_of_the_shipped_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twenty samples and random pictures in the files' place: the classifier sees the samples' classes."""
    rng = np.random.default_rng(0)
    pictures = {"images": rng.integers(0, 256, (30, 28, 28), dtype=np.uint8), "labels": np.arange(30) % 10}
    np.savez(tmp_path / "set.npz", **pictures)
    out = tmp_path / "report.json"
    command = ["eval", "--data", str(tmp_path / "set.npz"), "--samples", "20", "--steps", "6", "--guidance", "1.5"]
    assert cli.main([*command, "--likelihood", "2", "--json", str(out)]) == 0
    shown, report = capsys.readouterr().out, json.loads(out.read_text())
    assert "pictures  of 32x32 by resize=pad, as the shipped model was trained" in shown
    assert "features: fashion" in shown and "the model may have seen them" in shown
    assert report["rows"][2]["agreement"] >= 0.85 and report["rows"][1]["agreement"] < 0.6
    assert report["rows"][2]["count"] == 20 and len(report["rows"][2]["by_class"]) == 10


def test_eval_brings_pictures_to_the_size_as_the_training_did(tmp_path: Path, data: Path) -> None:
    """Of the shipped weights under any name, of a run's folder and its file; --resize goes before both."""
    shipped = tmp_path / "fashion.safetensors"
    shipped.symlink_to(file_of("fashion"))
    (tmp_path / "run").mkdir()
    tiny(data, resize="none").save(tmp_path / "run/config.json")
    weights = tmp_path / "run/model.safetensors"
    weights.write_bytes(b"")
    copied = tmp_path / "other.safetensors"
    copied.write_bytes(b"")

    def settings(model: Path | str, resize: str | None = None) -> tuple[bool, str, str]:
        said, how, why = _settings(argparse.Namespace(model=str(model), resize=resize))
        return said is not None, how, why

    for model in ("fashion", shipped):
        assert settings(model) == (False, "pad", "as the shipped model was trained")
    for model in (tmp_path / "run", weights):
        assert settings(model) == (True, "none", f"as {tmp_path / 'run/config.json'} says")
    assert settings(copied) == (False, "crop", "as runs are unless they say otherwise")
    assert settings("fashion", "crop") == (False, "crop", "as asked for")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--data is missing"),
        (["--data", "nowhere"], "no data at nowhere"),
        (["--data", "set.npy", "--solver", "rk45"], "makes its own steps"),
        (["--data", "set.npy", "--samples", "0"], "at least 1"),
        (["--data", "set.npy", "--model", "fashon"], "Did you mean 'fashion'"),
    ],
)
def test_eval_errors(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("set.npy", np.zeros((4, 1, 32, 32), np.uint8))
    assert cli.main(["eval", *options]) == 2
    assert words in capsys.readouterr().err
