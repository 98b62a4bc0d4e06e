"""fastdiff train: a preset, changed by options, trained into a folder. Parses and prints; the trainer does the work."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import fastdiff as fd
from fastdiff.cli.commands import add_command
from fastdiff.training import presets
from fastdiff.training.config import TrainConfig, read_value
from fastdiff.training.heap import keep_heap
from fastdiff.training.networks import draws_latents, fill

EXAMPLE = """fastdiff train --preset cifar32 --data my_pictures --out runs/mine --images 2000000
  fastdiff sample --model runs/mine --out samples.png
from the weights of another model instead of random ones (a run's folder, a .safetensors file, a shipped model):
  fastdiff train --preset cifar32 --data others --out runs/tuned --init runs/mine --learning-rate 1e-4
a classifier of noised images, to guide runs/mine by (fd.models.classifier_guided):
  fastdiff train --preset cifar32 --data my_pictures --out runs/classifier --objective classifier \
    --objective-options prediction=edm --objective-options schedule=edm --objective-options times=lognormal
several GPUs of one machine, or of many (see torchrun --help):
  torchrun --nproc-per-node 8 -m fastdiff.cli train --preset imagenet64 --data shards --out runs/big --resume auto"""

_OWN = ("preset", "data")
_TABLES = ("network", "objective_options")


def add_train(commands: Any) -> None:
    """Add the command, with one option for each field of the configuration."""
    parser = add_command(commands, "train", "train a network on your own pictures, or go on with a run", EXAMPLE)
    parser.add_argument("--preset", required=True, help=f"where to start from: {', '.join(presets.names())}")
    parser.add_argument(
        "--data", default="", help="folder of pictures (subfolders are classes), IDX files or shards; a file"
    )
    parser.add_argument("--out", type=Path, help="folder of the run: checkpoints, model.safetensors, metrics.jsonl")
    parser.add_argument("--resume", default="", choices=("auto",), help="go on from the newest checkpoint in --out")
    parser.add_argument("--show", action="store_true", help="print the configuration, filled in from --data, only")
    group = parser.add_argument_group("configuration", "what the preset says unless given here; lengths are in images")
    hints = get_type_hints(TrainConfig)
    for entry in fields(TrainConfig):
        if entry.name in _OWN:
            continue
        table = entry.name in _TABLES
        group.add_argument(
            "--" + entry.name.replace("_", "-"),
            action="append" if table else "store",
            metavar="NAME=VALUE" if table else _metavar(hints[entry.name]),
            help=entry.metadata["help"].replace("%", "%%"),
        )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train; 0 at the end of the images and after an interruption that was saved."""
    config = read_config(arguments)
    if arguments.show:
        print((_filled(config) if config.data else config).to_json())
        return 0
    if arguments.out is None:
        raise ValueError("--out is missing: name the folder of the run, runs/mine for example")
    from fastdiff.training.trainer import Trainer  # torch.distributed, which takes a second to import

    trainer = Trainer(config, arguments.out, arguments.resume)
    if trainer.ranks.device.type == "cpu":
        keep_heap()
    if trainer.ranks.first:
        print("\n".join(trainer.describe()), flush=True)
    reason = trainer.train()
    images = trainer.progress.images
    trainer.close()
    if trainer.ranks.first and reason != "done":
        print(f"{reason}: stopped and saved after {images} images; go on with --resume auto", file=sys.stderr)
    elif trainer.ranks.first:
        print(f"done      {images:,} images; {_next(trainer.config, arguments.out)}")
    return 0


def read_config(arguments: argparse.Namespace) -> TrainConfig:
    """The preset with what was given on the command line. Raises: ValueError or TypeError naming the option."""
    changes: dict[str, Any] = {"data": arguments.data}
    for entry in fields(TrainConfig):
        given = None if entry.name in _OWN else getattr(arguments, entry.name)
        if given is not None:
            changes[entry.name] = (
                _table(entry.name, given) if isinstance(given, list) else read_value(entry.name, given)
            )
    if changes.get("objective") == "classifier":
        changes.setdefault("sample_images", 0)  # which presets have, and a classifier draws none
    return presets.get(arguments.preset).change(**changes)


def _filled(config: TrainConfig) -> TrainConfig:
    """The configuration that a run would begin with: channels, classes, their names and the scale are the data's."""
    from fastdiff.training.trainer import open_set

    given = fd.load(config.init) if config.init else None
    return fill(config, open_set(config), None if given is None else given.sigma_data)


def _next(config: TrainConfig, out: Path) -> str:
    """What is done with the weights of a run."""
    if config.objective == "classifier":
        return f"fd.models.classifier_guided(model, fd.models.load_noisy_classifier({str(out)!r}))"
    return f"fastdiff sample --model {out}{' --out drawn.npy' * draws_latents(config)}"


def _table(name: str, pairs: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ValueError(f"--{name.replace('_', '-')} must be NAME=VALUE, got {pair!r}")
        found[key] = read_value(name, value)
    return found


def _metavar(hint: Any) -> str:
    if hint is bool:
        return "true|false"
    return "TEXT" if hint is str else "VALUE" if "tuple" in str(hint) else "NUMBER"
