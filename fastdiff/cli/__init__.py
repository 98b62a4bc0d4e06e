"""The command line: sample | train | eval | plan | info | verify. Parses, calls the library, prints; holds no maths."""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fastdiff as fd
from fastdiff.cli.commands import add_command, add_table_options, read_options
from fastdiff.cli.evaluate import add_eval
from fastdiff.cli.sample import add_sample
from fastdiff.cli.spelling import refuse_unknown, spelt
from fastdiff.cli.train import add_train
from fastdiff.compiler import convergence
from fastdiff.compiler.solvers.from_file import load_file, load_module
from fastdiff.engine import machine, selfcheck, suite
from fastdiff.models.unet_nodes import cost
from fastdiff.models.unet_presets import PRESETS, config_of
from fastdiff.report import page

_FAILURES = (ValueError, TypeError, FloatingPointError, OSError, MemoryError, ImportError, fd.BackendUnavailable)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors and warnings are one line, without a traceback or the code."""
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:
        refuse_unknown(arguments.parser, unknown)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return int(arguments.run(arguments))
    except _FAILURES as error:
        print(f"fastdiff: error: {spelt(str(error), arguments.parser)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastdiff: interrupted; nothing was written", file=sys.stderr)
        return 130


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    if category is UserWarning:  # ours, and what is said to users like ours
        print(f"fastdiff: warning: {message}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastdiff", description=fd.__doc__)
    parser.add_argument("--version", action="version", version=f"fastdiff {fd.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    add_sample(commands)
    add_train(commands)
    add_eval(commands)
    _add_plan(commands)
    _add_info(commands)
    _add_verify(commands)
    return parser


def _add_plan(commands: Any) -> None:
    parser = add_command(
        commands, "plan", "print a sampler's table, its NFE and its checks", "fastdiff plan dpmpp_2m --steps 20"
    )
    parser.add_argument("solver", help=f"one of {', '.join(fd.solvers.names())}")
    add_table_options(parser)
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


def _plan(arguments: argparse.Namespace) -> int:
    plan = fd.plan(
        arguments.solver, arguments.schedule, arguments.steps, arguments.grid,
        grid_options=read_options(arguments.grid_option, "--grid-option"), **read_options(arguments.option),
    )  # fmt: skip
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
