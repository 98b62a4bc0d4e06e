"""diffusers' schedulers with steps that are one fused row each, and its pipelines with loops that are run here.

May import: torch, engine, compiler; diffusers itself only where a function needs it, since it is an optional extra.
"""

from fastdiff.integrations.diffusers.accelerate import accelerate, restore
from fastdiff.integrations.diffusers.fast import fast

__all__ = ["accelerate", "fast", "restore"]
