"""Other libraries' samplers run beside ours on the same random raw outputs and the same noise, every state compared.

The raw outputs are random numbers, not a network's, so a wrong coefficient cannot hide behind a smooth function.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff.compiler.build import compile_levels
from fastdiff.compiler.build import plan as build
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.verify import execute
from fastdiff.process import predictions, schedules
from fastdiff.process.schedules import Level, Schedule

Array = np.ndarray[Any, np.dtype[np.float64]]

STEPS = (1, 2, 3, 10, 14, 15, 20, 50)  # diffusers lowers orders at the end of fewer than 15
TRAIN = 2100  # divisible by every number of STEPS, so that DDIM's t - T // N is the next entry of its timesteps
BETA_END = 0.02 * 1000 / TRAIN  # keeps the last level where the usual 1000 betas have it
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
        self.normals: Array = rng.standard_normal((max(steps, evaluations) + 1, *SIZE))
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

    def compare(
        self,
        plan: Plan,
        prediction: str,
        scaled: bool = False,
        sigma_data: float | None = None,
        rtol: float = RTOL,
    ) -> None:
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
            assert error < rtol, f"state {i} of {plan.nfe}: {error:.2e}"


def config(**options: Any) -> dict[str, Any]:
    return {"num_train_timesteps": TRAIN, "beta_end": BETA_END, "timestep_spacing": "trailing", **options}


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


def at_all_sigmas(solver: str, scheduler: Any, schedule: Schedule, **options: Any) -> Plan:
    """Our plan on the scheduler's own sigma / alpha, the last one too, which need not be 0."""
    levels = [schedule.level_from_rho(float(sigma), clip=True) for sigma in scheduler.sigmas.double()]
    return compile_levels(solver, levels, schedule, "theirs", options)


def quad(function: Callable[[float], float], start: float, stop: float, **_: Any) -> tuple[float, float]:
    """scipy.integrate.quad for polynomials of degree below 16, so that schedulers that call it need no SciPy."""
    points, weights = np.polynomial.legendre.leggauss(8)
    half = 0.5 * (stop - start)
    return half * sum(w * float(function(start + half * (p + 1.0))) for p, w in zip(points, weights, strict=True)), 0.0


def stub_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `scipy` with nothing but `integrate.quad`, where SciPy is not installed."""
    if importlib.util.find_spec("scipy") is None:
        scipy, integrate = types.ModuleType("scipy"), types.ModuleType("scipy.integrate")
        integrate.quad = quad
        scipy.integrate = integrate
        monkeypatch.setitem(sys.modules, "scipy", scipy)
        monkeypatch.setitem(sys.modules, "scipy.integrate", integrate)


def k_diffusion_sampling(monkeypatch: pytest.MonkeyPatch) -> Any:
    """k-diffusion's file of samplers alone, without what the rest of its package imports; skips without it."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None or not found.submodule_search_locations:
        pytest.skip("k-diffusion is not installed: pip install --no-deps k-diffusion")
    stub_scipy(monkeypatch)
    for name in ("torchdiffeq", "torchsde", "k_diffusion", "k_diffusion.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["torchdiffeq"].odeint = None
    utils = sys.modules["k_diffusion"].utils = sys.modules["k_diffusion.utils"]
    utils.append_dims = lambda x, count: x.reshape(*x.shape, *(1 for _ in range(count - x.ndim)))
    path = Path(found.submodule_search_locations[0]) / "sampling.py"
    spec = importlib.util.spec_from_file_location("k_diffusion.sampling", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Denoised:
    """A model that returns the case's random estimates, one per call, and remembers what it was shown."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.estimates: list[Array] = []
        self.states: list[Array] = []

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **_: Any) -> torch.Tensor:
        self.states.append(x.numpy().copy())
        self.estimates.append(self.rng.standard_normal(x.shape))
        return torch.from_numpy(self.estimates[-1])

    def compare(self, plan: Plan, end: torch.Tensor, normals: Array, rtol: float) -> None:
        """The plan meets the states the model was shown, and the same end."""
        seen: list[Array] = []

        def denoise(x: Array, level: Level) -> Array:
            seen.append(x)
            return self.estimates[len(seen) - 1]

        seen.append(execute(plan, denoise, self.states[0], lambda i, _: normals[i]))
        assert plan.nfe == len(self.estimates)
        for i, (ours, theirs) in enumerate(zip(seen, [*self.states, end.numpy()], strict=True)):
            error = np.abs(ours - theirs).max() / np.abs(theirs).max()
            assert error < rtol, f"state {i} of {plan.nfe}: {error:.2e}"
