"""k-diffusion's sampling functions, by name and signature, run as tables.

May import: calls, noise, loop. Each takes what k-diffusion's function of that name takes and returns
the same numbers from the same state of torch's random generator; docs/k_diffusion.md says how closely, and what
differs. Two keywords are added. seed: one integer per sample, or s for s, s + 1, ...: the noise is then made in the
row from each sample's seed, torch's generator is left alone, and a sample does not depend on the batch it is in.
host: where noise and progress bars come from (noise.Host).

model(x, sigma, **extra_args) -> denoised, sigma [B] in x's dtype. x: [B, *S] float32, float16 or bfloat16, the state
at sigmas[0]; the result has its dtype. sigmas: [steps + 1], descending. callback: receives {"x", "i", "sigma",
"sigma_hat", "denoised"} once a step. Raises tables.Refused (a ValueError) before the first model call for arguments
that no table covers, ValueError or TypeError where the model returns something else than the denoised x.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import Tensor

from fastdiff.integrations.k_diffusion import calls
from fastdiff.integrations.k_diffusion.calls import Call, Callback, Extra, Seed
from fastdiff.integrations.k_diffusion.loop import Model
from fastdiff.integrations.k_diffusion.noise import HERE, Host, NoiseSampler


def sample_euler(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = float("inf"),
    s_noise: float = 1.0, *, seed: Seed = None, host: Host = HERE,
) -> Tensor:  # fmt: skip
    """Euler with churn (Karras et al. 2022, Alg. 2, first order)."""
    call = Call(model, x, extra_args, callback, disable, None, seed, host)
    return calls.on_sigmas("euler", call, sigmas, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)


def sample_euler_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    *, seed: Seed = None, host: Host = HERE,
) -> Tensor:  # fmt: skip
    """Euler steps with ancestral noise."""
    call = Call(model, x, extra_args, callback, disable, noise_sampler, seed, host)
    return calls.on_sigmas("euler_ancestral", call, sigmas, eta=eta, s_noise=s_noise)


def sample_heun(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = float("inf"),
    s_noise: float = 1.0, *, seed: Seed = None, host: Host = HERE,
) -> Tensor:  # fmt: skip
    """Heun with churn (Karras et al. 2022, Alg. 2)."""
    call = Call(model, x, extra_args, callback, disable, None, seed, host)
    return calls.on_sigmas("heun", call, sigmas, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)


def sample_dpm_2(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = float("inf"),
    s_noise: float = 1.0, *, seed: Seed = None, host: Host = HERE,
) -> Tensor:  # fmt: skip
    """The midpoint rule, its middle halfway in log sigma, with churn."""
    call = Call(model, x, extra_args, callback, disable, None, seed, host)
    return calls.on_sigmas("dpm_2", call, sigmas, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)


def sample_dpm_2_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    *, seed: Seed = None, host: Host = HERE,
) -> Tensor:  # fmt: skip
    """The midpoint rule with ancestral noise."""
    call = Call(model, x, extra_args, callback, disable, noise_sampler, seed, host)
    return calls.on_sigmas("dpm_2_ancestral", call, sigmas, eta=eta, s_noise=s_noise)


def sample_lms(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, order: int = 4, *, seed: Seed = None, host: Host = HERE,
) -> Tensor:  # fmt: skip
    """Linear multistep of order 1 to 4."""
    call = Call(model, x, extra_args, callback, disable, None, seed, host)
    return calls.on_sigmas("lms", call, sigmas, order=order)


def sample_dpm_fast(
    model: Model, x: Tensor, sigma_min: float, sigma_max: float, n: int, extra_args: Extra = None,
    callback: Callback = None, disable: bool | None = None, eta: float = 0.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, *, seed: Seed = None, host: Host = HERE,
) -> Tensor:  # fmt: skip
    """DPM-Solver-fast (Lu et al. 2022a): n model calls from sigma_max to sigma_min, levels uniform in log sigma.

    callback receives "t" and "t_up" = -log sigma too, once a block of one to three calls.
    """
    call = Call(model, x, extra_args, callback, disable, noise_sampler, seed, host)
    return calls.dpm_fast(call, sigma_min, sigma_max, n, eta=eta, s_noise=s_noise)


def sample_dpm_adaptive(
    model: Model, x: Tensor, sigma_min: float, sigma_max: float, extra_args: Extra = None,
    callback: Callback = None, disable: bool | None = None, order: int = 3, rtol: float = 0.05, atol: float = 0.0078,
    h_init: float = 0.05, pcoeff: float = 0.0, icoeff: float = 1.0, dcoeff: float = 0.0, accept_safety: float = 0.81,
    eta: float = 0.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None, return_info: bool = False,
) -> Any:  # fmt: skip
    """DPM-Solver-12 and 23 with adaptive steps: k-diffusion's own function, where it is there.

    It takes the norm of the error over the whole batch and so one step for all; fastdiff's own "dpm_adaptive"
    (fd.sample(..., solver="dpm_adaptive")) gives every sample steps of its own, which is the same for a batch of one.
    Raises NotImplementedError where k-diffusion is not installed.
    """
    try:
        theirs = sys.modules.get("k_diffusion.sampling") or importlib.import_module("k_diffusion.sampling")
    except ImportError as error:
        raise NotImplementedError(
            "sample_dpm_adaptive chooses one step for the whole batch as it goes, which is left to k-diffusion's own "
            f"function, and k-diffusion cannot be imported ({error}); use sample_dpm_fast or sample_dpmpp_2m here, or "
            'fd.sample(fd.Denoiser(...), shape, solver="dpm_adaptive"), where every sample has steps of its own'
        ) from error
    return theirs.sample_dpm_adaptive(
        model, x, sigma_min, sigma_max, extra_args, callback, disable, order, rtol, atol, h_init, pcoeff, icoeff,
        dcoeff, accept_safety, eta, s_noise, noise_sampler, return_info,
    )  # fmt: skip


def sample_dpmpp_2s_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    *, seed: Seed = None, host: Host = HERE,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2S) with ancestral noise."""
    call = Call(model, x, extra_args, callback, disable, noise_sampler, seed, host)
    return calls.on_sigmas("dpmpp_2s_ancestral", call, sigmas, eta=eta, s_noise=s_noise)


def sample_dpmpp_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    r: float = 1 / 2, *, seed: Seed = None, host: Host = HERE,
) -> Tensor:  # fmt: skip
    """DPM-Solver++ (stochastic)."""
    call = Call(model, x, extra_args, callback, disable, noise_sampler, seed, host)
    return calls.on_sigmas("dpmpp_sde", call, sigmas, eta=eta, s_noise=s_noise, r=r)


def sample_dpmpp_2m(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, *, seed: Seed = None, host: Host = HERE,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M)."""
    return calls.on_sigmas("dpmpp_2m", Call(model, x, extra_args, callback, disable, None, seed, host), sigmas)


def sample_dpmpp_2m_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    solver_type: str = "midpoint", *, seed: Seed = None, host: Host = HERE,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M) SDE."""
    call = Call(model, x, extra_args, callback, disable, noise_sampler, seed, host)
    return calls.on_sigmas("dpmpp_2m_sde", call, sigmas, eta=eta, s_noise=s_noise, solver_type=solver_type)


def sample_dpmpp_3m_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    *, seed: Seed = None, host: Host = HERE,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(3M) SDE."""
    call = Call(model, x, extra_args, callback, disable, noise_sampler, seed, host)
    return calls.on_sigmas("dpmpp_3m_sde", call, sigmas, eta=eta, s_noise=s_noise)
