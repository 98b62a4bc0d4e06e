"""Solvers of a user's own Python file or package. May import: registry."""

from __future__ import annotations

import importlib
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
        raise _not_importable(str(path), error) from error
    finally:
        sys.path.remove(str(path.resolve().parent))
        del sys.modules[name]
    return _registered(str(path), name, before)


def load_module(given: str) -> list[str]:
    """Import `package.module`, whose solvers are meant, or `package.module:name`, that one; the names, sorted.

    The folder of the process is searched last, so that a package under development need not be installed. Raises
    ValueError, in one line, where it cannot be imported or does not register what was asked for.
    """
    name, _, wanted = given.partition(":")
    before = set(registry.names())
    sys.path.append("")
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise _not_importable(f"module {name!r}", error) from error
    finally:
        sys.path.remove("")
    found = _registered(f"module {name!r}", name, before)
    if wanted and wanted not in found:
        raise ValueError(f"module {name!r} registers no solver {wanted!r}; it registers {', '.join(found)}")
    return [wanted] if wanted else found


def _not_importable(what: str, error: BaseException) -> ValueError:
    reason = " ".join(str(error).split()) or "no message"
    return ValueError(f"{what} cannot be imported: {type(error).__name__}: {reason}")


def _registered(what: str, module: str, before: set[str]) -> list[str]:
    """What is registered now and was not before, or comes from this module or, if it is a package, from within it."""
    found = [
        name
        for name in registry.names()
        if name not in before or f"{registry.get(name).function.__module__}.".startswith(f"{module}.")
    ]
    if not found:
        raise ValueError(f'{what} registers no solver; decorate one with @fd.solver("name", order=...)')
    return found
