"""The Triton executor against the reference: on a GPU when there is one, else interpreted on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from interpreted import DEVICE, KERNELS, affine, interpreted, jit, layout, load, philox_module  # noqa: F401
from row_cases import Case, every_pair_or_all, expected, seeds_of

from fastdiff.compiler import layout as at
from fastdiff.engine import noise as counter_noise
from fastdiff.engine import reference
from fastdiff.engine.ops import StepTensors, check

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy under the interpreter, on inf and NaN
NAN, INF = float("nan"), float("inf")


philox, philox_words = philox_module.philox, philox_module.philox_words
normal_quads, normal_elements = philox_module.normal_quads, philox_module.normal_elements


# ---- noise


@jit
def block_kernel(counter, key, words):
    lane = tl.arange(0, 4)
    c0 = tl.load(counter + 4 * lane)
    c1 = tl.load(counter + 4 * lane + 1)
    c2 = tl.load(counter + 4 * lane + 2)
    c3 = tl.load(counter + 4 * lane + 3)
    k0 = tl.load(key + 2 * lane)
    k1 = tl.load(key + 2 * lane + 1)
    w0, w1, w2, w3 = philox(
        c0.to(tl.uint32, bitcast=True),
        c1.to(tl.uint32, bitcast=True),
        c2.to(tl.uint32, bitcast=True),
        c3.to(tl.uint32, bitcast=True),
        k0.to(tl.uint32, bitcast=True),
        k1.to(tl.uint32, bitcast=True),
    )
    tl.store(words + 4 * lane, w0.to(tl.int32, bitcast=True))
    tl.store(words + 4 * lane + 1, w1.to(tl.int32, bitcast=True))
    tl.store(words + 4 * lane + 2, w2.to(tl.int32, bitcast=True))
    tl.store(words + 4 * lane + 3, w3.to(tl.int32, bitcast=True))


@jit
def words_kernel(seed, first, noise_id, stream, words, QUADS: tl.constexpr):
    lane = tl.arange(0, QUADS)
    w0, w1, w2, w3 = philox_words(tl.load(first) + lane, tl.load(seed), tl.load(noise_id), tl.load(stream))
    tl.store(words + 4 * lane, w0.to(tl.int32, bitcast=True))
    tl.store(words + 4 * lane + 1, w1.to(tl.int32, bitcast=True))
    tl.store(words + 4 * lane + 2, w2.to(tl.int32, bitcast=True))
    tl.store(words + 4 * lane + 3, w3.to(tl.int32, bitcast=True))


@jit
def normals_kernel(seed, noise_id, stream, by_quad, by_element, QUADS: tl.constexpr):
    quad = tl.arange(0, QUADS).to(tl.int64)
    element = tl.arange(0, 4 * QUADS).to(tl.int64)
    key = tl.load(seed)
    name = tl.load(noise_id)
    branch = tl.load(stream)
    tl.store(by_quad + element, tl.reshape(normal_quads(quad, key, name, branch), [4 * QUADS]))
    tl.store(by_element + element, normal_elements(element, key, name, branch))


def int32(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.uint32).view(np.int32).copy()).to(DEVICE)


def as_words(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy().view(np.uint32)


# kat_vectors of Random123 (Salmon et al. 2011), philox4x32 with 10 rounds: zero, all ones, the digits of pi
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def test_philox_gives_the_known_answers() -> None:
    known = [*KNOWN, KNOWN[0]]
    words = torch.zeros(4, 4, dtype=torch.int32, device=DEVICE)
    block_kernel[(1,)](int32([c for c, _, _ in known]), int32([k for _, k, _ in known]), words)
    assert as_words(words).tolist() == [answer for _, _, answer in known]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_words_equal_the_reference_bit_for_bit(seed: int) -> None:
    for first, noise_id, stream in [(0, 0, 0), (2**32 - 5, 2**31 - 1, 3), (2**40 + 7, 12345, 1), (99, -1, 2)]:
        words = torch.zeros(16, 4, dtype=torch.int32, device=DEVICE)
        words_kernel[(1,)](
            torch.tensor([seed], device=DEVICE),
            torch.tensor([first], device=DEVICE),
            torch.tensor([noise_id], dtype=torch.int32, device=DEVICE),
            torch.tensor([stream], dtype=torch.int32, device=DEVICE),
            words,
            QUADS=16,
        )
        expected = counter_noise.philox(seed, first + np.arange(16, dtype=np.uint64), noise_id & 0xFFFFFFFF, stream)
        assert np.array_equal(as_words(words), expected)


@pytest.mark.parametrize("seed", [0, -7, 2**62 + 11])
def test_normals_are_within_2_ulp_of_the_reference(seed: int) -> None:
    quads = 1024
    by_quad, by_element = (torch.full((4 * quads,), NAN, device=DEVICE) for _ in range(2))
    normals_kernel[(1,)](
        torch.tensor([seed], device=DEVICE),
        torch.tensor([5], dtype=torch.int32, device=DEVICE),
        torch.tensor([1], dtype=torch.int32, device=DEVICE),
        by_quad,
        by_element,
        QUADS=quads,
    )
    expected = counter_noise.normal(seed, 4 * quads, 5, 1)
    assert torch.equal(by_quad, by_element)
    scale = np.maximum(np.abs(expected), np.float32(1.0))
    assert np.all(np.abs(by_quad.cpu().numpy() - expected) <= 2 * np.spacing(scale))


# ---- the row


def copy_step(step: StepTensors, device: torch.device | str = "cpu") -> StepTensors:
    def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.clone(memory_format=torch.preserve_format).to(device)

    return StepTensors(*[move(tensor) for tensor in step.arguments()])  # type: ignore[arg-type]


def launch(step: StepTensors, **options: int) -> None:
    """One row on the Triton executor, in place."""
    second = bool(step.coef[:, at.OUTPUT + at.OUT_E : at.SPREAD_LOG : at.OUTPUT_STRIDE].any())
    affine.bind(*step.arguments(), second=second, **options)(step.model_out, step.unguided, step.perturbed)


def run(step: StepTensors, **options: int) -> StepTensors:
    """The step after one row on the Triton executor, back on the CPU."""
    there = copy_step(step, DEVICE)
    check(there)
    launch(there, **options)
    return copy_step(there)


def run_reference(step: StepTensors) -> StepTensors:
    after = copy_step(step)
    reference.affine_step(*after.arguments())
    return after


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


def simple_step(
    shape: tuple[int, ...], batch: int = 1, layout: torch.memory_format = torch.contiguous_format, **changes: Any
) -> StepTensors:
    """One register, one row: x' = x + N(3), nothing else; fields may be replaced."""
    coef = torch.zeros(1, at.COEF_FIXED + at.NOISE_STRIDE)
    ids = torch.zeros(1, at.IDS_FIXED + at.TERM_IDS_STRIDE, dtype=torch.int32)
    coef[0, at.OUTPUT + at.OUT_DELTA] = 1.0
    coef[0, at.NOISE] = 1.0
    coef[0, at.CLAMP_LO : at.EMIT_SCALE] = torch.tensor([-INF, INF])
    coef[0, at.EMIT_SCALE] = 1.0
    ids[0, at.SLOT + 1 : at.FLAGS] = torch.tensor([-1] * 5 + [0, -1, -1], dtype=torch.int32)
    ids[0, at.TERMS] = 1
    ids[0, at.TERM_IDS : at.TERM_IDS + 2] = torch.tensor([3, at.STREAM_STEP], dtype=torch.int32)
    fields: dict[str, Any] = {
        "state": torch.zeros(batch, *shape).contiguous(memory_format=layout)[None],
        "model_out": torch.zeros(batch, *shape).contiguous(memory_format=layout),
        "model_in": None,
        "model_time": None,
        "coef": coef,
        "ids": ids,
        "row": torch.zeros(batch, dtype=torch.int32),
        "seed": torch.arange(batch) + 40,
        "guidance": torch.ones(batch),
        "noise": None,
        "denoised": None,
        "status": torch.full((batch,), -1, dtype=torch.int32),
        "ticket": torch.zeros(batch, dtype=torch.int32),
    }
    return StepTensors(**(fields | changes))


