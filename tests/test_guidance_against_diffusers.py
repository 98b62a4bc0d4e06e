"""Guidance end to end against diffusers: its guiders in a float64 loop, its schedulers, a pipeline's formula.

The guiders are called with both branches of the same network; only the combination is theirs.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
from diffusers import guiders
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
from diffusers.guiders.guider_utils import rescale_noise_cfg
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from guided_cases import (
    ALL,
    BACKENDS,
    CLOSE,
    GUIDED,
    SHAPE,
    Asked,
    error,
    in_double,
    label,
    labelled,
    latents,
    weights,
    wrapped,
)
from peers import NAMES, at_sigmas, config, ddpm_schedule
from peers import in_double as tables_in_double

import fastdiff as fd
from fastdiff.compiler.plan import Plan
from fastdiff.engine.guidance import APG, CFGZero, DynamicThreshold, Rescale

WEIGHTS = [3.0, 7.5, 1.5]


def guided(at: Asked, w: float | list[float]) -> Tensor:
    return at.uncond + weights(w) * (at.cond - at.uncond)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("phi", [0.7, 1.0])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_rescale(prediction: str, phi: float, backend: str) -> None:
    model = wrapped("linear", prediction)
    plan = fd.plan("dpmpp_2m", "linear", 6)

    def theirs(at: Asked) -> Tensor:
        return at.denoised(rescale_noise_cfg(guided(at, WEIGHTS), at.cond, phi))

    ours = fd.Sampler(plan, model, backend).sample(SHAPE, **GUIDED, guidance=WEIGHTS, rule=Rescale(phi))
    assert error(ours, in_double(plan, model, theirs)) < CLOSE
    assert error(ours, in_double(plan, model, lambda at: at.denoised(guided(at, WEIGHTS)))) > 0.05


class Apg:
    """diffusers' APG over a run; its norms, to know that the threshold shortens in some rows and not in all."""

    def __init__(self, w: float, eta: float, momentum: float, radius: float) -> None:
        # the original formulation is Dc + (w - 1) (...); their default adds the projected part to Du with weight w
        self.guider = guiders.AdaptiveProjectedGuidance(
            w - 1.0,
            adaptive_projected_guidance_rescale=radius,
            eta=eta,
            use_original_formulation=True,
        )
        self.guider.momentum_buffer = MomentumBuffer(momentum)
        self.lengths: list[Tensor] = []

    def __call__(self, at: Asked) -> Tensor:
        pred = self.guider.forward(at.cond, at.uncond).pred
        self.lengths.append(self.guider.momentum_buffer.running_average.flatten(1).norm(dim=1))
        return pred


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("eta", "momentum", "radius"), [(0.0, -0.5, 0.0), (0.0, 0.0, 2.05), (1.0, 0.7, 3.5), (0.4, -0.5, 1.8)]
)
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_apg(solver: str, eta: float, momentum: float, radius: float, backend: str) -> None:
    """On an x0 network: diffusers projects raw outputs, the paper denoised estimates, and there the two are one."""
    model = wrapped("linear", "x0")
    plan = fd.plan(solver, "linear", 6)
    theirs = Apg(5.0, eta, momentum, radius)
    expected = in_double(plan, model, theirs)
    rule = APG(eta, momentum, radius)
    ours = fd.Sampler(plan, model, backend).sample(SHAPE, **GUIDED, guidance=5.0, rule=rule)
    assert error(ours, expected) < CLOSE
    if radius:
        shortened = torch.stack(theirs.lengths) > radius
        assert shortened.any() and not shortened.all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("zero_init", [0, 1, 2])
@pytest.mark.parametrize("solver", ["flow_euler", "heun"])
def test_cfg_zero(solver: str, zero_init: int, backend: str) -> None:
    """diffusers counts the pipeline's steps, we count evaluations: two of Heun's are one step.

    Its guider is told here which evaluation it is. It adds 1e-8 to <Fu, Fu>, which is 70 elements of order 1.
    """
    model = wrapped("rectified_flow", "flow")
    plan = fd.plan(solver, "rectified_flow", 5, "flow_shift")
    guider = guiders.ClassifierFreeZeroStarGuidance(4.0, zero_init_steps=zero_init)

    def theirs(at: Asked) -> Tensor:
        guider.set_state(at.number, plan.nfe, at.fold.time)
        return at.denoised(guider.forward(at.cond, at.uncond).pred)

    sampler = fd.Sampler(plan, model, backend)
    states: list[Tensor] = []
    ours = sampler.sample(
        SHAPE, **GUIDED, guidance=4.0, rule=CFGZero(zero_init), callback=lambda at: states.append(at.state.clone())
    )
    assert error(ours, in_double(plan, model, theirs)) < CLOSE
    for state in states[:zero_init]:
        assert error(state, latents(range(3), SHAPE[1:])) < 1e-6  # velocity 0: the state stands still


