"""The guide op on every executor of a CPU: its scalars against float64, and what must not change a bit of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.compiler import layout as at
from fastdiff.engine import guide

EXECUTORS = [name for name in ("reference", "cpp") if fd.backends()[name].ok]
RULES = {"plain": at.PLAIN, "rescale": at.RESCALE, "apg": at.APG, "cfg_zero": at.CFG_ZERO}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPES = [(1,), (2,), (3, 1, 1), (7, 1, 1), (4, 4, 4), (10, 10, 10), (3, 32, 32), (1, 65537, 1)]
WITHOUT_MODEL = 2  # the row of `table` that has none
IDLE = 4  # the samples of a Case from here on are left alone

pytestmark = pytest.mark.parametrize("executor", EXECUTORS)


@dataclass(frozen=True)
class Case:
    """Six samples: guided, guided in a row without x, weight 1, gain 0, in a row without a model, beyond the table."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format
    branches: str = "stacked"  # or "apart"
    count: int = 3
    radius: float = 0.0
    mean: float = 0.0
    spread: float = 1.0
    seed: int = 0

    def tensors(self) -> guide.GuideTensors:
        rng, batch = np.random.default_rng(self.seed), IDLE + 2

        def image(count: int, dtype: torch.dtype, mean: float = 0.0, spread: float = 1.0) -> Tensor:
            values = mean + spread * rng.normal(size=(count, *self.shape))
            tensor = torch.from_numpy(values.astype(np.float32)).to(dtype)
            return tensor.contiguous(memory_format=self.layout) if tensor.dim() == 4 else tensor

        coef, ids = table()
        stack = [image(batch, self.dtype, self.mean, self.spread) for _ in range(self.count)]
        apart = stack[1:] + [None] * (3 - self.count) if self.branches == "apart" else [None, None]
        model_out = stack[0] if self.branches == "apart" else torch.cat(stack)
        if model_out.dim() == 4:
            model_out = model_out.contiguous(memory_format=self.layout)
        mix = torch.full((batch, at.MIX), float("nan"))
        mix[:, at.MIX_S] = torch.tensor([1.5, 0.0, 0.0, 1.5, 1.0, 1.0])
        return guide.GuideTensors(
            state=image(3 * batch, torch.float32).unflatten(0, (3, batch)),
            model_out=model_out,
            coef=coef,
            ids=ids,
            row=torch.tensor([0, 1, 0, 3, WITHOUT_MODEL, len(coef)], dtype=torch.int32),
            guidance=torch.tensor([4.5, -0.5, 1.0, 3.0, 3.0, 3.0]),
            settings=torch.tensor([0.7, 0.3, -0.5, self.radius, 0.9, 1.7, 0.0, 0.0]),
            mix=mix,
            partial=torch.full((batch, at.PARTS, at.SUMS), float("nan")),
            ticket=torch.zeros(batch, dtype=torch.int32),
            unguided=apart[0],
            perturbed=apart[1],
            momentum=image(batch, torch.float32),
        )


def table() -> tuple[Tensor, Tensor]:
    """Rows 0 to 3: an ordinary one, one without x, one without a model, one whose guidance is off."""
    coef = torch.zeros(4, at.COEF_FIXED)
    ids = torch.zeros(4, at.IDS_FIXED, dtype=torch.int32)
    coef[:, [at.P, at.Q, at.GAIN, at.PERTURB]] = torch.tensor(
        [[1.2, -0.8, 1.0, 1.0], [0.0, 1.1, 0.5, 1.0], [1.0, 1.0, 1.0, 1.0], [0.9, -0.3, 0.0, 1.0]]
    )
    ids[:, at.SLOT] = torch.tensor([2, -1, 0, 1])
    ids[:, at.FLAGS] = at.READS_MODEL
    ids[WITHOUT_MODEL, at.FLAGS] = 0
    return coef, ids


@dataclass
class Found:
    mix: np.ndarray
    momentum: np.ndarray
    slack: np.ndarray  # of mix_p and mix_q: the size of what is subtracted from 1


