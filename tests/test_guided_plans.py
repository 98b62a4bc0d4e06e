"""Guidance that is part of the table: CFG++, intervals, schedules, clamp, learned variance; JSON and explain()."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
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
    ask,
    conditions,
    error,
    in_double,
    labelled,
    start_of,
    weights,
    wrapped,
)
from torch import Tensor

import fastdiff as fd
from fastdiff.compiler.plan import Plan

LAMBDA = [0.6, 0.2, 1.0]


def estimates(model: fd.Denoiser, x: Tensor, level: Any) -> tuple[Tensor, Tensor]:
    """(D, Du) of CFG++ at scale LAMBDA, float64."""
    at = ask(model, 0, x, level)
    unguided = at.denoised(at.uncond)
    return unguided + weights(LAMBDA) * (at.denoised(at.cond) - unguided), unguided


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_cfg_pp_of_ddim_is_the_papers(prediction: str, backend: str) -> None:
    """Chung et al. 2024, Alg. 2: x' = alpha' D + sigma' eps_u, eps_u = (x - alpha Du) / sigma."""
    model = wrapped("linear", prediction)
    plan = fd.plan("ddim", "linear", 7, cfg_pp=True)
    x = start_of(plan)
    for s, t in itertools.pairwise(plan.levels):
        guided, unguided = estimates(model, x, s)
        x = t.alpha * guided + t.sigma / s.sigma * (x - s.alpha * unguided)
    ours = fd.Sampler(plan, model, backend).sample(SHAPE, **GUIDED, guidance=LAMBDA)
    assert error(ours, x) < CLOSE
    plain = fd.Sampler(fd.plan("ddim", "linear", 7), model, backend).sample(SHAPE, **GUIDED, guidance=LAMBDA)
    assert error(plain, x) > 0.02


@pytest.mark.parametrize("backend", BACKENDS)
def test_cfg_pp_of_euler_ancestral_is_comfyuis(backend: str) -> None:
    """x' = D + sigma_down / sigma (x - Du) + sigma_up z, at alpha = 1."""
    model = wrapped("edm", "x0")
    plan = fd.plan("euler_ancestral", "edm", 7, cfg_pp=True)
    draws = torch.randn(plan.draws, *SHAPE, generator=torch.Generator().manual_seed(0))
    x = start_of(plan)
    for i, (s, t) in enumerate(itertools.pairwise(plan.levels)):
        guided, unguided = estimates(model, x, s)
        up = t.sigma * math.sqrt(1 - (t.sigma / s.sigma) ** 2)
        x = guided + math.sqrt(t.sigma**2 - up**2) / s.sigma * (x - unguided)
        if up > 0:
            x = x + up * draws[i].double()
    ours = fd.Sampler(plan, model, backend).sample(SHAPE, noise=draws, **GUIDED, guidance=LAMBDA)
    assert error(ours, x) < CLOSE


@pytest.mark.parametrize("backend", BACKENDS)
def test_cfg_pp_of_dpmpp_2m_and_where_comfyuis_differs(backend: str) -> None:
    """With h = log(sigma/sigma'), r = h_before/h, c = expm1(-h) / (2 r), alpha = 1:

    ours         x' = D - e^-h Du + e^-h x - c (Du - Du_before), the sampler on Du, its clean part moved to D
    ComfyUI's    x' = D - e^-h Du + e^-h x - c (D - Du_before), which takes D for the newer of the two
    """
    model = wrapped("edm", "x0")
    plan = fd.plan("dpmpp_2m", "edm", 7, cfg_pp=True)
    levels = plan.levels
    states: list[Tensor] = []
    fd.Sampler(plan, model, backend).sample(
        SHAPE, **GUIDED, guidance=LAMBDA, callback=lambda at: states.append(at.state.double())
    )
    x, before = start_of(plan), None
    for i, (s, t) in enumerate(itertools.pairwise(levels)):
        guided, unguided = estimates(model, x, s)
        decay = t.sigma / s.sigma
        x = guided - decay * unguided + decay * x
        if before is not None and t.sigma > 0:
            r = math.log(levels[i - 1].sigma / s.sigma) / -math.log(decay)
            c = (decay - 1.0) / (2.0 * r)
            comfy = x - c * (guided - before)
            x = x - c * (unguided - before)
            assert error(comfy - states[i], -c * (guided - unguided)) < 1e-4  # states of order 80 in float32
        assert error(states[i], x) < CLOSE
        before = unguided


