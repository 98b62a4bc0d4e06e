"""A run that starts from the weights of another: what is taken over, and what does not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import assert_same, measured, tiny, weights

import fastdiff as fd
from fastdiff import cli
from fastdiff.training import objectives, presets
from fastdiff.training.config import TrainConfig
from fastdiff.training.data.loader import Batch
from fastdiff.training.networks import build_objective
from fastdiff.training.step import Outcome
from fastdiff.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("single_thread")

PLAIN = {"dropout": 0.0}


class Killed(Exception):
    """Stands for an error of a step."""


def test_the_configuration_is_shown_with_what_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--batch", "64", "--network", "dropout=0.2", "--objective", "v"]
    assert cli.main(["train", "--preset", "cifar32", "--show", *given]) == 0
    shown, preset = TrainConfig.from_json(capsys.readouterr().out), presets.get("cifar32")
    assert shown == preset.change(batch=64, network={"dropout": 0.2}, objective="v")
    assert shown.network["layers_per_block"] == 4 and shown.warmup_images == 10_000_000


def test_a_classifier_draws_none_of_the_presets_samples(capsys: pytest.CaptureFixture[str]) -> None:
    for given, images in (((), 0), (("--sample-images", "8"), 8)):  # what is asked for is refused, not forgotten
        assert cli.main(["train", "--preset", "cifar32", "--objective", "classifier", "--show", *given]) == 0
        assert TrainConfig.from_json(capsys.readouterr().out).sample_images == images


def test_with_data_the_configuration_is_shown_as_they_fill_it_in(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fashion-MNIST's names are not those of other classes; a run keeps what is shown, with the precision said."""
    given = ["--preset", "fashion32", "--data", str(data), "--size", "8", "--threads", "1"]
    assert cli.main(["train", *given, "--show"]) == 0
    shown = TrainConfig.from_json(capsys.readouterr().out)
    assert (shown.class_names, shown.classes, shown.channels) == ((), 3, 1)
    assert cli.main(["train", *given, "--show", "--init", "fashion"]) == 0
    assert TrainConfig.from_json(capsys.readouterr().out).objective_options["sigma_data"] == fd.load().sigma_data
    trainer = Trainer(shown, data.parent / "run")
    assert trainer.config == shown.change(precision=trainer.config.precision)


def test_another_objective_does_not_take_the_options_of_the_presets_own() -> None:
    """EDM's levels of fashion32 are no part of Ho et al. 2020's objective, which draws its times uniformly."""
    preset = presets.get("fashion32")
    assert preset.change(objective="edm").objective_options == preset.objective_options != {}
    changed = preset.change(objective="ddpm", objective_options={"perturbation": 0.1})
    assert changed.objective_options == {"perturbation": 0.1}
    assert build_objective(changed.change(classes=0)).times == objectives.times.Uniform()
    assert preset.change(objective_options={"flip": True}).objective_options.keys() == {"times", "flip"}


@pytest.fixture
def trained(data: Path, tmp_path: Path) -> Path:
    """The folder of a run of three steps, whose sigma_data is not that of the data."""
    config = tiny(data, images=24, weights_dtype="float32", seed=5, objective_options={"sigma_data": 0.75})
    Trainer(config, tmp_path / "given").train()
    return tmp_path / "given"


@pytest.mark.parametrize("file", ["", "model.safetensors"])
def test_weights_and_averages_begin_as_the_given_ones(data: Path, trained: Path, tmp_path: Path, file: str) -> None:
    trainer = Trainer(tiny(data, init=str(trained / file), ema_profiles=[0.1]), tmp_path / "run")
    given = dict(fd.load(trained).net.named_parameters())
    for held in (dict(trainer.net.named_parameters()), *trainer.ema.averages.values()):
        assert_same({name: tensor.detach() for name, tensor in held.items()}, given)
    assert trainer.objective.sigma_data == 0.75
    assert any("started from" in line for line in trainer.describe())


def test_the_first_loss_is_that_of_the_given_weights(data: Path, trained: Path, tmp_path: Path) -> None:
    config = tiny(data, images=24, init=str(trained), network=PLAIN)
    seen: list[tuple[Batch, Outcome]] = []
    trainer = Trainer(config, tmp_path / "run")
    trainer.train(lambda trainer, batch, outcome: seen.append((batch, outcome)))
    (batch, outcome), net = seen[0], fd.load(trained).net
    loss = trainer.objective.loss(net, batch.pictures, batch.labels, batch.seeds, 0)
    torch.testing.assert_close(outcome.per_sample, loss.per_sample, rtol=1e-5, atol=1e-6)
    fresh = Trainer(config.change(init=""), tmp_path / "fresh")
    other = fresh.objective.loss(fresh.net, batch.pictures, batch.labels, batch.seeds, 0)
    assert abs(float(other.mean.detach()) - float(loss.mean.detach())) > 1e-3


