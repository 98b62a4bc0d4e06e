"""fastdiff sample: pictures of a model, from its classes, a picture to start from, and a solver."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import fastdiff as fd
from fastdiff import images
from fastdiff.cli.commands import add_command, add_table_options, read_options
from fastdiff.engine.guidance import Reduction, Rule
from fastdiff.errors import unknown_name
from fastdiff.models.shipped import file_of
from fastdiff.models.weight_files import read_metadata

RULES: dict[str, type[Rule]] = {
    "rescale": fd.guidance.Rescale,
    "apg": fd.guidance.APG,
    "cfg_zero": fd.guidance.CFGZero,
}
STRENGTH = 0.6
GUIDANCE = 1.5


def add_sample(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "sample",
        "draw pictures with the shipped network, or with a run of fastdiff train",
        "fastdiff sample --solver dpmpp_2m --steps 20 --class Sneaker --class Bag --count 8 --out samples.png",
    )
    parser.add_argument(
        "--model", default="fashion", help="'fashion', the folder of a run or a .safetensors file (default fashion)"
    )
    parser.add_argument("--solver", default="dpmpp_2m", help=f"one of {', '.join(fd.solvers.names())}")
    add_table_options(parser)
    parser.add_argument(
        "--guidance",
        type=float,
        help=f"classifier-free guidance scale; 1 is off (default {GUIDANCE:g}, without classes: 1)",
    )
    parser.add_argument(
        "--rule", metavar="NAME[,OPTION=VALUE]", help=f"{', '.join(RULES)}; what guidance does, e.g. rescale,phi=0.5"
    )
    parser.add_argument(
        "--noise", choices=("white", "brownian"), default="white", help="of samplers that draw it (default white)"
    )
    parser.add_argument("--init", type=Path, help="a picture of the model's size to start every sample from")
    parser.add_argument(
        "--strength",
        type=float,
        help=f"with --init: how far up the noise it starts, above 0 and below 1 (default {STRENGTH})",
    )
    parser.add_argument(
        "--class",
        dest="classes",
        action="append",
        metavar="CLASS",
        help="a class name or index, repeatable (default: all)",
    )
    parser.add_argument("--count", type=int, default=8, help="samples per class (default 8)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first sample; sample i has seed + i (default 0)"
    )
    parser.add_argument("--batch", type=int, default=128, help="samples per network call (default 128)")
    parser.add_argument("--backend", default="auto", help="auto, reference, cpp, triton or cuda")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="a .png grid, a .npy array, or a folder")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Draw, write and report."""
    if arguments.count < 1 or arguments.batch < 1:
        raise ValueError(f"--count and --batch must be >= 1, got {arguments.count} and {arguments.batch}")
    images.check_writable(arguments.out)
    model = fd.load(arguments.model, device=_device(arguments.device))
    scale = _latent_scale(arguments)
    if model.shape is None:
        raise ValueError(f"model {arguments.model!r} does not say the shape of its samples; use the Python interface")
    _settle_guidance(arguments, model)
    labels = [label for label in _labels(arguments.classes, model) for _ in range(arguments.count)]
    init, rule = _start(arguments, model.shape), _rule(arguments.rule)
    _check_rule_acts(arguments, model, rule)
    plan = fd.plan(
        arguments.solver, model.schedule, arguments.steps, arguments.grid, strength=arguments.strength,
        grid_options=read_options(arguments.grid_option, "--grid-option"), **read_options(arguments.option),
    )  # fmt: skip
    sampler = fd.Sampler(plan, model, arguments.backend, memory_format=torch.channels_last)
    batches = [range(i, min(i + arguments.batch, len(labels))) for i in range(0, len(labels), arguments.batch)]
    drawn, nfe, seconds, model_seconds = [], 0, 0.0, 0.0
    for batch in tqdm(batches, disable=len(batches) == 1, desc="batches"):
        x = sampler.sample(
            (len(batch), *model.shape),
            seed=[arguments.seed + i for i in batch],
            init=None if init is None else init.expand(len(batch), *init.shape),
            noise=arguments.noise,
            opening="image",
            rule=rule,
            progress=len(batches) == 1,
            **_conditions(model, [labels[i] for i in batch], arguments.guidance),
        )
        drawn.append(images.to_pixels(x) if scale is None else (x.float() / scale).cpu().numpy())
        assert sampler.last_run is not None
        nfe = max(nfe, sampler.last_run.nfe)
        seconds += sampler.last_run.seconds
        model_seconds += sampler.last_run.model_seconds or 0.0
    names = [model.class_names[label] if label is not None else "" for label in labels]
    if scale is None:
        images.save(arguments.out, np.concatenate(drawn), names, columns=arguments.count)
    else:
        images.save_array(arguments.out, np.concatenate(drawn))
    _report(arguments, sampler, nfe, len(labels), seconds, model_seconds)
    return 0


def _latent_scale(arguments: argparse.Namespace) -> float | None:
    """What the latents of the model's training set were multiplied by; None of a model that draws pictures."""
    said = read_metadata(file_of(arguments.model)).get("latent_scale")
    if said is None:
        return None
    if arguments.out.suffix != ".npy" or arguments.init is not None:
        raise ValueError(
            "this model draws latents, not pictures: give --out drawn.npy, and no --init. They are float32 "
            "[batch, channels, height, width] in the units of its training set, for the decoder of that set"
        )
    return float(said)


