"""Velocity networks of flow_matching and torchcfm, beside the packages themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from network_peers import installed, torchcfm
from torch import Tensor, nn

import fastdiff as fd
from fastdiff.integrations import flow_matching as F
from fastdiff.models.exact import Mixture
from fastdiff.process.schedules import Level

SHAPE = (3, 2, 4, 4)


class Velocity(nn.Module):
    """A flow_matching model: data at t = 1, t [B] or a scalar, an extra by name."""

    def forward(self, x: Tensor, t: Tensor, push: Tensor | None = None) -> Tensor:
        t = t.reshape(-1, *(1 for _ in x.shape[1:])) if t.ndim else t
        pushed = 0.0 if push is None else push.reshape(-1, *(1 for _ in x.shape[1:]))
        return torch.sin(2 * x) * (1 - t) + torch.cos(3 * t) - 0.5 * x + pushed


def noise() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))


def their(net: nn.Module, method: str, step: float | None, **options: Any) -> Tensor:
    """The end of flow_matching's ODESolver."""
    end: Tensor = (
        installed("flow_matching.solver")
        .ODESolver(net)
        .sample(x_init=options.pop("start", noise()), step_size=step, method=method, **options)
    )
    return end


def run(model: fd.Denoiser, solver: str, steps: int, start: Tensor, cond: Any = None, **options: Any) -> Tensor:
    """A fixed number of equal steps of t, from the given noise."""
    plan = fd.plan(solver, model.schedule, steps, "trailing", **options)
    return fd.Sampler(plan, model).sample(start.shape, init=start, cond=cond)


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@torch.no_grad()
def test_euler_and_midpoint_are_their_solver(steps: int) -> None:
    net, push = Velocity(), torch.tensor([0.0, 0.3, -0.2])
    for solver, method, options in (
        ("flow_euler", "euler", {}),
        ("flow_midpoint", "midpoint", {"denoise": False}),
    ):
        expected = their(net, method, 1 / steps, push=push)
        got = run(F.wrap(net), solver, steps, noise(), {"push": push}, **options)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


@torch.no_grad()
def test_heun_is_their_solver_up_to_the_last_step() -> None:
    """Equal to torchdiffeq's heun2 until the last step, which is Euler's here: at the data D says nothing of u."""
    net, steps = Velocity(), 8
    cut = torch.tensor([0.0, 1 - 1 / steps])
    before = their(net, "heun2", 1 / steps, time_grid=cut)
    end = their(net, "euler", 1 / steps, start=before, time_grid=torch.tensor([cut[1], 1]))
    torch.testing.assert_close(run(F.wrap(net), "flow_heun", steps, noise()), end, rtol=0, atol=2e-6)
    exact = their(net, "dopri5", None, atol=1e-7, rtol=1e-7)
    errors = [float((run(F.wrap(net), "flow_heun", n, noise()) - exact).abs().max()) for n in (16, 64)]
    assert errors[0] / errors[1] > 12  # of order 2 all the same


@torch.no_grad()
def test_adaptive_steps_find_the_same_end() -> None:
    net = Velocity()
    expected = their(net, "dopri5", None, atol=1e-7, rtol=1e-7)
    model = F.wrap(net)
    plan = fd.plan("rk45", model.schedule, grid=[1.0, 1e-4], rtol=1e-6, atol=1e-6)
    got = fd.Sampler(plan, model).sample(SHAPE, init=noise())
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)


@torch.no_grad()
def test_every_way_to_call_a_network_in_both_directions() -> None:
    """One field, told five ways: by name, x first, t first, with the data at t = 0, and shown 999 t."""
    field, push = Velocity(), torch.tensor([0.1, 0.2, 0.3])
    expected = run(F.wrap(field), "flow_euler", 5, noise(), {"push": push})
    ways = (
        F.wrap(lambda x, t, push: field(x, t, push), call="x, t"),
        F.wrap(lambda t, x, push: field(x, t, push), call="t, x"),
        F.wrap(lambda x, t, push: -field(x, 1 - t, push), call="x, t", data_at=0),
        F.wrap(lambda x, t, push: field(x, t / 999, push), time_scale=999.0),
    )
    for model in ways:
        torch.testing.assert_close(run(model, "flow_euler", 5, noise(), {"push": push}), expected, rtol=0, atol=2e-6)
    for model in ways[:2]:
        torch.testing.assert_close(run(model, "flow_euler", 5, noise(), push), expected, rtol=0, atol=2e-6)


