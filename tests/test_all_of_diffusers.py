"""The schedulers of diffusers that no other file compares, and a list of all of them with the test of each."""

from __future__ import annotations

import ast
import copy
import importlib.util
import itertools
import math
from pathlib import Path
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
from peers import RTOL, STEPS, Array, Peer, at_sigmas, config, ddpm_schedule, in_double

every_count = pytest.mark.parametrize("steps", STEPS)

# where each class that has a solver of ours is compared, and why the others have none
HERE = "test_all_of_diffusers.py"
FIRST, SECOND = "test_against_diffusers.py", "test_more_against_diffusers.py"
COMPARED = {
    "DDPMScheduler": FIRST,
    "DDIMScheduler": FIRST,
    "EulerDiscreteScheduler": FIRST,
    "EulerAncestralDiscreteScheduler": FIRST,
    "LTXEulerAncestralRFScheduler": FIRST,
    "HeunDiscreteScheduler": FIRST,
    "DPMSolverMultistepScheduler": FIRST,
    "FlowMatchEulerDiscreteScheduler": FIRST,
    "EDMEulerScheduler": FIRST,
    "EDMDPMSolverMultistepScheduler": FIRST,
    "UniPCMultistepScheduler": SECOND,
    "DEISMultistepScheduler": SECOND,
    "SASolverScheduler": SECOND,
    "LMSDiscreteScheduler": SECOND,
    "IPNDMScheduler": SECOND,
    "PNDMScheduler": SECOND,
    "LCMScheduler": SECOND,
    "TCDScheduler": SECOND,
    "CMStochasticIterativeScheduler": SECOND,
    "FlowMatchHeunDiscreteScheduler": SECOND,
    "DPMSolverSinglestepScheduler": SECOND,
    "DDIMInverseScheduler": SECOND,
    "KDPM2DiscreteScheduler": HERE,
    "KDPM2AncestralDiscreteScheduler": HERE,
    "DPMSolverSDEScheduler": HERE,
    "CosineDPMSolverMultistepScheduler": HERE,
    "UnCLIPScheduler": HERE,
    "DDPMParallelScheduler": HERE,
    "DDIMParallelScheduler": HERE,
    "CogVideoXDDIMScheduler": HERE,
    "CogVideoXDPMScheduler": HERE,
    "FlowMatchLCMScheduler": HERE,
    "FlowMapEulerDiscreteScheduler": HERE,
    "KarrasVeScheduler": HERE,
    "ScoreSdeVeScheduler": HERE,
    "ScoreSdeVpScheduler": HERE,
    "SCMScheduler": HERE,
    "ConsistencyDecoderScheduler": HERE,
    "DDPMWuerstchenScheduler": HERE,
}
NOT_COMPARED = {
    "AmusedScheduler": "moves class indices",
    "BlockRefinementScheduler": "moves class indices",
    "DiscreteDDIMScheduler": "moves class indices",
    "EntropyBoundScheduler": "moves class indices",
    "VQDiffusionScheduler": "moves class indices",
    "DPMSolverMultistepInverseScheduler": "a second-order inversion, which no solver here is; capture compiles it",
    "HeliosScheduler": "UniPC over the stages of one pipeline, which change the size of the sample between them",
    "HeliosDMDScheduler": "renoises between the stages of one pipeline, which change the size of the sample",
    "MiniMaxH3Scheduler": "flow_euler on sigmas of its pipeline's own; capture compiles it",
    "PiflowScheduler": "its network predicts a policy, not a sample, a noise or a velocity",
    "RFD4ProteinaScheduler": "needs a mask of which atoms to emit; its noise is centred per molecule",
    "RePaintScheduler": "inpainting by going back and forth in time, with an image and a mask",
}


def test_every_scheduler_is_compared_or_there_is_a_reason() -> None:
    spec = importlib.util.find_spec("diffusers.schedulers")
    assert spec is not None and spec.submodule_search_locations
    found = {
        node.name
        for path in Path(spec.submodule_search_locations[0]).rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Scheduler")
    }
    assert found == COMPARED.keys() | NOT_COMPARED.keys()
    assert not COMPARED.keys() & NOT_COMPARED.keys()
    for name, file in COMPARED.items():
        assert name in (Path(__file__).parent / file).read_text().replace(f'"{name}": ', ""), name


_MADE: dict[str, Any] = {}


