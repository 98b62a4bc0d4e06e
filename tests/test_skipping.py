"""Approximations that skip work: what they evaluate, by how much they change a sample, and what they refuse."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from stand_in import StandIn, stand_in  # noqa: F401
from torch import Tensor

import fastdiff as fd
from fastdiff.compiler.assemble import assemble
from fastdiff.compiler.skipping import _segments
from fastdiff.compiler.verify import execute
from fastdiff.engine.skipping import Rule
from fastdiff.models.exact import Mixture

SHAPE = (1, 1, 32, 32)
BACKENDS = [name for name in ("reference", "cpp") if fd.backends()[name].ok]
PLANS = (
    "ddim",
    "ddpm",
    "heun",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m",
    "unipc",
    "sa_solver",
    "seeds_2",
    "pndm",
    "ghvb",
)
MIXTURE = Mixture([1.0, 2.0, 1.0], [[-1.0, 0.5], [0.2, -0.8], [1.0, 1.0]], [0.05, 0.02, 0.1])


def change(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


@pytest.fixture(scope="module")
def fashion() -> fd.Denoiser:
    return fd.load("fashion")


LABEL = {"class_labels": torch.tensor([7])}
STEPS = 16


@pytest.mark.parametrize("solver", PLANS)
def test_a_table_taken_apart_and_put_together_is_the_table(solver: str) -> None:
    plan = fd.plan(solver, "linear", 8)
    rows, registers, result = assemble(solver, _segments(plan), len(plan.given))
    assert registers == plan.registers

    def normal(index: int, stream: int) -> Any:
        return np.random.default_rng([index, stream]).standard_normal(3)

    start = np.array([0.3, -1.0, 2.0])
    whole = execute(plan, lambda x, level: np.tanh(x), start, normal)
    again = execute(
        fd.Plan(**{**vars(plan), "rows": rows, "result": result}), lambda x, level: np.tanh(x), start, normal
    )
    assert np.abs(again - whole).max() <= 1e-13 * np.abs(whole).max()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_what_a_row_takes_for_the_networks_output(order: int) -> None:
    """DDIM written out, the noise estimate of skipped rows extrapolated with Lagrange's weights."""
    plan = fd.plan("ddim", "linear", 9)
    skipped = plan.skipping([3, 4, 6], order=order)
    assert skipped.nfe == 6 and [row.reused for row in skipped.rows[1:]] == [i in (3, 4, 6) for i in range(9)]
    x = start = np.array([[0.4, -1.1], [1.5, 0.2]])
    known: list[tuple[float, Any]] = []
    for i, (s, t) in enumerate(zip(plan.levels, plan.levels[1:], strict=False)):
        if i in (3, 4, 6):
            e = 0.0
            nodes = known[-order:]
            for lam, value in nodes:
                e = e + value * math.prod((s.lam - other) / (lam - other) for other, _ in nodes if other != lam)
        else:
            e = (x - s.alpha * MIXTURE(x, s)) / s.sigma
            known.append((s.lam, e))
        x = t.alpha / s.alpha * (x - s.sigma * e) + t.sigma * e
    assert np.abs(execute(skipped, MIXTURE, start) - x).max() < 1e-12 * np.abs(x).max()


def test_equal_steps_give_the_papers_weights() -> None:
    """(-1)^(j+1) C(k, j) on levels in equal ratios, every one before asked."""
    plan = fd.plan("ddim", "edm", 8, "exponential")
    for order, weights in ((1, [1]), (2, [2, -1]), (3, [3, -3, 1]), (4, [4, -6, 4, -1])):
        row = plan.skipping([6], order=order).rows[7]
        (output,) = row.outputs
        level, reached = plan.levels[6], plan.levels[7]
        # x' = x + (sigma' - sigma) e
        assert sorted(c / (reached.sigma - level.sigma) for c in output.slots) == pytest.approx(sorted(weights))
        assert output.x == pytest.approx(1.0) and output.denoised == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2m", "ddpm"])
