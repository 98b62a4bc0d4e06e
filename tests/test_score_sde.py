"""score_sde's continuous models beside exact scores in its conventions, and its schedules' closed forms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.integrations import score_sde as S
from fastdiff.models.exact import Gaussian, Mixture
from fastdiff.process.schedules import Level

MIXTURE = Mixture([0.3, 0.7], [[-1.0, 0.5], [1.0, 0.0]], [0.1, 0.3])
GAUSSIAN = Gaussian(mean=[0.5, -0.2], variance=[0.3, 2.0])


class VPSDE:
    """What score_sde's objects are read for. beta(t) = beta_0 + t (beta_1 - beta_0)."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        self.beta_0, self.beta_1, self.N = beta_min, beta_max, 1000

    def marginal_prob(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, std) of Song et al. 2021, eq. 29."""
        log_alpha = -0.25 * t**2 * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0
        return log_alpha.exp(), (1 - (2 * log_alpha).exp()).sqrt()


class subVPSDE(VPSDE):
    def marginal_prob(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, _ = super().marginal_prob(t)
        return alpha, 1 - alpha**2


class VESDE:
    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        self.sigma_min, self.sigma_max, self.N = sigma_min, sigma_max, 1000

    def marginal_prob(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.sigma_min * (self.sigma_max / self.sigma_min) ** t


SDES: dict[str, Callable[[], Any]] = {"vp": VPSDE, "subvp": subVPSDE, "ve": VESDE}


def perfect(sde: Any, data: Any, shown: list[float] | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """The model that score_sde would train to the end: x and labels in its conventions, in float64 inside.

    VP, sub-VP: labels = 999 t, the output is minus std times the score. VE: labels = sigma, the output is the score.
    """

    def model(x: Tensor, labels: Tensor) -> Tensor:
        if shown is not None:
            shown.append(float(labels[0]))
        labels = labels.double()
        ve = isinstance(sde, VESDE)
        t = (labels / sde.sigma_min).log() / math.log(sde.sigma_max / sde.sigma_min) if ve else labels / 999
        alpha, std = (float(scale[0]) for scale in sde.marginal_prob(t))
        score = (alpha * data(x.double(), Level(alpha, std)) - x.double()) / std**2
        return (score if ve else -std * score).float()

    return model


@pytest.mark.parametrize("name", SDES)
def test_schedules_are_theirs(name: str) -> None:
    sde, schedule = SDES[name](), S.schedule(SDES[name]())
    t = torch.linspace(1e-5, 1, 201, dtype=torch.float64)
    alpha, std = sde.marginal_prob(t)
    np.testing.assert_allclose(schedule.alpha(t.numpy()), alpha.numpy(), rtol=1e-12)
    np.testing.assert_allclose(schedule.sigma(t.numpy()), std.numpy(), rtol=1e-9)  # theirs cancels near t = 0
    assert schedule == S.schedule(name) == S.schedule(schedule)


def test_schedules_of_other_constants() -> None:
    assert S.schedule(VPSDE(0.2, 10.2)) == fd.schedules.vp(0.2, 10.0)
    assert S.schedule(subVPSDE(0.2, 10.2)) == fd.schedules.sub_vp(0.2, 10.0)
    assert S.schedule(VESDE(0.02, 100.0)) == fd.schedules.ve(0.02, 100.0)


@pytest.mark.parametrize("name", SDES)
def test_the_model_is_read_as_theirs(name: str) -> None:
    """At any time of the clock P x + Q F is the exact E[x0 | x], and the labels are 999 t or sigma."""
    sde, shown = SDES[name](), []
    model = S.wrap(perfect(sde, MIXTURE, shown), sde)
    torch.manual_seed(0)
    for time in (1e-3, 0.05, 0.3, 0.7, 1.0):
        level = model.schedule.level(time)
        x0 = torch.tensor([[-1.0, 0.5], [1.0, 0.0], [0.4, -0.3]])
        x = level.alpha * x0 + level.sigma * torch.randn_like(x0)
        fold = fd.predictions.coefficients(model.prediction, level, model.schedule)
        denoised = fold.P * x + fold.Q * model(fold.c_in * x, torch.full((3,), fold.time))
        # the rounding of x itself, seen through 1/alpha
        atol = 1e-5 + 3e-6 * float(x.abs().max()) / level.alpha
        torch.testing.assert_close(denoised.double(), MIXTURE(x.double(), level), rtol=0, atol=atol)
        assert shown[-1] == pytest.approx(level.sigma if name == "ve" else 999 * time, rel=2e-6)


@pytest.mark.parametrize("name", SDES)
def test_their_ode_ends_where_it_must(name: str) -> None:
    """160 steps of UniPC with the perfect model are the exact map of the probability-flow ODE on Gaussian data."""
    sde = SDES[name]()
    model = S.wrap(perfect(sde, GAUSSIAN), sde)
    low = float(model.schedule.rho(1e-3 if name != "ve" else 0.0))
    plan = fd.plan("unipc", model.schedule, 160, "logsnr", grid_options={"sigma_min": low}, order=3)
    first, last = plan.levels[0], plan.levels[-2]
    torch.manual_seed(0)
    start = first.sigma * torch.randn(6, 2)
    at_last = GAUSSIAN.solve_ode(start.double(), first, last)
    got = fd.Sampler(plan, model).sample(start.shape, init=start)
    torch.testing.assert_close(got.double(), GAUSSIAN(at_last, last), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", SDES)
def test_euler_maruyama_is_theirs(name: str) -> None:
    """Their Euler-Maruyama predictor on the same noise: x' = x + (f x - g^2 score) dt + g sqrt(-dt) z."""
    sde, steps = SDES[name](), 25
    net = perfect(sde, MIXTURE)
    model = S.wrap(net, sde)
    times = torch.linspace(1, 0.05, steps, dtype=torch.float64)
    plan = fd.plan("euler_maruyama", model.schedule, grid=times.numpy())
    torch.manual_seed(0)
    normals = torch.randn(plan.draws, 5, 2)
    x = start = plan.levels[0].sigma * torch.randn(5, 2)
    x = x.double()
    for i, (s, t) in enumerate(itertools.pairwise(times)):
        beta = sde.beta_0 + s * (sde.beta_1 - sde.beta_0) if name != "ve" else torch.tensor(0.0)
        std = sde.marginal_prob(s.reshape(1))[1]
        if name == "ve":
            g2 = std**2 * 2 * math.log(sde.sigma_max / sde.sigma_min)
        else:
            total = s * sde.beta_0 + 0.5 * s**2 * (sde.beta_1 - sde.beta_0)
            g2 = beta * (1 - torch.exp(-2 * total)) if name == "subvp" else beta
        output = net(x.float(), (std if name == "ve" else 999 * s).reshape(1).expand(5).float()).double()
        score = output if name == "ve" else -output / std
        x = x - (t - s) * (0.5 * beta * x + g2 * score) + (g2 * (s - t)).sqrt() * normals[i].double()
    assert plan.draws == steps - 1
    seen: list[Tensor] = []
    fd.Sampler(plan, model).sample(
        start.shape, init=start, noise=normals, callback=lambda at: seen.append(at.state.clone())
    )
    torch.testing.assert_close(seen[-2].double(), x, rtol=0, atol=1e-5 * float(x.abs().max()))


