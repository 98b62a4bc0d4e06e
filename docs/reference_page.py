"""Writes docs/reference.md: every public name of the package, its signature and what its docstring says.

python docs/reference_page.py            # write docs/reference.md
python docs/reference_page.py --print    # print it instead
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fastdiff as fd

TARGET = Path(__file__).with_name("reference.md")
# What is imported from a module of its own, not from `fastdiff`.
MODULES = (
    "integrations.diffusers",
    "integrations.k_diffusion",
    "integrations.edm",
    "integrations.guided_diffusion",
    "integrations.score_sde",
    "integrations.flow_matching",
    "training.presets",
    "training.config",
    "training.trainer",
    "training.objectives",
)
OPENING = """# Reference

Every public name, its signature and its docstring, as `help()` shows them. Made by `python docs/reference_page.py`.
What each sampler is, its order and its options: [solvers](solvers.md), `fastdiff verify --solver NAME`.
"""


def page() -> str:
    """The whole page."""
    own = [(f"fd.{name}", getattr(fd, name)) for name in fd.__all__]
    modules = [(name, value) for name, value in own if inspect.ismodule(value)]
    modules += [(f"fastdiff.{name}", importlib.import_module(f"fastdiff.{name}")) for name in MODULES]
    parts = [OPENING, "## `import fastdiff as fd`\n"]
    seen: dict[int, str] = {}
    for name, value in own:
        if not inspect.ismodule(value):
            parts += entry(name, value, seen)
    for name, module in modules:
        parts.append(f"## `{name}`\n")
        parts += text(module)
        for item, value in public(module):
            parts += entry(f"{name}.{item}", value, seen)
    return "\n".join(parts).rstrip() + "\n"


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Functions and classes that the module offers: its __all__, else those it defines."""
    offered = getattr(module, "__all__", None)
    for name in sorted(offered or vars(module)):
        value = getattr(module, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            own = (value.__module__ or "").startswith("fastdiff") if offered else value.__module__ == module.__name__
            if own and not name.startswith("_"):
                yield name, value


def entry(name: str, value: Any, seen: dict[int, str]) -> list[str]:
    """A function, or a class with its public methods; of a second name only which the first is."""
    if id(value) in seen:
        return [f"### `{name}`\n", f"The same as `{seen[id(value)]}`.\n"]
    seen[id(value)] = name
    parts = [f"### `{name}`\n", *call(name, value), *text(value)]
    if not inspect.isclass(value):
        return parts
    for item, method in vars(value).items():
        called = method.__func__ if isinstance(method, staticmethod | classmethod) else method
        known = inspect.isfunction(called) or isinstance(called, property)
        if item.startswith("_") or not known or not called.__doc__:
            continue
        title = f"{value.__name__}.{item}"
        parts += [f"#### `{title}`\n", *([] if isinstance(called, property) else call(title, called)), *text(called)]
    return parts


class Written:
    """An annotation or a default that is shown as this text."""

    def __init__(self, shown: str) -> None:
        self.shown = shown

    def __repr__(self) -> str:
        return self.shown


def call(name: str, value: Any) -> list[str]:
    """How it is called: annotations as they are written, and a default that has no text of its own as dots."""
    if inspect.isclass(value) and issubclass(value, Exception):
        return []
    found = inspect.signature(value)
    parameters = []
    for parameter in found.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        annotation, default = parameter.annotation, parameter.default
        if isinstance(annotation, str):
            annotation = Written(annotation)
        if default is not parameter.empty and (" object at 0x" in repr(default) or repr(default) == "<factory>"):
            default = Written("...")
        parameters.append(parameter.replace(annotation=annotation, default=default))
    returns = found.return_annotation
    if isinstance(returns, str):
        returns = Written(returns) if returns != "None" else found.empty
    line = name + str(found.replace(parameters=parameters, return_annotation=returns))
    return ["```python\n" + "\n".join(textwrap.wrap(line, 116, subsequent_indent="    ")) + "\n```\n"]


def text(value: Any) -> list[str]:
    """The docstring as it stands: its equations are laid out by their indentation."""
    written = inspect.cleandoc(value.__doc__ or "").strip()
    return [f"```text\n{written}\n```\n"] if written else []


def main() -> None:
    """Write the page, or print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print the page instead of writing it")
    if parser.parse_args().print:
        print(page(), end="")
        return
    TARGET.write_text(page())
    print(f"{TARGET}: {len(TARGET.read_text().splitlines())} lines")


if __name__ == "__main__":
    main()