# samplers that rebuild their state from registers guidance does not move, or extrapolate through what it moved
TURNS_ROUND = {
    "deis", "dpm_2", "dpm_2_ancestral", "dpm_fast", "dpmsolver", "flow_heun", "flow_midpoint", "ghvb",
    "gradient_estimation", "hb", "heunpp2", "ipndm", "ipndm_v", "lms", "pndm", "euler_maruyama",
}  # fmt: skip
DROPS = {"consistency", "lcm", "sa_solver", "unipc"}
ADAPTIVE = {"dpm_adaptive", "rk45"}
CARRIES = sorted(set(fd.solvers.names()) - TURNS_ROUND - DROPS - ADAPTIVE)


@pytest.mark.parametrize("solver", sorted(ADAPTIVE))
@pytest.mark.parametrize("options", [{"cfg_pp": True}, {"guidance_schedule": lambda level: 1.0}])
def test_rows_made_as_they_go_have_no_schedule(solver: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{solver} makes its rows as it goes.*guidance_interval"):
        fd.plan(solver, "linear", **options)


@pytest.mark.parametrize("solver", sorted(TURNS_ROUND | DROPS))
def test_cfg_pp_of_samplers_that_do_not_carry_their_state_on_is_refused(solver: str) -> None:
    how = "drops what a row adds" if solver in DROPS else "turns it round"
    with pytest.raises(ValueError, match=f"cfg_pp: {solver} {how}.*take a sampler that carries"):
        plan_of(solver, cfg_pp=True)


def plan_of(solver: str, **options: Any) -> Plan:
    chosen = fd.solvers.get(solver)
    schedule = "rectified_flow" if chosen.flow_only else "vp" if solver == "euler_maruyama" else "linear"
    grid = "flow_shift" if chosen.flow_only else "karras"
    return fd.plan(solver, schedule, 5, grid, **options)


@pytest.mark.parametrize("solver", CARRIES)
def test_cfg_pp_with_equal_branches_is_the_plain_table(solver: str) -> None:
    """With Du = D its rows are the plain ones, coefficient for coefficient; the same evaluations, both branches."""
    plain, moved = plan_of(solver), plan_of(solver, cfg_pp=True)
    assert (moved.nfe, moved.registers, moved.draws) == (plain.nfe, plain.registers, plain.draws)
    assert moved.reads_unguided and not plain.reads_unguided
    for a, b in zip(plain.rows[1:], moved.rows[1:], strict=True):
        for theirs, ours in zip(a.outputs, b.outputs, strict=True):
            assert (ours.x, ours.slots, ours.noise, ours.dest) == (theirs.x, theirs.slots, theirs.noise, theirs.dest)
            assert ours.denoised + ours.other == pytest.approx(theirs.denoised, rel=1e-15, abs=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", CARRIES)
def test_cfg_pp_with_equal_branches_draws_the_plain_sample(solver: str, backend: str) -> None:
    sizes: list[int] = []

    def mild(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        sizes.append(len(x))
        return labelled(x, t, label)

    plain, moved = plan_of(solver), plan_of(solver, cfg_pp=True)
    assert plain.schedule is not None
    model = fd.Denoiser(mild, plain.schedule, "x0")
    cond = conditions("cond")["cond"]
    generator = torch.Generator().manual_seed(0)
    init = 0.5 * torch.randn(SHAPE, generator=generator) if fd.solvers.get(solver).upward else None
    draws = torch.randn(plain.draws, *SHAPE, generator=generator)
    exact = in_double(plain, model, lambda at: at.cond, draws, init)
    run = {"init": init, "noise": draws, "cond": cond, "given": {name: torch.zeros(SHAPE) for name in plain.given}}
    expected = fd.Sampler(plain, model, backend).sample(SHAPE, **run)
    sizes.clear()
    ours = fd.Sampler(moved, model, backend).sample(SHAPE, **run, uncond=cond, guidance=0.7)
    assert sizes == [2 * SHAPE[0]] * plain.nfe
    assert error(ours, exact) < 2 * error(expected, exact) + 1e-6


class Recorder:
    """A network that remembers the size of each of its batches."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return labelled(x, t, label)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_runs_only_the_branches_it_reads(backend: str) -> None:
    """In a stack of three the second cannot be left out alone; branches of their own networks can."""
    levels = [level.rho for level in fd.plan("ddim", "linear", 6).levels]
    guidance = (levels[3], levels[0])  # rows 0 to 3
    perturbed = (levels[4], levels[2])  # rows 2 to 4
    plan = fd.plan("ddim", "linear", 6, guidance_interval=guidance, perturbed_interval=perturbed)
    main, guide, skipping = Recorder(), Recorder(), Recorder()
    model, weak, cut = (fd.Denoiser(net, "linear", "eps") for net in (main, guide, skipping))

    def expected(at: Asked) -> Tensor:
        raw = at.uncond + 3.0 * (at.cond - at.uncond) if at.number <= 3 else at.cond
        return at.denoised(raw + 1.5 * (at.cond - at.perturbed) if 2 <= at.number <= 4 else raw)

    exact = in_double(plan, wrapped("linear", "eps"), expected)
    for networks, sizes in (
        ({}, ([6, 6, 9, 9, 9, 3], [], [])),
        ({"guide": weak}, ([3, 3, 6, 6, 6, 3], [3] * 4, [])),
        ({"perturbed": cut}, ([6, 6, 6, 6, 3, 3], [], [3] * 3)),
        ({"guide": weak, "perturbed": cut}, ([3] * 6, [3] * 4, [3] * 3)),
    ):
        for net in (main, guide, skipping):
            net.sizes.clear()
        ours = fd.Sampler(plan, model, backend, **networks).sample(SHAPE, **ALL, guidance=3.0, perturbed_scale=1.5)
        assert (main.sizes, guide.sizes, skipping.sizes) == sizes
        assert error(ours, exact) < CLOSE


@pytest.mark.parametrize("backend", BACKENDS)
def test_cfg_pp_within_an_interval(backend: str) -> None:
    """Rows outside are the plain sampler on the conditional branch alone; a gain of 0 inside is a scale of 1."""
    levels = fd.plan("ddim", "linear", 5).levels
    inside = (levels[3].rho, levels[1].rho)  # rows 1 to 3
    plan = fd.plan("ddim", "linear", 5, cfg_pp=True, guidance_interval=inside, guidance_schedule=[1, 1, 0, 1, 1])
    net = Recorder()
    model = fd.Denoiser(net, "linear", "eps")
    ours = fd.Sampler(plan, model, backend).sample(SHAPE, **GUIDED, guidance=0.6)
    assert net.sizes == [3, 6, 6, 6, 3]
    x = start_of(plan)
    for i, (s, t) in enumerate(itertools.pairwise(levels)):
        at = ask(wrapped("linear", "eps"), i, x, s)
        guided = again = at.denoised(at.cond)
        if 1 <= i <= 3:
            again = at.denoised(at.uncond)
            guided = again + (1.0 if i == 2 else 0.6) * (guided - again)
        x = t.alpha * guided + t.sigma / s.sigma * (x - s.alpha * again)
    assert error(ours, x) < CLOSE


@pytest.mark.parametrize("backend", BACKENDS)
def test_guidance_schedule(backend: str) -> None:
    """w of row i is 1 + g_i (w - 1); a sequence and a function of the level give one table."""
    gains = [0.0, 0.5, 1.0, 0.0, -0.5, 2.0]
    plan = fd.plan("dpmpp_2m", "linear", 6, guidance_schedule=gains)
    by_level = {level.rho: gain for level, gain in zip(plan.levels, gains, strict=False)}
    assert fd.plan("dpmpp_2m", "linear", 6, guidance_schedule=lambda level: by_level[level.rho]) == plan
    net = Recorder()
    w = [2.0, 4.0, 1.0]

    def expected(at: Asked) -> Tensor:
        return at.denoised(at.uncond + (1 + gains[at.number] * (weights(w) - 1)) * (at.cond - at.uncond))

    ours = fd.Sampler(plan, fd.Denoiser(net, "linear", "eps"), backend).sample(SHAPE, **GUIDED, guidance=w)
    assert net.sizes == [3, 6, 6, 3, 6, 6]
    assert error(ours, in_double(plan, wrapped("linear", "eps"), expected)) < CLOSE


def test_a_schedule_and_an_interval_multiply() -> None:
    levels = fd.plan("heun", "linear", 3).levels
    inside = (levels[1].rho, levels[0].rho)
    plan = fd.plan("heun", "linear", 3, guidance_schedule=[1, 2, 3, 4, 5], guidance_interval=inside)
    assert [row.gain for row in plan.rows[1:]] == [1.0, 2.0, 3.0, 0.0, 0.0]


FEATURES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("ddim", {"cfg_pp": True}, ("; E = D of the unguided branch", "E\n")),
    ("dpmpp_2m", {"clamp": (-1.0, 1.5)}, (", clamped to [-1, 1.5]",)),
    ("dpmpp_2m", {"clamp": (-math.inf, 1.5)}, (", clamped to [-inf, 1.5]",)),
    ("ddpm", {"variance": "learned_range"}, ("; z times exp(", " V), V the learned variance")),
    ("euler", {"guidance_schedule": [1, 0.5, 0, 2]}, (", guidance 1 + 0.5 (w - 1)", ", guidance 1\n", "1 + 2 (w - 1)")),
    ("euler", {"perturbed_interval": (0.0, 10.0)}, (", perturbed branch off",)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("solver", "options", "told"), FEATURES, ids=lambda value: str(value)[:30])
def test_json_and_explain(solver: str, options: dict[str, Any], told: tuple[str, ...], backend: str) -> None:
    plan = fd.plan(solver, "linear", 4, **options)
    text = plan.explain()
    plain = fd.plan(solver, "linear", 4).explain()
    for words in told:
        assert words in text and words not in plain
    again = fd.Plan.from_json(plan.to_json())
    assert again == plan and again.explain() == text and again.to_json() == plan.to_json()

    def with_variance(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return torch.cat([labelled(x, t, label), torch.sin(3 * x)], dim=1)

    model = fd.Denoiser(with_variance, "linear", "eps", learned_variance=True)
    draw = {**ALL, "guidance": 2.0, "perturbed_scale": 0.5}
    samples = [fd.Sampler(p, model, backend).sample(SHAPE, **draw) for p in (plan, again, fd.plan(solver, "linear", 4))]
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])


def test_a_plan_of_before_guidance_was_in_the_table_is_read() -> None:
    """Rows without the new fields mean what they meant: all of the guidance, no second estimate, no spread."""
    plan = fd.plan("ddpm", "linear", 4)
    document = json.loads(plan.to_json())
    for row in document["plan"]["rows"]:
        for name in ("estimate", "spread", "perturb", "muted"):
            del row[name]
        for output in row["outputs"]:
            del output["other"]
    document["digest"] = hashlib.sha256(json.dumps(document["plan"], sort_keys=True).encode()).hexdigest()
    assert fd.Plan.from_json(json.dumps(document)) == plan


@pytest.mark.parametrize("backend", BACKENDS)
def test_learned_range_ends_are_the_fixed_variances(backend: str) -> None:
    """V = -1 is fixed_small, V = 1 fixed_large; in between the logarithm of the deviation is interpolated."""
    samples = {}
    for v in (-1.0, 0.0, 1.0):
        net = lambda x, t, v=v: torch.cat([torch.tanh(x), torch.full_like(x, v)], dim=1)  # noqa: E731
        model = fd.Denoiser(net, "linear", "eps", learned_variance=True)
        for variance in ("learned_range", "fixed_small", "fixed_large"):
            plan = fd.plan("ddpm", "linear", 6, variance=variance)
            samples[variance, v] = fd.Sampler(plan, model, backend).sample(SHAPE, seed=3)
    fixed = samples["fixed_small", 0.0], samples["fixed_large", 0.0]
    assert error(samples["learned_range", -1.0], fixed[0].double()) < 1e-6
    assert error(samples["learned_range", 1.0], fixed[1].double()) < 2e-6
    assert min(error(samples["learned_range", 0.0], end.double()) for end in fixed) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_learned_range_in_half_precision_and_any_layout(
    dtype: torch.dtype, layout: torch.memory_format, backend: str
) -> None:
    """F and V here do not depend on x, so the network's rounding is in the formula too."""
    generator = torch.Generator().manual_seed(0)
    given = torch.cat([torch.randn(SHAPE, generator=generator), torch.rand(SHAPE, generator=generator) * 2 - 1], dim=1)
    given = given.to(dtype)
    plan = fd.plan("ddpm", "linear", 4, variance="learned_range")
    model = fd.Denoiser(lambda x, t: given, "linear", "x0", learned_variance=True, dtype=dtype)
    draws = torch.randn(plan.draws, *SHAPE, generator=generator)
    raw, v = given.double().chunk(2, dim=1)
    x = start_of(plan)
    for i, (s, t) in enumerate(itertools.pairwise(plan.levels)):
        a = s.alpha / t.alpha
        beta = s.sigma**2 - (a * t.sigma) ** 2
        x = (a * t.sigma**2 * x + t.alpha * beta * raw) / s.sigma**2
        if t.sigma > 0:
            small, large = math.log(beta * (t.sigma / s.sigma) ** 2), math.log(beta)
            x = x + torch.exp(0.25 * ((1 - v) * small + (1 + v) * large)) * draws[i].double()
    ours = fd.Sampler(plan, model, backend, memory_format=layout).sample(SHAPE, noise=draws)
    assert error(ours, x) < CLOSE