def test_other_outputs() -> None:
    """A model whose output is the score itself, and their get_score_fn, which is one already."""
    sde = VPSDE()
    raw = perfect(sde, MIXTURE)

    def score_fn(x: Tensor, t: Tensor) -> Tensor:
        return -raw(x, 999 * t) / sde.marginal_prob(t)[1].reshape(-1, 1)

    expected = fd.sample(S.wrap(raw, "vp"), (4, 2), "ddim", 10, seed=3)
    for model in (
        fd.Denoiser(score_fn, fd.schedules.vp(), "score"),
        S.wrap(lambda x, labels: score_fn(x, labels / 999), "vp", output="score"),
    ):
        torch.testing.assert_close(fd.sample(model, (4, 2), "ddim", 10, seed=3), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: S.wrap(torch.zeros(2), "vp"), TypeError, "needs a model"),  # type: ignore[arg-type]
        (lambda: S.wrap(torch.nn.Identity(), "vpsde"), ValueError, "Unknown SDE of score_sde 'vpsde'.*'vp'"),
        (lambda: S.wrap(torch.nn.Identity(), fd.schedules.linear()), ValueError, "of vp, sub_vp or ve schedules"),
        (lambda: S.wrap(torch.nn.Identity(), object()), TypeError, "VPSDE, subVPSDE or VESDE"),
        (lambda: S.wrap(torch.nn.Identity(), "vp", output="noise"), ValueError, "Unknown output"),
        (lambda: fd.sample(S.wrap(lambda x: x, "vp"), (1, 2), steps=2), TypeError, r"the network takes \(x\)"),
        (
            lambda: fd.sample(S.wrap(lambda x, labels: x[:1], "ve"), (2, 2), steps=2),
            ValueError,
            r"returned shape \(1, 2\) for an input of shape \(2, 2\)",
        ),
    ],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
