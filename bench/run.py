"""Benchmarks: `python bench/run.py NAME`, each with --help; `table` writes README from what they measured."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results.csv"
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bench import brownian, loop, measure, norm, ops, pipelines, stream, table, train, train_ops, unet  # noqa: E402

EPILOG = """examples:
  python bench/run.py ops --threads 2       the step alone; appends to bench/results.csv
  python bench/run.py brownian --threads 2  noise on a path; needs torchsde and k-diffusion
  python bench/run.py loop --threads 2      whole runs, network included
  python bench/run.py pipelines --threads 2 diffusers' pipelines before and after accelerate; needs transformers
  python bench/run.py stream --threads 2    requests of many plans: one running batch, batches, one by one
  python bench/run.py train --threads 2     whole training steps; needs diffusers
  python bench/run.py train-ops --threads 2 noising and loss of a training step
  python bench/run.py norm --threads 2      group normalisation on the UNets' shapes
  python bench/run.py unet --threads 2      a UNet's forward pass against diffusers'
  python bench/run.py table                 README's tables from bench/results.csv"""


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark; 1 when a result was wrong or could not be written, else 0."""
    options = _parser().parse_args(arguments)
    if options.command == "table":
        return table.update(options.csv, options.readme)
    device = torch.device(options.device if options.device != "auto" else _best_device())
    torch.set_num_threads(options.threads)
    if not (options.quick or options.force):
        measure.settle(measure.load_limit(device))
    facts = measure.machine(device, options.threads)
    print(table.heading(facts))
    benches = {
        "ops": ops, "brownian": brownian, "loop": loop, "pipelines": pipelines, "train-ops": train_ops, "norm": norm,
        "unet": unet, "stream": stream, "train": train,
    }  # fmt: skip
    with torch.set_grad_enabled(options.command in ("train", "train-ops")):
        return _record(benches[options.command].run(device, options.quick), facts, options)


def _record(lines: Iterator[dict[str, Any]], facts: dict[str, Any], options: argparse.Namespace) -> int:
    """Print every line as it comes and append the trustworthy ones to the results."""
    show, limit = table.LINES[options.command], measure.load_limit(torch.device(facts["device"]))
    print(show(None))
    kept, wrong, busy = [], 0, 0
    for line in lines:
        disturbed = facts["load"] > limit or line.get("others", 0.0) > measure.BUSY_OTHERS
        print(show(line) + (f"  busy: others took {line.get('others', 0.0):.0%}" if disturbed else ""), flush=True)
        wrong += line.get("gate") == "red"
        busy += disturbed
        if line.get("gate") != "red" and (options.force or not disturbed):
            kept.append(facts | line)
    if options.quick:
        print("quick: nothing recorded")
    elif kept:
        table.append(options.csv, kept)
        print(f"{len(kept)} lines appended to {options.csv}")
    if busy and not options.force:
        print(
            f"{busy} lines not recorded: load average {facts['load']} (at most {limit:g}) or other processes "
            f"above {measure.BUSY_OTHERS:.0%} of the processors. Stop them and run again, or add --force."
        )
    return 1 if wrong else 0


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (
        ("ops", "the step alone: the fused row against diffusers and the same row under torch.compile"),
        ("brownian", "a step with Brownian noise against k-diffusion's, and the noise alone"),
        ("loop", "end to end: our loop against diffusers' scheduler around the same network"),
        ("pipelines", "diffusers' pipelines with tiny components, before and after accelerate"),
        ("stream", "requests of many plans in one running batch, in batches of equal plans, and one by one"),
        ("train", "a whole training step against diffusers' training example's"),
        (
            "train-ops",
            "noising and loss of a training step, forward and backward, against diffusers' add_noise and mse",
        ),
        ("norm", "group normalisation with SiLU on every shape of the UNets, against torch and what it compiles to"),
        ("unet", "a UNet's forward pass: the fast form against the plain one and diffusers', eager and compiled"),
    ):
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
        command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
        command.add_argument("--quick", action="store_true", help="one tiny case in seconds; records nothing")
        command.add_argument("--force", action="store_true", help="record even when the machine is busy")
        command.add_argument("--csv", type=Path, default=RESULTS, help="where lines are appended")
    command = commands.add_parser("table", help="write README's tables from the results")
    command.add_argument("--csv", type=Path, default=RESULTS)
    command.add_argument("--readme", type=Path, default=ROOT / "README.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
