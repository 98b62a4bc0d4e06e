"""The guide op on the Triton executor, on a GPU or interpreted: against the reference, whose sums are float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import DEVICE, guide, interpreted  # noqa: F401
from row_cases import Case, every_pair_or_all, seeds_of

from fastdiff.compiler import layout as at
from fastdiff.engine import reference_guide
from fastdiff.engine.guide import GuideTensors, check

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy under the interpreter, on inf and NaN
NAN, INF = float("nan"), float("inf")
RULES = {"plain": at.PLAIN, "rescale": at.RESCALE, "apg": at.APG, "cfg_zero": at.CFG_ZERO}
SCALARS = slice(0, at.MIX_S)  # of mix; its last column is the caller's


def settings(
    phi: float = 0.7,
    eta: float = 0.25,
    beta: float = -0.5,
    radius: float = 5.0,
    percentile: float = 0.9,
    ceiling: float = INF,
) -> torch.Tensor:
    return torch.tensor([phi, eta, beta, radius, percentile, ceiling, NAN, NAN])


def from_case(case: Case, given: torch.Tensor) -> GuideTensors:
    """The guide op before the row of `case`: its scalars poisoned, its momentum random."""
    t = case.tensors()
    mix = torch.full((case.batch, at.MIX), NAN)
    mix[:, at.MIX_S] = 0.0 if t.mix is None else t.mix[:, at.MIX_S]
    return GuideTensors(
        state=t.state,
        model_out=t.model_out,
        coef=t.coef,
        ids=t.ids,
        row=t.row,
        guidance=t.guidance,
        settings=given,
        mix=mix,
        partial=torch.full((case.batch, at.PARTS, at.SUMS), NAN),
        ticket=torch.zeros(case.batch, dtype=torch.int32),
        unguided=t.unguided,
        perturbed=t.perturbed,
        momentum=torch.randn_like(t.state[0]),
    )


def simple(
    stack: torch.Tensor, guidance: float = 3.0, given: torch.Tensor | None = None, **changes: Any
) -> GuideTensors:
    """Samples of [2, B, N] (Fc, Fu) in a row with D = F, guided."""
    _, batch, length = stack.shape
    coef = torch.zeros(1, at.COEF_FIXED)
    coef[0, [at.Q, at.GAIN, at.PERTURB]] = 1.0
    ids = torch.zeros(1, at.IDS_FIXED, dtype=torch.int32)
    ids[0, at.FLAGS] = at.READS_MODEL
    fields: dict[str, Any] = {
        "state": torch.full((1, batch, length), NAN),
        "model_out": stack.flatten(0, 1),
        "coef": coef,
        "ids": ids,
        "row": torch.zeros(batch, dtype=torch.int32),
        "guidance": torch.full((batch,), guidance),
        "settings": settings() if given is None else given,
        "mix": torch.cat([torch.full((batch, at.MIX - 1), NAN), torch.zeros(batch, 1)], 1),
        "partial": torch.full((batch, at.PARTS, at.SUMS), NAN),
        "ticket": torch.zeros(batch, dtype=torch.int32),
        "momentum": torch.zeros(batch, length),
    }
    return GuideTensors(**(fields | changes))


def copy(tensors: GuideTensors, device: torch.device | str = "cpu") -> GuideTensors:
    def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.clone(memory_format=torch.preserve_format).to(device)

    return GuideTensors(*[move(tensor) for tensor in tensors.arguments()])  # type: ignore[arg-type]


def run(tensors: GuideTensors, rule: int, threshold: bool = False) -> GuideTensors:
    there = copy(tensors, DEVICE)
    check(there, rule)
    find = guide.bind(*there.arguments(), rule=rule, threshold=threshold)
    find(there.model_out, there.unguided, there.perturbed)
    return copy(there)


def assert_found(tensors: GuideTensors, rule: int, threshold: bool) -> GuideTensors:
    """Scalars and momentum are those of the reference, the ticket is back at 0, and nothing else has changed."""
    got, expected = run(tensors, rule, threshold), copy(tensors)
    reference_guide.guide(*expected.arguments(), rule=rule, threshold=threshold)
    torch.testing.assert_close(got.mix, expected.mix, rtol=1e-5, atol=2e-7, equal_nan=True)
    torch.testing.assert_close(got.momentum, expected.momentum, rtol=1e-6, atol=1e-6)
    for name in ("state", "model_out", "coef", "ids", "row", "guidance", "settings", "ticket", "unguided", "perturbed"):
        before, after = getattr(tensors, name), getattr(got, name)
        assert (before is None) == (after is None)
        if before is not None:
            torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    return got


SHAPES = [
    ((1,), torch.contiguous_format),
    ((3, 5, 7), torch.contiguous_format),
    ((4, 24, 20), torch.channels_last),
]


@every_pair_or_all
@pytest.mark.parametrize("threshold", [False, True], ids=["", "threshold"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("shape", "layout"), SHAPES)
def test_random_rows(
    shape: tuple[int, ...], layout: torch.memory_format, rule: str, threshold: bool, product: bool
) -> None:
    seeds = range(threshold, 6, 1 + threshold)
    for place in seeds_of(3, product, SHAPES.index((shape, layout)), RULES[rule]):
        for seed in seeds[place::3]:
            assert_random_row(shape, layout, rule, threshold, seed)


def assert_random_row(
    shape: tuple[int, ...], layout: torch.memory_format, rule: str, threshold: bool, seed: int
) -> None:
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    case = Case(
        shape,
        4,
        layout,
        dtypes[seed % 3],
        branches=("stacked", "apart")[seed % 2],
        guided=seed != 3,
        perturbed=seed > 2,
        idle=seed == 4,
        seed=seed + 10 * threshold + 20 * RULES[rule],
    )
    given = settings(radius=(0.0, 5.0, 0.1)[seed % 3], ceiling=(INF, 1.7)[seed % 2])
    assert_found(from_case(case, given), RULES[rule], threshold)


@pytest.mark.parametrize("rule", ["rescale", "apg", "cfg_zero"])
@pytest.mark.parametrize("length", [40_001, 2**17 + 4])
def test_a_sample_of_many_parts(rule: str, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    stack = torch.randn(2, 2, length, generator=generator)
    stack[1] += 0.3 * stack[0] + 0.1
    assert_found(simple(stack, momentum=torch.randn(2, length, generator=generator)), RULES[rule], False)


@pytest.mark.parametrize("place", [0, 777, 1500])
def test_rescale_of_a_mean_far_above_the_spread(place: int) -> None:
    """And of a sample with one extreme element, wherever it is: the worst that a shift by one element can meet."""
    generator = torch.Generator().manual_seed(1)
    stack = 4000.0 + torch.randn(2, 1, 3000, generator=generator)
    got = assert_found(simple(stack), at.RESCALE, False)
    conditional, second = stack.double()
    exact = 0.7 * float(conditional.std() / (second + 3.0 * (conditional - second)).std()) + 0.3
    assert float(got.mix[0, at.MIX_Q]) == pytest.approx(exact, rel=1e-5)
    stack[:, 0, place] += 3000.0
    assert_found(simple(stack), at.RESCALE, False)


def test_rescale_of_a_mean_a_million_times_the_spread() -> None:
    """With w = 2 and both branches multiples of 1/16, G is exact in fp32, and so is what the parts differ by."""
    stack = 1e6 + (16 * torch.randn(2, 1, 5000, generator=torch.Generator().manual_seed(1))).round() / 16
    got = run(simple(stack, 2.0), at.RESCALE)
    conditional, second = stack.double()
    exact = 0.7 * float(conditional.std() / (2.0 * conditional - second).std()) + 0.3
    assert float(got.mix[0, at.MIX_Q]) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("value", [0.1, -3.7])
def test_constant_branches_have_no_spread(value: float) -> None:
    """Exactly none, or the ratio of two roundings would be the scalar."""
    stack = torch.full((2, 1, 1477), value)
    stack[1] *= 0.37
    assert run(simple(stack), at.RESCALE).mix[0, at.MIX_Q] == 1.0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7])
def test_constant_branches(rule: str, value: float) -> None:
    """A spread of exactly 0, and sums of exactly 0: every ratio falls back to 1, the projection away."""
    stack = torch.full((2, 2, 1501), value)
    got = assert_found(simple(stack), RULES[rule], rule == "plain")
    assert torch.equal(got.mix[:, at.MIX_Q], torch.ones(2))
    assert torch.equal(got.mix[:, at.MIX_W], torch.full((2,), 0.0 if rule == "apg" else 1.0))


@pytest.mark.parametrize("rule", ["rescale", "apg", "cfg_zero"])
def test_scalars_depend_on_the_sample_alone(rule: str) -> None:
    """Bitwise: not on the batch, the place in it, or whether the branches are stacked."""
    case = Case((3, 20, 20), 3, torch.channels_last, torch.bfloat16, rows=1, seed=2)
    batch = from_case(case, settings())
    batch.ids[0, at.FLAGS], batch.coef[0, at.GAIN] = at.READS_MODEL, 1.0
    batch.coef[0, at.P] = 0.0
    batch.guidance.fill_(4.0)
    threshold = rule == "apg"
    found = run(batch, RULES[rule], threshold)
    last = copy(batch)
    last.unguided, last.model_out = last.model_out[-1:], last.model_out[2:3]
    last.state, last.momentum = last.state[:, 2:].clone(), last.momentum[2:]  # type: ignore[index]
    for name in ("row", "guidance", "mix", "partial", "ticket"):
        setattr(last, name, getattr(last, name)[2:])
    alone = run(last, RULES[rule], threshold)
    assert torch.equal(alone.mix[0], found.mix[2])
    assert torch.equal(alone.momentum[0], found.momentum[2])  # type: ignore[index]
    assert torch.equal(run(batch, RULES[rule], threshold).mix, found.mix)


@pytest.mark.parametrize("percentile", [0.0, 0.5, 0.9, 0.9999, 1.0])
@pytest.mark.parametrize("length", [1, 5, 4099])
def test_the_quantile_is_the_exact_one(length: int, percentile: float) -> None:
    """Between order statistics, in ties, and among values of every size from denormal to huge."""
    generator = torch.Generator().manual_seed(length)
    spread = torch.randn(length, generator=generator)
    samples = torch.stack(
        [spread, spread.round(), 10.0 ** (12 * spread), torch.full((length,), -2.5), 3 + 1e-6 * spread]
    )
    stack = samples.expand(2, -1, -1) + 0.0
    tensors = simple(stack, 1.0, settings(percentile=percentile))
    got = run(tensors, at.PLAIN, True)
    exact = torch.quantile(samples.abs().double(), float(tensors.settings[at.PERCENTILE]), dim=1).clamp(min=1.0)
    torch.testing.assert_close(got.mix[:, at.MIX_BOUND].double(), exact, rtol=2e-7, atol=0)
    torch.testing.assert_close(got.mix[:, at.MIX_POST].double(), 1.0 / exact, rtol=2e-7, atol=0)


def test_the_rank_keeps_the_digits_of_the_percentile() -> None:
    """Rank 4382.7 lies in a jump from 2 to a million: fp32 would place it with an error of 2e-4."""
    stack = torch.full((2, 1, 5001), 2.0)
    stack[:, 0, :618] = 1e6
    tensors = simple(stack, 1.0, settings(percentile=0.87654))
    exact = torch.quantile(stack[0, 0].double(), float(tensors.settings[at.PERCENTILE]))
    got = run(tensors, at.PLAIN, True).mix[0, at.MIX_BOUND]
    assert 2.0 < float(got) < 1e6
    assert float(got) == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_branch_that_is_not_finite_spoils_its_own_sample_only(rule: str, bad: float) -> None:
    stack = torch.randn(2, 3, 1200, generator=torch.Generator().manual_seed(5))
    clean = run(simple(stack), RULES[rule], rule == "plain")
    stack[0, 1, 700] = stack[1, 1, 3] = bad
    got = run(simple(stack), RULES[rule], rule == "plain")
    assert torch.equal(got.mix[[0, 2]], clean.mix[[0, 2]])
    assert got.ticket.tolist() == [0, 0, 0]
    if rule == "apg":
        assert got.mix[1, SCALARS].tolist() == list(at.PLAIN_MIX[SCALARS])
    elif rule != "plain":
        assert got.mix[1].isnan().any()


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_with_nothing_to_do_reads_nothing(rule: str) -> None:
    """Guidance 1, a row without gain, and a network without the branch leave identity scalars and the momentum."""
    stack = torch.full((2, 2, 100), NAN)
    momentum = torch.randn(2, 100)
    ungained = simple(stack, momentum=momentum)
    ungained.coef[0, at.GAIN] = 0.0
    for tensors in (
        simple(stack, 1.0, momentum=momentum),
        ungained,
        simple(stack, momentum=momentum, model_out=stack[0]),
    ):
        got = run(tensors, RULES[rule])
        assert torch.equal(got.mix[:, SCALARS], torch.tensor(at.PLAIN_MIX)[SCALARS].expand(2, -1))
        assert torch.equal(got.momentum, momentum)


def test_samples_without_a_row_or_a_model_are_left_alone() -> None:
    stack = torch.randn(2, 4, 64)
    tensors = simple(stack, row=torch.tensor([-1, 2, 1, 2**30], dtype=torch.int32))
    tensors.coef, tensors.ids = tensors.coef.repeat(2, 1), tensors.ids.repeat(2, 1)
    tensors.ids[1, at.FLAGS] = 0
    for rule in RULES.values():
        got = run(tensors, rule, True)
        torch.testing.assert_close(got.mix, tensors.mix, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got.momentum, tensors.momentum)
        assert got.ticket.tolist() == [0] * 4


def test_parts_are_at_most_those_of_the_scratch_and_cover_the_sample() -> None:
    for length in [*range(1, 4000, 13), 2**16, 2**17 - 1, 2**17, 2**17 + 1, 3 * 10**6, 2**31 + 5]:
        block, tiles, parts = guide.part_shape(length)
        assert parts <= at.PARTS
        assert (parts - 1) * block * tiles < length <= parts * block * tiles


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["rescale", "apg", "cfg_zero"])
@pytest.mark.parametrize("length", [2**20, 3 * 10**6])
def test_a_long_sample_in_every_dtype(rule: str, length: int) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        stack = torch.randn(2, 3, length, generator=torch.Generator().manual_seed(3)).to(dtype)
        stack[1] += 0.5 * stack[0]
        assert_found(simple(stack), RULES[rule], True)


@pytest.mark.gpu
def test_thousands_of_captured_launches_agree() -> None:
    """Arrivals of many programs, replayed: no sum is read before it is there, none is lost, and nothing syncs."""
    stack = torch.randn(2, 64, 2**17, generator=torch.Generator().manual_seed(3))
    there = copy(simple(stack), DEVICE)
    find = guide.bind(*there.arguments(), rule=at.RESCALE, threshold=True)
    find(there.model_out)
    first = there.mix.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        find(there.model_out)
    differs = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(2000):
        there.mix[:, SCALARS] = NAN
        there.partial.fill_(NAN)
        graph.replay()
        differs += (there.mix != first).sum()
    assert int(differs) == 0
    assert not there.ticket.any()
