"""Files put in place whole: nothing is left half-written. May import: nothing of the package."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_atomically(out: Path, write: Callable[[Path], object]) -> None:
    """`write` a temporary file beside `out`, then put it in its place; if that fails `out` is as it was."""
    handle, name = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.resolve().parent)
    os.close(handle)
    try:
        write(Path(name))
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, out)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
