"""docs/reference.md is what the package says of itself now."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import fastdiff as fd


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The script that writes the page."""
    path = Path(__file__).resolve().parent.parent / "docs" / "reference_page.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(reference: ModuleType) -> None:
    page = reference.page()
    assert reference.TARGET.read_text() == page, "docs/reference.md is old: run python docs/reference_page.py"
    assert " at 0x" not in page and "<factory>" not in page


def test_every_public_name_is_on_it_with_its_docstring(reference: ModuleType) -> None:
    page = reference.page()
    names = [f"fd.{name}" for name in fd.__all__]
    for name in fd.__all__:
        value = getattr(fd, name)
        if inspect.ismodule(value):
            names += [f"fd.{name}.{item}" for item, _ in reference.public(value)]
    for name in names:
        heading = f"`{name}`\n"
        assert heading in page, name
        after = page.split(heading, 1)[1].split("\n#", 1)[0]
        assert "```text\n" in after or "The same as" in after, f"{name} has no docstring"
