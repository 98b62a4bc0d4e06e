"""Every solver against diffusers' scheduler of that name: same levels, same raw outputs, same noise, every state.

The raw outputs are random numbers, not a network's, so a wrong coefficient cannot hide behind a smooth function.
Levels are the scheduler's own; x/alpha schedulers are compared after multiplying by alpha.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff.compiler.build import plan as build
from fastdiff.compiler.verify import execute
from fastdiff.process import grids, schedules
from fastdiff.process.schedules import Level

pytest.importorskip("diffusers")
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_edm_dpmsolver_multistep import EDMDPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_ltx_euler_ancestral_rf import LTXEulerAncestralRFScheduler
from peers import NAMES, RTOL, STEPS, TRAIN, Array, Peer, at_sigmas, config, ddpm_schedule, in_double


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("steps", STEPS)
def test_ddpm(steps: int, prediction: str, variance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = DDPMScheduler(**config(prediction_type=NAMES[prediction], variance_type=variance, clip_sample=False))
    scheduler.set_timesteps(steps)
    in_double(scheduler)
    plan = build("ddpm", ddpm_schedule(scheduler), grid=scheduler.timesteps.numpy(), variance=variance)
    if variance == "fixed_large":
        # diffusers still draws in the step to the clean level when its last time is not 0; ours never does
        monkeypatch.setattr(scheduler, "_get_variance", _no_noise_at_the_end(scheduler, scheduler._get_variance))
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0, torch.float64)
    peer.compare(plan, prediction)


def _no_noise_at_the_end(scheduler: Any, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def variance(t: Any, **options: Any) -> torch.Tensor:
        value = original(t, **options)
        return torch.zeros_like(value) if int(t) == int(scheduler.timesteps[-1]) else value

    return variance


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", STEPS)
def test_ddim_on_our_own_grids(steps: int, eta: float, spacing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = DDIMScheduler(**config(timestep_spacing=spacing, clip_sample=False))
    scheduler.set_timesteps(steps)
    in_double(scheduler)
    schedule = ddpm_schedule(scheduler)
    if steps > 1 or spacing == "trailing":  # one leading step is the noisiest level here, the cleanest there
        np.testing.assert_array_equal(grids.make(spacing, schedule, steps), scheduler.timesteps.numpy())
    plan = build("ddim", schedule, grid=scheduler.timesteps.numpy(), eta=eta)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0, torch.float64, eta=eta)
    peer.compare(plan, "eps")


def test_the_linear_schedule_is_theirs() -> None:
    theirs = DDPMScheduler(num_train_timesteps=1000).alphas_cumprod.double().numpy()
    np.testing.assert_allclose(schedules.linear().alpha_bar(np.arange(1000.0)), theirs, rtol=2e-5)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("steps", STEPS)
def test_euler(steps: int, karras: bool, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = EulerDiscreteScheduler(**config(prediction_type=NAMES[prediction], use_karras_sigmas=karras))
    scheduler.set_timesteps(steps)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(float(scheduler.sigmas[0]))
    peer.compare(at_sigmas("euler", scheduler, ddpm_schedule(scheduler)), prediction, scaled=True)


@pytest.mark.parametrize("steps", STEPS)
def test_euler_with_churn(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = EulerDiscreteScheduler(**config())
    scheduler.set_timesteps(steps)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(float(scheduler.sigmas[0]), s_churn=8.0, s_noise=1.003)
    plan = at_sigmas("euler", scheduler, ddpm_schedule(scheduler), s_churn=8.0, s_noise=1.003)
    # the states diffusers shows are from before the churn, so only the end is the same point of both
    raw = iter(peer.raw)
    start = peer.states[0] * plan.levels[0].alpha

    def denoise(x: Array, level: Level) -> Array:
        return (x - level.sigma * next(raw)) / level.alpha

    ours = execute(plan, denoise, start, lambda i, _: peer.normals[i])
    assert plan.draws == steps
    assert np.abs(ours - peer.states[-1]).max() < RTOL * np.abs(peer.states[-1]).max()


@pytest.mark.parametrize("space", ["vp", "edm"])
@pytest.mark.parametrize("steps", STEPS)
def test_euler_ancestral(steps: int, space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = EulerAncestralDiscreteScheduler(**config())
    scheduler.set_timesteps(steps)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(float(scheduler.sigmas[0]))
    schedule = ddpm_schedule(scheduler) if space == "vp" else schedules.edm(0.01, 200.0)
    peer.compare(at_sigmas("euler_ancestral", scheduler, schedule), "eps", scaled=space == "vp")


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("steps", STEPS)
def test_euler_ancestral_on_a_flow(steps: int, eta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = LTXEulerAncestralRFScheduler(eta=eta)
    levels = np.linspace(1.0, 0.0, steps + 1)
    scheduler.set_timesteps(sigmas=levels.tolist())
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0)
    plan = build("euler_ancestral", "rectified_flow", grid=levels, eta=eta)
    assert plan.levels[0].alpha == 0.0
    peer.compare(plan, "flow")


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("steps", STEPS)
def test_heun(steps: int, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = HeunDiscreteScheduler(**config(prediction_type=NAMES[prediction]))
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()  # its fp32 loses digits in x/sigma - D/sigma
    peer = Peer(scheduler, monkeypatch, steps, evaluations=2 * steps - 1)
    peer.run(float(scheduler.sigmas[0]), torch.float64)
    peer.compare(at_sigmas("heun", scheduler, ddpm_schedule(scheduler)), prediction, scaled=True)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("steps", STEPS)
def test_dpmpp_2m(steps: int, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = config(prediction_type=NAMES[prediction], final_sigmas_type="zero", use_karras_sigmas=prediction == "v")
    scheduler = DPMSolverMultistepScheduler(**options)
    scheduler.set_timesteps(steps)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0)
    peer.compare(at_sigmas("dpmpp_2m", scheduler, ddpm_schedule(scheduler)), prediction)


@pytest.mark.parametrize("correction", ["midpoint", "heun"])
@pytest.mark.parametrize("steps", STEPS)
def test_dpmpp_2m_sde(steps: int, correction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = config(algorithm_type="sde-dpmsolver++", solver_type=correction, final_sigmas_type="zero")
    scheduler = DPMSolverMultistepScheduler(**options)
    scheduler.set_timesteps(steps)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0)
    peer.compare(at_sigmas("dpmpp_2m_sde", scheduler, ddpm_schedule(scheduler), correction=correction), "eps")


@pytest.mark.parametrize("steps", STEPS)
def test_dpmpp_2m_on_a_flow(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = DPMSolverMultistepScheduler(
        **config(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero")
    )
    scheduler.set_timesteps(steps)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0)
    plan = build("dpmpp_2m", "rectified_flow", grid=scheduler.sigmas.double().numpy())
    peer.compare(plan, "flow")


@pytest.mark.parametrize("steps", STEPS)
def test_flow_euler(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN, shift=3.0)
    scheduler.set_timesteps(steps)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0)
    plan = build("flow_euler", "rectified_flow", grid=scheduler.sigmas.double().numpy())
    assert plan.levels[0].alpha == 0.0
    peer.compare(plan, "flow")


@pytest.mark.parametrize(
    ("solver", "make", "options"),
    [
        ("euler", EDMEulerScheduler, {}),
        ("dpmpp_2m", EDMDPMSolverMultistepScheduler, {"final_sigmas_type": "zero"}),
        (
            "dpmpp_2m_sde",
            EDMDPMSolverMultistepScheduler,
            {"final_sigmas_type": "zero", "algorithm_type": "sde-dpmsolver++"},
        ),
    ],
    ids=["euler", "dpmpp_2m", "dpmpp_2m_sde"],
)
@pytest.mark.parametrize("steps", STEPS)
def test_edm(steps: int, solver: str, make: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, **options)
    scheduler.set_timesteps(steps)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0)  # diffusers adds x and removes it again in fp32, so a large x would measure that
    schedule = schedules.edm()
    np.testing.assert_allclose(grids.make("karras", schedule, steps), scheduler.sigmas[:-1], rtol=1e-5)
    peer.compare(at_sigmas(solver, scheduler, schedule), "edm", sigma_data=0.5)
