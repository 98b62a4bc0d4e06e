"""A run of the trainer: against plain torch, against itself after a kill, and what it refuses."""

from __future__ import annotations

import functools
import os
import re
import resource
import shutil
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_runs import ALONE, COUNT, assert_same, lines, measured, stored, tiny, weights

import fastdiff as fd
from fastdiff import cli
from fastdiff.cli.train import _next
from fastdiff.training import graphed, objectives
from fastdiff.training.config import TrainConfig, check_resume
from fastdiff.training.data.arrays import Arrays
from fastdiff.training.data.loader import Loader
from fastdiff.training.data.order import image_indices, sample_seeds
from fastdiff.training.data.pictures import Fit
from fastdiff.training.data.source import Faults
from fastdiff.training.graphed import GraphedStep
from fastdiff.training.optimizer import build as build_optimizer
from fastdiff.training.optimizer import steps
from fastdiff.training.ranks import Ranks
from fastdiff.training.step import NotFinite, Outcome, Step
from fastdiff.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("single_thread")

LISTENING = {
    "times": {"name": "loss_second_moment", "history": 1},
    "schedule": {"name": "linear", "options": {"steps": 4}},
}


class Killed(Exception):
    """Stands for an error of a step: only a save in the background still ends."""


def kill_after(images: int):
    def check(trainer: Trainer, batch: object, outcome: object) -> None:
        if trainer.progress.images >= images:
            raise Killed

    return check


def test_steps_are_those_of_plain_torch(data: Path, tmp_path: Path) -> None:
    config = tiny(data, images=24, network={"dropout": 0.0}, ema_profiles=[])
    trainer = Trainer(config, tmp_path / "run")
    start = {name: parameter.detach().clone() for name, parameter in trainer.net.named_parameters()}
    trainer.train()

    peer = Trainer(config, tmp_path / "peer")
    net, average = peer.net, dict(start)
    assert all(torch.equal(parameter, start[name]) for name, parameter in net.named_parameters())
    objective = objectives.get(
        "edm", flip=True, drop_label=0.1, null_label=3, times={"name": "lognormal", "mean": -0.7, "std": 1.3},
        sigma_data=trainer.config.objective_options["sigma_data"],
    )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), 1.0, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01, fused=True)
    archive = np.load(data)
    for step in range(3):
        seen = 8 * step
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (seen + 8) / 32) * 0.5 * (1 + np.cos(np.pi * seen / 24))
        index = image_indices(COUNT, 0, seen, 8)
        pictures = torch.from_numpy(archive["images"][index])[:, None]
        labels, seeds = torch.from_numpy(archive["labels"][index]), torch.from_numpy(sample_seeds(0, seen, 8))
        objective.loss(net, pictures, labels, seeds, 0).mean.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = 0.5 ** (8 / min(40, 0.05 * (seen + 8)))
        average = {name: torch.lerp(average[name], p.detach(), 1 - decay) for name, p in net.named_parameters()}
    for name, parameter in trainer.net.named_parameters():
        torch.testing.assert_close(parameter, dict(net.named_parameters())[name], rtol=0, atol=1e-7)
        torch.testing.assert_close(trainer.ema.weights[name], average[name], rtol=0, atol=1e-7)


def test_resume_is_bit_identical(data: Path, tmp_path: Path) -> None:
    config = tiny(data)
    whole = Trainer(config, tmp_path / "whole")
    whole.train()
    for killed_at in (32, 64, 80):  # in mid-epoch, each after a checkpoint
        with pytest.raises(Killed):
            killed = Trainer(config, tmp_path / "run", resume="auto")
            killed.train(kill_after(killed_at))
    resumed = Trainer(config, tmp_path / "run", resume="auto")
    assert resumed.progress.images == 72
    assert resumed.train() == "done"
    assert_same(weights(resumed), weights(whole))
    assert_same(stored(tmp_path / "run", resumed), weights(whole))
    assert measured(tmp_path / "run") == measured(tmp_path / "whole")
    assert [line["images"] for line in lines(tmp_path / "run")] == [16, 32, 48, 64, 80, 96]
    assert (
        load_file(tmp_path / "run" / "model.safetensors").keys()
        == load_file(tmp_path / "whole/model.safetensors").keys()
    )


