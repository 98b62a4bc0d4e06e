"""Errors and warnings of every layer: what was wrong, what was got, what was expected, how to fix it."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable

_LIBRARIES = ("fastdiff", "torch", "diffusers")  # ours, and those whose functions stand between ours and a user's


class BackendUnavailable(RuntimeError):
    """An executor was asked for that this machine or this install does not have.

    Carries `reason` (why it is not there) and `fix` (what to do about it).
    """

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(f"{reason}. To fix it: {fix}")
        self.reason = reason
        self.fix = fix


class QueueFull(RuntimeError):
    """A stream has as many waiting requests as it may have."""


class RequestCancelled(RuntimeError):
    """The result of a request that was cancelled, or whose stream was closed, was asked for."""


class BatchTooLarge(MemoryError):
    """A run needed more memory than there is; `largest`: the batch that would fit, by estimate (0: not even one)."""

    def __init__(self, message: str, largest: int) -> None:
        super().__init__(message)
        self.largest = largest


def unknown_name(kind: str, got: object, known: Iterable[str], meant: str = "") -> ValueError:
    """The error for a name that is not in a registry: it lists the close names first, or says what was `meant`."""
    names = sorted(known)
    close = difflib.get_close_matches(str(got), names, n=3, cutoff=0.5)
    hint = meant or (f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else "")
    return ValueError(f"Unknown {kind} {got!r}.{hint} Known: {', '.join(names)}.")


def warn(message: str) -> None:
    """UserWarning that names the caller's line, however many of our functions lie in between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and (frame.f_globals.get("__name__") or "").partition(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
