"""A window of frames at levels of their own: order, levels, and the frames themselves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.compiler.solvers.steps import ancestral_split
from fastdiff.engine import noise

SHAPE = (2, 4, 4)
FRAME = 2 * 4 * 4


def apart(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * (1 + 0.1 * t.cos().view(-1, 1, 1, 1))


@pytest.mark.parametrize("solver", ["ddim", "euler_ancestral", "dpmpp_2m"])
def test_frames_that_a_network_treats_apart_are_samples_of_their_own(solver: str) -> None:
    model = fd.Denoiser(apart, "edm", "edm", sigma_data=0.5)
    frames = list(itertools.islice(fd.rolling(model, SHAPE, solver, 5, seed=30), 8))
    expected = fd.sample(model, (8, *SHAPE), solver, 5, seed=30)
    assert torch.equal(torch.stack(frames), expected)


def test_the_network_sees_the_window_oldest_first_and_one_frame_leaves_in_each_step() -> None:
    times: list[list[float]] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        times.append(t.tolist())
        return 0.5 * x

    model = fd.Denoiser(net, "edm", "x0")
    frames = fd.rolling(model, SHAPE, "ddim", 4)
    levels = fd.plan("ddim", model.schedule, 4).levels[:-1]
    descending = [torch.tensor(level.time).float().item() for level in levels]
    for emitted in range(1, 6):
        next(frames)
        assert len(times) == 3 + emitted
    assert times[:4] == [list(reversed(descending[: n + 1])) for n in range(4)]
    assert all(window == list(reversed(descending)) for window in times[3:])


def test_with_a_clip_the_window_is_full_from_the_first_step_and_frames_lean_on_each_other() -> None:
    """Against the algorithm written out, with a network that mixes the frames of its window."""
    rows, clip = 4, torch.linspace(-1, 1, 3 * FRAME).view(3, *SHAPE)

    def mixes(x: Tensor, t: Tensor) -> Tensor:
        return 0.6 * x / (1 + t.exp().view(-1, 1, 1, 1)) + 0.1 * x.tanh().mean(0, keepdim=True)

    model = fd.Denoiser(mixes, "edm", "x0")
    got = list(itertools.islice(fd.rolling(model, SHAPE, "euler_ancestral", rows, seed=7, clip=clip), 6))

    levels = fd.plan("euler_ancestral", model.schedule, rows).levels

    def normal(seed: int, index: int, stream: int) -> Tensor:
        return torch.from_numpy(noise.normal(seed, FRAME, index, stream)).view(SHAPE).double()

    def starts(seed: int, row: int, image: Tensor | None) -> dict[str, Any]:
        latent = levels[row].sigma * normal(seed, 0, 0)
        return {"x": latent if image is None else image.double() + latent, "row": row, "first": row, "seed": seed}

    window = [starts(7 + k, rows - 1 - k, clip[k]) for k in range(rows - 1)]
    expected = []
    for step in range(6):
        window.append(starts(7 + rows - 1 + step, 0, None))
        x = torch.stack([frame["x"] for frame in window])
        t = torch.tensor([levels[frame["row"]].time for frame in window], dtype=torch.float64)
        for frame, denoised in zip(window, mixes(x, t), strict=True):
            s, to = levels[frame["row"]], levels[frame["row"] + 1]
            down, up = ancestral_split(s, to, 1.0)
            slope = (frame["x"] - denoised) / s.sigma
            z = normal(frame["seed"], frame["row"] - frame["first"], 1)
            frame["x"] = denoised if to.sigma == 0.0 else frame["x"] + (down - s.sigma) * slope + up * z
            frame["row"] += 1
        expected.append(window.pop(0)["x"])
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"solver": "heun"}, "heun does not evaluate the network once per step"),
        ({"clip": torch.zeros(2, *SHAPE)}, r"3 frames.*\(3, 2, 4, 4\), got \(2, 2, 4, 4\)"),
        ({"solver": "dpm_adaptive"}, "dpm_adaptive"),
        ({"uncond": torch.zeros(1)}, "give guidance= too, 2.0 say .*leave uncond= out"),
    ],
)
def test_what_a_window_refuses(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fd.rolling(fd.Denoiser(apart, "edm", "x0"), SHAPE, **({"steps": 4} | arguments))