def test_noise_depends_on_the_seed_alone() -> None:
    """Bitwise: neither batch size nor place, memory format or number of programs changes a sample."""
    shape = (3, 22, 24)
    batch = run(simple_step(shape, 3)).state[0]
    assert torch.equal(run(simple_step(shape, 3, torch.channels_last)).state[0], batch)
    assert torch.equal(run(simple_step(shape, 2)).state[0], batch[:2])
    assert torch.equal(run(simple_step(shape, 3), programs=1).state[0], batch)
    alone = run(simple_step(shape, seed=torch.tensor([42]))).state[0, 0]
    assert torch.equal(alone, batch[2])
    expected = counter_noise.normal(42, alone.numel(), 3, at.STREAM_STEP)
    torch.testing.assert_close(alone.flatten(), torch.from_numpy(expected), rtol=3e-7, atol=3e-7)


def test_pixel_noise_equals_element_noise() -> None:
    """An odd image takes the path that draws every element on its own; the shared quads must give the same image."""
    for shape in ((3, 5, 5), (4, 6, 6), (300, 2, 2)):
        contiguous = run(simple_step(shape)).state
        assert torch.equal(run(simple_step(shape, layout=torch.channels_last)).state, contiguous)


def test_an_idle_sample_is_left_alone() -> None:
    step = Case((3, 4, 4), rows=2).tensors()
    step.row.copy_(torch.tensor([-1, 2, 2**31 - 1]))
    for before, after in zip(step.arguments(), run(step).arguments(), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def test_rows_advance_to_the_end_and_stop() -> None:
    step = simple_step((3, 24, 20), batch=2)
    for _ in range(2):
        step = run(step)
    assert step.row.tolist() == [1, 1]
    assert step.ticket.tolist() == [0, 0]


def test_the_number_of_programs_changes_nothing() -> None:
    step = simple_step((70 * 60,), batch=2)
    outcomes = [run(step, programs=programs) for programs in (1, 3, 9, 100)]
    for got in outcomes:
        assert got.row.tolist() == [1, 1]
        assert got.ticket.tolist() == [0, 0]
        assert torch.equal(got.state, outcomes[0].state)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_status_names_the_first_row_that_is_not_finite(bad: float, dtype: torch.dtype) -> None:
    shape, batch = (3, 20, 21), 5
    coef, ids = (t.repeat(3, 1) for t in (simple_step(shape).coef, simple_step(shape).ids))
    coef[:, at.Q], coef[:, at.GAIN], coef[:, at.OUTPUT + at.OUT_B] = 1.0, 1.0, 0.5
    ids[:, at.FLAGS] = at.READS_MODEL
    ids[1, at.FLAGS] = 0
    model_out = torch.zeros(2 * batch, *shape, dtype=dtype)
    model_out[0, 0, 0, 0] = bad  # sample 0: conditional, first element
    model_out[batch + 1, 2, 19, 20] = bad  # sample 1: unconditional, last element, guided
    model_out[batch + 2, 0, 0, 1] = bad  # sample 2: unconditional, not read at weight 1
    model_out[3, 1, 1, 1] = bad  # sample 3: its row does not read the model
    model_out[4, 2, 2, 2] = bad  # sample 4: already marked
    step = simple_step(
        shape,
        batch,
        coef=coef,
        ids=ids,
        model_out=model_out,
        row=torch.tensor([2, 2, 2, 1, 2], dtype=torch.int32),
        guidance=torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0]),
        status=torch.tensor([-1, -1, -1, -1, 0], dtype=torch.int32),
    )
    got = run(step)
    assert got.status.tolist() == [2, 2, -1, -1, 0] == run_reference(step).status.tolist()
    assert got.state[0, 2].isfinite().all() and got.state[0, 3].isfinite().all()