def run_scheduler(
    scheduler: Any, model: fd.Denoiser, w: float, draws: Tensor, monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """diffusers' own loop in float64, guided, its noise given."""
    drawn = iter(draws.double())
    module = sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(drawn), raising=False)
    x = latents(range(SHAPE[0]), SHAPE[1:]) * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        now = torch.full(SHAPE[:1], float(time), dtype=torch.float64)
        cond, uncond = (model.net(x, now, label(name).double()) for name in ("cond", "uncond"))
        if cond.shape[1] != x.shape[1]:  # a learned variance stays the conditional branch's
            cond, variance = cond.chunk(2, dim=1)
            uncond = uncond.chunk(2, dim=1)[0]
            output = torch.cat([uncond + w * (cond - uncond), variance], dim=1)
        else:
            output = uncond + w * (cond - uncond)
        x = scheduler.step(output, time, x, return_dict=False)[0]
    return x


def ancestral(steps: int, spacing: str = "leading", solver_options: Any = None, **options: Any) -> tuple[Any, Plan]:
    """A DDPMScheduler and our plan on its timesteps, latents of unit variance as its pipelines draw them."""
    scheduler = DDPMScheduler(**config(timestep_spacing=spacing, **{"clip_sample": False, **options}))
    scheduler.set_timesteps(steps)
    tables_in_double(scheduler)
    return scheduler, fd.plan(
        "ddpm", ddpm_schedule(scheduler), grid=scheduler.timesteps.numpy(), **solver_options or {}
    )


def noises(count: int) -> Tensor:
    """Unit normals; the last is 0: from a last time above 0 diffusers adds noise to the finished sample."""
    draws = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))
    draws[-1] = 0.0
    return draws


