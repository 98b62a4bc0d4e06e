"""What the tests of training share: a tiny run that takes milliseconds a step, and processes that can be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff.training import presets
from fastdiff.training.config import TrainConfig
from fastdiff.training.data.loader import Batch
from fastdiff.training.optimizer import steps
from fastdiff.training.ranks import Ranks, local
from fastdiff.training.step import Outcome
from fastdiff.training.trainer import Trainer

After = Callable[[Trainer, Batch, Outcome], None]
COUNT = 22  # pictures: no multiple of the batch, so that epochs end within batches
ALONE = Ranks(0, 1, torch.device("cpu"))

NETWORK = {
    "patch_size": 1, "mid_block_type": None,
    "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8],
    "layers_per_block": 1, "attention_head_dim": 4, "norm_num_groups": 4, "attn_norm_num_groups": 4, "dropout": 0.1,
}  # fmt: skip


def write_data(folder: Path, channels: int = 1) -> Path:
    """An .npz of 8 x 8 pictures in three classes."""
    rng = np.random.default_rng(3)
    shape = (COUNT, 8, 8) if channels == 1 else (COUNT, channels, 8, 8)
    np.savez(folder / "set.npz", images=rng.integers(0, 256, shape, dtype=np.uint8), labels=np.arange(COUNT) % 3)
    return folder / "set.npz"


def tiny(data: Path, **changes: Any) -> TrainConfig:
    """A configuration of a few milliseconds a step: fashion32's, made small, with dropout and flips."""
    usual = {
        "data": str(data), "size": 8, "images": 96, "batch": 8, "network": NETWORK, "precision": "fp32", "flip": True,
        "threads": 1, "log_images": 16, "save_images": 24, "warmup_images": 32, "ema_halflife": 40,
        "ema_profiles": [], "channels_last": False, "peak_tflops": 0.1, "device": "cpu", "class_names": [],
    }  # fmt: skip
    return presets.get("fashion32").change(**usual).change(**changes)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Everything a resume must bring back, copied."""
    return {name: tensor.clone() for name, tensor in trainer.tensors().items()}


def stored(run: Path, like: Trainer) -> dict[str, torch.Tensor]:
    """The tensors of the newest checkpoint of a run."""
    tensors = {name: torch.full_like(tensor, float("nan")) for name, tensor in like.tensors().items()}
    latest = like.checkpoints.__class__(run, ALONE).latest()
    assert latest is not None
    like.checkpoints.load(tensors, latest)
    return tensors


def lines(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of one kind."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in read if line["kind"] == kind]


def measured(run: Path) -> list[dict[str, Any]]:
    """The lines of training in metrics.jsonl without what depends on the machine."""
    clocks = ("images_per_s", "memory_bytes", "mfu", "seconds")
    return [{name: value for name, value in line.items() if name not in clocks} for line in lines(run)]


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Every tensor equal bit for bit."""
    assert got.keys() == expected.keys()
    different = [name for name in got if not torch.equal(got[name], expected[name])]
    assert not different, f"{len(different)} of {len(got)} tensors differ: {different[:5]}"


def forked() -> multiprocessing.context.ForkServerContext:
    """Processes that start in milliseconds with everything imported, and share no threads with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastdiff.training.trainer"])
    return context


def train_in_process(
    config: TrainConfig, run: Path, rank: int = 0, world: int = 1, port: int = 0, after: After | None = None
) -> None:
    """The target of a process: one of `world` that train together."""
    if world > 1:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        values = (rank, rank, world, world, "127.0.0.1", port)
        os.environ.update(dict(zip(names, map(str, values), strict=True)))
    trainer = Trainer(config, run, resume="auto")
    trainer.train(after)
    trainer.close()


def die_once(config: TrainConfig, run: Path) -> int:
    """A process of torchrun, the second of which is killed in the first round."""

    def die(trainer: Trainer, batch: object, outcome: object) -> None:
        first_round = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first_round and trainer.ranks.rank == 1 and trainer.progress.images == 40:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer = Trainer(config, run, resume="auto")
    trainer.train(die)
    images = trainer.progress.images
    trainer.close()
    return images


def overflow_once(trainer: Trainer, batch: Batch, outcome: Outcome) -> None:
    """In the second step the shard of the second process alone overflows; each process writes what it did in steps."""
    scaler = trainer.step.scaler

    def overflow(optimizer: torch.optim.Optimizer) -> None:
        local(trainer.step.parameters[0].grad).fill_(float("inf"))
        del scaler.unscale_
        scaler.unscale_(optimizer)

    if (trainer.ranks.rank, trainer.progress.step) == (1, 1):
        scaler.unscale_ = overflow
    with (trainer.run / f"{trainer.ranks.rank}.jsonl").open("a") as file:
        file.write(json.dumps([outcome.taken, scaler.get_scale(), steps(trainer.optimizer)]) + "\n")


def train_together(
    config: TrainConfig, run: Path, world: int, wait: bool = True, after: After | None = None
) -> list[multiprocessing.process.BaseProcess]:
    """Train with this many processes, and wait for them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        forked().Process(target=train_in_process, args=(config, run, rank, world, port, after)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    if not wait:
        return processes
    for process in processes:
        process.join(600)  # each one starts in seconds, unless the machine is busy
    assert [process.exitcode for process in processes] == [0] * world
    return processes