def test_large_finite_outputs_are_not_reported() -> None:
    """Not even where the difference of the branches or the guided output overflows."""
    model_out = torch.full((2, 5000), 3e38) * torch.tensor([[1.0], [-1.0]])
    step = simple_step((5000,), model_out=model_out, guidance=torch.tensor([2.0]))
    step.coef[0, at.GAIN] = 1.0
    step.ids[:, at.FLAGS] = at.READS_MODEL
    assert run(step).status.tolist() == [-1]


EDGES = torch.tensor(
    [0.0, -0.0, 1.0, 1.00390625, 1.01171875, 1.0039063692092896, -1.00390625, 3.3895314e38, 3.3961775e38, 3.4028235e38,
     1e-40, 9.1835e-41, 1.1754944e-38, 65504.0, 65519.996, 65520.0, 6e-8, 2.9802322e-08, 2.9802326e-08, INF, -INF]
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_model_input_is_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    bits = torch.from_numpy(np.random.default_rng(1).integers(0, 2**32, 3000, dtype=np.uint32).view(np.int32))
    random = bits.view(torch.float32)
    values = torch.cat([EDGES, random])
    step = simple_step(
        tuple(values.shape), state=values.view(1, 1, -1).clone(), model_in=torch.zeros(1, len(values), dtype=dtype)
    )
    step.coef[0, at.NOISE] = 0.0
    got = run(step)
    assert got.model_in is not None
    expected = values.to(dtype)
    assert torch.equal(got.model_in[0].isnan(), expected.isnan())
    finite = ~expected.isnan()
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    nonzero = finite & (values != 0)
    assert torch.equal(got.model_in[0][nonzero].view(integer), expected[nonzero].view(integer))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_widened_exactly(dtype: torch.dtype) -> None:
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()][:: 1 if DEVICE.type == "cuda" else 7]
    step = simple_step((len(values),), model_out=values.view(1, -1), denoised=torch.full((1, len(values)), NAN))
    step.coef[0, [at.Q, at.NOISE]] = torch.tensor([1.0, 0.0])
    step.ids[0, at.FLAGS] = at.READS_MODEL
    got = run(step)
    assert got.denoised is not None
    assert torch.equal(got.denoised[0], values.float())


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


