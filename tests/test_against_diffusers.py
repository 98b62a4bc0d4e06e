"""Every solver against diffusers' scheduler of that name: same levels, same raw outputs, same noise, every state.

The raw outputs are random numbers, not a network's, so a wrong coefficient cannot hide behind a smooth function.
Levels are the scheduler's own; x/alpha schedulers are compared after multiplying by alpha.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff.compiler.build import plan as build
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.verify import execute
from fastdiff.process import grids, predictions, schedules
from fastdiff.process.schedules import Level, Schedule

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

Array = np.ndarray[Any, np.dtype[np.float64]]

STEPS = (1, 2, 3, 10, 20, 50)
TRAIN = 600  # divisible by every number of STEPS, so that DDIM's t - T // N is the next entry of its timesteps
RTOL = 1e-5
SIZE = (4, 16)
NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


class Peer:
    """A scheduler run on the case's random raw outputs and noise; `states`: what each evaluation sees, and the end."""

    def __init__(self, scheduler: Any, monkeypatch: pytest.MonkeyPatch, steps: int, evaluations: int = 0) -> None:
        rng = np.random.default_rng(steps)
        self.scheduler = scheduler
        self.monkeypatch = monkeypatch
        self.raw: Array = rng.standard_normal((evaluations or steps, *SIZE))
        self.normals: Array = rng.standard_normal((steps + 1, *SIZE))
        self.latent: Array = rng.standard_normal(SIZE)
        self.states: list[Array] = []

    def run(self, scale: float, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        """Step through the scheduler's timesteps from scale * latent; the noise of step i is normals[i]."""
        step = 0

        def randn(shape: Any, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
            return torch.from_numpy(self.normals[step]).to(dtype or torch.float32)

        module = sys.modules[type(self.scheduler).__module__]
        self.monkeypatch.setattr(module, "randn_tensor", randn, raising=False)
        x = torch.from_numpy(scale * self.latent).to(dtype)
        for step, time in enumerate(self.scheduler.timesteps[: len(self.raw)]):
            self.states.append(x.double().numpy())
            raw = torch.from_numpy(self.raw[step]).to(dtype)
            x = self.scheduler.step(raw, time, x, return_dict=False, **options)[0]
        self.states.append(x.double().numpy())

    def compare(self, plan: Plan, prediction: str, scaled: bool = False, sigma_data: float | None = None) -> None:
        """The plan on the same numbers meets the same states; scaled: the scheduler's states are x / alpha."""
        seen: list[tuple[Array, float]] = []

        def denoise(x: Array, level: Level) -> Array:
            assert plan.schedule is not None
            fold = predictions.coefficients(prediction, level, plan.schedule, sigma_data)
            raw = self.raw[len(seen)]
            seen.append((x, level.alpha if scaled else 1.0))
            return fold.P * x + fold.Q * raw

        start = self.states[0] * (plan.levels[0].alpha if scaled else 1.0)
        seen.append((execute(plan, denoise, start, lambda i, _: self.normals[i]), 1.0))
        assert plan.nfe == len(self.raw)
        for i, ((ours, alpha), theirs) in enumerate(zip(seen, self.states, strict=True)):
            error = np.abs(ours - alpha * theirs).max() / np.abs(alpha * theirs).max()
            assert error < RTOL, f"state {i} of {plan.nfe}: {error:.2e}"


def config(**options: Any) -> dict[str, Any]:
    return {"num_train_timesteps": TRAIN, "timestep_spacing": "trailing", **options}


def ddpm_schedule(scheduler: Any) -> Schedule:
    """The scheduler's own alpha_bar, so that only the solver is compared."""
    return schedules.from_alpha_bar(scheduler.alphas_cumprod.double().numpy())


def at_sigmas(solver: str, scheduler: Any, schedule: Schedule, **options: Any) -> Plan:
    """Our plan on the scheduler's own sigma / alpha."""
    sigmas = scheduler.sigmas.double().numpy()
    sigmas = sigmas[np.append(True, np.diff(sigmas) != 0.0)]  # Heun lists inner levels twice
    return build(solver, schedule, grid=sigmas[:-1], grid_options={"unit": "rho"}, **options)


def in_double(scheduler: Any) -> None:
    """diffusers' discrete tables in float64: its 1 - alpha_bar ratios otherwise lose more than RTOL near the data."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()


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
    peer = Peer(scheduler, monkeypatch, steps, evaluations=2 * steps - 1)
    peer.run(float(scheduler.sigmas[0]))
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
