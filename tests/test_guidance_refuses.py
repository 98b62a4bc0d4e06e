"""What guidance refuses, and what it says: rules, arguments, networks, and plans that do not go together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from guided_cases import GUIDED, SHAPE, conditions, label, labelled, wrapped
from torch import Tensor

import fastdiff as fd
from fastdiff.engine.guidance import APG, CFGZero, DynamicThreshold, Rescale

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("make", "error_type", "message"),
    [
        (lambda: Rescale(1.5), ValueError, "Rescale: phi must be a finite number from 0 to 1, got 1.5"),
        (lambda: Rescale(-0.1), ValueError, "got -0.1"),
        (lambda: Rescale(NAN), ValueError, "got nan"),
        (lambda: Rescale("0.7"), TypeError, "Rescale: phi must be a number, got '0.7'"),  # type: ignore[arg-type]
        (lambda: Rescale(True), TypeError, "Rescale: phi must be a number, got True"),
        (lambda: Rescale(torch.tensor(0.7)), TypeError, "must be a number, got tensor"),  # type: ignore[arg-type]
        (lambda: APG(eta=INF), ValueError, "APG: eta must be a finite number"),
        (lambda: APG(momentum=1.1), ValueError, "APG: momentum must be a finite number from -1 to 1, got 1.1"),
        (lambda: APG(norm_threshold=-1.0), ValueError, "APG: norm_threshold must be a finite number from 0 to inf"),
        (lambda: APG(momentum=None), TypeError, "APG: momentum must be a number, got None"),  # type: ignore[arg-type]
        (lambda: CFGZero(-1), ValueError, "CFGZero: zero_init must be a number of rows, 0 or more, got -1"),
        (lambda: CFGZero(0.04), ValueError, "CFGZero: zero_init must be a number of rows"),  # type: ignore[arg-type]
        (lambda: CFGZero(True), ValueError, "CFGZero: zero_init must be a number of rows"),
        (lambda: DynamicThreshold(99.5), ValueError, "percentile must be a finite number from 0 to 1, got 99.5"),
        (lambda: DynamicThreshold(ceiling=0.5), ValueError, "DynamicThreshold: ceiling must be 1 or more, got 0.5"),
        (lambda: DynamicThreshold(ceiling=NAN), ValueError, "ceiling must be 1 or more, got nan"),
        (lambda: DynamicThreshold(ceiling="a"), TypeError, "ceiling must be a number, got 'a'"),  # type: ignore[arg-type]
    ],
)
def test_bad_rules(make: Any, error_type: type[Exception], message: str) -> None:
    with pytest.raises(error_type, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "error_type", "message"),
    [
        ({"rule": "rescale"}, TypeError, r"rule must be fd.guidance.Rescale, APG or CFGZero, got 'rescale'"),
        ({"rule": Rescale}, TypeError, "rule must be fd.guidance.Rescale, APG or CFGZero"),
        ({"rule": DynamicThreshold()}, TypeError, "rule must be fd.guidance.Rescale, APG or CFGZero"),
        ({"threshold": 0.995}, TypeError, "threshold must be a fd.guidance.DynamicThreshold, got 0.995"),
        ({"guidance": 2.0, "uncond": None}, ValueError, r"guidance != 1 needs uncond="),
        ({"guidance": [1.0, 1.0, 2.0], "uncond": None}, ValueError, r"guidance != 1 needs uncond="),
        ({"guidance": None}, ValueError, r"with guidance only: give guidance= too, 2.0 say .*leave uncond= out"),
        ({"guidance": [1.0, 2.0]}, ValueError, r"guidance must be one number or one per sample \(3\), got 2"),
        ({"perturbed_scale": 1.0}, ValueError, r"perturbed_scale != 0 needs a third branch"),
        ({"perturbed_scale": NAN}, ValueError, "perturbed_scale must be finite in float32, got nan"),
        ({"perturbed_scale": [1.0, 0.0]}, ValueError, r"perturbed_scale must be one number or one per sample \(3\)"),
        (
            {"perturbed_scale": 1.0, "rule": APG(), "guidance": 2.0, **conditions("perturbed_cond")},
            ValueError,
            "rule APG projects against one branch: use it without perturbed_scale",
        ),
        ({"perturbed_scale": 1.0, "perturbed_cond": {"text": label("cond")}}, ValueError, "cannot run as one batch"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error_type: type[Exception], message: str) -> None:
    sampler = fd.Sampler(fd.plan("ddim", "linear", 3), wrapped("linear", "eps"), "reference")
    with pytest.raises(error_type, match=message):
        sampler.sample(SHAPE, **{**GUIDED, "guidance": 1.0, **arguments})


def test_uncond_without_guidance_is_refused_and_guidance_of_one_is_not() -> None:
    model = wrapped("linear", "eps")
    with pytest.raises(ValueError, match="leave uncond= out"):
        fd.sample(model, SHAPE, steps=3, **conditions("cond", "uncond"))
    off = fd.sample(model, SHAPE, steps=3, guidance=1.0, **conditions("cond", "uncond"))
    assert torch.equal(off, fd.sample(model, SHAPE, steps=3, **conditions("cond")))
    plan = fd.plan("ddim", "linear", 3, cfg_pp=True)  # reads the unguided branch whatever the guidance
    fd.Sampler(plan, model).sample(SHAPE, **conditions("cond", "uncond"))


@pytest.mark.parametrize("name", ["guide", "perturbed"])
@pytest.mark.parametrize(
    ("other", "error_type", "message"),
    [
        (wrapped("cosine", "edm", sigma_data=0.5), ValueError, "has schedule cosine"),
        (wrapped("linear", "v"), ValueError, "has prediction 'v', the model 'edm'"),
        (wrapped("linear", "edm", sigma_data=1.0), ValueError, "has sigma_data 1.0, the model 0.5"),
        (labelled, TypeError, "must be a Denoiser, got function; wrap the network as the model is"),
    ],
)
def test_networks_that_do_not_go_together(name: str, other: Any, error_type: type[Exception], message: str) -> None:
    model = wrapped("linear", "edm", sigma_data=0.5)
    with pytest.raises(error_type, match=f"{name} {message}"):
        fd.Sampler(fd.plan("ddim", "linear", 3), model, "reference", **{name: other})


def test_variance_that_is_missing_or_not_expected() -> None:
    def two(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([x, x], dim=1)

    def one(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x)

    plain, learned = fd.plan("ddpm", "linear", 3), fd.plan("ddpm", "linear", 3, variance="learned_range")
    for net, told in ((one, False), (one, True)):
        model = fd.Denoiser(net, "linear", "eps", learned_variance=told)
        with pytest.raises(ValueError, match=r"learned spread, and the network returned no variance; wrap one that"):
            fd.Sampler(learned, model, "reference").sample(SHAPE)
    for plan in (plain, learned):
        with pytest.raises(
            ValueError, match=r"returned shape \(3, 4, 5, 7\) .* needs Denoiser\(..., learned_variance="
        ):
            fd.Sampler(plan, fd.Denoiser(two, "linear", "eps"), "reference").sample(SHAPE)
    ignored = fd.Sampler(plain, fd.Denoiser(two, "linear", "eps", learned_variance=True), "reference").sample(SHAPE)
    alone = fd.Sampler(plain, fd.Denoiser(lambda x, t: x, "linear", "eps"), "reference").sample(SHAPE)
    assert torch.equal(ignored, alone)


def test_cfg_pp_refuses() -> None:
    plan = fd.plan("ddim", "linear", 3, cfg_pp=True)
    sampler = fd.Sampler(plan, wrapped("linear", "eps"), "reference")
    with pytest.raises(ValueError, match=r"cfg_pp needs uncond=, the condition of the unguided branch"):
        sampler.sample(SHAPE, **conditions("cond"))


@pytest.mark.parametrize(
    ("options", "error_type", "message"),
    [
        ({"clamp": (1.0, -1.0)}, ValueError, r"clamp must be \(low, high\) with low < high, got \(1.0, -1.0\)"),
        ({"clamp": (NAN, 1.0)}, ValueError, "with low < high"),
        ({"clamp": 1.0}, TypeError, r"clamp must be two numbers \(low, high\), got 1.0"),
        ({"guidance_interval": (2.0, 1.0)}, ValueError, r"guidance_interval must be \(low, high\) in sigma/alpha"),
        ({"guidance_interval": 3}, TypeError, r"guidance_interval must be two numbers \(low, high\), got 3"),
        ({"perturbed_interval": (-1.0, 1.0)}, ValueError, r"perturbed_interval must be \(low, high\) in sigma/alpha"),
        ({"guidance_schedule": [1.0, 0.5]}, ValueError, r"one number per evaluation of the network \(4\)"),
        ({"guidance_schedule": 0.5}, ValueError, r"or a function of the level, got 0.5"),
        ({"guidance_schedule": [1.0, NAN, 1.0, 1.0]}, ValueError, "guidance_schedule must be finite in every row"),
        ({"guidance_schedule": lambda level: None}, ValueError, "guidance_schedule must be finite in every row"),
        ({"variance": "learned"}, ValueError, "variance must be one of fixed_small, fixed_large, learned_range"),
    ],
)
def test_bad_options(options: dict[str, Any], error_type: type[Exception], message: str) -> None:
    with pytest.raises(error_type, match=message):
        fd.plan("ddpm", "linear", 4, **options)
