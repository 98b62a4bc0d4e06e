"""Multistep, few-step and other samplers against diffusers' schedulers: same levels, outputs, noise, every state."""

from __future__ import annotations

import importlib
import types
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff.compiler.build import compile_levels
from fastdiff.compiler.build import plan as build
from fastdiff.compiler.verify import execute
from fastdiff.process import schedules
from fastdiff.process.schedules import CLEAN, Level

pytest.importorskip("diffusers")
from peers import (
    BETA_END,
    NAMES,
    RTOL,
    STEPS,
    TRAIN,
    Array,
    Peer,
    at_all_sigmas,
    at_sigmas,
    config,
    ddpm_schedule,
    in_double,
    quad,
)

THIRD = 1e-4  # diffusers solves for its third-order weights in fp32
every_count = pytest.mark.parametrize("steps", STEPS)


def scheduler_of(module: str, name: str, **options: Any) -> Any:
    return getattr(importlib.import_module(f"diffusers.schedulers.scheduling_{module}"), name)(**options)


def prepared(scheduler: Any, steps: int) -> Any:
    """The scheduler with its timesteps and, in float64, its levels: its own fp32 loses digits in differences."""
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    return scheduler


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("prediction", ["eps", "v"])
@every_count
def test_unipc(steps: int, prediction: str, order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = config(
        prediction_type=NAMES[prediction],
        solver_order=order,
        final_sigmas_type="zero",
        use_karras_sigmas=prediction == "v",
    )
    scheduler = prepared(scheduler_of("unipc_multistep", "UniPCMultistepScheduler", **options), steps)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0, torch.float64)
    plan = at_sigmas("unipc", scheduler, ddpm_schedule(scheduler), order=order)
    peer.compare(plan, prediction, rtol=RTOL if order < 3 else THIRD)


@pytest.mark.parametrize("order", [1, 2, 3])
@every_count
def test_unipc_bh1(steps: int, order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a last level above 0: with sigma = 0 diffusers' bh1 is not a number."""
    options = config(solver_order=order, solver_type="bh1", final_sigmas_type="sigma_min")
    scheduler = prepared(scheduler_of("unipc_multistep", "UniPCMultistepScheduler", **options), steps)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0, torch.float64)
    plan = at_all_sigmas("unipc", scheduler, ddpm_schedule(scheduler), order=order, variant="bh1")
    peer.compare(plan, "eps", rtol=RTOL if order < 3 else THIRD)


@every_count
def test_unipc_without_its_corrector(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = config(solver_order=3, final_sigmas_type="zero", disable_corrector=list(range(steps)))
    scheduler = scheduler_of("unipc_multistep", "UniPCMultistepScheduler", **options)
    prepared(scheduler, steps)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0, torch.float64)
    plan = at_sigmas("unipc", scheduler, ddpm_schedule(scheduler), order=3, corrector=False)
    peer.compare(plan, "eps", rtol=THIRD)


@every_count
def test_unipc_on_a_flow(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = config(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero")
    scheduler = scheduler_of("unipc_multistep", "UniPCMultistepScheduler", **options)
    prepared(scheduler, steps)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0, torch.float64)
    peer.compare(build("unipc", "rectified_flow", grid=scheduler.sigmas.double().numpy()), "flow")


@pytest.mark.parametrize(
    ("algorithm", "correction"),
    [
        ("dpmsolver++", "midpoint"),
        ("dpmsolver++", "heun"),
        ("dpmsolver", "midpoint"),
        ("dpmsolver", "heun"),
        ("sde-dpmsolver++", "midpoint"),  # the flavor's second-order step
    ],
)
@every_count
def test_third_order_multistep(steps: int, algorithm: str, correction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = config(algorithm_type=algorithm, solver_type=correction, solver_order=3)
    options["final_sigmas_type"] = "sigma_min" if algorithm == "dpmsolver" else "zero"
    scheduler = scheduler_of("dpmsolver_multistep", "DPMSolverMultistepScheduler", **options)
    prepared(scheduler, steps)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0, torch.float64)
    schedule = ddpm_schedule(scheduler)
    if algorithm == "dpmsolver":
        plan = at_all_sigmas("dpmsolver", scheduler, schedule, order=3, correction=correction, flavor="diffusers")
    elif algorithm == "dpmsolver++":
        plan = at_sigmas("dpmpp_3m", scheduler, schedule, correction=correction, flavor="diffusers")
    else:
        plan = at_sigmas("dpmpp_3m_sde", scheduler, schedule, flavor="diffusers")
    peer.compare(plan, "eps", rtol=THIRD)


@pytest.mark.parametrize("correction", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2])
@every_count
def test_dpmsolver(steps: int, order: int, correction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = config(
        algorithm_type="dpmsolver", solver_type=correction, solver_order=order, final_sigmas_type="sigma_min"
    )
    scheduler = scheduler_of("dpmsolver_multistep", "DPMSolverMultistepScheduler", **options)
    prepared(scheduler, steps)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0, torch.float64)
    schedule = ddpm_schedule(scheduler)
    plan = at_all_sigmas("dpmsolver", scheduler, schedule, order=order, correction=correction, flavor="diffusers")
    peer.compare(plan, "eps")


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("prediction", ["eps", "v"])
@every_count
def test_deis(steps: int, prediction: str, order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of(
        "deis_multistep",
        "DEISMultistepScheduler",
        **config(prediction_type=NAMES[prediction], solver_order=order),
    )
    prepared(scheduler, steps)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0, torch.float64)
    plan = at_all_sigmas("deis", scheduler, ddpm_schedule(scheduler), order=order, flavor="diffusers")
    peer.compare(plan, prediction, rtol=RTOL if order < 3 else THIRD)


