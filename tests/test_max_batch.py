"""Requests larger than what runs at once: the same samples in parts, how many fit, and what is said when none do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.engine import memory
from fastdiff.errors import BatchTooLarge

SHAPE = (7, 3, 6, 5)
WIDTH = 40


def labelled(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    return torch.tanh(x + 0.1 * label.view(-1, 1, 1, 1)) * (1 + 0.1 * t.cos().view(-1, 1, 1, 1))


def model() -> fd.Denoiser:
    return fd.Denoiser(labelled, "edm", "edm", sigma_data=0.5)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


CASES: list[dict[str, Any]] = [
    {"solver": "dpmpp_2m_sde", "noise": "brownian", "seed": [5, 1, 9, 9, 2, 0, 7]},
    {"solver": "ddpm", "noise": normal(5, *SHAPE)},
    {"solver": "ddpm", "noise": lambda i, shape: normal(*shape) + i},
    {"solver": "ddim", "noise": fd.FrameNoise(axis=1)},
    {"solver": "heun", "init": normal(*SHAPE), "strength": 0.3},
    {"solver": "ddim", "guidance": [1.0, 2.0, 3.0, 1.0, 0.0, 2.0, 5.0], "rule": fd.guidance.APG()},
    {
        "solver": "ddim",
        "guidance": 2.0,
        "perturbed_scale": [0.0, 1.0] * 3 + [2.0],
        "perturbed_cond": {"label": normal(7)},
    },
    {"solver": "dpm_adaptive", "rtol": 0.1},
    {"solver": "ddim", "skip": fd.AdaptiveSkip(0.3)},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["solver"])
@pytest.mark.parametrize("size", [1, 3])
def test_in_parts_is_the_whole(case: dict[str, Any], size: int) -> None:
    draw = {"steps": 6, "cond": {"label": normal(7)}, "uncond": {"label": torch.zeros(7)}, "guidance": 1.0, **case}
    if draw["solver"] == "dpm_adaptive":
        del draw["steps"]
    whole = fd.sample(model(), SHAPE, **draw)
    assert torch.equal(fd.sample(model(), SHAPE, max_batch=size, **draw), whole)


def test_what_a_run_in_parts_says_of_itself() -> None:
    sizes: list[int] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        sizes.append(len(x))
        return 0.5 * x

    sampler = fd.Sampler(fd.plan("ddim", "edm", 4), fd.Denoiser(net, "edm", "x0"))
    whole = sampler.sample(SHAPE, seed=3)
    one = sampler.last_run
    assert one is not None and one.parts == 1 and sizes == [7] * 4
    assert torch.equal(sampler.sample(SHAPE, seed=3, max_batch=3), whole)
    run = sampler.last_run
    assert run is not None and (run.nfe, run.parts) == (4, 3) and sizes[4:] == [3] * 8 + [1] * 4
    assert torch.equal(sampler.sample(SHAPE, seed=3, max_batch=9), whole)
    adaptive = fd.Sampler(fd.plan("rk45", "edm"), fd.Denoiser(net, "edm", "x0"))
    adaptive.sample(SHAPE)
    counts = adaptive.last_run.adaptive  # type: ignore[union-attr]
    adaptive.sample(SHAPE, max_batch=2)
    assert adaptive.last_run.adaptive == counts and len(counts.nfe) == 7  # type: ignore[union-attr]


def wide(x: Tensor, t: Tensor) -> Tensor:
    """Needs WIDTH times its input, and its output."""
    return x.repeat(1, WIDTH, 1, 1).view(len(x), WIDTH, *x.shape[1:]).mean(1)


def test_a_networks_memory_is_measured() -> None:
    x, t = torch.zeros(SHAPE), torch.zeros(7)
    image = x.numel() * 4
    assert memory.peak(lambda: wide(x, t), torch.device("cpu")) == (WIDTH + 1) * image

    def two_steps() -> Tensor:
        y = x + 1  # one
        y = y * 2  # two, then the first goes
        y.mul_(3)
        z = y.view(-1)[:5]  # no memory of its own
        return torch.cat([y, y]) + z[0]  # y, the pair, and the sum of its size

    assert memory.peak(two_steps, torch.device("cpu")) == 5 * image
    assert memory.available(torch.device("cpu")) > 1 << 20


@pytest.mark.parametrize("fits", [1, 2, 5, 100])
def test_auto_draws_as_many_as_fit(monkeypatch: pytest.MonkeyPatch, fits: int) -> None:
    sizes: list[int] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        sizes.append(len(x))
        return wide(x, t)

    sampler = fd.Sampler(fd.plan("dpmpp_2m", "edm", 3), fd.Denoiser(net, "edm", "x0"))
    whole = sampler.sample(SHAPE)
    (kept,) = sampler._shelf.entries
    sampler.sample((1, *SHAPE[1:]))
    one = sampler._shelf.entries[-1].bytes
    each = (kept.bytes - one) // 6
    image = 4 * 90
    # the table and one sample's buffers and network, and then so many more of both; half of one is none
    needs = one - each + (fits + 0.5) * (each + (WIDTH + 1) * image)
    monkeypatch.setattr(memory, "available", lambda device: int(needs / memory.HEADROOM))
    sizes.clear()
    assert torch.equal(sampler.sample(SHAPE, max_batch="auto"), whole)
    drawn = sizes[-3 * -(-7 // min(fits, 7)) :]
    assert max(drawn) == min(fits, 7) and sum(drawn) == 3 * 7


def test_out_of_memory_says_how_many_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def net(x: Tensor, t: Tensor) -> Tensor:
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        return wide(x, t)

    sampler = fd.Sampler(fd.plan("ddim", "edm", 3), fd.Denoiser(net, "edm", "x0"))
    sampler.sample((2, *SHAPE[1:]))
    monkeypatch.setattr(memory, "available", lambda device: 4 * (WIDTH + 10) * 4 * 90)
    with pytest.raises(BatchTooLarge, match=r"batch of 7.*largest batch that fits is (\d).*max_batch='auto'") as caught:
        sampler.sample(SHAPE)
    assert 1 <= caught.value.largest <= 4 and isinstance(caught.value, MemoryError)
    assert sampler.memory().buffers == 0, "what was kept is let go first"
    assert sampler.sample(SHAPE, max_batch=caught.value.largest).shape == SHAPE


def test_a_batch_that_no_memory_holds() -> None:
    with pytest.raises(BatchTooLarge, match=r"268,435,456 MiB.*not even one sample.*can't allocate memory") as caught:
        fd.sample(fd.Denoiser(lambda x, t: x, "edm", "x0"), (8, 2**20, 2**12, 2**10), "ddim", 2)
    assert caught.value.largest == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_batch": 0}, "max_batch must be"),
        ({"max_batch": "all"}, "max_batch must be"),
        ({"max_batch": True}, "max_batch must be"),
        ({"max_batch": 2, "callback": print}, "callback sees a batch as a whole"),
        (
            {"max_batch": 2, "init": torch.zeros(8, 3, 6, 5), "strength": 0.5},
            r"init must have one entry per sample \(7\)",
        ),
        (
            {"max_batch": 2, "solver": "ddpm", "noise": torch.zeros(3, 8, 3, 6, 5)},
            "noise must have one entry per sample",
        ),
        ({"max_batch": 2, "cond": {"label": torch.zeros(8)}}, r"one entry per sample"),
    ],
)
def test_what_cannot_be_cut(arguments: dict[str, Any], words: str) -> None:
    draw = {"solver": "ddim", "steps": 3, "cond": {"label": torch.zeros(7)}} | arguments
    with pytest.raises(ValueError, match=words):
        fd.sample(model(), SHAPE, **draw)