def test_executors_run_rows_that_ask_nothing(solver: str, backend: str) -> None:
    calls = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return torch.from_numpy(0.4 * np.tanh(x.double().numpy())).float()

    model = fd.Denoiser(net, "vp", "x0")
    plan = fd.plan(solver, model.schedule, 8, skipping={"every": 3, "order": 1})
    rows = len(plan.rows) - 1
    asked = [i for i in range(rows) if i % 3 == 0 or i == rows - 1]
    sampler = fd.Sampler(plan, model, backend)
    start = torch.linspace(-2, 2, 12).view(2, 6)
    noise = torch.linspace(-1, 1, 12 * max(plan.draws, 1)).view(-1, 2, 6)
    got = sampler.sample((2, 6), init=start, noise=noise if plan.draws else "white")
    expected = execute(
        plan, lambda x, level: 0.4 * np.tanh(x * c_in(model, level)), start.numpy(), lambda i, s: noise[i].numpy()
    )
    assert (got.double() - torch.from_numpy(expected)).abs().max() < 1e-5
    assert len(calls) == len(asked) == plan.nfe == sampler.last_run.nfe  # type: ignore[union-attr]


def c_in(model: fd.Denoiser, level: fd.Level) -> float:
    return fd.predictions.coefficients("x0", level, model.schedule).c_in


@pytest.fixture(scope="module")
def whole(fashion: fd.Denoiser) -> Callable[[str], Tensor]:
    """The shipped network's sample with every evaluation, of a sampler."""
    return functools.cache(lambda solver: fd.sample(fashion, SHAPE, solver, STEPS, cond=LABEL))


@pytest.mark.parametrize(
    ("solver", "order", "least", "most"),
    [("ddim", 1, 0.03, 0.045), ("ddim", 2, 0.012, 0.022), ("dpmpp_2m", 2, 0.018, 0.03), ("ddpm", 1, 0.25, 0.4)],
)
def test_extrapolated_outputs_change_the_sample_by(
    fashion: fd.Denoiser, whole: Any, solver: str, order: int, least: float, most: float
) -> None:
    """Relative change with 9 of 16 evaluations."""
    skipped = fd.plan(solver, fashion.schedule, STEPS).skipping(every=2, order=order)
    assert skipped.nfe == 9 and "approximate" in skipped.explain()
    assert least < change(fd.Sampler(skipped, fashion).sample(SHAPE, cond=LABEL), whole(solver)) < most


def test_skipped_rows_in_a_stream_and_in_graphs(stand_in: type[StandIn]) -> None:  # noqa: F811
    model = fd.Denoiser(lambda x, t: torch.tanh(x), "edm", "edm", sigma_data=0.5)
    plans = [fd.plan(solver, "edm", 7).skipping(every=3, order=1) for solver in ("ddim", "dpmpp_2m", "heun")]
    alone = [fd.Sampler(plan, model, graph=False).sample((1, 3, 4, 4), seed=i)[0] for i, plan in enumerate(plans)]
    for i, plan in enumerate(plans):
        replayed = fd.Sampler(plan, model, graph=True)
        assert torch.equal(replayed.sample((1, 3, 4, 4), seed=i)[0], alone[i])
    stream = fd.stream(model, (3, 4, 4), slots=2)
    requests = [stream.submit(plan, seed=i) for i, plan in enumerate(plans)]
    assert all(torch.equal(request.result(), x) for request, x in zip(requests, alone, strict=True))
    assert [r.nfe for r in requests] == [plan.nfe for plan in plans]
    assert stream.stats().evaluated == sum(plan.nfe for plan in plans)


