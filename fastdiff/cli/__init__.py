"""The command line: sample | train | eval | plan | info | verify. Parses, calls the library, prints; holds no maths."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import fastdiff as fd
from fastdiff import images
from fastdiff.cli.commands import add_command
from fastdiff.cli.evaluate import add_eval
from fastdiff.cli.train import add_train
from fastdiff.compiler import convergence
from fastdiff.compiler.solvers.from_file import load_file, load_module
from fastdiff.engine import machine, selfcheck, suite
from fastdiff.models.unet_nodes import cost
from fastdiff.models.unet_presets import PRESETS, config_of
from fastdiff.report import page

_FAILURES = (ValueError, TypeError, FloatingPointError, OSError, MemoryError, ImportError, fd.BackendUnavailable)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors are one line, not a traceback."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except _FAILURES as error:
        print(f"fastdiff: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastdiff: interrupted; nothing was written", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastdiff", description=fd.__doc__)
    parser.add_argument("--version", action="version", version=f"fastdiff {fd.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_sample(commands)
    add_train(commands)
    add_eval(commands)
    _add_plan(commands)
    _add_info(commands)
    _add_verify(commands)
    return parser


def _add_table_options(parser: argparse.ArgumentParser, steps: int) -> None:
    parser.add_argument("--steps", type=int, default=steps, help=f"levels of the grid (default {steps})")
    parser.add_argument("--grid", default="karras", help=f"one of {', '.join(fd.grids.names())} (default karras)")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the solver, e.g. eta=0.5"
    )


def _add_sample(commands: Any) -> None:
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
    _add_table_options(parser, 20)
    parser.add_argument(
        "--guidance", type=float, default=1.5, help="classifier-free guidance scale; 1 is off (default 1.5)"
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
    parser.set_defaults(run=_sample)


def _add_plan(commands: Any) -> None:
    parser = add_command(
        commands, "plan", "print a sampler's table, its NFE and its checks", "fastdiff plan dpmpp_2m --steps 20"
    )
    parser.add_argument("solver", help=f"one of {', '.join(fd.solvers.names())}")
    _add_table_options(parser, 20)
    parser.add_argument("--schedule", default="linear", help=f"one of {', '.join(_plain_schedules())} (default linear)")
    parser.add_argument("--json", action="store_true", help="print the table as JSON instead")
    parser.set_defaults(run=_plan)


def _plain_schedules() -> list[str]:
    needs_data = ("from_betas", "from_alpha_bar", "rescale_zero_terminal_snr", "time_shared")
    return [name for name in fd.schedules.names() if name not in needs_data]


def _add_verify(commands: Any) -> None:
    parser = add_command(
        commands,
        "verify",
        "check tables, noise and executors on this machine, or measure samplers",
        "fastdiff verify --solver my_solver.py",
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--solver",
        metavar="NAME",
        help="laws, order, bias, cost and suite of a sampler: its name, or a file or package.module[:name] of yours",
    )
    chosen.add_argument("--all", action="store_true", help="write the table and the plot of all samplers")
    parser.add_argument("--out", type=Path, help="with --all: a .md file, the plot goes beside it (default solvers.md)")
    parser.set_defaults(run=_verify)


def _add_info(commands: Any) -> None:
    parser = add_command(
        commands,
        "info",
        "version, machine, and each backend: ok, or why not; or what a UNet costs",
        "fastdiff info --unet ddpm-cifar10 --batch 1",
    )
    parser.add_argument(
        "--unet", metavar="NAME", help=f"one of {', '.join(PRESETS)}, a config.json or a .safetensors file"
    )
    parser.add_argument("--batch", type=int, default=1, help="images in a forward pass (default 1)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.set_defaults(run=_info)


def _sample(arguments: argparse.Namespace) -> int:
    if arguments.count < 1 or arguments.batch < 1:
        raise ValueError(f"--count and --batch must be >= 1, got {arguments.count} and {arguments.batch}")
    images.check_writable(arguments.out)
    model = fd.load(arguments.model, device=_device(arguments.device))
    if model.shape is None:
        raise ValueError(f"model {arguments.model!r} does not say the shape of its samples; use the Python interface")
    labels = [label for label in _labels(arguments.classes, model) for _ in range(arguments.count)]
    plan = fd.plan(arguments.solver, model.schedule, arguments.steps, arguments.grid, **_options(arguments.option))
    sampler = fd.Sampler(plan, model, arguments.backend, memory_format=torch.channels_last)
    batches = [range(i, min(i + arguments.batch, len(labels))) for i in range(0, len(labels), arguments.batch)]
    drawn, nfe, seconds, model_seconds = [], 0, 0.0, 0.0
    for batch in tqdm(batches, disable=len(batches) == 1, desc="batches"):
        x = sampler.sample(
            (len(batch), *model.shape),
            seed=[arguments.seed + i for i in batch],
            progress=len(batches) == 1,
            **_conditions(model, [labels[i] for i in batch], arguments.guidance),
        )
        drawn.append(images.to_pixels(x))
        assert sampler.last_run is not None
        nfe = max(nfe, sampler.last_run.nfe)
        seconds += sampler.last_run.seconds
        model_seconds += sampler.last_run.model_seconds or 0.0
    names = [model.class_names[label] if label is not None else "" for label in labels]
    images.save(arguments.out, np.concatenate(drawn), names, columns=arguments.count)
    _report(arguments, sampler, nfe, len(labels), seconds, model_seconds)
    return 0


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
    print(f"sampler   {plan.solver}, {'its own steps' if adaptive else f'{arguments.steps} steps on grid {plan.grid}'}")
    print(
        f"NFE       {'at most ' if adaptive else ''}{nfe} per sample"
        + (f", each of two branches with guidance {arguments.guidance}" if guided else "")
    )
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


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise ValueError(f"--option must be NAME=VALUE, got {pair!r}")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def _plan(arguments: argparse.Namespace) -> int:
    plan = fd.plan(arguments.solver, arguments.schedule, arguments.steps, arguments.grid, **_options(arguments.option))
    if arguments.json:
        print(plan.to_json())
        return 0
    print(plan.explain())
    report = plan.verify()
    print(f"\n{report}")
    return 0 if report.ok else 1


def _info(arguments: argparse.Namespace) -> int:
    if arguments.unet is None:
        print(machine.describe())
        return 0
    config = config_of(arguments.unet)
    print(f"{arguments.unet}, batch {arguments.batch}, {arguments.dtype}: kernels of one forward pass, bytes it moves")
    for name, fast in (("fast", True), ("plain", False)):
        found = cost(config, arguments.batch, getattr(torch, arguments.dtype), fast=fast)
        parts = ", ".join(f"{count} {kernel}" for kernel, count in found.kernels.most_common())
        print(f"{name:<6} {found.nodes:>5} kernels  {found.bytes / 1e6:>9,.1f} MB  {parts}")
        for block, reason in found.fallbacks.items():
            print(f"       {block} runs as it is: it {reason}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.out is not None and not arguments.all:
        raise ValueError("--out goes with --all: only the table of all samplers is written to a file")
    if arguments.solver is not None:
        return _verify_solver(arguments.solver)
    if arguments.all:
        return _verify_all(arguments.out or Path("solvers.md"))
    failed = 0
    for check in selfcheck.run():
        print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.sentence}")
        failed += not check.ok
    print(f"{failed} failed" if failed else "all checks passed")
    return 1 if failed else 0


def _verify_solver(given: str) -> int:
    names, ok = _solver_names(given), True
    for i, name in enumerate(names):
        measured = _measure(name)
        print("\n" * (i > 0) + str(measured))
        ok = ok and measured.ok
        if fd.solvers.get(name).adaptive:
            continue  # the suite is of tables
        outcomes = {trial: trial.run() for trial in suite.trials(name)}
        print(suite.summary(outcomes))
        ok = ok and all(outcome.ok for outcome in outcomes.values())
    return 0 if ok else 1


def _solver_names(given: str) -> list[str]:
    """The sampler of this name, or those of a file or module that registers them."""
    if given in fd.solvers.names():
        return [given]
    if given.endswith(".py") or Path(given).name != given or Path(given).is_file():
        return load_file(Path(given))
    return load_module(given) if "." in given or ":" in given else [given]


def _measure(name: str) -> page.AnyMeasurement:
    """`convergence.measure`, with whatever the solver's own code raises as one line."""
    try:
        return convergence.measure(name)
    except _FAILURES:
        raise
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"solver {name!r} failed at {where.filename}:{where.lineno}: {reason}") from error


def _verify_all(out: Path) -> int:
    page.check_writable(out)
    measured = page.measure_all(tqdm(fd.solvers.names(), desc="samplers", disable=None))
    picture = page.write(out, measured)
    failed = [m.solver.name for m in measured if not m.ok]
    print(f"wrote {out} and {picture}: {len(measured)} samplers")
    print(f"{len(failed)} failed: {', '.join(failed)}" if failed else "all keep their laws and their declared order")
    return 1 if failed else 0
