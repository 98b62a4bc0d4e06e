"""Triton's interpreter without its search of triton.language at every call of a device function.

At a launch, and again at every call of one jitted function by another, `_patch_lang` goes through all names of
triton.language to replace the built-in ones. What a launch replaces stays until it ends, so once is enough; the second
search and those after it were two fifths of the time of the interpreted tests.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

SEEN = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # by Triton's own functions and by ours


def once_a_launch() -> Any:
    """A `_patch_lang` that does nothing while a launch, whose scope it was the first to give out, is not restored."""
    patch, launch = interpreter._patch_lang, interpreter._LangPatchScope()

    def patch_lang(function: Any) -> Any:
        nonlocal launch
        if launch._changes:
            return interpreter._LangPatchScope()
        launch = patch(SEEN)
        return launch

    return patch_lang


if hasattr(interpreter, "_LangPatchScope"):  # else it is an older Triton, left as it is
    interpreter._patch_lang = once_a_launch()
