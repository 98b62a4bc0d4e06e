"""Files put in place whole: nothing is left half-written. May import: nothing of the package."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def check_place(out: Path) -> None:
    """Raise OSError now if nothing could be written at `out` later."""
    parent = out.resolve().parent
    if not parent.is_dir():
        raise FileNotFoundError(
            f"cannot write {out}: the folder {parent} does not exist; create it or choose another place"
        )
    target = out if out.exists() else parent
    if not os.access(target, os.W_OK) or not os.access(parent, os.W_OK):
        raise PermissionError(f"cannot write {out}: no permission to write in {parent}; choose another place")


def check_writable_file(out: Path) -> None:
    """Raise OSError now if the file `out`, of any kind, could not be written later."""
    check_place(out)
    if out.is_dir():
        raise IsADirectoryError(f"cannot write {out}: it is a folder; choose a file name")


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, survive a power cut; of folders only where the system can. OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def write_atomically(out: Path, write: Callable[[Path], object]) -> None:
    """`write` a temporary file beside `out`, then put it in its place; if that fails `out` is as it was."""
    handle, name = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.resolve().parent)
    os.close(handle)
    try:
        write(Path(name))
        sync(Path(name))
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, out)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
