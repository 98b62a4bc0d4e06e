"""How every command's parser is made: a summary, an example in its help, and the options that several have."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import fastdiff as fd
from fastdiff.compiler.build import STEPS


def add_command(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """The parser of one command, added to what `add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(parser=parser)
    return parser


def add_table_options(parser: argparse.ArgumentParser) -> None:
    """The options of a plan: --steps, --grid, --grid-option and --option."""
    parser.add_argument("--steps", type=int, help=f"levels of the grid (default {STEPS})")
    parser.add_argument("--grid", default="karras", help=f"one of {', '.join(fd.grids.names())} (default karras)")
    parser.add_argument(
        "--grid-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the grid, e.g. rho=5; gits needs cache=FILE, custom levels=[10,3,1]",
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the solver, e.g. eta=0.5"
    )


def read_options(pairs: Sequence[str], given: str = "--option") -> dict[str, Any]:
    """NAME=VALUE, each value JSON where it is JSON, else text. given: where they were, for the error."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise ValueError(f"{given} must be NAME=VALUE, got {pair!r}")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options
