"""Memory of freed tensors that stays with the process. May import: nothing of the package.

glibc hands the memory of large tensors back to the system when they are freed, and a training step that makes the same
tensors again pays for each page of them anew: 3 % of a step of the preset fashion32.
"""

from __future__ import annotations

import ctypes

# of mallopt, in malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = -1


def keep_heap() -> bool:
    """Let this process keep what it frees, to its end; whether its C library can, which glibc does.

    For a process that is a training run, not for a library's call: the process then shrinks no more.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_TRIM_THRESHOLD, _NEVER) and mallopt(_MMAP_MAX, 0))
