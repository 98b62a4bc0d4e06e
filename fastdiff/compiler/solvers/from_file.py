"""Solvers of a user's own Python file. May import: registry."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from fastdiff.compiler.solvers import registry


def load_file(path: Path) -> list[str]:
    """Run a Python file that registers solvers with `@fd.solver`; the names it registered, sorted.

    Modules beside the file can be imported by it, as when it is run as a script. Raises FileNotFoundError where there
    is no file and ValueError, in one line, where it cannot be imported or registers nothing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no solver file {path}; give the path of a Python file, or a registered name")
    name = f"_user_solver_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file; give a file that ends in .py")
    before = set(registry.names())
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split()) or "no message"
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {reason}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
        del sys.modules[name]
    found = [n for n in registry.names() if n not in before or registry.get(n).function.__module__ == name]
    if not found:
        raise ValueError(f'{path} registers no solver; decorate one with @fd.solver("name", order=...)')
    return found
