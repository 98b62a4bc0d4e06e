"""diffusers' schedulers, their steps run as one fused row each.

May import: torch, engine, compiler; diffusers itself only where a function needs it, since it is an optional extra.
"""

from fastdiff.integrations.diffusers.fast import fast

__all__ = ["fast"]