# ---- what only a GPU can show


@pytest.mark.gpu
def test_a_captured_step_replays_every_row() -> None:
    case = Case((4, 32, 32), 3, torch.channels_last, torch.bfloat16, torch.bfloat16)
    step = case.tensors()
    step.state.normal_()
    step.row.zero_()
    eager, captured = copy_step(step, DEVICE), copy_step(step, DEVICE)
    launch(copy_step(step, DEVICE))
    bound = affine.bind(*captured.arguments())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bound(captured.model_out)
    for _ in range(5):
        launch(eager)
        graph.replay()
    torch.cuda.synchronize()
    assert captured.row.tolist() == [4, 4, 4]
    for one, other in zip(eager.arguments(), captured.arguments(), strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_rows_advance_once_under_contention() -> None:
    """Thousands of programs of one sample, many launches: no program may see the advanced row, no arrival be lost."""
    length, launches = 2**22 + 4, 50
    step = copy_step(simple_step((length,), batch=2), DEVICE)
    step.coef, step.ids = step.coef.repeat(launches, 1), step.ids.repeat(launches, 1)
    step.coef[:, at.NOISE] = 0.0
    step.coef[:, at.OUTPUT + at.OUT_K] = 0.0
    step.coef[:, at.Q] = 1.0
    step.coef[:, at.OUTPUT + at.OUT_B] = 1.0
    step.coef[:, at.OUTPUT + at.OUT_DELTA] = 0.0
    step.coef[:, at.CLAMP_LO] = torch.arange(launches, device=DEVICE, dtype=torch.float32)
    step.ids[:, at.FLAGS] = at.READS_MODEL
    for launch in range(launches):
        launch(step, programs=2**20)
        assert bool((step.state == launch).all()), "a program saw the next row"
        assert step.row.tolist() == [launch + 1] * 2 and step.ticket.tolist() == [0, 0]


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    length = 2**30
    if torch.cuda.mem_get_info()[0] < 22 * 2**30:
        pytest.skip("needs 22 GiB on the CUDA device")
    small = simple_step((8,))
    small.ids[0, [at.SLOT, at.DEST]] = torch.tensor([2, 3], dtype=torch.int32)
    small.coef[0, at.NOISE] = 0.0
    step = copy_step(small, DEVICE)
    step.state = torch.zeros(4, 1, length, device=DEVICE)
    step.state[2, 0] = torch.arange(length, device=DEVICE, dtype=torch.float32)
    step.model_out = torch.zeros(1, length, device=DEVICE, dtype=torch.float16)
    launch(step)
    assert torch.equal(step.state[3], step.state[2])
