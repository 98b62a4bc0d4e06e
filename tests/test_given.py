"""Tensors a caller gives to a solver: mean-reverting diffusion with its degraded image, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.compiler import solvers
from fastdiff.compiler.build import plan as build
from fastdiff.compiler.run import Run
from fastdiff.compiler.verify import GIVEN, execute, propagate
from fastdiff.engine import noise
from fastdiff.process.schedules import Level

Array = np.ndarray[Any, np.dtype[np.float64]]
BACKENDS = [name for name in ("reference", "cpp") if fd.backends()[name].ok]
SHAPE = (2, 3, 4, 5)


def images(seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(SHAPE)).float()


@pytest.mark.parametrize("noise", ["ode", "sde"])
@pytest.mark.parametrize("prediction", ["x0", "eps"])
def test_the_law_is_the_closed_form_of_the_mean_reverting_sde(noise: str, prediction: str) -> None:
    """x_t | x0 ~ N(alpha x0 + (1 - alpha) mu, sigma^2) at every level (Luo et al. 2023, eq. 6), to rounding."""
    for order in (1, 2, 3):
        plan = build("mean_reverting", "vp", 8, "logsnr", order=order, noise=noise, prediction=prediction)
        states = propagate(plan, [0.0, 1.5], [0.0, 0.0])
        for level, mean, variance in zip(states.levels, states.mean, states.variance, strict=True):
            expected = level.alpha * np.array([0.0, 1.5]) + (1.0 - level.alpha) * GIVEN
            np.testing.assert_allclose(mean, expected, atol=1e-12)
            np.testing.assert_allclose(variance, level.sigma**2, rtol=1e-10, atol=1e-14)


def test_gaussian_data_come_out_of_mu_plus_noise() -> None:
    """From mu + sigma n, as the paper starts, to the law of the data: N(1, v), whatever mu is, as the steps grow."""
    v = np.array([0.05, 0.5, 2.0])
    errors = []
    for steps in (20, 40, 80):
        plan = build("mean_reverting", "vp", steps, "logsnr", noise="sde")
        end = propagate(plan, 1.0, v, start="noise")
        before = end.variance[-2] / (plan.levels[-2].alpha ** 2 * v + plan.levels[-2].sigma ** 2) - 1.0
        # from pure noise the mean remembers alpha_0 (mu - 1), which the data's own shrinkage divides again
        assert np.abs(end.mean[-1] - 1.0).max() < 3.0 * plan.levels[0].alpha
        errors.append(np.abs(before).max())
    assert math.log2(errors[1] / errors[2]) == pytest.approx(2.0, abs=0.35)


def test_a_network_of_the_noise_takes_the_published_step() -> None:
    """MRS-ODE-1 in its noise form: x' = (a_t/a_s) x - sigma_t (e^h - 1) eps + mu (1 - a_t/a_s)."""
    plan = build("mean_reverting", "vp", 7, "logsnr", order=1, prediction="eps")
    rng = np.random.default_rng(0)
    raw, mu, start = rng.standard_normal((plan.nfe, 4)), rng.standard_normal(4), rng.standard_normal(4)
    states: list[Array] = []

    def denoise(x: Array, level: Level) -> Array:
        states.append(x)
        return (x - level.sigma * raw[len(states) - 1]) / level.alpha

    states.append(execute(plan, denoise, start, given={"mu": mu}))
    x = start
    for i, (s, t) in enumerate(zip(plan.levels[:-1], plan.levels[1:], strict=True)):
        np.testing.assert_allclose(states[i], x, rtol=1e-9, atol=1e-9)
        growth = t.sigma * math.expm1(t.lam - s.lam) if t.sigma > 0.0 else s.sigma / s.alpha
        x = t.alpha / s.alpha * x - growth * raw[i] + mu * (1.0 - t.alpha / s.alpha)
    np.testing.assert_allclose(states[-1], x, rtol=1e-9, atol=1e-9)


