"""Triton kernels, installed as `fastdiff.kernels`.

May import: Triton and fastdiff.errors, nothing else of the package. Importing this package imports no Triton.
"""

from __future__ import annotations

if __name__ == "kernels":
    # run from the source folder: transformers looks for a package of this name, and takes one with no file for none
    __file__ = None  # type: ignore[assignment]

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            "these are fastdiff's kernels and must be imported as `fastdiff.kernels`: the name `kernels` belongs to "
            "another package, which diffusers imports. Install fastdiff, and run Python from outside its source folder "
            "(or with `python -P`)"
        )
