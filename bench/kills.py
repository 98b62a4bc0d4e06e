"""Kills a training run many times at random moments, saves included, and holds the result against an undisturbed run.

    python bench/kills.py --times 50

A tiny network on random pictures, a checkpoint after every third batch. Each round starts the run with --resume auto
in a process of its own and kills it (SIGKILL) at a random moment, every other time while a checkpoint is being written.
A round must begin at the newest checkpoint of the round before, and the end and all lines of the log must be the
undisturbed run's bit for bit. The suite does three rounds of this: tests/test_train_together.py.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from tiny_runs import forked, measured, stored, tiny, train_in_process, weights, write_data  # noqa: E402

from fastdiff.training.trainer import Trainer  # noqa: E402


def main() -> int:
    """Print each round; 1 if a checkpoint was lost or the end differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = tiny(write_data(folder), save_images=24, images=24 * 40 * max(1, options.times), log_images=40)
        reached, lost, saves = 0, 0, 0
        for i in range(options.times):
            during = kill_once(config, folder / "run", rng, saving=i % 2 == 1)
            newest = newest_checkpoint(folder / "run")
            saves += during
            lost += newest < reached
            print(f"kill {i + 1}: newest checkpoint {newest} images{', during a save' * during}", flush=True)
            reached = newest
        end = config.change(images=reached + 240)
        resumed = Trainer(end, folder / "run", resume="auto")
        begun = resumed.progress.images
        resumed.train()
        # The rate's schedule knows the end of a run, so that the undisturbed run has the killed ones' in its config.
        whole = Trainer(config, folder / "whole")
        whole.train(stop_at(reached))
        Trainer(end, folder / "whole", resume="auto").train()
        ours, theirs = stored(folder / "run", resumed), stored(folder / "whole", resumed)
        logs = measured(folder / "run") == measured(folder / "whole")
    same = all(torch.equal(ours[key], theirs[key]) for key in weights(resumed)) and logs
    print(f"{options.times} kills, {saves} of them during a save; {lost} checkpoints lost; went on from {begun}")
    print("the end is the undisturbed run's bit for bit" if same else "the end DIFFERS from the undisturbed run's")
    return 0 if same and not lost and begun == reached else 1


def kill_once(config: object, run: Path, rng: random.Random, saving: bool) -> bool:
    """Start the run, kill it, and say whether a checkpoint was being written."""
    before = newest_checkpoint(run)
    process = forked().Process(target=train_in_process, args=(config, run))
    process.start()
    while process.is_alive() and newest_checkpoint(run) == before and not saving:
        time.sleep(0.001)
    moment = time.monotonic() + rng.uniform(0.0, 0.5)
    while process.is_alive() and time.monotonic() < moment:
        time.sleep(0.001)
    while process.is_alive() and saving and not writing(run):
        pass
    during = writing(run)
    process.kill()
    process.join()
    return during


def newest_checkpoint(run: Path) -> int:
    """Images of the newest whole checkpoint; 0 without one."""
    return max((int(path.name) for path in (run / "checkpoints").glob("[0-9]*")), default=0)


def writing(run: Path) -> bool:
    """Whether a checkpoint has its temporary name now."""
    return any(path.name[1:].isdecimal() for path in (run / "checkpoints").glob(".*"))


def stop_at(images: int) -> Callable[[Trainer, object, object], None]:
    """A callback of the trainer that ends it there, as Ctrl-C would."""

    def check(trainer: Trainer, batch: object, outcome: object) -> None:
        if trainer.progress.images == images:
            os.kill(os.getpid(), signal.SIGTERM)

    return check


if __name__ == "__main__":
    sys.exit(main())