def ours_on(plan: Plan, model: fd.Denoiser, w: float, draws: Tensor, backend: str, **options: Any) -> Tensor:
    """Our run from the scheduler's start: its latents are not multiplied by sigma."""
    start = latents(range(SHAPE[0]), SHAPE[1:]).float()
    return fd.Sampler(plan, model, backend).sample(
        SHAPE, init=start, noise=draws[: plan.draws], **GUIDED, guidance=w, **options
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("w", [1.0, 6.0])
@pytest.mark.parametrize(("percentile", "ceiling"), [(0.9, 100.0), (0.995, 1.5), (0.5, 1.0)])
def test_dynamic_threshold_in_ddpm(
    percentile: float, ceiling: float, w: float, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, plan = ancestral(
        8,
        thresholding=True,
        dynamic_thresholding_ratio=percentile,
        sample_max_value=ceiling,
    )
    model = fd.Denoiser(labelled, plan.schedule, "eps")
    draws = noises(8)
    rule = DynamicThreshold(percentile, ceiling)
    expected = run_scheduler(scheduler, model, w, draws, monkeypatch)
    assert error(ours_on(plan, model, w, draws, backend, threshold=rule), expected) < CLOSE
    assert error(ours_on(plan, model, w, draws, backend), expected) > 0.05


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("w", [1.0, 6.0])
def test_dynamic_threshold_in_dpmpp(w: float, prediction: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = config(
        prediction_type=NAMES[prediction], final_sigmas_type="zero",
        thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=50.0,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(**options)
    scheduler.set_timesteps(10)
    plan = at_sigmas("dpmpp_2m", scheduler, ddpm_schedule(scheduler))
    model = fd.Denoiser(labelled, plan.schedule, prediction)
    draws = noises(1)
    expected = run_scheduler(scheduler, model, w, draws, monkeypatch)
    assert error(ours_on(plan, model, w, draws, backend, threshold=DynamicThreshold(0.9, 50.0)), expected) < CLOSE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bound", [1.0, 0.6])
def test_clamp_is_clip_sample(bound: float, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, plan = ancestral(
        8, clip_sample=True, clip_sample_range=bound, solver_options={"clamp": (-bound, bound)}
    )  # fmt: skip
    model = fd.Denoiser(labelled, plan.schedule, "eps")
    draws = noises(8)
    ours = ours_on(plan, model, 4.0, draws, backend)
    assert error(ours, run_scheduler(scheduler, model, 4.0, draws, monkeypatch)) < CLOSE
    assert ours.abs().max() == torch.tensor(bound)


def with_variance(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """F and V in [-1, 1], another for each branch."""
    return torch.cat([labelled(x, t, label), torch.sin(3 * x + 5 * label.to(x.dtype).view(-1, 1, 1, 1))], dim=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("w", [1.0, 3.0])
@pytest.mark.parametrize(("steps", "spacing"), [(1, "trailing"), (2, "leading"), (5, "leading"), (20, "leading")])
def test_learned_range(steps: int, spacing: str, w: float, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With guidance the variance is the conditional branch's, as in guided-diffusion and DiT."""
    learned = {"variance": "learned_range"}
    scheduler, plan = ancestral(steps, spacing, learned, variance_type="learned_range")
    model = fd.Denoiser(with_variance, plan.schedule, "eps", learned_variance=True)
    draws = noises(steps)
    expected = run_scheduler(scheduler, model, w, draws, monkeypatch)
    assert error(ours_on(plan, model, w, draws, backend), expected) < CLOSE


def skipping(kind: str, w: float, s: float, rescale: float) -> Any:
    """diffusers' guider; told of no step, its start and stop do not count."""
    common = {"guidance_scale": w, "guidance_rescale": rescale}
    if kind == "PAG":
        return guiders.PerturbedAttentionGuidance(
            perturbed_guidance_scale=s, perturbed_guidance_layers=[0], **common
        )  # fmt: skip
    return guiders.SkipLayerGuidance(skip_layer_guidance_scale=s, skip_layer_guidance_layers=[0], **common)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["PAG", "SLG"])
@pytest.mark.parametrize(("w", "rescale"), [(4.0, 0.0), (4.0, 0.7), (1.0, 0.0), (1.0, 0.7)])
def test_perturbed_branch(w: float, rescale: float, kind: str, backend: str) -> None:
    """Without guidance diffusers takes Fp + s (Fc - Fp), so its s is ours plus 1 there."""
    model = wrapped("linear", "eps")
    plan = fd.plan("dpmpp_2m", "linear", 6)
    guider = skipping(kind, w, 2.5 if w != 1.0 else 3.5, rescale)

    def theirs(at: Asked) -> Tensor:
        return at.denoised(guider.forward(at.cond, at.uncond, at.perturbed).pred)

    ours = fd.Sampler(plan, model, backend).sample(
        SHAPE, **ALL, guidance=w, perturbed_scale=2.5, rule=Rescale(rescale) if rescale else None
    )
    assert error(ours, in_double(plan, model, theirs)) < CLOSE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("s_image", [1.0, 1.6])
def test_three_conditions_of_instruct_pix2pix(s_image: float, backend: str) -> None:
    """Brooks et al. 2023, eq. 3, as in diffusers' pipeline, with (image, text), (image, none) and (none, none):

    F = F00 + s_image (Fi0 - F00) + s_text (Fit - Fi0) is our F = Fu + w (Fc - Fu) + s (Fc - Fp) with Fc = Fit,
    Fu = F00, Fp = Fi0, w = s_image and s = s_text - s_image.
    """
    s_text = 7.5
    model = wrapped("scaled_linear", "eps")
    plan = fd.plan("euler_ancestral", "scaled_linear", 6)

    def published(at: Asked) -> Tensor:
        text_and_image, nothing, image = at.cond, at.uncond, at.perturbed
        return at.denoised(nothing + s_text * (text_and_image - image) + s_image * (image - nothing))

    draws = torch.randn(plan.draws, *SHAPE, generator=torch.Generator().manual_seed(1))
    ours = fd.Sampler(plan, model, backend).sample(
        SHAPE, noise=draws, **ALL, guidance=s_image, perturbed_scale=s_text - s_image
    )
    assert error(ours, in_double(plan, model, published, draws=draws)) < CLOSE


LINEAR: list[dict[str, Any]] = [
    {"cfg_pp": True},
    {"interval": (1.0, 10.0)},
    {"schedule": [1.0, 0.5, 0.0, 2.0, 1.0]},
    {"clamp": (-1.0, 1.0)},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", LINEAR, ids=str)
@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_captured_plans_are_guided_as_ours(kind: Any, options: dict[str, Any], backend: str) -> None:
    """DDIM in three coordinates and from two sides: a scheduler's table guided afterwards, and our own."""
    own = {DDIMScheduler: {"clip_sample": False}, EulerDiscreteScheduler: {}}
    scheduler = kind(**config(**own.get(kind, {"solver_order": 1, "final_sigmas_type": "zero"})))
    captured = fd.capture(scheduler, steps=5)
    scheduler.set_timesteps(5)
    plan = fd.plan("ddim", ddpm_schedule(scheduler), grid=scheduler.timesteps.numpy())
    model = fd.Denoiser(labelled, plan.schedule, "eps")
    start = latents(range(SHAPE[0]), SHAPE[1:])
    samples = [
        fd.Sampler(p.guided(**options), model, backend).sample(
            SHAPE, init=(p.levels[0].sigma * start).float(), **GUIDED, guidance=0.6
        )
        for p in (captured, plan)
    ]
    assert error(samples[0], samples[1].double()) < CLOSE


def test_cfg_pp_refuses_a_table_that_uses_the_output_as_it_was() -> None:
    plan = fd.capture(DDIMScheduler(**config(clip_sample=True)), steps=4)
    with pytest.raises(ValueError, match="cfg_pp: capture:DDIMScheduler uses the second estimate of its rows itself"):
        plan.guided(cfg_pp=True)
