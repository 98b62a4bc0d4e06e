"""Adaptive samplers in the engine: each sample its own steps, on every executor, with everything `sample` offers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peers import k_diffusion_sampling
from torch import Tensor

import fastdiff as fd
from fastdiff import cli
from fastdiff.compiler import layout as at
from fastdiff.compiler.adaptive import AdaptivePlan
from fastdiff.compiler.verify_adaptive import execute
from fastdiff.engine import noise
from fastdiff.models.exact import Gaussian, Mixture

BACKENDS = [name for name in ("reference", "cpp") if fd.backends()[name].ok]
SOLVERS = ["dpm_adaptive", "rk45"]
SHAPE = (3, 2, 2)
MIXTURE = Mixture([0.3, 0.5, 0.2], np.random.default_rng(0).standard_normal((3, 12)), [0.05, 0.02, 0.1])
NARROW = fd.schedules.edm(0.05, 5.0)


def exact(schedule: fd.Schedule, data: Any = MIXTURE) -> fd.Denoiser:
    """The exact denoiser of a law, each sample by itself at its own time, so that nothing depends on the batch."""

    def net(x: Tensor, time: Tensor) -> Tensor:
        low, high = schedule.time_range
        levels = [schedule.level(min(max(float(t), low), high)) for t in time]
        parts = [data(one.double().reshape(1, 12), lv) for one, lv in zip(x, levels, strict=True)]
        return torch.cat(parts).view(x.shape).to(x.dtype)

    return fd.Denoiser(net, schedule, "x0")


def counts(sampler: fd.Sampler) -> Any:
    assert sampler.last_run is not None and sampler.last_run.adaptive is not None
    return sampler.last_run.adaptive


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("rtol", [0.05, 0.005, 0.001])
def test_dpm_adaptive_is_k_diffusions(backend: str, order: int, rtol: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = k_diffusion_sampling(monkeypatch)
    start = 5.0 * torch.from_numpy(np.random.default_rng(1).standard_normal((1, *SHAPE)))

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        level = fd.Level(1.0, float(sigma[0]))
        return MIXTURE(x.reshape(1, 12), level).reshape(x.shape)

    options = {"order": order, "rtol": rtol, "atol": rtol}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", functools.partial(torch.tensor, dtype=torch.float64))
        end, info = sampling.sample_dpm_adaptive(
            model, start, 0.05, 5.0, disable=True, return_info=True, noise_sampler=lambda *_: 0.0, **options
        )
    sampler = fd.Sampler(fd.plan("dpm_adaptive", NARROW, denoise=False, **options), exact(NARROW), backend)
    got = sampler.sample((1, *SHAPE), init=start.float())
    assert (got - end).abs().max() <= 1e-5 * end.abs().max()
    run = counts(sampler)
    assert (run.nfe[0], run.accepted[0], run.rejected[0]) == (info["nfe"], info["n_accept"], info["n_reject"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("noise_kind", ["white", "brownian"])
@pytest.mark.parametrize(
    ("solver", "options"),
    [("dpm_adaptive", {"order": 2}), ("dpm_adaptive", {"eta": 1.0, "rtol": 0.02}), ("rk45", {"rtol": 1e-3})],
    ids=str,
)
def test_a_batch_is_its_samples_run_in_float64(
    backend: str, noise_kind: str, solver: str, options: dict[str, Any]
) -> None:
    schedule = fd.schedules.vp()
    plan = fd.plan(solver, schedule, grid_options={"sigma_min": 0.05, "sigma_max": 10.0}, **options)
    assert isinstance(plan, AdaptivePlan)
    seeds = [3, 2**40, 5]
    sampler = fd.Sampler(plan, exact(schedule), backend)
    got = sampler.sample((3, *SHAPE), seed=seeds, noise=noise_kind)
    top = plan.levels[0]

    def denoise(x: np.ndarray[Any, Any], level: fd.Level) -> np.ndarray[Any, Any]:
        return MIXTURE(x.reshape(1, 12), level).reshape(x.shape)

    for b, seed in enumerate(seeds):
        normal = functools.partial(noise.normal, seed, 12)
        one = execute(plan, denoise, top.sigma * normal(0, at.STREAM_LATENT), normal, noise_kind == "brownian")
        run = counts(sampler)
        walk = one.walk
        assert (run.nfe[b], run.accepted[b], run.rejected[b]) == (walk.evaluations, walk.accepted, walk.rejected)
        np.testing.assert_allclose(got[b].numpy().ravel(), one.sample, atol=2e-4)
    assert len(set(counts(sampler).nfe)) > 1 or solver == "rk45"
    assert sampler.last_run is not None and sampler.last_run.nfe == max(counts(sampler).nfe)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("solver", "options"), [("dpm_adaptive", {}), ("dpm_adaptive", {"eta": 1.0}), ("rk45", {})])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_seed_alone_and_in_a_batch_give_one_image(
    backend: str, solver: str, options: dict[str, Any], layout: torch.memory_format
) -> None:
    model = exact(fd.schedules.edm())
    options = {**options, "rtol": 1e-3, "noise": "brownian", "backend": backend}
    many = fd.sample(model, (8, *SHAPE), solver, seed=[11, 5, 4, 8, 1, 2, 9, 7], memory_format=layout, **options)
    alone = fd.sample(model, (1, *SHAPE), solver, seed=[8], **options)
    pair = fd.sample(model, (2, *SHAPE), solver, seed=[8, 100], **options)
    assert torch.equal(many[3], alone[0]) and torch.equal(pair[0], alone[0])


@pytest.mark.parametrize("backend", BACKENDS[-1:])
def test_a_seed_follows_the_path_of_the_fixed_grids(backend: str) -> None:
    """With eta = 1 the ancestral steps have the SDE of dpmpp_2m_sde for their limit, and then the same solution."""
    model = exact(fd.schedules.edm(0.05, 10.0))

    def run(solver: str, noise_kind: str, **options: Any) -> Tensor:
        return fd.sample(model, (6, *SHAPE), solver, seed=3, noise=noise_kind, backend=backend, **options)

    fixed = run("dpmpp_2m_sde", "brownian", steps=100)
    distance = [
        float((run("dpm_adaptive", kind, eta=1.0, rtol=tol, atol=tol) - fixed).abs().mean())
        for kind, tol in (("brownian", 0.05), ("brownian", 0.002), ("white", 0.002))
    ]
    assert distance[1] < 0.06 and distance[1] < 0.2 * distance[0]
    assert distance[2] > 0.4


@pytest.mark.parametrize(("solver", "stages"), [("dpm_adaptive", 3), ("rk45", 6)])
def test_evaluations_of_rejected_steps_are_counted(solver: str, stages: int) -> None:
    """D jumps at sigma = 1, which no step can cross without a large error."""
    calls: list[int] = []

    def net(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(len(x))
        return torch.where(sigma.view(-1, 1, 1, 1) < 1.0, 2.0, -2.0) * torch.ones_like(x)

    model = fd.Denoiser(net, fd.schedules.edm(), "x0")
    sampler = fd.Sampler(fd.plan(solver, model.schedule, rtol=1e-2, atol=1e-2), model)
    x = sampler.sample((2, *SHAPE))
    run = counts(sampler)
    assert min(run.rejected) >= 3
    assert run.nfe[0] == stages * (run.accepted[0] + run.rejected[0]) + 1
    assert len(calls) == max(run.nfe) and set(calls) == {2}
    assert torch.equal(x, torch.full_like(x, 2.0))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", ["linear", "rectified_flow", "edm", "cosine"])
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_gaussian_data_on_every_schedule(solver: str, schedule: str, prediction: str) -> None:
    """The exact solution of the probability-flow ODE, from alpha = 0 too, within the tolerance."""
    process = fd.schedules.get(schedule)
    data = Gaussian(0.3, 0.25)

    def net(x: Tensor, time: Tensor) -> Tensor:
        low, high = process.time_range
        level = process.level(min(max(float(time[0]), low), high))
        denoised = data(x.double(), level)
        return fd.predictions.convert(denoised, x.double(), level, "x0", prediction).float()

    model = fd.Denoiser(net, process, prediction)
    # finer tolerances meet the float32 of an output that is divided by alpha
    plan = fd.plan(solver, process, rtol=1e-4, atol=1e-4, grid_options={"sigma_min": 0.02})
    sampler = fd.Sampler(plan, model)
    x = sampler.sample((1, *SHAPE), seed=4)
    top, bottom = plan.levels[:2]
    z = noise.normal(4, 12, 0, at.STREAM_LATENT).astype(np.float64).reshape(1, *SHAPE)
    expected = data(data.solve_ode(top.sigma * z, top, bottom), bottom)
    assert np.abs(x.numpy() - expected).max() <= 2e-2 * (solver == "dpm_adaptive") + 2e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_guidance_conditions_and_halves(backend: str, solver: str) -> None:
    sizes: list[int] = []

    def labelled(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        sizes.append(len(x))
        return label.view(-1, 1, 1, 1).expand_as(x).contiguous()

    model = fd.Denoiser(labelled, fd.schedules.edm(), "x0")
    settings: dict[str, Any] = {
        "cond": {"label": torch.tensor([1.0, 2.0])},
        "uncond": {"label": torch.tensor([0.5, 0.0])},
        "guidance": [3.0, 1.0],
    }
    x = fd.sample(model, (2, 1, 2, 2), solver, backend=backend, **settings)
    np.testing.assert_allclose(x[:, 0, 0, 0].numpy(), [0.5 + 3 * 0.5, 2.0], rtol=1e-6)
    assert set(sizes) == {4}
    sizes.clear()
    plan = fd.plan(solver, model.schedule, guidance_interval=(0.5, 5.0))
    x = fd.Sampler(plan, model, backend).sample((2, 1, 2, 2), **settings)
    assert set(sizes) == {2, 4}
    assert x[0, 0, 0, 0] == pytest.approx(1.0, abs=1e-2)  # guidance is off in the last evaluation


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_callback_sees_every_row(solver: str) -> None:
    model = exact(fd.schedules.edm())
    seen: list[fd.RowInfo] = []
    estimates: list[Tensor] = []

    def watch(row: fd.RowInfo) -> None:
        seen.append(row)
        estimates.append(row.denoised.clone())

    sampler = fd.Sampler(fd.plan(solver, model.schedule, rtol=0.01), model)
    x = sampler.sample((4, *SHAPE), callback=watch, progress=True)
    assert sampler.last_run is not None
    assert [row.row for row in seen] == list(range(sampler.last_run.nfe))
    nfe = [sum(row.levels[b] is not None for row in seen) for b in range(4)]
    assert nfe == list(counts(sampler).nfe)
    assert all(row.level.rho == max(lv.rho for lv in row.levels if lv is not None) for row in seen)
    assert seen[0].level.rho == 80.0 and seen[-1].level.rho == 0.002
    last = [max(i for i, row in enumerate(seen) if row.levels[b] is not None) for b in range(4)]
    assert all(torch.equal(x[b], estimates[last[b]][b]) for b in range(4))


@pytest.mark.parametrize("solver", SOLVERS)
def test_from_an_image_and_from_a_state(solver: str) -> None:
    schedule = fd.schedules.vp()
    seen: list[tuple[Tensor, Tensor]] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x.clone(), t.clone()))
        return torch.full_like(x, 0.25)

    model = fd.Denoiser(net, schedule, "x0")
    image = torch.linspace(-1, 1, 12).reshape(1, *SHAPE)
    x = fd.sample(model, (1, *SHAPE), solver, init=image, strength=0.4, seed=9)
    level = schedule.level(0.4)
    z = torch.from_numpy(noise.normal(9, 12, 0, at.STREAM_LATENT)).view(1, *SHAPE)
    torch.testing.assert_close(seen[0][0], level.alpha * image + level.sigma * z, rtol=1e-5, atol=1e-6)
    assert float(seen[0][1]) == pytest.approx(0.4)
    assert torch.equal(x, torch.full_like(x, 0.25))
    seen.clear()
    fd.Sampler(fd.plan(solver, schedule), model).sample((1, *SHAPE), init=image)
    torch.testing.assert_close(seen[0][0], image, rtol=1e-6, atol=1e-7)


def test_the_ends_are_the_grids() -> None:
    ends = [fd.plan("rk45", "edm", steps, grid).levels for steps, grid in ((20, "karras"), (5, "exponential"))]
    assert ends[0] == ends[1]
    own = fd.plan("rk45", "edm", grid=[30.0, 0.5])
    assert [level.rho for level in own.levels] == [30.0, 0.5, 0.0]
    with pytest.raises(ValueError, match=r"chooses its own levels: give the first and the last .* got 3 levels"):
        fd.plan("dpm_adaptive", "edm", grid=[30.0, 2.0, 0.5])


def test_failures_name_the_sample_and_the_level() -> None:
    schedule = fd.schedules.edm()

    def sampler(net: Any, **options: Any) -> fd.Sampler:
        return fd.Sampler(fd.plan("dpm_adaptive", schedule, **options), fd.Denoiser(net, schedule, "x0"))

    def broken(x: Tensor, sigma: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[1] = torch.where(sigma[1] < 2.0, torch.nan, 0.0)
        return out

    with pytest.raises(
        FloatingPointError, match=r"inf or nan after \d+ evaluations \(sample 1, time=0\.3\d+, sigma/al"
    ):
        sampler(broken).sample((2, *SHAPE))
    rough = sampler(lambda x, t: 1e4 * torch.sin(1e6 * x))
    with pytest.raises(FloatingPointError, match=r"the step size of sample 0 at sigma/alpha=.* fell to"):
        fd.Sampler(fd.plan("rk45", schedule), rough.model).sample((1, *SHAPE))
    with pytest.raises(FloatingPointError, match=r"sample 0 at .* more than max_steps=3 trial steps"):
        sampler(lambda x, t: torch.zeros_like(x), max_steps=3).sample((1, *SHAPE))


@pytest.mark.parametrize(
    ("solver", "options", "error", "says"),
    [
        ("dpm_adaptive", {"rtol": 0.0}, ValueError, "dpm_adaptive: rtol must be finite and above 0, got 0.0"),
        ("rk45", {"rtol": -1e-3}, ValueError, "rk45: rtol must be"),
        ("rk45", {"atol": float("inf")}, ValueError, "rk45: atol must be"),
        ("rk45", {"atol": "small"}, TypeError, "option 'atol' must be a number"),
        ("dpm_adaptive", {"order": 4}, ValueError, "order must be 2 or 3, got 4"),
        ("dpm_adaptive", {"order": 1}, ValueError, "order must be 2 or 3, got 1"),
        ("dpm_adaptive", {"eta": -0.5}, ValueError, "amount of noise"),
        ("dpm_adaptive", {"h_init": 0.0}, ValueError, "h_init must be finite and above 0"),
        ("dpm_adaptive", {"accept_safety": 1.5}, ValueError, r"accept_safety must be in \(0, 1\]"),
        ("rk45", {"pcoeff": 0.0, "icoeff": 0.0}, ValueError, "would not shorten a step"),
        ("rk45", {"max_steps": 0}, ValueError, "max_steps must be 1 or more"),
        ("rk45", {"order": 5}, TypeError, "has no option 'order'"),
        ("rk45", {"guidance_interval": (2.0, 1.0)}, ValueError, "guidance_interval"),
    ],
)
def test_bad_options(solver: str, options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        fd.plan(solver, "edm", **options)


def test_what_an_adaptive_plan_is_not() -> None:
    plan = fd.plan("dpm_adaptive", "edm", eta=1.0)
    with pytest.raises(ValueError, match="its evaluations are in sampler.last_run"):
        _ = plan.nfe
    with pytest.raises(ValueError, match="has no table to write"):
        plan.to_json()
    from fastdiff.compiler.build import compile_levels

    with pytest.raises(ValueError, match="chooses its levels while it runs"):
        compile_levels("rk45", plan.levels, plan.schedule, "custom", {})
    model = exact(fd.schedules.edm())
    with pytest.raises(ValueError, match="draws as often as its steps turn out to need"):
        fd.Sampler(plan, model).sample((1, *SHAPE), noise=torch.zeros(1, 1, *SHAPE))
    with pytest.raises(ValueError, match="at alpha = 0|At alpha = 0"):
        fd.Sampler(fd.plan("rk45", "rectified_flow"), fd.Denoiser(lambda x, t: x, "rectified_flow", "eps"))
    given = fd.sample(model, (1, *SHAPE), "rk45", noise=torch.zeros(0, 1, *SHAPE), rtol=1e-3)
    assert torch.equal(given, fd.sample(model, (1, *SHAPE), "rk45", rtol=1e-3))


def test_one_sampler_serves_many_runs() -> None:
    model = exact(fd.schedules.edm())
    sampler = fd.Sampler(fd.plan("dpm_adaptive", model.schedule, eta=0.5), model)
    first = sampler.sample((2, *SHAPE), seed=1)
    path = sampler.sample((2, *SHAPE), seed=1, noise="brownian")
    sampler.sample((3, *SHAPE), seed=8)
    assert torch.equal(first, sampler.sample((2, *SHAPE), seed=1))
    assert torch.equal(path, sampler.sample((2, *SHAPE), seed=1, noise="brownian"))
    assert not torch.equal(first, path)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--solver", "rk45"]) == 0
    text = capsys.readouterr().out
    assert "ok   point mass" in text and "rtol = atol = 1e-05: error 3.0e-05 with 85 evaluations, 12 steps" in text
    assert cli.main(["plan", "dpm_adaptive", "--option", "order=2"]) == 0
    assert "2 model evaluations a trial step" in capsys.readouterr().out
    assert cli.main(["plan", "rk45", "--json"]) == 2
    assert "has no table to write" in capsys.readouterr().err
    out = str(tmp_path / "x.npy")
    assert cli.main(["sample", "--solver", "dpm_adaptive", "--class", "bag", "--count", "2", "--out", out]) == 0
    assert "dpm_adaptive, its own steps" in capsys.readouterr().out