def test_the_conventions_of_both_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """What their trainers give a network for x, t and target, ours reads as x = alpha x0 + sigma n and n - x0."""
    cfm = torchcfm(monkeypatch, "conditional_flow_matching")
    data, start, t = torch.full(SHAPE, 0.7), noise(), torch.tensor([0.1, 0.5, 0.9])
    theirs = installed("flow_matching.path").CondOTProbPath().sample(x_0=start, x_1=data, t=t)
    samples = [(theirs.x_t, theirs.dx_t)]
    for matcher in (cfm.ConditionalFlowMatcher(sigma=0.0), cfm.TargetConditionalFlowMatcher(sigma=0.0)):
        torch.manual_seed(0)
        monkeypatch.setattr(matcher, "sample_noise_like", lambda x: start)
        _, x, target = matcher.sample_location_and_conditional_flow(start, data, t)
        samples.append((x, target))
    for x, target in samples:
        model = F.wrap(lambda x, t, target=target: target)
        for i, time in enumerate(t.tolist()):
            level = model.schedule.level(1 - time)
            expected = level.alpha * data[i] + level.sigma * start[i]
            torch.testing.assert_close(x[i], expected, rtol=0, atol=1e-6)
            fold = fd.predictions.coefficients(model.prediction, level, model.schedule)
            output = model(x, torch.full((3,), level.time))
            torch.testing.assert_close(fold.P * x[i] + fold.Q * output[i], data[i], rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_network_of_torchcfm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its UNet, called (t, x, y): Euler here is Euler on it, classes and all."""
    torch.manual_seed(0)
    unet = torchcfm(monkeypatch, "models.unet").UNetModel
    net = unet(dim=(2, 8, 8), num_channels=32, num_res_blocks=1, channel_mult=(1, 1), class_cond=True, num_classes=4,
               attention_resolutions="4").eval()  # fmt: skip
    for parameter in net.parameters():
        if not parameter.any():
            parameter.add_(0.05 * torch.randn_like(parameter))
    labels, x = torch.tensor([1, 3]), torch.randn(2, 2, 8, 8)
    expected = x.clone()
    for i in range(5):
        expected = expected + net(torch.full((2,), i / 5), expected, labels) / 5
    got = run(F.wrap(net, call="t, x"), "flow_euler", 5, x, {"y": labels})
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_other_paths_through_their_own_transform() -> None:
    """A network of the cosine path, which flow_matching moves to CondOT, has the exact field of the straight path."""
    mixture = Mixture([0.4, 0.6], [[-1.0], [1.0]], [0.1, 0.2])

    class OfCosine(nn.Module):  # x = sin(pi t/2) x0 + cos(pi t/2) n
        def forward(self, x: Tensor, t: Tensor, **_: Any) -> Tensor:
            angle = math.pi / 2 * float(t.flatten()[0])
            level = Level(math.sin(angle), math.cos(angle))
            x0 = mixture(x.double(), level)
            n = (x.double() - level.alpha * x0) / level.sigma
            return (math.pi / 2 * (level.sigma * x0 - level.alpha * n)).float()

    schedulers = installed("flow_matching.path.scheduler")
    moved = schedulers.ScheduleTransformedModel(OfCosine(), schedulers.CosineScheduler(), schedulers.CondOTScheduler())
    with pytest.raises(ValueError, match="takes one time for the whole batch"):
        F.wrap(moved)
    model = F.wrap(lambda x, t: moved(x=x, t=t[0]))
    x = torch.linspace(-2, 2, 9).reshape(9, 1)
    for sigma in (0.1, 0.5, 0.9):
        level = model.schedule.level(sigma)
        fold = fd.predictions.coefficients("flow", level, model.schedule)
        got = fold.P * x + fold.Q * model(x, torch.full((9,), sigma))
        torch.testing.assert_close(got.double(), mixture(x.double(), level), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: F.wrap(torch.zeros(2)), TypeError, "needs a velocity network"),  # type: ignore[arg-type]
        (
            lambda: F.wrap(nn.Identity(), call="t,x"),
            ValueError,
            "call must be one of 'x, t', 't, x', 'x=, t='.*got 't,x'",
        ),
        (lambda: F.wrap(lambda t, x: x, call="x, t"), ValueError, r"wrong order, it takes \(t, x\).*call='t, x'"),
        (lambda: F.wrap(Velocity(), call="t, x"), ValueError, r"wrong order, it takes \(x, t.*call='x, t'"),
        (lambda: F.wrap(nn.Identity(), data_at=2), ValueError, "data_at must be 0 or 1"),
        (lambda: F.wrap(nn.Identity(), time_scale=0), ValueError, "time_scale must be finite and above 0"),
        (lambda: run(F.wrap(Velocity()), "flow_euler", 2, noise(), torch.zeros(3)), TypeError, "conditions by name"),
        (lambda: run(F.wrap(Velocity()), "flow_euler", 2, noise(), {"y": torch.zeros(3)}), TypeError, r"takes \(x.*y="),
        (
            lambda: run(F.wrap(lambda t, x: x[:, :1], call="t, x"), "flow_euler", 2, noise()),
            ValueError,
            "returned shape",
        ),
    ],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