def expected(t: guide.GuideTensors, rule: int, threshold: bool) -> Found:
    """The rules' formulas, written out in float64."""
    batch, rows = t.state.shape[1], len(t.coef)

    def split(tensor: Tensor | None) -> list[np.ndarray]:
        return [] if tensor is None else [part.double().flatten(1).numpy() for part in tensor.split(batch)]

    stack = split(t.model_out)
    conditional = stack[0]
    unguided = stack[1] if len(stack) > 1 else (split(t.unguided) or [None])[0]
    perturbed = stack[2] if len(stack) > 2 else (split(t.perturbed) or [None])[0]
    phi, eta, beta, radius, percentile, ceiling = t.settings.double().numpy()[:6]
    mix, slack = t.mix.double().numpy(), np.zeros(batch)
    (momentum,) = split(t.momentum) or [np.zeros_like(conditional)]

    for b in range(batch):
        i = int(t.row[b])
        if not 0 <= i < rows or not int(t.ids[i, at.FLAGS]) & at.READS_MODEL:
            continue
        p, q, gain, perturb = t.coef[i, [at.P, at.Q, at.GAIN, at.PERTURB]].double().numpy()
        x = t.state[int(t.ids[i, at.SLOT]), b].double().flatten().numpy() if p else 0.0
        w, s = 1 + gain * (float(t.guidance[b]) - 1), perturb * mix[b, at.MIX_S]
        fc = conditional[b]
        fu = fc if unguided is None else unguided[b]
        fp = fc if perturbed is None else perturbed[b]
        guided = unguided is not None and w != 1
        f = fu + w * (fc - fu) + s * (fc - fp)
        d = p * x + q * f

        mix[b, : at.MIX_S] = at.PLAIN_MIX[: at.MIX_S]
        if rule == at.RESCALE and f.std() > 0 and (guided or (perturbed is not None and s)):
            mix[b, at.MIX_Q] = phi * fc.std() / f.std() + 1 - phi
            d = p * x + mix[b, at.MIX_Q] * q * f
        elif rule == at.CFG_ZERO and guided and fu.any():
            u = mix[b, at.MIX_U] = (fc @ fu) / (fu @ fu)
            d = p * x + q * (u * fu + w * (fc - u * fu) + s * (fc - fp))
        elif rule == at.APG and guided:
            m = momentum[b] = q * (fc - fu) + beta * momentum[b]
            dc = p * x + q * fc
            c = min(1.0, radius / np.linalg.norm(m)) if radius and m.any() else 1.0
            mix[b, at.MIX_W], mix[b, at.MIX_M] = 0, (w - 1) * c
            if dc.any():
                mix[b, [at.MIX_P, at.MIX_Q]] = 1 - mix[b, at.MIX_M] * (1 - eta) * (m @ dc) / (dc @ dc)
                slack[b] = abs(mix[b, at.MIX_M] * (1 - eta)) * np.linalg.norm(m) / np.linalg.norm(dc)
            f = fc + s * (fc - fp)
            d = mix[b, at.MIX_P] * p * x + mix[b, at.MIX_Q] * q * f + mix[b, at.MIX_M] * m
        if threshold:
            bound = mix[b, at.MIX_BOUND] = min(max(float(np.quantile(np.abs(d), percentile)), 1.0), ceiling)
            mix[b, at.MIX_POST] = 1 / bound
    return Found(mix, momentum, slack)


def find(t: guide.GuideTensors, rule: int, threshold: bool, executor: str) -> guide.GuideTensors:
    guide.bind(t, rule, threshold, executor)(t.model_out, t.unguided, t.perturbed)
    return t


def compare(case: Case, rule: int, threshold: bool, executor: str, change: object = None) -> guide.GuideTensors:
    t = case.tensors()
    if callable(change):
        change(t)
    before, want = copy.deepcopy(t), expected(t, rule, threshold)
    find(t, rule, threshold, executor)
    got = t.mix.double().numpy()
    for column in range(at.MIX):
        slack = want.slack if column in (at.MIX_P, at.MIX_Q) else 0.0
        with np.errstate(invalid="ignore"):  # inf - inf, where both say inf
            error, size = np.abs(got[:, column] - want.mix[:, column]), np.abs(want.mix[:, column])
        fits = (error <= 1e-5 * (size + slack)) | (got[:, column] == want.mix[:, column])
        fits |= np.isnan(got[:, column]) & np.isnan(want.mix[:, column])
        assert fits.all(), f"column {column}: got {got[:, column]}, expected {want.mix[:, column]}"
    assert torch.equal(t.mix[:, at.MIX_S], before.mix[:, at.MIX_S])
    assert t.mix[IDLE:, : at.MIX_S].isnan().all()
    momentum = t.momentum.double().flatten(1).numpy()
    np.testing.assert_allclose(momentum, want.momentum, rtol=1e-6, atol=2e-6 * max(1.0, np.abs(momentum).max()))
    still = range(IDLE + 2) if rule != at.APG or case.count == 1 else range(2, IDLE + 2)
    assert torch.equal(t.momentum[list(still)], before.momentum[list(still)])
    for name in ("state", "model_out", "unguided", "perturbed", "row", "guidance", "settings", "ticket"):
        now = getattr(t, name)
        assert now is None or torch.equal(now, getattr(before, name)), name
    return t