def test_without_a_ramp_the_average_remembers_the_given_weights(data: Path, trained: Path, tmp_path: Path) -> None:
    """Half of them is left after a half-life, of which the ramp leaves nothing."""
    moved = []
    for name, rampup in (("a", 0.0), ("b", 0.05)):
        trainer = Trainer(tiny(data, images=40, ema_halflife=40, ema_rampup=rampup, init=str(trained)), tmp_path / name)
        start, states = weights(trainer), []
        trainer.train(lambda trainer, batch, outcome, into=states: into.append(weights(trainer)))
        value = start["net/conv_in.weight"]
        for state in states if rampup == 0 else states[-1:]:
            value = torch.lerp(value, state["net/conv_in.weight"], 1 - 0.5 ** (8 / 40))
        moved.append(float((weights(trainer)["ema/ema/conv_in.weight"] - value).abs().max()))
    assert moved[0] < 1e-6 < 1e-5 < moved[1]


def test_such_a_run_resumes_bit_for_bit_without_the_file(data: Path, trained: Path, tmp_path: Path) -> None:
    config = tiny(data, init=str(trained))
    whole = Trainer(config, tmp_path / "whole")
    whole.train()

    def kill(trainer: Trainer, batch: Batch, outcome: Outcome) -> None:
        if trainer.progress.images == 64:
            raise Killed

    killed = Trainer(config, tmp_path / "run")
    with pytest.raises(Killed):
        killed.train(kill)
    shutil.rmtree(trained)
    with pytest.raises(ValueError, match=r"configuration:\n  init: '.*given' in the run, '' now\nGive these"):
        Trainer(config.change(init=""), tmp_path / "run", resume="auto")
    resumed = Trainer(config, tmp_path / "run", resume="auto")
    assert resumed.progress.images == 48
    resumed.train()
    assert_same(weights(resumed), weights(whole))
    assert measured(tmp_path / "run") == measured(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": 0}, "num_class_embeds: 4 there, None here"),
        ({"drop_label": 0.0, "class_names": ()}, "null_label: 3 there, None here"),
        ({"network": {"block_out_channels": [16]}}, r"block_out_channels: \(8,\) there, \(16,\) here"),
        ({"network": {"norm_eps": 1e-3}}, "norm_eps: 1e-05 there, 0.001 here"),
        ({"objective_options": {"sigma_data": 0.25}}, "sigma_data: 0.75 there, 0.25 here"),
        ({"objective": "flow", "objective_options": {"times": "uniform"}}, "prediction: 'edm' there, 'flow' here"),
        ({"init": "nowhere/model.safetensors"}, "no model file nowhere/model.safetensors"),
        ({"init": "fashoin"}, "Did you mean 'fashion'"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    data: Path, trained: Path, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        Trainer(tiny(data, **({"init": str(trained)} | change)), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_channels_that_do_not_fit_are_named(trained: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "rgb.npy", np.zeros((9, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="in_channels: 1 there, 3 here") as caught:
        Trainer(tiny(tmp_path / "rgb.npy", channels=3, init=str(trained)), tmp_path / "run")
    assert "out_channels: 1 there, 3 here" in str(caught.value)


def test_the_shipped_model_is_trained_further_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate of almost nothing leaves the shipped weights, and with them the model that is written."""
    rng = np.random.default_rng(1)
    pictures = rng.integers(0, 256, (20, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=pictures, labels=np.arange(20) % 10)
    command = [
        "train", "--preset", "fashion32", "--init", "fashion", "--data", str(tmp_path / "set.npz"), "--batch", "4",
        "--images", "4", "--learning-rate", "1e-12", "--threads", "1", "--out", str(tmp_path / "run"),
        "--weights-dtype", "float32",
    ]  # fmt: skip
    assert cli.main(command) == 0
    assert "started from fashion" in capsys.readouterr().out
    run, shipped = fd.load(tmp_path / "run"), fd.load("fashion")
    assert run.sigma_data == shipped.sigma_data == 0.8696  # of these pictures it is another
    assert run.class_names == shipped.class_names and run.null_label == shipped.null_label == 10
    for name, parameter in shipped.net.named_parameters():
        torch.testing.assert_close(dict(run.net.named_parameters())[name], parameter, rtol=0, atol=1e-7)