def recorded(prediction: str, seen: list[torch.Tensor]) -> fd.Denoiser:
    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(x.clone())
        return torch.tanh(x) * 0.5

    return fd.Denoiser(net, "vp", prediction)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prediction", ["x0", "eps"])
def test_the_engine_restores_from_the_degraded_image(backend: str, prediction: str) -> None:
    """fp32 runs from mu + sigma n, twice on one sampler, against `execute` on the same network."""
    seen: list[torch.Tensor] = []
    model = recorded(prediction, seen)
    plan = fd.plan("mean_reverting", model.schedule, 6, "logsnr", noise="sde", prediction=prediction)
    sampler = fd.Sampler(plan, model, backend)
    for seed in (3, 4):
        seen.clear()
        mu = images(seed)
        got = sampler.sample(SHAPE, seed=[seed, 9], given={"mu": mu})
        draw = {s: [noise.normal(s, 60, i, 1).reshape(SHAPE[1:]) for i in range(plan.draws)] for s in (seed, 9)}
        latent = np.stack([noise.normal(s, 60, 0, 0).reshape(SHAPE[1:]) for s in (seed, 9)])
        start = mu.double().numpy() + plan.levels[0].sigma * latent
        np.testing.assert_allclose(seen[0], start, rtol=1e-5, atol=1e-5)

        def denoise(x: Array, level: Level) -> Array:
            raw = 0.5 * np.tanh(x)
            return raw if prediction == "x0" else (x - level.sigma * raw) / level.alpha

        drawn = {i: np.stack([draw[s][i] for s in (seed, 9)]) for i in range(plan.draws)}
        expected = execute(plan, denoise, start, lambda i, _, drawn=drawn: drawn[i], {"mu": mu.double().numpy()})
        size = 1.0 / min(level.alpha for level in plan.levels)  # a reading of the noise divides by alpha
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6 * size)


def test_an_image_is_noised_about_mu_and_a_state_is_used_as_it_is() -> None:
    seen: list[torch.Tensor] = []
    model = recorded("x0", seen)
    plan = fd.plan("mean_reverting", model.schedule, 6, "logsnr", strength=0.5)
    first, mu, image = plan.levels[0], images(0), images(1)
    sampler = fd.Sampler(plan, model)
    sampler.sample(SHAPE, init=image, given={"mu": mu})
    sampler.sample(SHAPE, init=image, opening="image", given={"mu": mu})
    fd.sample(model, SHAPE, "mean_reverting", 6, "logsnr", strength=0.5, init=image, given={"mu": mu})
    latent = torch.stack([torch.from_numpy(noise.normal(s, 60, 0, 0)).view(SHAPE[1:]) for s in (0, 1)])
    noised = first.alpha * image + (1.0 - first.alpha) * mu + first.sigma * latent
    assert torch.equal(seen[0], image)
    assert torch.allclose(seen[plan.nfe], noised, atol=1e-6)
    assert torch.equal(seen[plan.nfe], seen[2 * plan.nfe])


