"""Several processes: the same run as one, killed at any moment, sharded, restarted by torch's elastic agent."""

from __future__ import annotations

import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_runs import (
    assert_same,
    die_once,
    forked,
    lines,
    measured,
    overflow_once,
    stored,
    tiny,
    train_in_process,
    train_together,
    weights,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fastdiff.training import ranks
from fastdiff.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("single_thread")

PLAIN = {"dropout": 0.0}  # masks are drawn for a place in the batch, so they do depend on the number of processes


def alone(data: Path, run: Path, **changes: object) -> Trainer:
    trainer = Trainer(tiny(data, **changes), run)
    trainer.train()
    return trainer


@pytest.mark.parametrize(("how", "micro_batch", "objective"), [("fsdp", 2, "edm"), ("ddp", 2, "ddpm")])
def test_two_processes_are_one(
    data: Path, tmp_path: Path, how: str, micro_batch: int, objective: str
) -> None:  # fmt: skip
    """Loss, gradient and moments of two processes are those of one, to rounding, and so is their checkpoint.

    With "ddpm" the times follow the loss, so each process must have heard the other's.
    """
    options = {
        "network": PLAIN, "images": 24, "log_images": 8, "save_images": 8, "epsilon": 1e-3, "objective": objective,
        "channels_last": True,
    }  # fmt: skip
    if objective == "ddpm":
        options["objective_options"] = {
            "times": {"name": "loss_second_moment", "history": 1},
            "schedule": {"name": "linear", "options": {"steps": 3}},
        }
    one = alone(data, tmp_path / "one", **options)
    train_together(tiny(data, parallel=how, micro_batch=micro_batch, **options), tmp_path / "two", 2)
    two = stored(tmp_path / "two", one)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    for first, second in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
        assert second["gradient_norm"] == pytest.approx(first["gradient_norm"], rel=1e-4)


def test_a_sharded_run_goes_on_alone_and_sharded_again(data: Path, tmp_path: Path) -> None:
    """Two processes that shard the weights, then one that has them all, then two: the checkpoint is resharded.

    Where the first checkpoint belongs lies a file, so that only the process that renames fails: both go on. The last
    one is lost, so that a line of the log is the mean of steps of two processes and of one.
    """
    options = {
        "network": PLAIN, "epsilon": 1e-3, "decay": "constant", "images": 48, "log_images": 32, "save_images": 8,
        "async_save": False, "ema_profiles": [0.1],
    }  # fmt: skip
    one = alone(data, tmp_path / "one", **options)
    (tmp_path / "two" / "checkpoints").mkdir(parents=True)
    (tmp_path / "two" / "checkpoints" / f"{8:012d}").touch()
    train_together(tiny(data, parallel="fsdp", **options | {"images": 24}), tmp_path / "two", 2)
    assert [line["images"] for line in lines(tmp_path / "two", "save_failed")] == [8]
    shutil.rmtree(tmp_path / "two" / "checkpoints" / f"{24:012d}")
    resumed = Trainer(tiny(data, **options | {"images": 32}), tmp_path / "two", resume="auto")
    assert (resumed.progress.images, resumed.progress.loss_count) == (16, 2)
    resumed.train()
    train_together(tiny(data, parallel="fsdp", **options), tmp_path / "two", 2)
    two = stored(tmp_path / "two", one)
    first, second = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["images"] for line in first] == [line["images"] for line in second] == [32, 48]
    assert [line["loss"] for line in second] == pytest.approx([line["loss"] for line in first], rel=1e-5)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_an_overflow_in_one_shard_is_one_in_all(data: Path, tmp_path: Path) -> None:
    """Both leave the step out and halve the scale, and go on together."""
    config = tiny(data, precision="fp16", parallel="fsdp", images=24, network=PLAIN)
    train_together(config, tmp_path / "run", 2, after=overflow_once)
    did = [(tmp_path / "run" / f"{rank}.jsonl").read_text().splitlines() for rank in range(2)]
    assert did[0] == did[1] == ["[true, 65536.0, 1]", "[false, 32768.0, 1]", "[true, 32768.0, 2]"]


def test_kills_at_random_moments_lose_nothing(data: Path, tmp_path: Path) -> None:
    """kill -9 three times, saves included (one follows the other); bench/kills.py does it fifty times."""
    config = tiny(data, save_images=8, images=160)
    whole = alone(data, tmp_path / "whole", save_images=8, images=160)
    rng, killed = random.Random(0), 0
    for _ in range(3):
        process = forked().Process(target=train_in_process, args=(config, tmp_path / "run"))
        process.start()
        while process.is_alive() and not (tmp_path / "run" / "checkpoints").is_dir():
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.3))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 1
    resumed = Trainer(config, tmp_path / "run", resume="auto")
    resumed.train()
    assert_same(weights(resumed), weights(whole))
    assert measured(tmp_path / "run") == measured(tmp_path / "whole")


def test_every_start_has_a_part_of_the_store_to_itself() -> None:
    """The first process answers those of the last start too, until those of this one have come."""
    store, addresses = dist.HashStore(), []
    for start in range(3):
        with ThreadPoolExecutor(3) as threads:
            parts = [threads.submit(ranks.fresh, store, 0, 3)]
            time.sleep(0.05)
            parts += [threads.submit(ranks.fresh, store, rank, 3) for rank in (1, 2)]
        assert not any(part.result().check(["address"]) for part in parts)
        parts[1].result().set("address", str(start))
        addresses.append(parts[2].result().get("address"))
    assert addresses == [b"0", b"1", b"2"]


def test_who_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "PATIENCE", 0.1)
    store = dist.HashStore()
    store.set("fastdiff/1", "of an earlier start")
    with pytest.raises(TimeoutError, match=r"processes \[1, 2\] of 3 did not join within 0.1 s"):
        ranks.fresh(store, 0, 3)


def test_a_process_that_dies_is_started_again(data: Path, tmp_path: Path) -> None:
    """What torchrun does: the agent ends the others, starts all again, and they go on from the last checkpoint.

    The end is that of two processes that nobody disturbed, bit for bit, with all that a run can carry on: dropout,
    micro-batches, two more averages, classes, times that follow the loss, and saves in the background.
    """
    config = tiny(
        data, images=64, micro_batch=1, ema_profiles=[0.1, 0.05], objective="ddpm",
        objective_options={
            "times": {"name": "loss_second_moment", "history": 1},
            "schedule": {"name": "linear", "options": {"steps": 4}},
        },
    )  # fmt: skip
    train_together(config, tmp_path / "whole", 2)
    launch = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="dies", rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0",
        max_restarts=1, monitor_interval=0.05, start_method="forkserver",
    )  # fmt: skip
    ended = elastic_launch(launch, die_once)(config, tmp_path / "run")
    assert ended == {0: 64, 1: 64}
    like = Trainer(config, tmp_path / "like")
    assert like.config.classes == 3 and "ema/power_0.05/conv_in.weight" in like.tensors()
    assert_same(stored(tmp_path / "run", like), stored(tmp_path / "whole", like))
    assert measured(tmp_path / "run") == measured(tmp_path / "whole")


def test_a_signal_to_one_stops_all_at_the_same_step(data: Path, tmp_path: Path) -> None:
    options = {"images": 80_000, "log_images": 8, "save_images": 80_000}
    processes = train_together(tiny(data, **options), tmp_path / "run", 2, wait=False)
    while not (tmp_path / "run" / "metrics.jsonl").is_file():
        time.sleep(0.01)
    processes[1].terminate()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    last = lines(tmp_path / "run")[-1]["images"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"{last:012d}"]