def test_skipping_goes_through_json_and_leaves_the_plan_alone() -> None:
    plan = fd.plan("dpmpp_2m", "edm", 8)
    before = plan.to_json()
    skipped = plan.skipping(every=2)
    assert fd.Plan.from_json(skipped.to_json()) == skipped and plan.to_json() == before
    assert fd.plan("dpmpp_2m", "edm", 8, skipping={"every": 2}) == skipped


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fd.plan("ddim", "edm", 5).skipping(), "give rows="),
        (lambda: fd.plan("ddim", "edm", 5).skipping([1], every=2), "give rows="),
        (lambda: fd.plan("ddim", "edm", 5).skipping([0]), "integers from 1 to 4"),
        (lambda: fd.plan("ddim", "edm", 5).skipping([5]), "integers from 1 to 4"),
        (lambda: fd.plan("ddim", "edm", 5).skipping([True]), "integers from 1 to 4"),
        (lambda: fd.plan("ddim", "edm", 5).skipping(every=0), "every must be"),
        (lambda: fd.plan("ddim", "edm", 5).skipping(every=2, order=5), "order must be"),
        (lambda: fd.plan("ddim", "edm", 5).skipping(every=2).skipping(every=2), "give all rows at once"),
        (lambda: fd.plan("ddim", "edm", 5, cfg_pp=True).skipping(every=2), "CFG\\+\\+"),
        (lambda: fd.plan("ddim", "edm", 5).skipping(every=2).guided(cfg_pp=True), "no unguided estimate"),
        (lambda: fd.plan("pndm", "edm", 5).skipping(every=2), "leaves no room in a row.*shorter history"),
        (lambda: fd.plan("rk45", "edm", skipping={"every": 2}), "makes its rows as it goes"),
        (lambda: fd.AdaptiveSkip(delta=-1.0), "delta must be"),
        (lambda: fd.AdaptiveSkip(most=0), "most must be"),
    ],
)
def test_what_skipping_refuses(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_the_rule_of_the_third_difference() -> None:
    rule = Rule(fd.AdaptiveSkip(0.01, most=2))
    # d: level, then exactly linear (third difference 0), so skips until two on end, then asks once
    assert [rule.skips(d) for d in (5.0, 4.0, 3.0, 2.0, 1.0, 0.5)] == [False, False, True, True, False, False]
    # |(3.05 + 5) / 2 - 4| = 0.025 <= 0.01 * 4, and 0.06 is not
    for third, skips in ((3.05, True), (3.12, False)):
        rule = Rule(fd.AdaptiveSkip(0.01))
        assert [rule.skips(d) for d in (5.0, 4.0, third)][-1] is skips
    assert rule.skipped == 0


def by_hand(net: Any, plan: fd.Plan, start: Any, skip: fd.AdaptiveSkip) -> tuple[Any, int]:
    """DDIM in float64 with the published rule, for one sample."""
    x, states, in_turn, asked, e = start, [], 0, 0, None
    for s, t in zip(plan.levels, plan.levels[1:], strict=False):
        states.append(x)
        d = [np.abs(b - a).mean() for a, b in zip(states[-4:], states[-3:], strict=False)]
        smooth = len(states) >= 4 and abs((d[2] + d[0]) / 2 - d[1]) <= skip.delta * d[1]
        if smooth and in_turn < skip.most:
            in_turn += 1
        else:
            in_turn, asked, e = 0, asked + 1, (x - s.alpha * net(x, s)) / s.sigma
        x = t.alpha / s.alpha * (x - s.sigma * e) + t.sigma * e
    return x, asked


@pytest.mark.parametrize("backend", BACKENDS)
def test_adaptive_skipping_is_the_published_loop_for_each_sample(backend: str) -> None:
    calls: list[int] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return torch.tanh(3 * x) * 0.5 + 0.2 * torch.cos(x)

    model = fd.Denoiser(net, "edm", "x0")
    sampler = fd.Sampler(fd.plan("ddim", "edm", 40), model, backend)
    start = 80.0 * torch.randn(6, 30, generator=torch.Generator().manual_seed(1))
    skip = fd.AdaptiveSkip(0.02)
    got = sampler.sample((6, 30), init=start, skip=skip)
    expected = [
        by_hand(lambda x, level: np.tanh(3 * x) * 0.5 + 0.2 * np.cos(x), sampler.plan, row, skip)
        for row in start.double().numpy()
    ]
    counts = tuple(asked for _, asked in expected)
    assert sampler.last_run is not None and sampler.last_run.nfe_of == counts
    assert sum(calls) == sum(counts) < 6 * 40 and sampler.last_run.nfe == max(counts)
    assert np.abs(got.numpy() - np.stack([x for x, _ in expected])).max() < 1e-4
    one = sampler.sample((1, 30), init=start[3:4], skip=skip)
    assert torch.equal(one[0], got[3])


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmpp_2m"])
def test_adaptive_skipping_without_tolerance_skips_nothing(solver: str) -> None:
    model = fd.Denoiser(lambda x, t, label: torch.tanh(x + label.view(-1, 1)), "vp", "x0")
    draw = {"cond": {"label": torch.ones(3)}, "uncond": {"label": torch.zeros(3)}, "guidance": [1.0, 2.0, 3.0]}
    whole = fd.sample(model, (3, 10), solver, 9, **draw)
    assert torch.equal(fd.sample(model, (3, 10), solver, 9, skip=fd.AdaptiveSkip(0.0), **draw), whole)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_adaptive_skipping_changes_the_sample_by(fashion: fd.Denoiser, whole: Any, solver: str) -> None:
    """With ten times the paper's tolerance, as 16 steps are few: 11 evaluations are left."""
    sampler = fd.Sampler(fd.plan(solver, fashion.schedule, STEPS), fashion)
    got = sampler.sample(SHAPE, cond=LABEL, skip=fd.AdaptiveSkip(0.1))
    assert sampler.last_run is not None and 10 <= sampler.last_run.nfe <= 12
    assert 0.03 < change(got, whole(solver)) < 0.08


def test_what_adaptive_skipping_refuses() -> None:
    model = fd.Denoiser(lambda x, t: 0.5 * x, "edm", "x0")
    for solver, words in (("heun", "more or less often than once"), ("unipc", "none left to save")):
        with pytest.raises(ValueError, match=words):
            fd.sample(model, (1, 4), solver, 5, skip=fd.AdaptiveSkip())
    with pytest.raises(TypeError, match="AdaptiveSkip"):
        fd.sample(model, (1, 4), "ddim", 5, skip=0.01)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def wide() -> fd.models.UNet:
    torch.manual_seed(0)
    config = fd.models.UNetConfig(
        sample_size=16,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    net = fd.models.UNet(config)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.eval().requires_grad_(False)


def test_deep_calls_are_the_unet_and_shallow_ones_its_outer_levels(wide: fd.models.UNet) -> None:
    reuse = fd.models.reuse_features(fd.Denoiser(wide, "linear"), every=3, levels=1).net
    x, y = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    t, u = torch.tensor([10.0, 20.0]), torch.tensor([5.0, 15.0])
    entering: list[Tensor] = []
    calls: list[str] = []
    handles = [wide.up_blocks[-1].register_forward_pre_hook(lambda _, given: entering.append(given[0].clone()))]
    for name in ("down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1"):
        handles.append(wide.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name)))
    assert torch.equal(reuse(x, t), wide(x, t))
    assert len(calls) == 2 * 5
    reuse.mode = 2
    shallow = reuse(y, u)
    assert len(calls) == 2 * 5 and torch.equal(entering[2], entering[0])
    # the same as the UNet with what enters its last level replaced
    handles.append(wide.up_blocks[-1].register_forward_pre_hook(lambda _, given: (entering[0], *given[1:])))
    assert torch.equal(shallow, wide(y, u))
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("levels", [1, 2])
def test_rows_of_a_run_alternate(stand_in: type[StandIn], wide: fd.models.UNet, levels: int) -> None:  # noqa: F811
    model = fd.models.reuse_features(fd.Denoiser(wide, "linear"), every=3, levels=levels)
    deep: list[int] = []
    handle = wide.down_blocks[2].register_forward_hook(lambda _, given, output: deep.append(len(given[0])))
    try:
        eager = fd.sample(model, (2, 3, 16, 16), "ddim", 8, graph=False)
        assert len(deep) == 3
        for graph in (True, "loop"):
            assert torch.equal(fd.sample(model, (2, 3, 16, 16), "ddim", 8, graph=graph), eager)
        # where guidance begins the batch doubles, and features of the smaller one do not reach
        plan = fd.plan("ddim", "linear", 8, guidance_interval=(0.05, 20.0))
        gains = [row.gain for row in plan.rows[1:]]
        first, last = gains.index(1.0), 8 - gains[::-1].index(1.0)
        assert 0 < first < last < 8
        modes = model.net.modes([2 * (1 + int(g)) for g in gains])  # type: ignore[union-attr]
        assert modes[0] == modes[first] == 0 and modes[first + 1] == 4
    finally:
        handle.remove()


