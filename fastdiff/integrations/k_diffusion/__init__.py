"""k-diffusion's samplers, run as tables: `sample_*` with its signatures, and `patch` to put them into a program.

    from fastdiff.integrations import k_diffusion as K
    x = K.sample_euler_ancestral(model, x, sigmas, extra_args=..., callback=...)
    K.patch()                                       # or K.patch(comfy.k_diffusion.sampling)

k-diffusion need not be installed. What is equal, and what differs: docs/k_diffusion.md.
"""

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