def test_fp16_resumes_with_its_loss_scale(data: Path, tmp_path: Path) -> None:
    config = tiny(data, precision="fp16", images=48)
    whole = Trainer(config, tmp_path / "whole")
    whole.train()
    with pytest.raises(Killed):
        killed = Trainer(config, tmp_path / "run")
        killed.train(kill_after(32))
    resumed = Trainer(config, tmp_path / "run", resume="auto")
    assert resumed.progress.scaler["_growth_tracker"] == 3 and resumed.progress.images == 24
    resumed.train()
    assert_same(weights(resumed), weights(whole))


def test_fp16_stops_when_no_scale_helps(data: Path, tmp_path: Path) -> None:
    """A gradient that is not a number under a finite loss: 2^16 is halved to below 1 in 17 steps."""
    trainer = Trainer(tiny(data, precision="fp16", images=400, save_images=400), tmp_path / "run")
    next(trainer.net.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NotFinite, match="with finite losses"):
        trainer.train()
    assert trainer.progress.step == 17 and trainer.progress.scaler["scale"] == 0.5


def test_fp16_stops_when_the_norm_overflows_at_any_scale(data: Path, tmp_path: Path) -> None:
    """The gradient itself is finite, so that the scale stays: nothing was trained in the steps before it is said."""
    trainer = Trainer(tiny(data, precision="fp16", save_images=400), tmp_path / "run")
    next(trainer.net.parameters()).register_hook(lambda gradient: gradient * 1e27)
    with pytest.raises(NotFinite, match="gradient norm inf in step 2 .* with finite losses"):
        trainer.train()
    assert trainer.progress.scaler["scale"] == 2**16 and steps(trainer.optimizer) == 0


