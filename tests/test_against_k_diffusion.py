"""The samplers against k-diffusion's functions: same sigmas, the same random estimates and noise, every state.

k-diffusion is no dependency; its file of samplers is read from where it is installed, and the tests skip without it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from peers import SIZE, Denoised, k_diffusion_sampling

from fastdiff.compiler.build import plan as build
from fastdiff.process import schedules

STEPS = (1, 2, 3, 10, 14, 15, 20, 50)
RTOL = {1: 1e-5, 2: 1e-5, 3: 1e-4, 4: 1e-4}
CHURN = {"s_churn": 8.0, "s_tmin": 0.1, "s_tmax": 40.0, "s_noise": 1.01}
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any], int]] = [
    ("euler", "sample_euler", {}, {}, 1),
    ("euler", "sample_euler", CHURN, CHURN, 1),
    ("euler_ancestral", "sample_euler_ancestral", {"eta": 0.7}, {"eta": 0.7}, 1),
    ("euler_ancestral", "sample_euler_ancestral", {"s_noise": 1.1}, {"s_noise": 1.1}, 1),
    ("dpmpp_2s_ancestral", "sample_dpmpp_2s_ancestral", {"s_noise": 1.1}, {"s_noise": 1.1}, 2),
    ("dpmpp_sde", "sample_dpmpp_sde", {"s_noise": 0.9}, {"s_noise": 0.9}, 2),
    ("dpmpp_2m_sde", "sample_dpmpp_2m_sde", {"s_noise": 0.9}, {"s_noise": 0.9}, 2),
    ("heun", "sample_heun", {}, {}, 2),
    ("heun", "sample_heun", CHURN, CHURN, 2),
    ("edm", "sample_heun", {"s_churn": 0.0}, {}, 2),
    ("edm", "sample_heun", {}, {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}, 2),
    ("dpm_2", "sample_dpm_2", {}, {}, 2),
    ("dpm_2", "sample_dpm_2", CHURN, CHURN, 2),
    ("dpm_2_ancestral", "sample_dpm_2_ancestral", {}, {}, 2),
    ("dpm_2_ancestral", "sample_dpm_2_ancestral", {"eta": 0.4, "s_noise": 1.1}, {"eta": 0.4, "s_noise": 1.1}, 2),
    ("lms", "sample_lms", {"flavor": "k_diffusion"}, {}, 4),
    ("lms", "sample_lms", {"flavor": "k_diffusion", "order": 2}, {"order": 2}, 2),
    ("dpmpp_2s_ancestral", "sample_dpmpp_2s_ancestral", {}, {}, 2),
    ("dpmpp_2s_ancestral", "sample_dpmpp_2s_ancestral", {"eta": 0.5}, {"eta": 0.5}, 2),
    ("dpmpp_sde", "sample_dpmpp_sde", {}, {}, 2),
    ("dpmpp_sde", "sample_dpmpp_sde", {"eta": 0.5, "r": 0.3}, {"eta": 0.5, "r": 0.3}, 2),
    ("dpmpp_2m", "sample_dpmpp_2m", {}, {}, 2),
    ("dpmpp_2m_sde", "sample_dpmpp_2m_sde", {}, {}, 2),
    ("dpmpp_2m_sde", "sample_dpmpp_2m_sde", {"eta": 0.4, "s_noise": 1.2}, {"eta": 0.4, "s_noise": 1.2}, 2),
    ("dpmpp_2m_sde", "sample_dpmpp_2m_sde", {"correction": "heun"}, {"solver_type": "heun"}, 2),
    ("dpmpp_3m_sde", "sample_dpmpp_3m_sde", {}, {}, 3),
    ("dpmpp_3m_sde", "sample_dpmpp_3m_sde", {"eta": 0.3, "s_noise": 0.9}, {"eta": 0.3, "s_noise": 0.9}, 3),
]


def levels(steps: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.append(np.geomspace(60.0, 0.05, steps) if steps > 1 else [60.0], 0.0)


@pytest.mark.parametrize(
    ("steps", "solver", "function", "ours", "theirs", "order"),
    [
        pytest.param(steps, *case, id="-".join([case[0], *map(str, case[2].values()), str(steps)]))
        for case in CASES
        for steps in STEPS
        # with one step k-diffusion's multistep SDE samplers read a variable they have not set
        if not (steps == 1 and case[1].endswith("m_sde"))
    ],
)
def test_sampler(
    steps: int,
    solver: str,
    function: str,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    order: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampling = k_diffusion_sampling(monkeypatch)
    normals = np.random.default_rng(steps).standard_normal((2 * steps + 2, *SIZE))
    draws: Iterator[Any] = iter(torch.from_numpy(normals))
    sampler = getattr(sampling, function)
    if "noise_sampler" in inspect.signature(sampler).parameters:
        sampler = functools.partial(sampler, noise_sampler=lambda *_: next(draws))
    if "s_churn" in theirs:
        monkeypatch.setattr(torch, "randn_like", lambda _: next(draws))
    sigmas = levels(steps)
    model = Denoised(steps)
    start = torch.from_numpy(60.0 * np.random.default_rng(steps + 100).standard_normal(SIZE))
    end = sampler(model, start, torch.from_numpy(sigmas), disable=True, **theirs)
    plan = build(solver, schedules.edm(0.002, 80.0), grid=sigmas, grid_options={"unit": "rho"}, **ours)
    if "s_churn" in theirs:  # they draw in every step, ours where the churn is on
        normals = normals[np.flatnonzero((theirs["s_tmin"] <= sigmas[:-1]) & (sigmas[:-1] <= theirs["s_tmax"]))]
    model.compare(plan, end, normals, RTOL[order])


@pytest.mark.parametrize("options", [{}, {"eta": 1.0}, {"eta": 0.6, "s_noise": 1.1}], ids=str)
@pytest.mark.parametrize("steps", [2, 3, 4, 5, 6, 7, 20])
def test_dpm_fast(steps: int, options: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """All evaluations on the way from the first level to the last noisy one, where k-diffusion stops."""
    sampling = k_diffusion_sampling(monkeypatch)
    model = Denoised(steps)
    start = torch.from_numpy(60.0 * np.random.default_rng(0).standard_normal(SIZE))
    monkeypatch.setattr(torch, "tensor", functools.partial(torch.tensor, dtype=torch.float64))
    monkeypatch.setattr(torch, "linspace", functools.partial(torch.linspace, dtype=torch.float64))
    normals = np.random.default_rng(steps).standard_normal((steps, *SIZE))
    draws = iter(torch.from_numpy(normals))
    end = sampling.sample_dpm_fast(
        model, start, 0.05, 60.0, steps, disable=True, noise_sampler=lambda *_: next(draws), **options
    )
    plan = build(
        "dpm_fast", schedules.edm(), grid=levels(steps), grid_options={"unit": "rho"}, denoise=False, **options
    )
    model.compare(plan, end, normals, 1e-5)
