"""README's Python runs as it stands, and its commands exist."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff import cli

README = Path(__file__).resolve().parent.parent / "README.md"
NETWORKS = ("edm", "guided_diffusion", "score_sde", "flow_matching")  # a page in docs/ for each project


def blocks(language: str) -> list[tuple[int, str]]:
    """(line number, text) of every fenced block of one language ("" for commands)."""
    found, start, kind, lines = [], 0, None, []
    for number, line in enumerate(README.read_text().splitlines(), 1):
        if line.startswith("```") and kind is None:
            start, kind, lines = number, line[3:].strip(), []
        elif line.startswith("```"):
            found += [(start, "\n".join(lines))] if kind == language else []
            kind = None
        else:
            lines.append(line)
    return found


def commands() -> list[str]:
    written = [line.partition("#")[0].strip() for _, block in blocks("") for line in block.splitlines()]
    lines = [line.removeprefix("time ") for line in written]
    return [line for line in lines if line.startswith("fastdiff ")]


@pytest.mark.long
def test_python_blocks_run_in_order(tmp_path):
    page = [""] * len(README.read_text().splitlines())
    for start, text in blocks("python"):
        lines = text.splitlines()
        page[start : start + len(lines)] = lines  # at their own line numbers, so that a traceback points into README
    assert sum(bool(line) for line in page) > 30
    script = tmp_path / "README.py"
    script.write_text("\n".join(page))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "midpoint_2s, 19 model evaluations, grid karras: ok" in done.stdout


@pytest.mark.parametrize("name", NETWORKS)
def test_page_of_a_project(name):
    """Its Python runs as it stands, before and after differ by a few lines, and the tests it names are there."""
    page = (README.parent / "docs" / f"{name}.md").read_text()
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.S)), {})
    diffs = re.findall(r"```diff\n(.*?)```", page, re.S)
    assert diffs and all(diff.count("\n") <= 4 for diff in diffs)
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    named, files = re.findall(r"-k (\w+)", page), re.findall(r"tests/(test_\w+\.py)", page)
    assert named or files
    assert [words for words in named if not re.search(rf"def test_\w*{words}", tests)] == []
    assert [file for file in files if not Path(__file__).with_name(file).exists()] == []


FEATURES = re.findall(r"`(test_\w+\.py)::(test_\w+)`", README.read_text())


def test_every_feature_names_its_test():
    rows = [line for line in README.read_text().splitlines() if line.startswith("|") and "::test_" in line]
    assert len(rows) > 25 and len(FEATURES) >= len(rows)


@pytest.mark.parametrize(("file", "test"), FEATURES)
def test_the_test_of_a_feature_is_there(file, test):
    tree = ast.parse((Path(__file__).parent / file).read_text())
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_first_example_is_short():
    first = [line for line in blocks("python")[0][1].splitlines() if line.strip()]
    assert len(first) <= 10, f"README promises a short first example, it has {len(first)} lines"


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    arguments = cli._parser().parse_args(shlex.split(command)[1:])
    assert callable(arguments.run)


def test_commands_are_shown():
    shown = {command.split()[1] for command in commands()}
    assert {"sample", "plan", "info", "verify"} <= shown


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", README.with_name("Makefile").read_text(), re.M))
    named = set(re.findall(r"\bmake ([a-z]+)", README.read_text()))
    assert named <= targets


def test_files_named_exist():
    root = README.parent
    text = README.read_text()
    named = {
        *re.findall(r"`((?:bench|recipes|fastdiff|docs|\.ci)/[\w./]*)`", text),
        *re.findall(r"\]\(([\w./]+)\)", text),
    }
    made_later = {"bench/results.csv"}  # by the command beside it
    missing = [name for name in named - made_later if not (root / name).exists()]
    assert not missing


def test_table_has_its_place():
    text = README.read_text()
    assert text.count("<!-- bench:begin -->") == 1
    assert text.index("<!-- bench:begin -->") < text.index("<!-- bench:end -->")