def _start(arguments: argparse.Namespace, shape: tuple[int, ...]) -> Tensor | None:
    """The picture of --init, and --strength filled in."""
    if arguments.init is None:
        if arguments.strength is not None:
            raise ValueError("--strength needs --init, the picture to start from")
        arguments.strength = 1.0
        return None
    if arguments.strength is None:
        arguments.strength = STRENGTH
    if not 0.0 < arguments.strength < 1.0:
        raise ValueError(
            f"--strength must be above 0 and below 1, where nothing of --init would be left, got {arguments.strength:g}"
        )
    return images.read(arguments.init, shape)


def _rule(given: str | None) -> Rule | None:
    """NAME or NAME,OPTION=VALUE,... as the rule of fd.guidance."""
    if given is None:
        return None
    name, *pairs = given.split(",")
    if name not in RULES:
        raise unknown_name("rule", name, RULES)
    options, known = read_options(pairs, f"options of --rule {name}"), [entry.name for entry in fields(RULES[name])]
    for option in options:
        if option not in known:
            raise unknown_name(f"option of rule {name!r}", option, known)
    return RULES[name](**options)


def _settle_guidance(arguments: argparse.Namespace, model: fd.Denoiser) -> None:
    """The usual --guidance where none is given, and ValueError for one on a model without classes to guide by."""
    if arguments.guidance is None:
        arguments.guidance = GUIDANCE if model.class_names and model.null_label is not None else 1.0
    elif arguments.guidance != 1.0 and not model.class_names:
        raise ValueError(
            f"--guidance {arguments.guidance:g} has no effect: this model has no classes to guide by; leave it out"
        )


def _check_rule_acts(arguments: argparse.Namespace, model: fd.Denoiser, rule: Rule | None) -> None:
    """ValueError for a rule that changes what guidance does, and nothing else, where nothing is guided."""
    if rule is None or Reduction(rule).muted:
        return
    if not model.class_names:
        raise ValueError(
            f"--rule {arguments.rule} changes what guidance does, and this model has no classes to guide by: leave "
            "--rule out"
        )
    if arguments.guidance == 1.0:
        raise ValueError(
            f"--rule {arguments.rule} changes what guidance does, and --guidance 1 is off: give another --guidance, or "
            "leave --rule out"
        )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; use cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not here: torch sees {torch.cuda.device_count()} CUDA devices; use cpu")
    return device


def _report(
    arguments: argparse.Namespace, sampler: fd.Sampler, nfe: int, count: int, seconds: float, model_seconds: float
) -> None:
    guided = sampler.model.null_label is not None and arguments.guidance != 1.0
    plan = sampler.plan
    adaptive = isinstance(plan, fd.AdaptivePlan)
    start = f", from {arguments.init} at strength {arguments.strength:g}" if arguments.init else ""
    steps = "its own steps" if adaptive else f"{len(plan.levels) - 1} steps on grid {plan.grid}"
    print(f"sampler   {plan.solver}, {steps}{start}")
    asked = [f"each of two branches with guidance {arguments.guidance}"] if guided else []
    asked += [f"rule {arguments.rule}"] if arguments.rule else []
    print(f"NFE       {'at most ' if adaptive else ''}{nfe} per sample{', ' if asked else ''}{' and '.join(asked)}")
    print(f"samples   {count} in {seconds:.2f} s: {count / seconds:.1f} images/s")
    if model_seconds:
        print(f"time      {model_seconds:.3f} s in the model, {seconds - model_seconds:.3f} s in everything else")
    print(f"backend   {sampler.backend} on {sampler.model.device}")
    print(f"seeds     {arguments.seed} .. {arguments.seed + count - 1}")
    print(f"wrote     {arguments.out}")


def _labels(given: list[str] | None, model: fd.Denoiser) -> list[int | None]:
    if not model.class_names:
        if given:
            raise ValueError("this model has no classes; leave --class out")
        return [None]
    if not given:
        return list(range(len(model.class_names)))
    by_name = {name.lower(): i for i, name in enumerate(model.class_names)}
    labels: list[int | None] = []
    for name in given:
        index = int(name) if name.isdecimal() else by_name.get(name.lower(), -1)
        if not 0 <= index < len(model.class_names):
            known = ", ".join(f"{i} {n}" for i, n in enumerate(model.class_names))
            raise ValueError(f"unknown class {name!r}; classes: {known}")
        labels.append(index)
    return labels


def _conditions(model: fd.Denoiser, labels: list[int | None], guidance: float) -> dict[str, Any]:
    if labels[0] is None:
        return {}
    cond = {"class_labels": torch.tensor(labels)}
    if guidance == 1.0:
        return {"cond": cond}
    if model.null_label is None:
        raise ValueError("this model was trained without a null label, so it cannot be guided; use --guidance 1")
    return {
        "cond": cond,
        "uncond": {"class_labels": torch.full((len(labels),), model.null_label)},
        "guidance": guidance,
    }