def test_reused_features_belong_to_one_run_and_the_network_is_deep_after_it(wide: fd.models.UNet) -> None:
    model = fd.models.reuse_features(fd.Denoiser(wide, "linear"), every=3)
    plan, shape = fd.plan("ddim", "linear", 3), (1, 3, 16, 16)
    x, t = torch.randn(shape), torch.tensor([10.0])
    first, second, refused = fd.Sampler(plan, model), fd.Sampler(plan, model), []

    def between(row: Any) -> None:
        with pytest.raises(RuntimeError, match="another run works with this network"):
            second.sample(shape, seed=1)
        refused.append(row.row)

    alone = first.sample(shape, seed=0)
    assert torch.equal(model.net(x, t), wide(x, t))
    assert torch.equal(first.sample(shape, seed=0, callback=between), alone) and refused == [0, 1, 2]
    second.sample(shape, seed=1)  # free again

    def fails(row: Any) -> None:
        raise KeyError(row.row)

    for _ in range(2):
        with pytest.raises(KeyError):
            first.sample(shape, callback=fails)
    assert torch.equal(model.net(x, t), wide(x, t))


@pytest.mark.parametrize(("every", "least", "most"), [(2, 0.02, 0.035), (3, 0.045, 0.065)])
def test_reused_features_change_the_sample_by(
    fashion: fd.Denoiser, whole: Any, every: int, least: float, most: float
) -> None:
    model = fd.models.reuse_features(fashion, every)
    assert least < change(fd.sample(model, SHAPE, "ddim", STEPS, cond=LABEL), whole("ddim")) < most