@pytest.mark.parametrize(("predictor", "corrector"), [(1, 1), (2, 1), (2, 2), (3, 3), (3, 4), (1, 3)])
@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
@every_count
def test_sa_solver(steps: int, tau: float, predictor: int, corrector: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of(
        "sasolver",
        "SASolverScheduler",
        **config(predictor_order=predictor, corrector_order=corrector, tau_func=lambda _: torch.tensor(tau)),
    )
    prepared(scheduler, steps)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0, torch.float64)
    options = {"predictor_order": predictor, "corrector_order": corrector, "tau": tau, "flavor": "diffusers"}
    plan = at_all_sigmas("sa_solver", scheduler, ddpm_schedule(scheduler), **options)
    if tau == 0.0:
        peer.normals[:] = 0.0
    peer.compare(plan, "eps", rtol=RTOL if max(predictor, corrector) < 3 else THIRD)


@pytest.mark.parametrize("order", [1, 2, 4])
@every_count
def test_lms(steps: int, order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("diffusers.schedulers.scheduling_lms_discrete")
    monkeypatch.setattr(module, "integrate", types.SimpleNamespace(quad=quad), raising=False)
    scheduler = scheduler_of("lms_discrete", "LMSDiscreteScheduler", **config())
    scheduler.set_timesteps(steps)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(float(scheduler.sigmas[0]), order=order)
    plan = at_sigmas("lms", scheduler, ddpm_schedule(scheduler), order=order, flavor="diffusers")
    peer.compare(plan, "eps", scaled=True, rtol=RTOL if order < 3 else THIRD)


@every_count
def test_ipndm(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own schedule, alpha = cos, sigma = sin of an angle, and a network that predicts v."""
    scheduler = scheduler_of("ipndm", "IPNDMScheduler", num_train_timesteps=TRAIN)
    scheduler.set_timesteps(steps)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0, torch.float64)
    alphas, sigmas = scheduler.alphas.double().numpy(), scheduler.betas.double().numpy()
    levels = [Level(float(max(a, 1e-8)), float(b)) for a, b in zip(alphas[:-1], sigmas[:-1], strict=True)] + [CLEAN]
    plan = compile_levels("ipndm", levels, None, "theirs", {"flavor": "diffusers"})
    calls = iter(range(steps))

    def denoise(x: Array, level: Level) -> Array:
        i = next(calls)
        # theirs divides by alpha only after the multistep combination, so what it holds is E = sigma x + alpha F
        noise = level.sigma * x + alphas[i] * peer.raw[i]
        return (x - level.sigma * noise) / level.alpha

    ours = execute(plan, denoise, peer.states[0])
    assert np.abs(ours - peer.states[-1]).max() <= 1e-4 * np.abs(peer.states[-1]).max()


@pytest.mark.parametrize(
    ("warmup", "steps"),
    # with fewer than four steps diffusers has no Runge-Kutta warm-up to run: its timesteps begin in the middle of one
    [*(("plms", steps) for steps in STEPS), *(("prk", steps) for steps in (4, 5, *STEPS) if steps > 3)],
)
def test_pndm(warmup: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"skip_prk_steps": warmup == "plms", "set_alpha_to_one": True, "timestep_spacing": "leading"}
    # twice as many training steps, so that the middle of a step, at half its length, is a time of the scheduler too
    scheduler = scheduler_of("pndm", "PNDMScheduler", num_train_timesteps=2 * TRAIN, beta_end=BETA_END / 2, **options)
    scheduler.set_timesteps(steps)
    in_double(scheduler)
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    evaluations = len(scheduler.timesteps)
    peer = Peer(scheduler, monkeypatch, steps, evaluations=evaluations)
    peer.run(1.0, torch.float64)
    schedule = ddpm_schedule(scheduler)
    times = scheduler._timesteps[::-1].astype(np.float64)
    plan = build("pndm", schedule, grid=np.ascontiguousarray(times), warmup=warmup, flavor="diffusers")
    peer.compare(plan, "eps")


@pytest.mark.parametrize("prediction", ["eps", "v"])
@every_count
def test_lcm(steps: int, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of(
        "lcm",
        "LCMScheduler",
        num_train_timesteps=1000,
        clip_sample=False,
        prediction_type=NAMES[prediction],
    )
    scheduler.set_timesteps(steps)
    in_double(scheduler)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0, torch.float64)
    plan = build("lcm", ddpm_schedule(scheduler), grid=scheduler.timesteps.numpy(), flavor="diffusers")
    peer.compare(plan, prediction)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@every_count
def test_tcd(steps: int, gamma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of("tcd", "TCDScheduler", num_train_timesteps=1000, clip_sample=False)
    scheduler.set_timesteps(steps)
    in_double(scheduler)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0, torch.float64, eta=gamma)
    # diffusers ends at index 0, a little above the clean level
    schedule = ddpm_schedule(scheduler)
    levels = [schedule.level(float(time)) for time in [*scheduler.timesteps, 0]]
    plan = compile_levels("tcd", levels, schedule, "theirs", {"gamma": gamma})
    peer.compare(plan, "eps")


@every_count
def test_consistency(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"clip_denoised": False, "num_train_timesteps": 201}
    scheduler = scheduler_of("consistency_models", "CMStochasticIterativeScheduler", **options)
    scheduler.set_timesteps(steps)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(80.0, torch.float64)
    sigmas = scheduler.sigmas.double().numpy()
    # an EDM network whose skip starts at sigma_min; its last step ends at sigma_min with no noise, which is D
    schedule = schedules.edm(0.002, 80.5)
    plan = build("consistency", schedule, grid=sigmas[:-1], grid_options={"unit": "rho"}, epsilon=0.002)
    calls = iter(peer.raw)

    def denoise(x: Array, level: Level) -> Array:
        above = level.sigma - 0.002
        skip = 0.25 / (above**2 + 0.25)
        out = above * 0.5 / np.sqrt(level.sigma**2 + 0.25)
        return skip * x + out * next(calls)

    ours = execute(plan, denoise, peer.states[0], lambda i, _: peer.normals[i])
    assert np.abs(ours - peer.states[-1]).max() < RTOL * np.abs(peer.states[-1]).max()


@every_count
def test_flow_heun(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of("flow_match_heun_discrete", "FlowMatchHeunDiscreteScheduler", num_train_timesteps=TRAIN)
    prepared(scheduler, steps)
    sigmas = scheduler.sigmas.numpy()
    peer = Peer(scheduler, monkeypatch, steps, evaluations=2 * steps - 1)
    peer.run(1.0, torch.float64)
    levels = sigmas[np.append(True, np.diff(sigmas) != 0.0)]
    peer.compare(build("flow_heun", "rectified_flow", grid=levels), "flow")


@every_count
def test_flow_stochastic(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of(
        "flow_match_euler_discrete",
        "FlowMatchEulerDiscreteScheduler",
        num_train_timesteps=TRAIN,
        shift=3.0,
        stochastic_sampling=True,
    )
    scheduler.set_timesteps(steps)
    peer = Peer(scheduler, monkeypatch, steps)
    draws = iter(peer.normals)
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.from_numpy(next(draws)).to(x.dtype))
    peer.run(1.0)
    plan = build("flow_sde", "rectified_flow", grid=scheduler.sigmas.double().numpy(), flavor="diffusers")
    peer.compare(plan, "flow")


@every_count
def test_edm_third_order(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"solver_order": 3, "final_sigmas_type": "zero", "sigma_data": 0.5}
    scheduler = scheduler_of("edm_dpmsolver_multistep", "EDMDPMSolverMultistepScheduler", **options)
    prepared(scheduler, steps)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0, torch.float64)
    plan = at_sigmas("dpmpp_3m", scheduler, schedules.edm(0.002, 80.5), flavor="diffusers")
    peer.compare(plan, "edm", sigma_data=0.5, rtol=THIRD)


@pytest.mark.parametrize(("solver", "order"), [("dpmpp_2s", 2), ("dpmpp_3s", 3)])
@pytest.mark.parametrize("prediction", ["eps", "v"])
@every_count
def test_singlestep(steps: int, prediction: str, solver: str, order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = config(solver_order=order, prediction_type=NAMES[prediction])
    del options["timestep_spacing"]
    scheduler = scheduler_of("dpmsolver_singlestep", "DPMSolverSinglestepScheduler", **options)
    prepared(scheduler, steps)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0, torch.float64)
    plan = at_sigmas(solver, scheduler, ddpm_schedule(scheduler), flavor="diffusers")
    peer.compare(plan, prediction, rtol=RTOL if order < 3 else THIRD)


@every_count
def test_ddim_inverse(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs shows the network the level a step goes to, ours the one it comes from; given E, the states agree."""
    scheduler = scheduler_of(
        "ddim_inverse", "DDIMInverseScheduler", num_train_timesteps=TRAIN, beta_end=BETA_END, clip_sample=False
    )
    scheduler.set_timesteps(steps)
    in_double(scheduler)
    scheduler.initial_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0, torch.float64)
    schedule = ddpm_schedule(scheduler)
    plan = build("ddim_inverse", schedule, grid=scheduler.timesteps.numpy()[::-1].astype(np.float64))
    noises = iter(peer.raw)

    def denoise(x: Array, level: Level) -> Array:
        return (x - level.sigma * next(noises)) / level.alpha

    ours = execute(plan, denoise, peer.latent)
    assert np.abs(ours - peer.states[-1]).max() < RTOL * np.abs(peer.states[-1]).max()
