"""The Triton executor against the reference: on a GPU when there is one, else interpreted on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import affine, interpreted, layout  # noqa: F401
from row_cases import Case, every_pair_or_all, expected, seeds_of
from triton_cases import INF, NAN, run, run_reference, simple_step

from fastdiff.compiler import layout as at
from fastdiff.engine.ops import StepTensors

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy under the interpreter, on inf and NaN


def assert_row(step: StepTensors, got: StepTensors) -> None:
    """What `got` holds is the row of `step` in float64, bookkeeping and rounding of the model input exactly."""
    exact, plain = expected(step), run_reference(step)
    for name in ("state", "denoised"):
        torch.testing.assert_close(getattr(got, name).double(), exact[name], rtol=1e-5, atol=1e-5, equal_nan=True)
    for name in ("model_time", "row", "status", "ticket", "coef", "ids", "seed", "guidance", "noise", "model_out"):
        torch.testing.assert_close(getattr(got, name), getattr(plain, name), rtol=0, atol=0, equal_nan=True)
    if got.model_in is not None:
        batch, rows = got.state.shape[1], len(got.coef)
        for index, emitted in enumerate(got.model_in):
            b = index % batch
            i = int(step.row[b])
            if 0 <= i < rows:
                product = got.coef[i, at.EMIT_SCALE] * got.state[int(got.ids[i, at.DEST]), b]
                assert torch.equal(emitted, product.to(emitted.dtype))
            else:
                assert emitted.isnan().all()


# single-tile and many-tile, vector and scalar, every source of noise
SHAPES = [
    *[(shape, torch.contiguous_format) for shape in [(2,), (7,), (3, 5, 7), (4, 8, 8), (1, 33, 33), (3, 24, 20)]],
    *[
        (shape, torch.channels_last)
        for shape in [(3, 6, 6), (3, 24, 20), (4, 8, 34), (3, 5, 5), (4, 3, 3), (260, 2, 2)]
    ],
]
DTYPES = [(torch.float32, torch.float32), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)]


@every_pair_or_all
@pytest.mark.parametrize("dtypes", DTYPES, ids=["fp32-fp32", "fp16-bf16", "bf16-fp16"])
@pytest.mark.parametrize(("shape", "layout"), SHAPES)
def test_random_rows(
    shape: tuple[int, ...], layout: torch.memory_format, dtypes: tuple[torch.dtype, torch.dtype], product: bool
) -> None:
    for seed in seeds_of(2, product, SHAPES.index((shape, layout)), DTYPES.index(dtypes)):
        injected = seed == 1
        case = Case(shape, 3, layout, *dtypes, injected=injected, idle=injected, seed=seed + sum(shape))
        step = case.tensors()
        assert_row(step, run(step, programs=(affine.PROGRAMS, 1)[seed]))


@pytest.mark.parametrize("seed", range(12))
def test_random_rows_of_other_tables(seed: int) -> None:
    layout = (torch.contiguous_format, torch.channels_last)[seed % 2]
    emit = (None, torch.bfloat16, torch.float32)[seed % 3]
    case = Case((3, 4, 5), 5, layout, emit_dtype=emit, guided=seed % 4 < 2, terms=seed % 5, idle=True, seed=seed)
    step = case.tensors()
    assert_row(step, run(step))


FEATURES = [
    {"branches": "apart"},
    {"mixed": True},
    {"spread": True},
    {"perturbed": True},
    {"perturbed": True, "guided": False, "branches": "apart"},
    {"perturbed": True, "branches": "apart", "mixed": True, "spread": True},
]
FEW_SHAPES = [
    ((3, 5, 7), torch.contiguous_format),
    ((3, 24, 20), torch.contiguous_format),
    ((3, 24, 20), torch.channels_last),
    ((3, 5, 5), torch.channels_last),
]


@every_pair_or_all
@pytest.mark.parametrize("features", FEATURES, ids=lambda features: "-".join(map(str, features.values())))
@pytest.mark.parametrize(("shape", "layout"), FEW_SHAPES)
def test_random_rows_with_everything_a_rule_may_add(
    shape: tuple[int, ...], layout: torch.memory_format, features: dict[str, Any], product: bool
) -> None:
    for seed in seeds_of(len(DTYPES), product, FEW_SHAPES.index((shape, layout)), FEATURES.index(features)):
        case = Case(
            shape, 3, layout, *DTYPES[seed], injected=seed == 1, idle=seed == 2, seed=seed + sum(shape), **features
        )
        step = case.tensors()
        assert_row(step, run(step, programs=(affine.PROGRAMS, 1, 2)[seed]))


@pytest.mark.parametrize("seed", range(24))
def test_random_tables_with_everything_a_rule_may_add(seed: int) -> None:
    features = FEATURES[seed % len(FEATURES)]
    case = Case((3, 4, 5), 7, emit_dtype=(None, torch.float32)[seed % 2], terms=seed % 4, seed=100 + seed, **features)
    step = case.tensors()
    assert_row(step, run(step))


def test_a_second_estimate_is_the_conditional_one_where_there_is_no_unguided_branch() -> None:
    step = simple_step((40,), model_out=torch.randn(1, 40), noise=torch.zeros(4, 1, 40))
    step.state.normal_()
    step.ids[0, at.FLAGS] = at.READS_MODEL + at.E_UNGUIDED
    step.coef[0, [at.P, at.Q, at.CLAMP_HI, at.OUTPUT + at.OUT_E]] = torch.tensor([0.5, 2.0, -9.0, 1.0])
    step.coef[0, at.OUTPUT + at.OUT_DELTA] = 0.0
    expected = 0.5 * step.state[0] + 2.0 * step.model_out
    torch.testing.assert_close(run(step).state[0], expected, rtol=3e-7, atol=3e-7)


def test_the_unguided_branch_is_read_for_the_second_estimate_only_where_it_has_a_weight() -> None:
    step = simple_step((40,), 2, model_out=torch.zeros(4, 40), noise=torch.zeros(4, 2, 40))
    step.model_out[2:] = NAN
    step.coef, step.ids = step.coef.repeat(2, 1), step.ids.repeat(2, 1)
    step.ids[:, at.FLAGS] = at.READS_MODEL + at.E_UNGUIDED
    step.coef[0, at.OUTPUT + at.OUT_E] = 1.0
    step.row[1] = 1
    assert run(step).status.tolist() == [0, -1]


def test_what_a_rule_switches_off_is_not_read() -> None:
    """Scalars 0, and a guidance of 1, keep NaN in Fu, Fp, M and V away from the state and from status."""
    case = Case((3, 4, 4), 4, branches="apart", perturbed=True, mixed=True, spread=True, rows=1, seed=3)
    step = case.tensors()
    step.state[step.state.isnan()] = 0.0
    clean = run(step)
    for name in ("unguided", "perturbed", "momentum", "variance"):
        getattr(step, name).fill_(NAN)
    step.ids[:, at.FLAGS] = at.READS_MODEL
    step.guidance.fill_(1.0)
    step.mix[:, at.MIX_S] = step.mix[:, at.MIX_M] = 0.0  # type: ignore[index]
    got = run(step)
    assert not clean.state.isnan().any() and not got.state.isnan().any()
    assert got.status.tolist() == [-1] * 4


@pytest.mark.parametrize("branch", ["unguided", "perturbed"])
def test_status_watches_every_branch_that_is_read(branch: str) -> None:
    step = Case((3, 4, 4), 4, branches="apart", perturbed=True, mixed=True, rows=1, seed=3).tensors()
    step.state[step.state.isnan()] = 0.0
    step.ids[:, at.FLAGS] = at.READS_MODEL
    step.coef[:, [at.GAIN, at.PERTURB]] = 1.0
    step.guidance.copy_(torch.tensor([3.0, 3.0, 1.0, 3.0]))
    step.mix[:, at.MIX_W], step.mix[:, at.MIX_S] = 1.0, torch.tensor([1.0, 1.0, 0.0, 1.0])  # type: ignore[index]
    getattr(step, branch)[0, 0, 0, 0] = INF
    getattr(step, branch)[2, 1, 1, 1] = NAN  # not read
    getattr(step, branch)[3, 2, 3, 3] = NAN
    assert run(step).status.tolist() == [0, -1, -1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_learned_spread_is_exact_to_a_millionth(dtype: torch.dtype) -> None:
    variance = torch.linspace(-20, 20, 2001, dtype=torch.float64).to(dtype)
    step = simple_step((2001,), variance=variance[None], noise=torch.ones(4, 1, 2001))
    step.model_out = step.model_out.to(dtype)
    step.coef[0, [at.SPREAD_LOG, at.SPREAD_SLOPE]] = torch.tensor([-1.25, 1.5])
    step.ids[0, at.FLAGS] = at.SPREADS_NOISE
    # the argument of exp is one fused operation, whose rounding is not the exponential's fault
    argument = (1.5 * variance.double() - 1.25).float()
    torch.testing.assert_close(run(step).state[0, 0].double(), argument.double().exp(), rtol=1e-6, atol=0)


def test_error_is_at_most_twice_that_of_torch() -> None:
    mine = torchs = 0.0
    for seed in range(4):
        step = Case((3, 10, 10), terms=1, seed=100 + seed).tensors()
        exact = expected(step)["state"]
        mine = max(mine, float((run(step).state - exact).nan_to_num().abs().max()))
        torchs = max(torchs, float((run_reference(step).state - exact).nan_to_num().abs().max()))
    assert mine <= 2 * torchs


def test_a_row_without_model_or_noise_reads_neither() -> None:
    shape = (3, 4, 4)
    step = simple_step(shape, model_out=torch.full((1, *shape), NAN), noise=torch.full((4, 1, *shape), NAN))
    step.coef[0, [at.NOISE, at.P, at.Q, at.CLAMP_LO]] = torch.tensor([0.0, 2.0, 3.0, 0.5])
    step.coef[0, at.OUTPUT + at.OUT_B] = 1.0  # D is 0 when the row does not read the model
    step.state.normal_()
    got = run(step)
    assert torch.equal(got.state, torch.zeros_like(step.state))
    assert got.status.tolist() == [-1]


def test_columns_are_those_of_the_layout() -> None:
    names = [name for name in dir(layout) if name.isupper()]
    assert len(names) >= 50
    for name in names:
        assert getattr(layout, name).value == getattr(at, name), name
    assert layout.NOISE.value == at.COEF_FIXED
    assert layout.TERM_IDS.value == at.IDS_FIXED
    assert (at.MAX_OUTPUTS, at.MAX_SLOTS) == (3, 6)