def varied(shape: tuple[int, ...], number: int) -> Case:
    """Dtype, layout, branches, radius: their combinations are gone through as the number grows."""
    return Case(
        shape,
        dtype=DTYPES[number % 3],
        layout=LAYOUTS[number // 3 % 2],
        branches=("stacked", "apart")[number // 2 % 2],
        count=(3, 2, 3, 1, 2)[number % 5],
        radius=(0.0, 0.7)[number // 4 % 2],
        seed=number,
    )


@pytest.mark.parametrize("threshold", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{np.prod(shape)}")
def test_scalars_against_float64(executor: str, shape: tuple[int, ...], rule: str, threshold: bool) -> None:
    for number in range(2 if shape == SHAPES[-1] else 8):
        compare(varied(shape, 7 * number + RULES[rule]), RULES[rule], threshold, executor)


@pytest.mark.parametrize("branches", ["stacked", "apart"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_every_dtype_layout_and_form_of_branches(
    executor: str, rule: str, dtype: torch.dtype, layout: torch.memory_format, branches: str
) -> None:
    for count in (1, 2, 3):
        case = Case((5, 9, 13), dtype, layout, branches, count, radius=1.0, seed=count)
        compare(case, RULES[rule], count == 3, executor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3,), (1000,), (65537,)])
def test_a_mean_far_above_the_deviations_costs_no_digits(
    executor: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    for spread in (1.0, 0.01):
        compare(Case(shape, dtype, mean=300.0, spread=spread), at.RESCALE, False, executor)


def test_a_first_element_far_from_all_others_costs_no_digits(executor: str) -> None:
    def far(t: guide.GuideTensors) -> None:
        t.model_out[:, 0] = torch.linspace(1e3, 2e4, len(t.model_out))

    compare(Case((3072,)), at.RESCALE, False, executor, far)
    compare(Case((65537,)), at.RESCALE, False, executor, far)


@pytest.mark.parametrize("rule", RULES)
def test_all_zero_branches_leave_the_row_as_it_is(executor: str, rule: str) -> None:
    def zero(t: guide.GuideTensors) -> None:
        t.model_out.zero_()
        t.state.zero_()

    t = compare(Case((3, 8, 8)), RULES[rule], True, executor, zero)
    if rule != "apg":
        assert torch.equal(t.mix[:IDLE, : at.MIX_BOUND], torch.tensor([at.PLAIN_MIX[: at.MIX_BOUND]] * IDLE))
    t = compare(Case((3, 8, 8)), RULES[rule], True, executor, lambda t: zero(t) or t.momentum.zero_())
    assert (t.mix[:IDLE, [at.MIX_P, at.MIX_Q]] == 1).all()


@pytest.mark.parametrize("value", [-0.1, 2.5])
def test_equal_elements_have_no_deviation(executor: str, value: float) -> None:
    t = compare(Case((4097,)), at.RESCALE, False, executor, lambda t: t.model_out.fill_(value))
    assert (t.mix[:IDLE, at.MIX_Q] == 1).all()


@pytest.mark.parametrize("percentile", [0.0, 0.25, 0.5, 0.995, 1.0])
@pytest.mark.parametrize("shape", [(1,), (2,), (5,), (201,), (4096,)])
def test_the_bound_is_the_quantile_with_ties_and_at_both_ends(
    executor: str, shape: tuple[int, ...], percentile: float
) -> None:
    def set_percentile(t: guide.GuideTensors) -> None:
        t.settings[at.PERCENTILE], t.settings[at.CEILING] = percentile, 1e6
        t.model_out.mul_(20).round_()
        t.state.round_()

    compare(Case(shape), at.PLAIN, True, executor, set_percentile)
    compare(Case(shape), at.PLAIN, True, executor, lambda t: set_percentile(t) or t.model_out.mul_(1.3))


def test_the_bound_is_at_least_one_and_at_most_the_ceiling(executor: str) -> None:
    small = find(Case((64,), spread=1e-3).tensors(), at.PLAIN, True, executor)
    small.state.zero_()
    assert (find(small, at.PLAIN, True, executor).mix[:IDLE, at.MIX_BOUND] == 1).all()
    large = find(Case((64,), spread=1e3).tensors(), at.PLAIN, True, executor)
    assert (large.mix[:IDLE, at.MIX_BOUND] == large.settings[at.CEILING]).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_ends_and_stays_in_its_sample(executor: str, rule: str, bad: float) -> None:
    for shape in ((3,), (3, 40, 40)):
        clean, t = Case(shape, radius=1.0).tensors(), Case(shape, radius=1.0).tensors()
        for branch in range(3):
            t.model_out[6 * branch].view(-1)[branch :: 2 + branch] = bad
        find(t, RULES[rule], True, executor)
        find(clean, RULES[rule], True, executor)
        assert same_bits(t.mix[1:], clean.mix[1:])
        assert same_bits(t.momentum[1:], clean.momentum[1:])
        assert not t.ticket.any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(7,), (1000,), (3, 57, 61)])
def test_a_sample_is_the_same_alone_anywhere_in_a_batch_and_on_any_threads(
    executor: str, rule: str, shape: tuple[int, ...]
) -> None:
    source = Case(shape, torch.bfloat16, radius=2.0).tensors()
    threads = torch.get_num_threads()

    def several(copies: int) -> guide.GuideTensors:
        """Samples 0 and 1, `copies` of both."""
        t, order = copy.deepcopy(source), torch.tensor([0, 1] * copies)
        t.state = t.state[:, order].contiguous()
        t.model_out = torch.cat([part[order] for part in t.model_out.split(6)])
        for name in ("row", "guidance", "mix", "partial", "ticket", "momentum"):
            setattr(t, name, getattr(t, name)[order])
        return find(t, RULES[rule], True, executor)

    pair = several(1)
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            many = several(17)
            for b in range(34):
                assert same_bits(many.mix[b], pair.mix[b % 2])
                assert same_bits(many.momentum[b], pair.momentum[b % 2])
    finally:
        torch.set_num_threads(threads)


def test_the_momentum_runs_on_from_call_to_call(executor: str) -> None:
    t = Case((3, 6, 5), radius=1.0).tensors()
    for _ in range(3):
        want = expected(t, at.APG, False)
        find(t, at.APG, False, executor)
        np.testing.assert_allclose(t.momentum.double().flatten(1).numpy(), want.momentum, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(t.mix.double().numpy(), want.mix, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rule", "branches"), [("rescale", "stacked"), ("apg", "apart")])
def test_opcheck(executor: str, rule: str, branches: str) -> None:
    t = Case((3, 5, 4), branches=branches).tensors()
    options = {"rule": RULES[rule], "threshold": rule == "apg", "executor": executor}
    torch.library.opcheck(torch.ops.fastdiff.guide.default, t.arguments(), options)


@pytest.mark.parametrize("rule", RULES)
def test_bound_call_equals_the_dispatched_op(executor: str, rule: str) -> None:
    dispatched, bound = Case((3, 5, 4)).tensors(), Case((3, 5, 4)).tensors()
    guide.guide(dispatched, RULES[rule], True, executor)
    find(bound, RULES[rule], True, executor)
    assert same_bits(dispatched.mix, bound.mix)
    assert same_bits(dispatched.momentum, bound.momentum)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"momentum": None}, ValueError, "rule APG keeps its direction in momentum"),
        ({"mix": torch.zeros(6, 7)}, ValueError, r"mix has shape \(6, 7\), expected \(6, 8\)"),
        ({"settings": torch.zeros(8).double()}, TypeError, "settings has dtype torch.float64, expected torch.float32"),
        ({"partial": torch.zeros(6, 64, 8, device="meta")}, ValueError, "partial is on meta, the state on cpu"),
        ({"unguided": torch.zeros(6, 3, 5, 4)}, ValueError, r"model_out has shape \(18, 3, 5, 4\), expected \(6, 3"),
        ({"momentum": torch.zeros(6, 3, 4, 5).mT}, ValueError, "momentum must be dense and laid out like the state"),
    ],
)
def test_what_does_not_fit_is_refused(
    executor: str, change: dict[str, Tensor | None], error: type[Exception], words: str
) -> None:
    t = Case((3, 5, 4)).tensors()
    for name, value in change.items():
        setattr(t, name, value)
    with pytest.raises(error, match=words):
        guide.guide(t, at.APG, False, executor)
    with pytest.raises(ValueError, match=r"rule must be 0 to 3 \(PLAIN, RESCALE, APG, CFG_ZERO\), got 4"):
        guide.guide(Case((3,)).tensors(), 4, False, executor)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, any NaN equal to any NaN."""
    return torch.equal(a.nan_to_num(1234.5), b.nan_to_num(1234.5)) and torch.equal(a.isnan(), b.isnan())
