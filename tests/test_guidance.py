"""Guidance rules and branches: the papers' formulas, batches, formats, networks of their own, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from guided_cases import (
    ALL,
    BACKENDS,
    CLOSE,
    GUIDED,
    SHAPE,
    Asked,
    conditions,
    error,
    in_double,
    label,
    labelled,
    weights,
    wrapped,
)
from torch import Tensor, nn

import fastdiff as fd
from fastdiff.engine.guidance import APG, CFGZero, DynamicThreshold, Rescale

RULES = [Rescale(0.7), APG(0.3, 0.6, 1.0), CFGZero(0), CFGZero(2)]
DIMS = (1, 2, 3)


def norm(image: Tensor) -> Tensor:
    """Of each sample."""
    return torch.linalg.vector_norm(image, dim=DIMS, keepdim=True)


def projected(rule: APG, w: float) -> Any:
    """Sadat et al. 2024, Alg. 1, on denoised estimates, over a run."""
    running = torch.zeros(SHAPE, dtype=torch.float64)

    def combine(at: Asked) -> Tensor:
        nonlocal running
        best = at.denoised(at.cond)
        running = best - at.denoised(at.uncond) + rule.momentum * running
        length = norm(running)
        short = running * (rule.norm_threshold / length).clamp(max=1.0) if rule.norm_threshold else running
        unit = best / norm(best)
        along = (short * unit).sum(DIMS, keepdim=True) * unit
        return best + (w - 1.0) * (short - along + rule.eta * along)

    return combine


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rule", "threshold"), [(None, DynamicThreshold(0.8)), *itertools.product(RULES, [None, DynamicThreshold(0.8)])]
)
def test_rows_without_guidance_do_not_use_the_scalars_of_the_row_before(
    rule: Any, threshold: DynamicThreshold | None, backend: str
) -> None:
    """A rule finds nothing there: F = Fc; APG's direction waits, the threshold does not."""
    gains = [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    model = wrapped("linear", "eps")
    plan = fd.plan("ddim", "linear", 6, guidance_schedule=gains)
    projects = projected(rule, 5.0) if isinstance(rule, APG) else None

    def expected(at: Asked) -> Tensor:
        raw = at.uncond + 5.0 * (at.cond - at.uncond)
        if not gains[at.number]:
            raw = at.cond
        elif isinstance(rule, Rescale):
            ratio = at.cond.std(DIMS, keepdim=True) / raw.std(DIMS, keepdim=True)
            raw = (rule.phi * ratio + 1 - rule.phi) * raw
        elif isinstance(rule, CFGZero):
            a = (at.cond * at.uncond).sum(DIMS, keepdim=True) / at.uncond.square().sum(DIMS, keepdim=True)
            raw = a * at.uncond + 5.0 * (at.cond - a * at.uncond)
        if isinstance(rule, CFGZero) and at.number < rule.zero_init:
            raw = torch.zeros_like(raw)
        denoised = projects(at) if projects and gains[at.number] else at.denoised(raw)
        if threshold is not None:
            s = denoised.abs().flatten(1).quantile(threshold.percentile, dim=1).clamp(min=1.0).view(-1, 1, 1, 1)
            denoised = denoised.clamp(-s, s) / s
        return denoised

    exact = in_double(plan, model, expected)
    ours = fd.Sampler(plan, model, backend).sample(SHAPE, **GUIDED, guidance=5.0, rule=rule, threshold=threshold)
    assert error(ours, exact) < CLOSE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("rule", [APG(), APG(0.4, -0.75, 3.0), APG(1.0, 0.5, 0.0)])
def test_apg_projects_denoised_estimates_whatever_the_network_predicts(
    rule: APG, prediction: str, backend: str
) -> None:
    model = wrapped("linear", prediction)
    plan = fd.plan("dpmpp_2m", "linear", 7)
    exact = in_double(plan, model, projected(rule, 4.0))
    ours = fd.Sampler(plan, model, backend).sample(SHAPE, **GUIDED, guidance=4.0, rule=rule)
    assert error(ours, exact) < CLOSE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "rule", [Rescale(0.0), APG(eta=1.0, momentum=0.0), DynamicThreshold(0.5, 1.0)], ids=lambda rule: type(rule).__name__
)
def test_rules_that_change_nothing_are_plain_guidance(rule: Any, backend: str) -> None:
    """A threshold of at most 1 clamps to [-1, 1], which `clamp` does too."""
    model = wrapped("linear", "eps")
    plain = fd.plan("dpmpp_2m", "linear", 6)
    given = {"threshold": rule} if isinstance(rule, DynamicThreshold) else {"rule": rule}
    ours = fd.Sampler(plain, model, backend).sample(SHAPE, **GUIDED, guidance=3.0, **given)
    plan = fd.plan("dpmpp_2m", "linear", 6, clamp=(-1.0, 1.0)) if isinstance(rule, DynamicThreshold) else plain
    expected = fd.Sampler(plan, model, backend).sample(SHAPE, **GUIDED, guidance=3.0)
    assert error(ours, expected.double()) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("w", [2.0, [0.5, 1.0, 4.0]])
