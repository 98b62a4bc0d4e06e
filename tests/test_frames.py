"""Noise that frames share: exact covariance of the construction, the bits it is made of, and videos it gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.engine import noise

BACKENDS = [name for name in ("reference", "cpp") if fd.backends()[name].ok]
SIZES = (0.0, 0.5, 1.0, 3.0)


@pytest.mark.parametrize("a", SIZES)
@pytest.mark.parametrize("mode", ["mixed", "progressive"])
def test_covariance_of_the_construction(mode: str, a: float) -> None:
    """combine() on unit vectors is its matrix M; the covariance of the frames is M M^T."""
    frames = 9
    basis = torch.eye(frames + 1, dtype=torch.float64)
    own, shared = basis[None, :frames], basis[None, frames]
    matrix = fd.FrameNoise(mode=mode, a=a).combine(own.clone(), shared)[0].numpy()
    apart = np.abs(np.subtract.outer(np.arange(frames), np.arange(frames)))
    correlation = a / np.hypot(1.0, a)
    expected = correlation**apart if mode == "progressive" else np.where(apart == 0, 1.0, correlation**2)
    np.testing.assert_allclose(matrix @ matrix.T, expected, rtol=0, atol=1e-15 * frames)
    assert np.array_equal(np.triu(matrix[:, :frames], 1), np.zeros((frames, frames)))  # on no later frame


def drawn(shape: tuple[int, ...], given: fd.FrameNoise, seed: Any = 0, backend: str = "auto", steps: int = 3) -> Any:
    """The latents and every step's noise as the network and the sampler see them: [draws + 1, *shape]."""
    seen: list[torch.Tensor] = []
    model = fd.Denoiser(lambda x, t: torch.zeros_like(x), fd.schedules.edm(), "x0")
    plan = fd.plan("consistency", model.schedule, steps, "karras", epsilon=0.0)  # x' = D + rho z
    sampler = fd.Sampler(plan, model, backend)
    noise = {"noise": given}
    sampler.sample(shape, seed=seed, callback=lambda at: seen.append(at.state.clone()), **noise)
    levels = [level.sigma for level in plan.levels]
    states = [x / s for x, s in zip(seen, levels[1:-1], strict=False)]
    first: list[torch.Tensor] = []
    opening = fd.Denoiser(lambda x, t: first.append(x.clone()) or torch.zeros_like(x), model.schedule, "x0")
    fd.Sampler(plan, opening, backend).sample(shape, seed=seed, **noise)
    return torch.stack([first[0] / levels[0], *states])


@pytest.mark.parametrize("base", ["white", "brownian"])
@pytest.mark.parametrize("mode", ["mixed", "progressive"])
def test_measured_covariance(mode: str, base: str) -> None:
    """Of the latents and of a step, over 2^16 elements: within 5 standard errors, sqrt(1 + c^2) / 256, of the exact."""
    z = drawn((2, 4, 1, 256, 256), fd.FrameNoise(mode=mode, a=1.0, base=base), seed=[5, 6])
    elements = 2**16
    for draw in z:
        for video in draw:
            got = np.cov(video.reshape(4, elements).double().numpy(), bias=True)
            apart = np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
            exact = 0.5 ** (apart / 2) if mode == "progressive" else np.where(apart == 0, 1.0, 0.5)
            assert (np.abs(got - exact) <= 5.0 * np.sqrt((1.0 + exact**2) / elements)).all()
    # draws, and videos of different seeds, have nothing in common
    flat = z.reshape(len(z) * 2, -1).double().numpy()
    rest = np.corrcoef(flat) - np.eye(len(flat))
    assert np.abs(rest).max() <= 5.0 * np.sqrt(3.0 / elements)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["mixed", "progressive"])
def test_the_bits_are_named_normals(mode: str, backend: str) -> None:
    """Frame by frame from the normals of engine/noise.py, in fp32 with one rounding per operation."""
    a, scale = 0.75, np.float32(1.0 / np.hypot(1.0, 0.75))
    batch, frames, size = 2, 3, 4 * 3 * 5
    z = drawn((batch, frames, 4, 3, 5), fd.FrameNoise(mode=mode, a=a), seed=[7, 2**63], backend=backend)[0]
    for b, seed in enumerate((7, 2**63)):
        own = noise.normal(seed, frames * size, 0, 0).reshape(frames, size)
        shared = noise.normal(seed, size, 0, 4)
        expected = own * scale
        if mode == "mixed":
            expected = expected + shared * np.float32(a / np.hypot(1.0, a))
        else:
            expected[0] = own[0]
            for f in range(1, frames):
                expected[f] = expected[f] + expected[f - 1] * np.float32(a / np.hypot(1.0, a))
        latent = np.float32(80.0) * expected / 80.0
        assert np.array_equal(z[b].numpy().reshape(frames, size), latent.astype(np.float32))


@pytest.fixture
def model() -> fd.Denoiser:
    return fd.Denoiser(lambda x, t: torch.tanh(x), fd.schedules.edm(), "edm", sigma_data=0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ["ddpm", "sa_solver", "edm", "ddim"])
