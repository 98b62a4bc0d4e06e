"""fastdiff eval: samples of a model, and its errors by level, beside real pictures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastdiff as fd
from fastdiff.cli.commands import add_command
from fastdiff.files import check_writable_file, write_atomically
from fastdiff.models.shipped import SHIPPED, file_of
from fastdiff.models.weight_files import read_metadata
from fastdiff.training.config import TrainConfig
from fastdiff.training.data import Source, open_data
from fastdiff.training.data.pictures import RESIZE
from fastdiff.training.data.subset import Subset
from fastdiff.training.evaluation import evaluate

EXAMPLE = "fastdiff eval --model runs/mine --data my_pictures --samples 2000"


def add_eval(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "eval", "measure a model beside real pictures", EXAMPLE)
    parser.add_argument("--model", default="fashion", help="'fashion', the folder of a run or a .safetensors file")
    parser.add_argument("--data", help="training set; default: that of the run")
    parser.add_argument("--test", help="pictures not trained on; default: the set's test split, or every second one")
    parser.add_argument(
        "--resize", choices=RESIZE, help="how pictures come to the model's size; default: as in training"
    )
    parser.add_argument("--samples", type=int, default=10_000, help="equally many of each class (default 10000)")
    parser.add_argument("--features", default="auto", help="auto, fashion, pixels, or package.module:function")
    parser.add_argument("--solver", default="dpmpp_2m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--grid", default="karras")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first sample")
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--likelihood", type=int, default=500, help="pictures for errors by level and bits; 0: none")
    parser.add_argument("--fid", action="store_true", help="FID with Inception too; needs the package torch-fidelity")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write all numbers, those of each class too, to this file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    if arguments.samples < 1 or arguments.batch < 1 or arguments.likelihood < 0:
        raise ValueError("--samples and --batch must be at least 1, --likelihood at least 0")
    if arguments.json is not None:
        check_writable_file(arguments.json)
    model = fd.load(arguments.model, device=arguments.device)
    if arguments.guidance != 1.0 and model.null_label is None:
        raise ValueError(
            f"--guidance {arguments.guidance:g} has no effect: this model has no classes, or was trained without a "
            "null label, so it cannot be guided; leave it out"
        )
    train, test, resized, scale = _sets(arguments, model)
    plan = fd.plan(arguments.solver, model.schedule, arguments.steps, arguments.grid)
    if isinstance(plan, fd.AdaptivePlan):
        raise ValueError(f"eval draws with a fixed table, and {arguments.solver} makes its own steps; choose another")
    report = evaluate(
        model, plan, train, test, arguments.samples, arguments.features, arguments.guidance, arguments.seed,
        arguments.batch, arguments.likelihood, arguments.fid, progress=True,
        scale=scale,
    )  # fmt: skip
    seen = "; the model may have seen them, give --test others" if isinstance(test, Subset) else ""
    print(f"training  {train.describe()}\ntest      {test.describe()}{seen}\npictures  {resized}")
    print(f"samples   {arguments.solver}, {arguments.steps} steps on grid {plan.grid}, guidance {arguments.guidance:g}")
    print(report)
    if arguments.json is not None:
        text = json.dumps(report.to_dict(), indent=1)
        write_atomically(arguments.json, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))
    return 0


def _settings(arguments: argparse.Namespace) -> tuple[TrainConfig | None, str, str]:
    """The configuration of the model's run where there is one, how pictures come to its size, and who says so."""
    file = file_of(arguments.model)
    config = file.parent / "config.json"
    said = TrainConfig.load(config) if file.name.startswith("model") and config.is_file() else None
    if arguments.resize:
        return said, arguments.resize, "as asked for"
    if said:
        return said, said.resize, f"as {config} says"
    if any(file.samefile(file_of(name)) for name in SHIPPED):
        return None, "pad", "as the shipped model was trained"
    return None, "crop", "as runs are unless they say otherwise"


def _sets(arguments: argparse.Namespace, model: fd.Denoiser) -> tuple[Source, Source, str, float]:
    """The training and the test pictures at the model's size, how they came to it, and the scale of float values."""
    if model.shape is None:
        raise ValueError(f"model {arguments.model!r} does not say the shape of its samples; use the Python interface")
    said, resize, why = _settings(arguments)
    scale = float(read_metadata(file_of(arguments.model)).get("latent_scale", 1.0))
    data = arguments.data or (said.data if said else None)
    if not data:
        raise ValueError("--data is missing: name the folder or file the model was trained on")
    how: dict[str, Any] = {"size": model.shape[1], "resize": resize, "channels": model.shape[0]}
    how["classes"] = len(model.class_names) if model.class_names else 0
    resized = f"of {model.shape[1]}x{model.shape[2]} by resize={resize}, {why}"
    train = open_data(data, **how)
    if arguments.test:
        return train, open_data(arguments.test, **how), resized, scale
    try:
        test = open_data(data, **how, split="test")
    except (FileNotFoundError, ValueError):
        test = train
    if len(test) != len(train) or not torch.equal(test.fetch(np.arange(1))[0], train.fetch(np.arange(1))[0]):
        return train, test, resized, scale
    return Subset(train, np.arange(0, len(train), 2)), Subset(train, np.arange(1, len(train), 2)), resized, scale
