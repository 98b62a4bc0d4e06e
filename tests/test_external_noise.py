"""Noise a caller gives, as a tensor or a function, to every sampler that draws; and what does not fit."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from peers import k_diffusion_sampling
from test_brownian_solvers import STOCHASTIC

import fastdiff as fd
from fastdiff.compiler import solvers
from fastdiff.engine import noise

SHAPE = (2, 3, 5, 4)
stochastic = pytest.mark.parametrize(
    ("solver", "options"), STOCHASTIC, ids=["-".join([s, *map(str, o.values())]) for s, o in STOCHASTIC]
)


def sampler_of(solver: str, options: dict[str, Any]) -> fd.Sampler:
    flow = solvers.get(solver).flow_only
    schedule, grid = ("rectified_flow", "linspace") if flow else ("vp", "logsnr")
    model = fd.Denoiser(lambda x, t: torch.tanh(x), schedule, "x0")
    return fd.Sampler(fd.plan(solver, model.schedule, 5, grid, **options), model)


@stochastic
def test_a_tensor_and_a_function_replace_the_counters(solver: str, options: dict[str, Any]) -> None:
    """Given the normals it would have drawn, a sampler makes the same sample, bit for bit."""
    sampler = sampler_of(solver, options)
    plan = sampler.plan
    given = {name: torch.full(SHAPE, 0.3) for name in plan.given}
    own = [[noise.normal(seed, 60, i, 1).reshape(SHAPE[1:]) for seed in (0, 1)] for i in range(plan.draws)]
    draws = torch.from_numpy(np.array(own))
    asked: list[tuple[int, torch.Size]] = []

    def function(index: int, shape: torch.Size) -> torch.Tensor:
        asked.append((index, shape))
        return draws[index]

    white = sampler.sample(SHAPE, given=given)
    assert torch.equal(white, sampler.sample(SHAPE, noise=draws, given=given))
    assert torch.equal(white, sampler.sample(SHAPE, noise=function, given=given))
    assert asked == [(i, torch.Size(SHAPE)) for i in range(plan.draws)]
    assert not torch.equal(white, sampler.sample(SHAPE, noise=-draws, given=given))
    for wrong in (draws[:-1], torch.cat([draws, draws[:1]]), draws[:, :1], draws[..., :-1]):
        with pytest.raises(ValueError, match=rf"noise must have shape \({plan.draws}, 2, 3, 5, 4\)"):
            sampler.sample(SHAPE, noise=wrong, given=given)


def test_what_is_no_noise() -> None:
    sampler = sampler_of("ddpm", {})
    with pytest.raises(
        ValueError, match=r"noise\(0, shape\) must return a tensor of shape \(2, 3, 5, 4\), got \(3, 5, 4\)"
    ):
        sampler.sample(SHAPE, noise=lambda i, shape: torch.zeros(shape[1:]))
    with pytest.raises(ValueError, match=r"noise\(0, shape\) must return .* got ndarray"):
        sampler.sample(SHAPE, noise=lambda i, shape: np.zeros(shape))  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match="noise must be 'white', 'brownian', a FrameNoise, .* got ndarray"):
        sampler.sample(SHAPE, noise=np.zeros((4, *SHAPE)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"noise is the class FrameNoise; give an object of it: FrameNoise\(\.\.\.\)"):
        sampler.sample(SHAPE, noise=fd.FrameNoise)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="noise must be 'white', .* got 'pink'"):
        sampler.sample(SHAPE, noise="pink")


def test_a_deterministic_sampler_takes_noise_of_no_draws() -> None:
    sampler = sampler_of("ddim", {})
    white = sampler.sample(SHAPE)
    assert torch.equal(white, sampler.sample(SHAPE, noise=torch.zeros(0, *SHAPE)))
    assert torch.equal(white, sampler.sample(SHAPE, noise=lambda i, shape: torch.zeros(shape)))
    with pytest.raises(ValueError, match=r"noise must have shape \(0, 2, 3, 5, 4\)"):
        sampler.sample(SHAPE, noise=torch.zeros(1, *SHAPE))


def test_s_noise_and_eta_are_where_k_diffusion_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = k_diffusion_sampling(monkeypatch)
    missing = []
    for name, function in inspect.getmembers(sampling, inspect.isfunction):
        ours = name.removeprefix("sample_")
        if name.startswith("sample_") and ours in solvers.names():
            theirs = inspect.signature(function).parameters
            known = solvers.get(ours).options()
            wanted = {"eta", "s_noise", "s_churn", "s_tmin", "s_tmax", "r"} & theirs.keys()
            missing += [f"{ours}.{option}" for option in sorted(wanted - known.keys())]
            assert all(known[o] == theirs[o].default for o in wanted & known.keys())
    assert not missing
