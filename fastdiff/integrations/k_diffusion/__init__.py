"""k-diffusion's samplers, run as tables: `sample_*` with its signatures, and `patch` to put them into a program.

    from fastdiff.integrations import k_diffusion as K
    x = K.sample_euler_ancestral(model, x, sigmas, extra_args=..., callback=...)
    K.patch()                                       # or K.patch(comfy.k_diffusion.sampling)

k-diffusion need not be installed. What is equal, and what differs: docs/k_diffusion.md.
"""

import difflib
from typing import Any

from fastdiff.compiler import solvers
from fastdiff.integrations.k_diffusion.denoisers import denoiser
from fastdiff.integrations.k_diffusion.functions import (
    sample_dpm_2,
    sample_dpm_2_ancestral,
    sample_dpm_adaptive,
    sample_dpm_fast,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_2s_ancestral,
    sample_dpmpp_3m_sde,
    sample_dpmpp_sde,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
    sample_lms,
)
from fastdiff.integrations.k_diffusion.loop import clear
from fastdiff.integrations.k_diffusion.noise import BrownianTreeNoiseSampler, Host
from fastdiff.integrations.k_diffusion.patch import Patched, patch, unpatch
from fastdiff.integrations.k_diffusion.tables import Refused

__all__ = [
    "BrownianTreeNoiseSampler",
    "Host",
    "Patched",
    "Refused",
    "clear",
    "denoiser",
    "patch",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpm_adaptive",
    "sample_dpm_fast",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    """AttributeError that says what there is: functions of that kind, and a solver of that name to plan with."""
    said = f"module {__name__!r} has no attribute {name!r}"
    kind, _, solver = name.partition("sample_")
    if kind or not solver:
        raise AttributeError(said)
    own = [each for each in __all__ if each.startswith("sample_")]
    twins = difflib.get_close_matches(solver, solvers.names(), n=1, cutoff=0.75)
    close = difflib.get_close_matches(name, own, n=1, cutoff=0.85)
    hint = f"; did you mean {close[0]}?" if close else "."
    if twins and f"sample_{twins[0]}" not in own:
        hint = f"; that solver is fd.plan({twins[0]!r}, schedule), run by fd.Sampler on denoiser(model)."
    raise AttributeError(f"{said}{hint} The functions of k-diffusion it has: {', '.join(own)}")