def pulled(run: Run, x: Any, pull: float = 0.25) -> Any:
    """Each step ends a little nearer to the tensor given as "target", and the last one adds "offset"."""
    target, offset = run.given("target"), run.given("offset")
    for _, s, t in run.intervals():
        denoised = run.denoise(x, s)
        x = denoised + (t.sigma / s.sigma) * (x - denoised) + pull * (target - denoised)
    return x + offset


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_solver_of_ones_own_takes_tensors(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiff.compiler.solvers.registry._SOLVERS", dict(solvers.registry._SOLVERS))
    solvers.solver("pulled_here", order=1)(pulled)
    plan = fd.plan("pulled_here", "edm", 5, "karras")
    assert fd.Plan.from_json(plan.to_json()) == plan and plan.given == {"target": 1, "offset": 2}
    assert "given: target, in r1 at the start" in plan.explain()
    model = fd.Denoiser(lambda x, t: torch.tanh(x), fd.schedules.edm(), "x0")
    given = {"target": images(5), "offset": images(6)}
    start = 80.0 * images(7)
    expected = execute(plan, lambda x, _: np.tanh(x), start.numpy(), None, {k: v.numpy() for k, v in given.items()})
    for layout in (torch.contiguous_format, torch.channels_last):
        sampler = fd.Sampler(plan, model, backend, memory_format=layout)
        for _ in range(2):
            np.testing.assert_allclose(sampler.sample(SHAPE, init=start, given=given), expected, rtol=1e-5, atol=1e-5)


def about(run: Run, x: Any) -> Any:
    """One step; what the start holds besides the centre is kept by the opening row and returned."""
    centre = run.given("centre", centre=True)
    rest = run.keep(x - centre)
    return 0.0 * run.denoise(x, run.levels[0]) + rest


def test_the_opening_row_may_read_the_centre_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiff.compiler.solvers.registry._SOLVERS", dict(solvers.registry._SOLVERS))
    solvers.solver("about_here", order=0)(about)
    seen: list[torch.Tensor] = []
    model = recorded("x0", seen)
    plan = fd.plan("about_here", model.schedule, 1)
    sampler, centre = fd.Sampler(plan, model), images(2)
    latent = torch.stack([torch.from_numpy(noise.normal(s, 60, 0, 0)).view(SHAPE[1:]) for s in (0, 1)])
    sigma = plan.levels[0].sigma
    assert torch.allclose(sampler.sample(SHAPE, given={"centre": centre}), sigma * latent, atol=1e-6)
    assert torch.allclose(seen[-1], centre + sigma * latent, atol=1e-6)
    assert torch.allclose(sampler.sample(SHAPE, init=centre, given={"centre": centre}), torch.zeros(SHAPE), atol=1e-6)


def test_refusals() -> None:
    model = fd.Denoiser(lambda x, t: x, "vp", "x0")
    sampler = fd.Sampler(fd.plan("mean_reverting", model.schedule, 4, "logsnr"), model)
    mu = torch.zeros(SHAPE)
    with pytest.raises(
        ValueError, match=r"mean_reverting takes given=\{'mu': tensor\}, got none; give a tensor of shape"
    ):
        sampler.sample(SHAPE)
    with pytest.raises(ValueError, match=r"takes given=\{'mu': tensor\}, got mu, nu"):
        sampler.sample(SHAPE, given={"mu": mu, "nu": mu})
    with pytest.raises(ValueError, match=r"given\['mu'\] must be a floating-point tensor of shape \(2, 3, 4, 5\)"):
        sampler.sample(SHAPE, given={"mu": mu[:1]})
    with pytest.raises(ValueError, match="floating-point"):
        sampler.sample(SHAPE, given={"mu": mu.int()})
    with pytest.raises(TypeError, match=r"given\['mu'\] must be a tensor of shape .*, got ndarray"):
        sampler.sample(SHAPE, given={"mu": mu.numpy()})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"given\['mu'\] holds inf or nan"):
        sampler.sample(SHAPE, given={"mu": mu / 0.0})
    with pytest.raises(ValueError, match="ddim takes no given=, got mu"):
        fd.sample(model, SHAPE, "ddim", 4, given={"mu": mu})
    with pytest.raises(ValueError, match="for a network that predicts 'x0', got one that predicts 'eps'; its option"):
        fd.Sampler(fd.plan("mean_reverting", "vp", 4, "logsnr"), fd.Denoiser(lambda x, t: x, "vp", "eps"))
    with pytest.raises(ValueError, match="says nothing of the image where alpha = 0"):
        fd.plan("mean_reverting", "rectified_flow", 4, "trailing", prediction="eps")
    with pytest.raises(ValueError, match="prediction must be 'x0' or 'eps' or 'score'"):
        fd.plan("mean_reverting", "vp", 4, prediction="v")
    with pytest.raises(ValueError, match=r"this plan takes given=\{mu\}, got \[\]"):
        execute(fd.plan("mean_reverting", "vp", 2), lambda x, _: x, np.zeros(3))