def test_autoguidance(w: Any, backend: str) -> None:
    """Karras et al. 2024, eq. 4: D = Dg + w (D - Dg), Dg from a weaker network, on the same condition."""
    model = wrapped("linear", "v")
    weak = fd.Denoiser(lambda x, t, label: 0.8 * labelled(0.9 * x, t, label), "linear", "v")
    plan = fd.plan("heun", "linear", 5)

    def expected(at: Asked) -> Tensor:
        time = torch.full(SHAPE[:1], at.fold.time, dtype=torch.float64)
        guide = at.denoised(weak.net(at.fold.c_in * at.x, time, label("cond").double()))
        return guide + weights(w) * (at.denoised(at.cond) - guide)

    ours = fd.Sampler(plan, model, backend, guide=weak).sample(SHAPE, **conditions("cond"), guidance=w)
    assert error(ours, in_double(plan, model, expected)) < CLOSE
    same = fd.sample(model, SHAPE, "heun", 5, **conditions("cond"), guidance=w, guide=weak, backend=backend)
    assert torch.equal(ours, same)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_negative_prompt_is_the_condition_of_the_unguided_branch(backend: str) -> None:
    """F = Fneg + w (Fc - Fneg)."""
    model = wrapped("linear", "eps")
    plan = fd.plan("ddim", "linear", 5)
    ours = fd.Sampler(plan, model, backend).sample(
        SHAPE, **conditions("cond"), uncond={"label": label("perturbed_cond")}, guidance=3.0
    )
    exact = in_double(plan, model, lambda at: at.denoised(at.perturbed + 3.0 * (at.cond - at.perturbed)))
    assert error(ours, exact) < CLOSE