def test_what_reused_features_refuse(wide: fd.models.UNet) -> None:
    model = fd.Denoiser(wide, "linear")
    reuse = fd.models.reuse_features(model, levels=2)
    guided = fd.Sampler(fd.plan("ddim", "linear", 3), model, guide=reuse)
    for call, error, words in (
        (lambda: fd.models.reuse_features(wide), TypeError, "needs a Denoiser around"),
        (lambda: fd.models.reuse_features(fd.Denoiser(torch.nn.Identity(), "linear")), TypeError, "got Identity"),
        (lambda: fd.models.reuse_features(model, 0), ValueError, "every must be"),
        (lambda: fd.models.reuse_features(model, 2, levels=3), ValueError, "at most 2"),
        (lambda: fd.stream(reuse, (3, 16, 16)), ValueError, "without reuse_features"),
        (lambda: fd.stream(model, (3, 16, 16), guide=reuse), ValueError, "a stream has.*without reuse_features"),
        (lambda: fd.stream(model, (3, 16, 16), perturbed=reuse), ValueError, "a stream has.*without reuse_features"),
        (lambda: guided.stream((3, 16, 16)), ValueError, "a stream has.*without reuse_features"),
        (lambda: fd.sample(reuse, (1, 3, 16, 16), "rk45"), ValueError, "without reuse_features"),
        (lambda: fd.sample(reuse, (1, 3, 16, 16), "ddim", skip=fd.AdaptiveSkip()), ValueError, "without reuse"),
    ):
        with pytest.raises(error, match=words):
            call()
    reuse.net.mode = 2  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="needs a deep one"):
        reuse.net(torch.zeros(2, 3, 16, 16), torch.zeros(2))