def test_times_that_follow_the_loss_resume_with_what_they_heard(data: Path, tmp_path: Path) -> None:
    config = tiny(data, objective="ddpm", objective_options=LISTENING)
    whole = Trainer(config, tmp_path / "whole")
    whole.train()
    with pytest.raises(Killed):
        killed = Trainer(config, tmp_path / "run")
        killed.train(kill_after(80))
    resumed = Trainer(config, tmp_path / "run", resume="auto")
    heard = resumed.objective.times.state()
    assert resumed.progress.images == 72 and sum(heard["counts"]) == 72 and min(heard["counts"]) > 0
    assert not np.allclose(resumed.objective.times.chances(resumed.objective.schedule), 0.25)
    resumed.train()
    assert_same(weights(resumed), weights(whole))
    assert resumed.objective.times.state() == whole.objective.times.state()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves(
    data: Path, tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    def press(trainer: Trainer, batch: object, outcome: object) -> None:
        if trainer.progress.images == 40:
            os.kill(os.getpid(), number)

    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    trainer = Trainer(tiny(data), tmp_path / "run")
    assert trainer.train(press) == number.name
    assert trainer.progress.images == 40 and trainer.checkpoints.latest().name == f"{40:012d}"
    assert_same(stored(tmp_path / "run", trainer), weights(trainer))
    assert {each: signal.getsignal(each) for each in before} == before
    assert f"{number.name}: the step is finished and saved first" in capfd.readouterr().err


def test_a_signal_during_the_last_save_does_not_cut_it_short(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tiny(data, images=24), tmp_path / "run")
    save = trainer.checkpoints.save

    def pressed(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments)

    monkeypatch.setattr(trainer.checkpoints, "save", pressed)
    assert trainer.train() == "done"
    assert trainer.checkpoints.latest().name == f"{24:012d}"
    assert_same(stored(tmp_path / "run", trainer), weights(trainer))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU does, and this machine has a CUDA device")
def test_precision_is_full_on_a_cpu_unless_asked_for(data: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny(data, precision="auto"), tmp_path / "run")
    assert trainer.config.precision == "fp32" and TrainConfig().precision == "auto"


def test_a_run_is_not_overwritten_and_not_changed(data: Path, tmp_path: Path) -> None:
    Trainer(tiny(data, images=24), tmp_path / "run").train()
    with pytest.raises(ValueError, match="holds a run already, of 24 images: add --resume auto"):
        Trainer(tiny(data), tmp_path / "run")
    with pytest.raises(ValueError, match="another configuration") as caught:
        Trainer(tiny(data, batch=4, seed=7, log_images=8), tmp_path / "run", resume="auto")
    assert "batch: 8 in the run, 4 now" in str(caught.value) and "seed: 0 in the run, 7 now" in str(caught.value)
    assert "log_images" not in str(caught.value)
    assert Trainer(tiny(data, images=32), tmp_path / "run", resume="auto").progress.images == 24
    with pytest.raises(ValueError, match="size: 8 in the run, 4 now"):  # and not that the pictures are larger
        Trainer(tiny(data, size=4), tmp_path / "run", resume="auto")


def test_one_process_saves_and_resumes_without_the_warning_that_it_is_one(data: Path, tmp_path: Path) -> None:
    """Whatever filters a program sets after it has imported the trainer; no other warning is silenced."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Trainer(tiny(data, images=24), tmp_path / "run").train()
        Trainer(tiny(data, images=32), tmp_path / "run", resume="auto").train()
        warnings.warn("torch.distributed is something else", stacklevel=1)
    assert [str(warning.message) for warning in said if "distributed" in str(warning.message)] == [
        "torch.distributed is something else"
    ]


def test_micro_batches_may_change_where_no_noise_is_dealt_out_within_them(data: Path, tmp_path: Path) -> None:
    one, other = (
        tiny(data, images=8, objective=name, objective_options={"times": "uniform"})
        for name in ("cfm", "transport_cfm")
    )
    for config in (one, other):
        Trainer(config, tmp_path / config.objective).train()
    assert Trainer(one.change(micro_batch=4), tmp_path / "cfm", resume="auto").progress.images == 8
    with pytest.raises(ValueError, match="micro_batch: 8 in the run, 4 now"):
        Trainer(other.change(micro_batch=4), tmp_path / "transport_cfm", resume="auto")


@pytest.mark.parametrize(("was", "now", "same"), [(None, 8, True), (8, None, True), (None, 16, True), (4, None, False)])
def test_what_is_computed_at_once_may_be_said_or_follow(
    data: Path, tmp_path: Path, was: int | None, now: int | None, same: bool
) -> None:
    """None is the share of a process, 8 here; 4 is what the configuration of a run of two processes says."""
    options = {"objective": "transport_cfm", "objective_options": {"times": "uniform"}}
    config = tiny(data, images=8, micro_batch=was, **options)
    Trainer(config, tmp_path / "run").train()
    resume = functools.partial(Trainer, config.change(micro_batch=now), tmp_path / "run", resume="auto")
    if same:
        assert resume().progress.images == 8
    else:
        with pytest.raises(ValueError, match="micro_batch: 4 in the run, 8 now"):
            resume()


def test_what_was_computed_at_once_is_not_cut_to_the_share_of_more_processes() -> None:
    """16 noises were dealt to 16 images: 8 processes of 8 each cannot go on with that, and 2 of 32 can."""
    run = TrainConfig(batch=64, micro_batch=16)
    check_resume(run, run, world=2)
    for now in (16, 8):  # what is given, and what the trainer makes of it
        with pytest.raises(ValueError, match="micro_batch: 16 in the run, 8 now"):
            check_resume(run, run.change(micro_batch=now), world=8)


def test_a_set_that_grew_is_another_run(data: Path, tmp_path: Path) -> None:
    """The objective is one that takes no sigma_data from the pictures, which would differ too."""
    config = tiny(data, images=24, objective="ddpm", objective_options={"times": "uniform"}, classes=0)
    Trainer(config, tmp_path / "run").train()
    np.savez(data, images=np.zeros((COUNT + 3, 8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"set.npz holds 25 pictures, and the run was trained on 22, in an order"):
        Trainer(config.change(images=48), tmp_path / "run", resume="auto")


def test_a_set_may_move_but_not_become_another(data: Path, tmp_path: Path) -> None:
    """The objective is one that takes no sigma_data from the pictures, which would differ too."""
    config = tiny(data, images=24, objective="ddpm", objective_options={"times": "uniform"})
    Trainer(config, tmp_path / "run").train()
    moved = data.rename(tmp_path / "moved.npz")
    resumed = Trainer(config.change(data=str(moved)), tmp_path / "run", resume="auto")
    assert resumed.progress.images == 24
    assert TrainConfig.load(tmp_path / "run" / "config.json").data == str(moved)
    archive = dict(np.load(moved))
    for name, values in archive.items():  # as many, the last picture or the last label another
        changed = values.copy()
        changed[-1] = (changed[-1] + 1) % 3
        np.savez(data, **archive | {name: changed})
        with pytest.raises(ValueError, match=r"set.npz holds other pictures than .*moved.npz, which the run was"):
            Trainer(config, tmp_path / "run", resume="auto")


def test_a_damaged_checkpoint_gives_way_to_the_one_before(data: Path, tmp_path: Path) -> None:
    whole = Trainer(tiny(data), tmp_path / "run")
    whole.train()
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == [f"{72:012d}", f"{96:012d}"]
    shard = next(checkpoints[1].glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (checkpoints[1].parent / ".000000000104").mkdir()  # a save that was killed
    resumed = Trainer(tiny(data), tmp_path / "run", resume="auto")
    assert resumed.progress.images == 72 and not list(checkpoints[1].parent.glob(".*"))
    resumed.train()
    assert_same(stored(tmp_path / "run", resumed), weights(whole))


def test_a_checkpoint_of_the_right_size_that_cannot_be_read_names_the_one_before(data: Path, tmp_path: Path) -> None:
    Trainer(tiny(data), tmp_path / "run").train()
    newest = tmp_path / "run" / "checkpoints" / f"{96:012d}"
    shard = next(newest.glob("*.distcp"))
    shard.write_bytes(b"\x17" * shard.stat().st_size)
    with pytest.raises(ValueError, match=r"0096 cannot be read into .* remove it; the one before is 000000000072"):
        Trainer(tiny(data), tmp_path / "run", resume="auto")
    shutil.rmtree(newest)
    assert Trainer(tiny(data), tmp_path / "run", resume="auto").progress.images == 72


@pytest.mark.parametrize("in_background", [True, False])
def test_a_full_disk_keeps_the_last_good_checkpoint(
    data: Path, tmp_path: Path, in_background: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(trainer: Trainer, batch: object, outcome: object) -> None:
        if trainer.progress.images == 40:  # after the checkpoint at 24: files of 8 KB and no more
            trainer.checkpoints.finish()
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))

    trainer = Trainer(tiny(data, async_save=in_background), tmp_path / "run")
    try:
        with pytest.raises(OSError, match="the last good one is 000000000024. Make room"):
            trainer.train(fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert trainer.progress.images == 96  # a save on the way that fails does not end the run
    assert "could not write checkpoint" in capfd.readouterr().err
    assert {line["images"] for line in lines(tmp_path / "run", "save_failed")} & {48, 56, 72}
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"{24:012d}"]
    resumed = Trainer(tiny(data), tmp_path / "run", resume="auto")
    resumed.train()
    assert_same(weights(resumed), weights(trainer))


def poisoned(tmp_path: Path) -> Path:
    """Float pictures, number 5 of which is not a number."""
    values = np.random.default_rng(0).standard_normal((COUNT, 1, 8, 8)).astype(np.float32)
    values[5, 0, 3, 3] = np.nan
    np.save(tmp_path / "bad.npy", values)
    return tmp_path / "bad.npy"


def test_a_loss_that_is_no_number_stops_with_the_batch(tmp_path: Path) -> None:
    config = tiny(poisoned(tmp_path), objective_options={"sigma_data": 1.0}, save_images=8)
    first = int(np.flatnonzero(image_indices(COUNT, 0, 0, COUNT) == 5)[0]) // 8
    trainer = Trainer(config, tmp_path / "run")
    with pytest.raises(
        NotFinite, match=rf"in step {first + 1} \(after {8 * first + 8} images\), 1 samples at model times"
    ):
        trainer.train()
    batch = load_file(tmp_path / "run" / f"not-finite-{8 * first + 8:012d}-0.safetensors")
    place = int(torch.isnan(batch["pictures"]).flatten(1).any(1).nonzero()[0])
    assert torch.isnan(batch["per_sample"]).nonzero().tolist() == [[place]]
    assert batch["seeds"].tolist() == sample_seeds(0, 8 * first, 8).tolist()
    objective = trainer.objective.loss(lambda x, t, c: x, torch.zeros(8, 1, 8, 8), None, batch["seeds"], 0)
    assert torch.equal(objective.level, batch["level"])
    assert all(torch.isfinite(tensor).all() for tensor in trainer.tensors().values())


def test_a_batch_that_cannot_be_kept_does_not_hide_why_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("fastdiff.training.trainer.save_file", full)
    trainer = Trainer(tiny(poisoned(tmp_path), objective_options={"sigma_data": 1.0}), tmp_path / "run")
    with pytest.raises(NotFinite, match=r"loss nan .* the batch could not be written to .*: No space left on device"):
        trainer.train()
    assert not list((tmp_path / "run").glob("not-finite-*"))


class OneOfTwo(Ranks):
    """The first process, whose peer finds one unreadable file."""

    def share(self, found: list[tuple[str, str]]) -> list[tuple[str, str]]:
        return [*found, ("theirs.png", "cut short")]


def test_files_that_another_process_cannot_read_are_named_and_counted(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(tiny(data, images=48), tmp_path / "run", ranks=OneOfTwo(0, 1, torch.device("cpu")))
    trainer.source.faults = Faults(2000)
    trainer.source.faults.record("ours.png", ValueError("no picture"))
    trainer.train()
    assert [line["unreadable_files"] for line in lines(tmp_path / "run")] == [2, 2, 2]
    said = capfd.readouterr().err
    assert said.count("skipped ours.png: no picture") == 1 and "skipped theirs.png: cut short" in said
    with pytest.raises(ValueError, match=r"3 of 2000 files cannot be read"):
        trainer.source.faults.learn([("a third", "cut short")])


def test_a_process_without_the_bad_samples_says_so(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tiny(data), tmp_path / "run")
    outcome = Outcome(np.nan, np.nan, 1e-3, False, torch.ones(8), torch.ones(8))
    monkeypatch.setattr(trainer.step, "run", lambda batch, progress, asked: trainer.step.count(outcome, progress))
    with pytest.raises(NotFinite, match="loss nan .* 0 samples here: another process has them"):
        trainer.train()


def test_steps_that_are_no_number_can_be_left_out(tmp_path: Path) -> None:
    config = tiny(poisoned(tmp_path), objective_options={"sigma_data": 1.0}, max_skips=2)
    trainer = Trainer(config, tmp_path / "run")
    with pytest.raises(NotFinite):
        trainer.train()  # the picture comes once an epoch: the third epoch is one too many
    assert trainer.progress.skips == 3 and 44 < trainer.progress.images <= 66 + 8
    assert len(lines(tmp_path / "run", "skipped")) == 2
    assert all(torch.isfinite(tensor).all() for tensor in trainer.tensors().values())


@pytest.mark.parametrize(
    "change",
    [
        {"micro_batch": 3},
        {"recompute": True},
        {"channels_last": True},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
)
def test_how_it_is_computed_changes_only_rounding(data: Path, tmp_path: Path, change: dict[str, object]) -> None:
    runs = []
    for name, config in (("a", tiny(data)), ("b", tiny(data, **change))):
        config = config.change(network={"dropout": 0.0}, images=16, epsilon=1e-3)
        trainer = Trainer(config, tmp_path / name)
        trainer.train()
        runs.append(weights(trainer))
    for name, tensor in runs[0].items():
        torch.testing.assert_close(runs[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_attention_is_computed_again_as_it_was(data: Path, tmp_path: Path) -> None:
    """By torch's plain formula, as fashion32 has it, which keeps other tensors than torch's kernels."""
    network = {"dropout": 0.0, "mid_block_type": "UNetMidBlock2D"}
    config = tiny(data, math_attention=True, images=16).change(network=network)
    trained = []
    for again in (False, True):
        trainer = Trainer(config.change(recompute=again), tmp_path / str(again))
        trainer.train()
        trained.append(weights(trainer))
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, rtol=0, atol=0)


def test_the_graphed_step_is_the_eager_step(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The body of the graph, run in place of its replay: its buffers must hold what changes from step to step."""
    monkeypatch.setattr(graphed, "captured", lambda body: body)
    trained, heard = [], []
    config = tiny(data, network={"dropout": 0.0}, micro_batch=4, objective="ddpm", objective_options=LISTENING)
    for kind in (Step, GraphedStep):
        trainer = Trainer(config, tmp_path / kind.__name__)
        optimizer = build_optimizer(trainer.net, trainer.config)
        trainer.optimizer = optimizer
        trainer.step = kind(
            trainer.config, trainer.net, trainer.net, trainer.objective, optimizer, trainer.ema, ALONE
        )  # fmt: skip
        trainer.train()
        trained.append(weights(trainer))
        heard.append(trainer.objective.times.state())
    assert_same(*trained)
    assert heard[0] == heard[1] and sum(heard[1]["counts"]) == 96


def test_the_weights_file_is_the_average_and_samples(data: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny(data, images=24, weights_dtype="float32", ema_profiles=[0.1]), tmp_path / "run")
    trainer.train()
    model = fd.load(tmp_path / "run")
    assert model.prediction == "edm" and model.shape == (1, 8, 8) and model.class_names == ("0", "1", "2")
    assert model.null_label == 3 and model.sigma_data == trainer.objective.sigma_data
    for name, parameter in model.net.named_parameters():
        assert torch.equal(parameter, trainer.ema.weights[name])
    power = load_file(tmp_path / "run" / "model-power_0.1.safetensors")
    assert torch.equal(power["conv_in.weight"], trainer.ema.averages["power_0.1"]["conv_in.weight"])


@pytest.mark.parametrize(
    ("objective", "options"), [("flow", {}), ("hybrid", {}), ("implicit", {}), ("edm", {"log_variance": True})]
)
def test_what_is_trained_is_what_is_loaded(
    data: Path, tmp_path: Path, objective: str, options: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    """The file of a run says its schedule, prediction and variance, and the next command samples from it."""
    config = tiny(
        data, objective=objective, images=16, classes=0, weights_dtype="float32", eval_images=16, eval_count=8
    )
    trainer = Trainer(config.change(objective_options=options), tmp_path / "run")
    trainer.train()
    model = fd.load(tmp_path / "run")
    assert model.schedule == trainer.objective.schedule and model.prediction == trainer.objective.prediction
    assert model.learned_variance == (objective == "hybrid") and model.class_names == () and model.null_label is None
    peer = trainer.objective.denoiser(trainer.previews.network())
    x, time = torch.randn(2, 1, 8, 8), torch.full((2,), 0.5)
    torch.testing.assert_close(model(x, time)[:, :1], peer(x, time)[:, :1], rtol=0, atol=1e-6)  # other memory format
    out = tmp_path / "x.npy"
    assert (
        cli.main(["sample", "--model", str(tmp_path / "run"), "--count", "2", "--steps", "2", "--out", str(out)]) == 0
    )
    x = fd.sample(model, (2, 1, 8, 8), steps=2, seed=0, memory_format=torch.channels_last)
    assert np.array_equal(np.load(out), fd.images.to_pixels(x))


def test_latents_are_drawn_in_the_units_of_their_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "latents.npy", 5 * np.random.default_rng(0).standard_normal((16, 4, 8, 8)).astype(np.float32))
    config = tiny(
        tmp_path / "latents.npy", channels=4, scale=0.2, images=16, weights_dtype="float32", resize="none",
        sample_images=16, sample_steps=2,
    )  # fmt: skip
    Trainer(config, tmp_path / "run").train()
    assert _next(config, Path("run")) == "fastdiff sample --model run --out drawn.npy"
    command = ["sample", "--model", str(tmp_path / "run"), "--count", "2", "--steps", "2", "--out"]
    assert cli.main([*command, str(tmp_path / "x.png")]) == 2
    assert "draws latents, not pictures: give --out drawn.npy" in capsys.readouterr().err
    assert cli.main([*command, str(tmp_path / "x.npy")]) == 0
    x = fd.sample(fd.load(tmp_path / "run"), (2, 4, 8, 8), steps=2, seed=0, memory_format=torch.channels_last)
    drawn = np.load(tmp_path / "x.npy")
    assert drawn.dtype == np.float32 and drawn.std() > 1.5
    np.testing.assert_allclose(drawn, x.numpy() / 0.2, rtol=1e-6)
    grid = np.load(tmp_path / "run" / "samples" / f"{16:012d}.npy")
    assert grid.shape == (16, 4, 8, 8) and grid.dtype == np.float32
    model = fd.load(tmp_path / "run")
    x = fd.Sampler(fd.plan("dpmpp_2m", model.schedule, 2, "karras"), model).sample((16, 4, 8, 8), seed=0)
    np.testing.assert_allclose(grid, x.numpy() / 0.2, rtol=1e-5, atol=1e-5)


def test_one_command_trains_on_a_folder_and_the_next_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for kind in ("cats", "dogs"):
        (tmp_path / "pictures" / kind).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (20, 30 + i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / kind / f"{i}.png")
    run, out = tmp_path / "runs" / "mine", tmp_path / "samples.npy"
    small = [
        "--network", "block_out_channels=[8,8]", "--network", "norm_num_groups=4", "--network", "layers_per_block=1",
        "--network", 'down_block_types=["DownBlock2D","AttnDownBlock2D"]', "--network", "attention_head_dim=8",
        "--network", 'up_block_types=["AttnUpBlock2D","UpBlock2D"]', "--batch", "4", "--size", "16", "--threads", "1",
    ]  # fmt: skip
    command = ["train", "--preset", "cifar32", "--data", str(tmp_path / "pictures"), "--out", str(run), *small]
    assert cli.main([*command, "--images", "8", "--sample-images", "8", "--sample-steps", "2"]) == 0
    shown = capsys.readouterr()
    bar = shown.err.split("\r")[-1]
    assert re.search(r"8\.00/8\.00 .*image/s, loss=\d\.\d+, images_s=\d+, memory=[\d.]+ GiB, mfu=\d+%", bar), bar
    assert "12 pictures in" in shown.out and "2 classes" in shown.out and "done      8 images" in shown.out
    assert (run / "samples" / f"{8:012d}.png").is_file()
    assert TrainConfig.load(run / "config.json").class_names == ("cats", "dogs")
    assert (
        cli.main(["sample", "--model", str(run), "--class", "dogs", "--count", "2", "--steps", "2", "--out", str(out)])
        == 0
    )
    assert np.load(out).shape == (2, 16, 16, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "cifar"], "Did you mean 'cifar32'"),
        (["--preset", "fashion32", "--data", "nowhere"], "no data at nowhere"),
        (["--preset", "fashion32"], "nothing to train on"),
        (["--preset", "fashion32", "--data", "x", "--batch", "many"], "batch must be int, got 'many'"),
        (["--preset", "fashion32", "--data", "x", "--precision", "fp8"], "Unknown precision 'fp8'"),
        (["--preset", "fashion32", "--data", "x", "--micro-batch", "0"], "micro_batch must be at least 1, got 0"),
        (["--preset", "fashion32", "--data", "x", "--eval-count", "0"], "eval_count must be at least 1, got 0"),
        (["--preset", "fashion32", "--data", "x", "--peak-tflops", "0"], "peak_tflops must be above 0, got 0.0"),
        (["--preset", "fashion32", "--data", "x", "--ema-rampup", "nan"], "ema_rampup must be float, got 'nan'"),
        (
            ["--preset", "fashion32", "--data", "set.npz", "--eval-images", "128", "--eval-data", "nowhere"],
            "no data at nowhere",
        ),
        (["--preset", "fashion32", "--data", "x", "--network", "wide"], "--network must be NAME=VALUE"),
        (["--preset", "fashion32", "--data", "set.npz", "--objective", "ddmp"], "Did you mean 'ddpm'"),
        (["--preset", "fashion32", "--data", "set.npz", "--objective", "v_prediction"], "Did you mean --objective v?"),
        (["--preset", "fashion32", "--data", "set.npz", "--size", "4"], "more than 4x4; use --resize crop"),
        (["--preset", "fashion32", "--data", "latents.npy"], "has 4 channels, expected 1; use --channels 4"),
        (["--preset", "fashion32", "--data", "latents.npy", "--channels", "4"], "only pixels resize; use --size 8"),
        (
            ["--preset", "fashion32", "--data", "set.npz", "--objective", "classifier", "--classes", "0"],
            "objective 'classifier' learns to tell classes apart, and set.npz has none",
        ),
        (
            ["--preset", "fashion32", "--data", "set.npz", "--objective", "classifier", "--sample-images", "8"],
            "draws no samples: set --sample-images 0",
        ),
        (
            ["--preset", "fashion32", "--data", "set.npz", "--objective", "classifier", "--init", "fashion"],
            "--init fashion is a denoiser: leave init out",
        ),
        (["--preset", "fashion32", "--data", "set.npz", "--objective-options", "p=1"], "Unknown option of objective"),
        (["--preset", "fashion32", "--data", "set.npz", "--network", "widths=[3]"], "unknown entries ['widths']"),
        (
            ["--preset", "fashion32", "--data", "set.npz", "--classes", "2"],
            "labels are out of range, the first is 2 of",
        ),
        (["--preset", "fashion32", "--data", "set.npz", "--device", "tpu"], "device must be auto, cpu or cuda"),
        (["--preset", "fashion32", "--data", "set.npz", "--graph", "true"], "--graph true needs one process on a GPU"),
        (["--preset", "fashion32", "--data", "set.npz", "--tensorboard", "true"], "pip install tensorboard"),
    ],
)
def test_errors_say_how_to_go_on(
    options: list[str], words: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    np.save("latents.npy", np.zeros((2, 4, 8, 8), np.float32))
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    assert cli.main(["train", *options, "--out", "run", "--threads", "1", "--images", "128"]) == 2
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message
    left = ["config.json"] if "--tensorboard" in options else []  # found missing when the training begins
    assert [path.name for path in tmp_path.glob("run/*")] == left and (tmp_path / "run").exists() == bool(left)


def test_a_configuration_survives_its_file_and_shows_what_changed(data: Path, tmp_path: Path) -> None:
    config = tiny(data, objective_options={"flip": True})
    config.save(tmp_path / "config.json")
    assert TrainConfig.load(tmp_path / "config.json") == config
    check_resume(config, config.change(images=5, workers=1, compile=True))
    with pytest.raises(ValueError, match="learning_rate: 0.001 in the run, 0.1 now"):
        check_resume(config, config.change(learning_rate=0.1))
    with pytest.raises(ValueError, match="Did you mean 'batch'"):
        config.change(bathc=3)


def test_the_evaluation_is_the_loss_of_the_average(data: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny(data, images=24, eval_images=24, eval_count=16), tmp_path / "run")
    trainer.train()
    net = fd.load(tmp_path / "run").net  # fp16 weights, so the loss agrees to a thousandth
    batch = Loader(trainer.source, 0x5EED, 16).read(0)
    loss = trainer.objective.loss(net, batch.pictures, batch.labels, batch.seeds, 0).mean
    assert lines(tmp_path / "run", "eval")[0]["loss"] == pytest.approx(float(loss), rel=2e-3)


def test_an_evaluation_counts_each_picture_once(data: Path, tmp_path: Path) -> None:
    """Of 66 pictures the second batch has two, not 64."""
    trainer = Trainer(tiny(data, eval_count=66), tmp_path / "run")
    rng = np.random.default_rng(0)
    source = Arrays(rng.integers(0, 256, (70, 1, 8, 8), dtype=np.uint8), np.arange(70) % 3, "here", Fit())
    batch = Loader(source, 0x5EED, 66).read(0)
    net = trainer.previews.network()
    loss = trainer.objective.loss(net, batch.pictures, batch.labels, batch.seeds, 0).mean
    assert trainer.previews.evaluate(source) == {"loss": pytest.approx(float(loss), rel=1e-5)}