def scheduler_of(module: str, name: str, **options: Any) -> Any:
    """A copy of the first one made with these options: KDPM2's constructor takes half a second."""
    label = f"{name} {options}"
    if label not in _MADE:
        _MADE[label] = getattr(importlib.import_module(f"diffusers.schedulers.{module}"), name)(**options)
    return copy.deepcopy(_MADE[label])


def stages_in_double(scheduler: Any) -> None:
    """Every level of a two-stage scheduler in float64, its inner ones computed again from its sigmas."""
    for name in ("sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down", "log_sigmas"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())


@pytest.mark.parametrize("prediction", ["eps", "v"])
@every_count
def test_dpm_2(steps: int, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = {"eps": "epsilon", "v": "v_prediction"}[prediction]
    scheduler = scheduler_of("scheduling_k_dpm_2_discrete", "KDPM2DiscreteScheduler", **config(prediction_type=kind))
    scheduler.set_timesteps(steps)
    stages_in_double(scheduler)
    peer = Peer(scheduler, monkeypatch, steps, evaluations=2 * steps - 1)
    peer.run(float(scheduler.sigmas[0]), torch.float64)
    peer.compare(at_sigmas("dpm_2", scheduler, ddpm_schedule(scheduler)), prediction, scaled=True)


@every_count
def test_dpm_2_ancestral(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of("scheduling_k_dpm_2_ancestral_discrete", "KDPM2AncestralDiscreteScheduler", **config())
    scheduler.set_timesteps(steps)
    stages_in_double(scheduler)
    peer = Peer(scheduler, monkeypatch, steps, evaluations=2 * steps - 1)
    peer.run(float(scheduler.sigmas[0]), torch.float64)
    peer.normals = peer.normals[1::2]  # only the second stage of a step uses its draw
    if steps == 1:
        peer.normals = np.zeros((1, *peer.latent.shape))
    peer.compare(at_sigmas("dpm_2_ancestral", scheduler, ddpm_schedule(scheduler)), "eps", scaled=True)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@every_count
def test_dpmpp_sde(steps: int, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = {"eps": "epsilon", "v": "v_prediction"}[prediction]
    scheduler = scheduler_of("scheduling_dpmsolver_sde", "DPMSolverSDEScheduler", **config(prediction_type=kind))
    scheduler.set_timesteps(steps)
    stages_in_double(scheduler)
    peer = Peer(scheduler, monkeypatch, steps, evaluations=2 * steps - 1)
    draws = iter(peer.normals)
    scheduler.noise_sampler = lambda *_: torch.from_numpy(next(draws))
    peer.run(float(scheduler.sigmas[0]), torch.float64)
    peer.compare(at_sigmas("dpmpp_sde", scheduler, ddpm_schedule(scheduler)), prediction, scaled=True)


@pytest.mark.parametrize("correction", ["midpoint", "heun"])
@every_count
def test_dpmpp_2m_sde_of_the_cosine_scheduler(steps: int, correction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"solver_type": correction, "sigma_min": 0.3, "sigma_max": 80.0}
    scheduler = scheduler_of("scheduling_cosine_dpmsolver_multistep", "CosineDPMSolverMultistepScheduler", **options)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    peer = Peer(scheduler, monkeypatch, steps)
    draws = iter(peer.normals)
    scheduler.noise_sampler = lambda *_: torch.from_numpy(next(draws))
    peer.run(1.0, torch.float64)
    peer.raw = -peer.raw  # its c_out has the sign of a v-prediction
    plan = at_sigmas("dpmpp_2m_sde", scheduler, schedules.edm(0.2, 80.5), correction=correction)
    peer.compare(plan, "edm", sigma_data=1.0)


def by_step(peer: Peer, step: Any) -> None:
    """Run `step(raw, time, x, i, normal)` over the scheduler's timesteps."""
    x = torch.from_numpy(peer.latent)
    for i, time in enumerate(peer.scheduler.timesteps[: len(peer.raw)]):
        peer.states.append(x.numpy())
        x = step(torch.from_numpy(peer.raw[i]), time, x, i, torch.from_numpy(peer.normals[i]))
    peer.states.append(x.numpy())


@pytest.mark.parametrize("prediction", ["eps", "x0"])
@pytest.mark.parametrize("steps", STEPS[1:])  # with one step its set_timesteps divides by zero
def test_ddpm_of_unclip(steps: int, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = {"eps": "epsilon", "x0": "sample"}[prediction]
    scheduler = scheduler_of("scheduling_unclip", "UnCLIPScheduler", clip_sample=False, prediction_type=kind)
    scheduler.set_timesteps(steps)
    scheduler.betas = scheduler.betas.double()
    scheduler.alphas = 1.0 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    times = [int(time) for time in scheduler.timesteps]
    peer = Peer(scheduler, monkeypatch, steps)
    module = importlib.import_module("diffusers.schedulers.scheduling_unclip")

    def step(raw: Any, time: Any, x: Any, i: int, normal: Any) -> Any:
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: normal)
        following = times[i + 1] if i + 1 < steps else None
        return scheduler.step(raw, int(time), x, prev_timestep=following, return_dict=False)[0]

    by_step(peer, step)
    schedule = ddpm_schedule(scheduler)
    peer.compare(build("ddpm", schedule, grid=np.array(times, dtype=np.float64)), prediction)


@pytest.mark.parametrize("name", ["DDIMParallelScheduler", "CogVideoXDDIMScheduler"])
@every_count
def test_ddim_by_other_names(steps: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "scheduling_ddim_parallel" if "Parallel" in name else "scheduling_ddim_cogvideox"
    scheduler = scheduler_of(module, name, **config(clip_sample=False))
    scheduler.set_timesteps(steps)
    in_double(scheduler)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0, torch.float64)
    peer.compare(build("ddim", ddpm_schedule(scheduler), grid=scheduler.timesteps.numpy()), "eps")


@every_count
def test_ddpm_parallel(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of("scheduling_ddpm_parallel", "DDPMParallelScheduler", **config(clip_sample=False))
    scheduler.set_timesteps(steps)
    in_double(scheduler)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0, torch.float64)
    peer.compare(build("ddpm", ddpm_schedule(scheduler), grid=scheduler.timesteps.numpy()), "eps")


@every_count
def test_ddpm_of_wuerstchen(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Continuous cosine times from 1 to 0, given to the step one per sample."""
    scheduler = scheduler_of("scheduling_ddpm_wuerstchen", "DDPMWuerstchenScheduler")
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.double()
    scheduler.timesteps = times
    peer = Peer(scheduler, monkeypatch, steps)
    module = importlib.import_module("diffusers.schedulers.scheduling_ddpm_wuerstchen")
    peer.normals[steps - 1] = 0.0  # it ends at alpha_bar = .9999 without noise

    def step(raw: Any, time: Any, x: Any, i: int, normal: Any) -> Any:
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: normal)
        return scheduler.step(raw, time.expand(len(x)), x, return_dict=False)[0]

    by_step(peer, step)
    squares = scheduler._alpha_cumprod(times, "cpu").double().numpy()
    levels = [Level(math.sqrt(a), math.sqrt(1.0 - a), float(t)) for a, t in zip(squares, times, strict=True)]
    plan = compile_levels("ddpm", levels, schedules.vp(), "theirs", {})
    raw, seen = iter(peer.raw), []

    def denoise(x: Array, level: Level) -> Array:
        seen.append(x)
        return (x - level.sigma * next(raw)) / level.alpha

    end = execute(plan, denoise, peer.latent, lambda i, _: peer.normals[i])
    for ours, theirs in zip([*seen, end], peer.states, strict=True):
        assert np.abs(ours - theirs).max() < RTOL * np.abs(theirs).max()


@every_count
def test_dpmpp_2m_sde_of_cogvideox(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old estimate is handed back to its step; the second draw of a step is the one it uses."""
    scheduler = scheduler_of("scheduling_dpm_cogvideox", "CogVideoXDPMScheduler", **config(clip_sample=False))
    scheduler.set_timesteps(steps)
    in_double(scheduler)
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    peer = Peer(scheduler, monkeypatch, steps)
    module = importlib.import_module("diffusers.schedulers.scheduling_dpm_cogvideox")
    times, old = scheduler.timesteps, [None]

    def step(raw: Any, time: Any, x: Any, i: int, normal: Any) -> Any:
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: normal)
        back = times[i - 1] if i else None
        x, old[0] = scheduler.step(raw, old[0], time, back, x, return_dict=False)
        return x

    by_step(peer, step)
    plan = build("dpmpp_2m_sde", ddpm_schedule(scheduler), grid=times.numpy())
    peer.compare(plan, "eps")


@every_count
def test_lcm_on_a_flow(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of("scheduling_flow_match_lcm", "FlowMatchLCMScheduler")
    scheduler.set_timesteps(steps)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0)
    plan = build("lcm", "rectified_flow", grid=scheduler.sigmas.double().numpy())
    peer.compare(plan, "flow")


@every_count
def test_flow_map_euler(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of("scheduling_flow_map_euler_discrete", "FlowMapEulerDiscreteScheduler")
    scheduler.set_timesteps(steps)
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0)
    peer.compare(build("flow_euler", "rectified_flow", grid=scheduler.sigmas.double().numpy()), "flow")


@every_count
def test_scm(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """alpha = cos, sigma = sin of the time: lcm on those levels, the data's spread divided out."""
    scheduler = scheduler_of("scheduling_scm", "SCMScheduler", sigma_data=1.0)
    middle = {} if steps == 2 else {"intermediate_timesteps": None}
    scheduler.set_timesteps(steps, **middle)
    scheduler.timesteps = scheduler.timesteps.double()
    angles = scheduler.timesteps.numpy()
    peer = Peer(scheduler, monkeypatch, steps)
    peer.run(1.0, torch.float64)
    levels = [Level(math.cos(a), math.sin(a), float(a)) for a in angles[:-1]] + [CLEAN]
    plan = compile_levels("lcm", levels, None, "theirs", {})
    raw, seen = iter(peer.raw), []

    def denoise(x: Array, level: Level) -> Array:
        seen.append(x)
        return level.alpha * x - level.sigma * next(raw)

    end = execute(plan, denoise, peer.latent, lambda i, _: peer.normals[i])
    for ours, theirs in zip([*seen, end], peer.states, strict=True):
        assert np.abs(ours - theirs).max() < RTOL * np.abs(theirs).max()


def test_consistency_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two fixed times, and the skip and output scales it reads off its table."""
    scheduler = scheduler_of("scheduling_consistency_decoder", "ConsistencyDecoderScheduler")
    scheduler.set_timesteps(2)
    peer = Peer(scheduler, monkeypatch, 2)
    peer.run(1.0, torch.float64)
    times = [int(time) for time in scheduler.timesteps]
    levels = [
        Level(float(scheduler.sqrt_alphas_cumprod[t]), float(scheduler.sqrt_one_minus_alphas_cumprod[t])) for t in times
    ]
    plan = compile_levels("lcm", [*levels, CLEAN], None, "theirs", {})
    calls, seen = iter(zip(times, peer.raw, strict=True)), []

    def denoise(x: Array, level: Level) -> Array:
        seen.append(x)
        t, raw = next(calls)
        return float(scheduler.c_out[t]) * raw + float(scheduler.c_skip[t]) * x

    end = execute(plan, denoise, peer.latent, lambda i, _: peer.normals[i])
    for ours, theirs in zip([*seen, end], peer.states, strict=True):
        assert np.abs(ours - theirs).max() < RTOL * np.abs(theirs).max()


@pytest.mark.parametrize("s_churn", [0.0, 8.0])
@every_count
def test_edm_of_karras_ve(steps: int, s_churn: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alg. 2 with Heun, its network's output being (D - x) / sigma."""
    sigmas = np.append(np.geomspace(45.0, 0.06, steps) if steps > 1 else [45.0], 0.0)  # all within its s_min and s_max
    scheduler = scheduler_of("deprecated.scheduling_karras_ve", "KarrasVeScheduler", s_churn=s_churn)
    scheduler.num_inference_steps = steps
    module = importlib.import_module("diffusers.schedulers.deprecated.scheduling_karras_ve")
    peer = Peer(scheduler, monkeypatch, steps, evaluations=2 * steps - 1)
    draws, raws = iter(peer.normals), iter(peer.raw)
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: torch.from_numpy(next(draws)))
    x = torch.from_numpy(45.0 * peer.latent)
    start = x.numpy()
    for s, t in itertools.pairwise(sigmas):
        s_hat = s
        if s_churn:
            x, s_hat = scheduler.add_noise_to_input(x, s)
        raw = torch.from_numpy(next(raws))
        peer.states.append(x.numpy())
        ahead, slope = scheduler.step(raw, s_hat, t, x, return_dict=False)
        if t > 0.0:
            peer.states.append(ahead.numpy())
            raw = torch.from_numpy(next(raws))
            ahead = scheduler.step_correct(raw, s_hat, t, x, ahead, slope, return_dict=False)[0]
        x = ahead
    peer.states.append(x.numpy())
    options = {"s_churn": s_churn, "s_tmin": scheduler.config.s_min, "s_tmax": scheduler.config.s_max}
    options["s_noise"] = float(scheduler.config.s_noise)
    plan = build("edm", schedules.edm(0.002, 80.0), grid=sigmas, grid_options={"unit": "rho"}, **options)
    raws, seen = iter(peer.raw), []

    def denoise(x: Array, level: Level) -> Array:
        seen.append(x)
        return x + level.sigma * next(raws)

    end = execute(plan, denoise, start, lambda i, _: peer.normals[i])
    for ours, theirs in zip([*seen, end], peer.states, strict=True):
        assert np.abs(ours - theirs).max() < RTOL * np.abs(theirs).max()


@every_count
def test_reverse_diffusion_of_score_sde(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`step_pred` on its own geometric sigmas: its states after the mean, and no noise in our last step."""
    scheduler = scheduler_of("scheduling_sde_ve", "ScoreSdeVeScheduler", num_train_timesteps=steps, sigma_max=50.0)
    scheduler.set_timesteps(steps)
    scheduler.set_sigmas(steps)
    scheduler.timesteps = scheduler.timesteps.double()
    scheduler.discrete_sigmas = scheduler.discrete_sigmas.double()
    sigmas = scheduler.discrete_sigmas.numpy()[::-1]
    peer = Peer(scheduler, monkeypatch, steps)
    module = importlib.import_module("diffusers.schedulers.scheduling_sde_ve")
    x = mean = torch.from_numpy(50.0 * peer.latent)
    for i, time in enumerate(scheduler.timesteps):
        peer.states.append(x.numpy())
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(peer.normals[i]))  # noqa: B023
        x, mean = scheduler.step_pred(torch.from_numpy(peer.raw[i]), time, x, return_dict=False)
    # their last step goes from the smallest sigma to 0, with x + sigma^2 score, which is D
    peer.states.append(mean.numpy())
    grid = np.ascontiguousarray(sigmas)
    plan = build("reverse_diffusion", schedules.ve(0.009, 51.0), grid=grid, grid_options={"unit": "rho"})
    raws, seen = iter(peer.raw), []

    def denoise(x: Array, level: Level) -> Array:
        seen.append(x)
        return x + level.sigma**2 * next(raws)

    end = execute(plan, denoise, peer.states[0], lambda i, _: peer.normals[i])
    for ours, theirs in zip([*seen, end], peer.states, strict=True):
        assert np.abs(ours - theirs).max() < RTOL * np.abs(theirs).max()


@pytest.mark.parametrize("steps", [2, 3, 10, 14, 15, 20, 50])
def test_euler_maruyama_of_score_sde(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`step_pred` with the schedule's own beta(t); its step has the length 1/N, so ours are at equal times."""
    scheduler = scheduler_of("deprecated.scheduling_sde_vp", "ScoreSdeVpScheduler")
    scheduler.timesteps = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    peer = Peer(scheduler, monkeypatch, steps)
    module = importlib.import_module("diffusers.schedulers.deprecated.scheduling_sde_vp")
    x = torch.from_numpy(peer.latent)
    for i, time in enumerate(scheduler.timesteps[:-1]):
        peer.states.append(x.numpy())
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(peer.normals[i]))  # noqa: B023
        x, _ = scheduler.step_pred(torch.from_numpy(peer.raw[i]), x, time)
    peer.states.append(x.numpy())
    schedule = schedules.vp()
    plan = build("euler_maruyama", schedule, grid=scheduler.timesteps.numpy())
    raws, seen = iter(peer.raw), []

    def denoise(x: Array, level: Level) -> Array:
        seen.append(x)  # their network's output is the noise
        return (x - level.sigma * next(raws)) / level.alpha

    execute(plan, denoise, peer.states[0], lambda i, _: peer.normals[i])
    # what enters our last evaluation is their last state
    assert len(seen) == len(peer.states) == steps
    for ours, theirs in zip(seen, peer.states, strict=True):
        assert np.abs(ours - theirs).max() < RTOL * np.abs(theirs).max()