SETTINGS = [
    *({"rule": rule} for rule in RULES),
    {"threshold": DynamicThreshold(0.9)},
    {"rule": Rescale(0.7), "threshold": DynamicThreshold(0.9, 3.0)},
    {"rule": APG(0.3, 0.6, 1.0), "threshold": DynamicThreshold(0.9)},
    {"perturbed_scale": [0.0, 1.5, -0.5, 2.0, 0.0]},
    {"rule": CFGZero(1), "perturbed_scale": [1.0, 1.5, -0.5, 0.0, 0.0], "threshold": DynamicThreshold(0.8)},
    {"rule": Rescale(0.5), "perturbed_scale": [1.0, 1.5, -0.5, 0.0, 2.0]},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_sample_does_not_depend_on_its_batch(settings: dict[str, Any], backend: str) -> None:
    """Bitwise, whatever the seeds, guidances and scales of the others, and with guidance 1 too."""
    model = wrapped("linear", "eps")
    plan = fd.plan("dpmpp_2m_sde", "linear", 5, cfg_pp="perturbed_scale" in settings)
    seeds, guidance = [11, 5, 2**40, 7, 3], [3.0, 7.0, 1.0, 0.5, 2.0]
    shape = (5, 2, 5, 7)
    every = conditions("cond", "uncond", "perturbed_cond", batch=5)
    scales = settings.get("perturbed_scale", [0.0] * 5)
    sampler = fd.Sampler(plan, model, backend)
    together = sampler.sample(shape, seeds, **every, guidance=guidance, **{**settings, "perturbed_scale": scales})
    for b in range(5):
        one = {name: {"label": given["label"][b : b + 1]} for name, given in every.items()}
        own = {**settings, "perturbed_scale": scales[b]}
        alone = sampler.sample((1, *shape[1:]), [seeds[b]], **one, guidance=guidance[b], **own)
        assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_memory_format_does_not_change_the_sample(settings: dict[str, Any], backend: str) -> None:
    model = wrapped("linear", "eps")
    every = {**conditions("cond", "uncond", "perturbed_cond", batch=5), "guidance": 4.0, "perturbed_scale": 0.0}
    plan = fd.plan("dpmpp_2m", "linear", 5)
    plain, last = (
        fd.Sampler(plan, model, backend, memory_format=layout).sample((5, 2, 6, 4), **{**every, **settings})
        for layout in (torch.contiguous_format, torch.channels_last)
    )
    assert error(last, plain.double()) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_leaves_nothing_for_the_next(backend: str) -> None:
    """One sampler, every rule in turn, with and without: each run equals that of a new sampler."""
    model = wrapped("linear", "eps")
    plan = fd.plan("dpmpp_2m", "linear", 5)
    used = fd.Sampler(plan, model, backend)
    every = conditions("cond", "uncond", "perturbed_cond", batch=5)
    plain: dict[str, Any] = {}
    for settings in [s for given in SETTINGS for s in (given, given, plain)]:
        draw = {**every, "guidance": [3.0, 7.0, 1.0, 0.5, 2.0], "perturbed_scale": 0.0, **settings}
        fresh = fd.Sampler(plan, model, backend).sample((5, 2, 5, 7), **draw)
        assert torch.equal(used.sample((5, 2, 5, 7), **draw), fresh)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_of_a_subclass_is_that_rule(rule: Any, backend: str) -> None:
    kind = type(rule)
    named = type("Named", (kind,), {})(*vars(rule).values())
    model = wrapped("linear", "eps")
    sampler = fd.Sampler(fd.plan("ddim", "linear", 4), model, backend)
    expected, ours = (sampler.sample(SHAPE, **GUIDED, guidance=4.0, rule=r) for r in (rule, named))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", [*SETTINGS[:6], {}], ids=str)
def test_inference_mode_then_not(settings: dict[str, Any], backend: str) -> None:
    """Buffers made inside inference mode serve a call outside it, the learned variance's too."""

    def with_variance(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return torch.cat([labelled(x, t, label), torch.sin(3 * x)], dim=1)

    model = fd.Denoiser(with_variance, "linear", "eps", learned_variance=True)
    sampler = fd.Sampler(fd.plan("ddpm", "linear", 4, variance="learned_range"), model, backend)
    with torch.inference_mode():
        inside = sampler.sample(SHAPE, **GUIDED, guidance=2.0, **settings)
    assert torch.equal(sampler.sample(SHAPE, **GUIDED, guidance=2.0, **settings), inside)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_network_that_changes_its_dtype_between_calls(backend: str) -> None:
    """As under autocast: the variance read in a row is that of this row's dtype."""
    dtype = torch.float32

    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([torch.tanh(x), torch.sin(3 * x)], dim=1).to(dtype)

    model = fd.Denoiser(net, "linear", "eps", learned_variance=True)
    sampler = fd.Sampler(fd.plan("ddpm", "linear", 4, variance="learned_range"), model, backend)
    first, other = sampler.sample(SHAPE, seed=1), sampler.sample(SHAPE, seed=2)
    dtype = torch.bfloat16
    sampler.sample(SHAPE, seed=3)
    dtype = torch.float32
    assert torch.equal(sampler.sample(SHAPE, seed=1), first) and torch.equal(sampler.sample(SHAPE, seed=2), other)


class Convolved(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1, dtype=dtype)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_networks_of_two_dtypes(dtypes: tuple[torch.dtype, torch.dtype], backend: str) -> None:
    """Each is called in its own, and its output joins in the main network's: equal weights guide nowhere."""
    torch.manual_seed(0)
    main = Convolved(dtypes[0])
    other = Convolved(dtypes[1])
    with torch.no_grad():
        for a, b in zip(main.parameters(), other.parameters(), strict=True):
            a.copy_(a.bfloat16())
            b.copy_(a)
    model, second = fd.Denoiser(main, "linear", "v"), fd.Denoiser(other, "linear", "v")
    plan = fd.plan("ddim", "linear", 4)
    plain = fd.Sampler(plan, model, backend).sample(SHAPE)
    guided = fd.Sampler(plan, model, backend, guide=second, perturbed=second).sample(
        SHAPE, guidance=2.0, perturbed_scale=1.0
    )
    assert error(guided, plain.double()) < 0.01  # what bfloat16 rounds


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prediction", ["x0", "eps"])
@pytest.mark.parametrize("rule", RULES)
def test_outputs_that_are_all_zero(rule: Any, prediction: str, backend: str) -> None:
    """A ratio with denominator 0 leaves its scalar at 1, so both branches 0 are the network that says 0."""
    model = fd.Denoiser(lambda x, t, label: torch.zeros_like(x), "linear", prediction)
    sampler = fd.Sampler(fd.plan("dpmpp_2m", "linear", 5), model, backend)
    ours = sampler.sample(SHAPE, **GUIDED, guidance=4.0, rule=rule, threshold=DynamicThreshold(1.0, 1e6))
    expected = sampler.sample(SHAPE, **conditions("cond"), threshold=DynamicThreshold(1.0, 1e6))
    assert torch.equal(ours, expected)
    assert ours.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [SHAPE, (3, 1, 1, 1)])
@pytest.mark.parametrize(
    ("rule", "cond", "uncond", "expected"),
    [
        (Rescale(0.7), 0.5, 0.1, 0.1 + 4 * 0.4),  # no spread to keep: plain guidance
        (CFGZero(0), 0.5, 0.0, 4 * 0.5),  # nothing to project on: a = 1
        (APG(0.3, 0.0), 0.0, 0.5, 3 * -0.5),  # nothing to project along: the whole direction
        (APG(0.3, 0.0), 0.5, 0.1, 0.5 + 0.3 * 3 * 0.4),  # all of it along D
    ],
)
def test_constant_outputs(
    rule: Any, cond: float, uncond: float, expected: float, shape: tuple[int, ...], backend: str
) -> None:
    model = fd.Denoiser(lambda x, t, label: label.view(-1, 1, 1, 1).expand_as(x), "linear", "x0")
    sampler = fd.Sampler(fd.plan("ddim", "linear", 3), model, backend)
    both = {"cond": {"label": torch.full((3,), cond)}, "uncond": {"label": torch.full((3,), uncond)}}
    sample = sampler.sample(shape, **both, guidance=4.0, rule=rule)
    assert torch.allclose(sample, torch.tensor(expected), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("branch", ["cond", "uncond", "perturbed_cond"])
@pytest.mark.parametrize("settings", [*({"rule": rule} for rule in RULES), {"threshold": DynamicThreshold()}], ids=str)
def test_an_output_that_is_not_finite_names_the_row(
    settings: dict[str, Any], branch: str, value: float, backend: str
) -> None:
    """In any branch, under any rule; one element of one sample is enough."""
    perturbs = branch == "perturbed_cond"
    if perturbs and isinstance(settings.get("rule"), APG):
        settings = {}  # APG takes no third branch
    calls = 0

    def net(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        out = labelled(x, t, label)
        if calls == 3:
            place = ["cond", "uncond", "perturbed_cond"].index(branch)
            out[place * SHAPE[0] + 1, 1, 4, 6] = value
        return out

    sampler = fd.Sampler(fd.plan("ddim", "linear", 5), fd.Denoiser(net, "linear", "eps"), backend)
    with pytest.raises(FloatingPointError, match=r"inf or nan at row 2 of 5 \(sample 1, time="):
        sampler.sample(
            SHAPE, **(ALL if perturbs else GUIDED), guidance=3.0, perturbed_scale=float(perturbs), **settings
        )
    assert calls == 3
    again = sampler.sample(SHAPE, **GUIDED, guidance=3.0)  # and the next run is clean
    assert again.isfinite().all()