@pytest.mark.filterwarnings("ignore:noise='brownian'")
def test_nothing_shared_is_white_noise(model: fd.Denoiser, solver: str, backend: str) -> None:
    run = {"solver": solver, "steps": 5, "seed": 3, "backend": backend}
    shape = (2, 5, 3, 7, 4)
    white = fd.sample(model, shape, **run)
    assert torch.equal(white, fd.sample(model, shape, noise=fd.FrameNoise(a=0.0), **run))
    assert torch.equal(white, fd.sample(model, shape, noise=fd.FrameNoise(a=0.0, mode="progressive"), **run))
    assert not torch.equal(white, fd.sample(model, shape, noise=fd.FrameNoise(a=0.1), **run))
    path = fd.sample(model, shape, noise="brownian", **run)
    framed = fd.sample(model, shape, noise=fd.FrameNoise(a=0.0, base="brownian"), **run)
    assert (framed - path).abs().max() <= 1e-5 * path.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["mixed", "progressive"])
def test_a_video_depends_on_its_seed_and_a_frame_on_no_later_one(model: fd.Denoiser, mode: str, backend: str) -> None:
    def draw(shape: tuple[int, ...], seed: Any, axis: int = 1) -> torch.Tensor:
        given = fd.FrameNoise(axis=axis, mode=mode, a=1.5)
        return fd.sample(model, shape, "ddpm", 6, seed=seed, noise=given, backend=backend)

    alone = draw((1, 5, 3, 7, 3), [17])
    batch = draw((9, 5, 3, 7, 3), [*range(4), 17, *range(4, 8)])
    assert torch.equal(batch[4], alone[0])
    assert torch.equal(draw((1, 3, 3, 7, 3), [17]), alone[:, :3])
    # channels before frames: the same video
    assert torch.equal(draw((1, 3, 5, 7, 3), [17], axis=2).movedim(2, 1), alone)
    assert torch.equal(draw((1, 3, 5, 7, 3), [17], axis=-3).movedim(2, 1), alone)


def test_memory_format_and_other_ranks(model: fd.Denoiser) -> None:
    given = fd.FrameNoise(a=1.0)
    runs = [
        fd.sample(model, (2, 4, 6, 5), "ddpm", 4, noise=given, memory_format=layout)
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    assert torch.equal(runs[0], runs[1])
    flat = fd.sample(model, (2, 4), "ddpm", 4, noise=given)  # a frame of one element
    assert torch.equal(flat, fd.sample(model, (2, 4, 1), "ddpm", 4, noise=given).flatten(1))


def test_a_starting_video_gets_frame_noise_too() -> None:
    seen: list[torch.Tensor] = []
    model = fd.Denoiser(lambda x, t: seen.append(x.clone()) or torch.zeros_like(x), fd.schedules.edm(), "x0")
    shape, given = (1, 3, 2, 4, 4), fd.FrameNoise(a=2.0, mode="progressive")
    video = torch.linspace(-1, 1, 96).view(shape)
    fd.sample(model, shape, "ddim", 4, noise=given, init=video, strength=0.5, seed=4)
    fd.sample(model, shape, "ddim", 4, noise=given, seed=4)
    sigma = fd.plan("ddim", model.schedule, 4, strength=0.5).levels[0].sigma
    latent = next(x for x in seen[1:] if x.abs().max() > 100.0) / 80.0
    assert torch.allclose(seen[0], video + sigma * latent, rtol=1e-5, atol=1e-4)


def test_refusals(model: fd.Denoiser) -> None:
    for options, says in (
        ({"axis": 0}, "axis of the shape after the batch's, got 0"),
        ({"mode": "both"}, "mode must be 'mixed' or 'progressive', got 'both'"),
        ({"a": -1.0}, "finite and >= 0, got -1.0"),
        ({"a": float("nan")}, "finite and >= 0"),
        ({"base": "pink"}, "base must be 'white' or 'brownian'"),
    ):
        with pytest.raises(ValueError, match=says):
            fd.FrameNoise(**options)
    with pytest.raises(ValueError, match=r"axis 4 is not an axis after the batch of shape \(2, 3, 4, 4\); use 1 for"):
        fd.sample(model, (2, 3, 4, 4), steps=2, noise=fd.FrameNoise(axis=4))
    with pytest.raises(ValueError, match="axis -4 is not an axis"):
        fd.sample(model, (2, 3, 4, 4), steps=2, noise=fd.FrameNoise(axis=-4))

    def twice(m, x, sigmas):  # type: ignore[no-untyped-def]
        return m(m(x, sigmas[0]) + torch.randn_like(x) - 0.5 * torch.randn_like(x), sigmas[1])

    traced = fd.Sampler(fd.trace(twice, [1.0, 0.5], model.schedule), model)
    with pytest.raises(ValueError, match="does not say which levels each of its draws covers"):
        traced.sample((1, 2, 2), noise=fd.FrameNoise(base="brownian"))
