"""The C++ executor: its rows against float64, and what must not change a bit of a picture."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from instruction_sets import INSTRUCTION_SETS, best_instruction_set  # noqa: F401
from row_cases import Case, expected

from fastdiff.compiler import layout as at
from fastdiff.engine import guide, native, ops, reference
from fastdiff.errors import BackendUnavailable

HALF_TYPES = (torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPES = [
    (1, 1, 1),
    (3, 5, 7),
    (3, 8, 8),
    (4, 9, 9),
    (2, 33, 31),
    (17, 5, 3),
    (20, 6, 6),
    (33, 7, 11),
    (3, 32, 32),
    (4, 37, 41),
]


def run(tensors: ops.StepTensors, instruction_set: int | None = None) -> ops.StepTensors:
    if instruction_set is not None:
        assert native.load().fastdiff_cpu_isa(instruction_set) == instruction_set
    ops.bind(tensors, "cpp")(tensors.model_out, tensors.unguided, tensors.perturbed)
    return tensors


# -- rows


def random_cases() -> list[Case]:
    rng = np.random.default_rng(2024)
    cases = []
    for seed in range(320):
        branches = ("stacked", "apart")[seed // 160]
        guided = bool(rng.integers(2))
        cases.append(
            Case(
                shape=SHAPES[seed % len(SHAPES)],
                batch=int(rng.integers(1, 6)),
                layout=LAYOUTS[seed % 2],
                model_dtype=(torch.float32, *HALF_TYPES)[int(rng.integers(3))],
                emit_dtype=(None, torch.float32, *HALF_TYPES)[int(rng.integers(4))],
                guided=guided,
                branches=branches,
                perturbed=(guided or branches == "apart") and bool(rng.integers(2)),
                mixed=bool(rng.integers(2)),
                spread=bool(rng.integers(2)),
                terms=int(rng.integers(0, 5)),
                injected=bool(rng.random() < 0.2),
                idle=bool(rng.random() < 0.2),
                seed=seed,
            )
        )
    return cases


def widest(tensors: ops.StepTensors, b: int) -> float:
    """What a normal, known to 2 ulp, is multiplied with at most besides its weight."""
    c, d = tensors.coef[int(tensors.row[b])], tensors.ids[int(tensors.row[b])]
    if tensors.variance is None or not d[at.FLAGS] & at.SPREADS_NOISE:
        return 1.0
    return max(1.0, float(torch.exp(c[at.SPREAD_LOG] + c[at.SPREAD_SLOPE] * tensors.variance[b].float()).max()))


@pytest.mark.parametrize("case", random_cases(), ids=lambda case: f"{case.seed}")
def test_random_rows_against_float64(case: Case) -> None:
    tensors = case.tensors()
    before, want = copy.deepcopy(tensors), expected(tensors)
    torch_own = copy.deepcopy(tensors)
    reference.affine_step(*torch_own.arguments())  # type: ignore[arg-type]
    run(tensors)

    for b in range(case.batch):
        i = int(before.row[b])
        active = 0 <= i < case.rows
        written = [int(r) for r in before.ids[i][at.DEST : at.DEST + 3] if r >= 0] if active else []
        for register in range(case.registers):
            if register in written:
                error = (tensors.state[register, b].double() - want["state"][register, b]).abs().max()
                own = (torch_own.state[register, b].double() - want["state"][register, b]).abs().max()
                most = 2 * own + 4e-7 * widest(before, b)
                assert error <= most, f"register {register} of sample {b}: {error} against torch's {own}"
            else:
                assert same_bits(tensors.state[register, b], before.state[register, b])
        assert tensors.row[b] == (i + 1 if active else i)
        assert tensors.status[b] == -1

        reads_model = active and bool(before.ids[i, at.FLAGS] & at.READS_MODEL)
        if reads_model:
            torch.testing.assert_close(tensors.denoised[b].double(), want["denoised"][b], rtol=1e-6, atol=3e-6)
        else:
            assert tensors.denoised[b].isnan().all()
        for copied in range(len(tensors.model_time) // case.batch):
            time = tensors.model_time[copied * case.batch + b]
            assert time == before.coef[i, at.EMIT_TIME] if active else time.isnan()
        if tensors.model_in is None:
            continue
        for copied in range(len(tensors.model_in) // case.batch):
            image = tensors.model_in[copied * case.batch + b]
            if active:
                scaled = before.coef[i, at.EMIT_SCALE] * tensors.state[written[0], b]
                assert same_bits(image, scaled.to(image.dtype))
                tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[image.dtype]
                torch.testing.assert_close(image.double(), want["emitted"][b], rtol=tolerance, atol=tolerance)
            else:
                assert image.isnan().all()


@pytest.mark.parametrize("seed", range(24))
def test_instruction_sets_agree_to_the_bit(seed: int) -> None:
    case = Case(
        shape=SHAPES[seed % len(SHAPES)],
        layout=LAYOUTS[seed % 2],
        model_dtype=(torch.float32, *HALF_TYPES)[seed % 3],
        emit_dtype=(*HALF_TYPES, torch.float32)[seed % 3],
        perturbed=seed % 4 > 1,
        mixed=seed % 4 > 0,
        spread=seed % 4 > 0,
        seed=100 + seed,
    )
    first, *others = (run(case.tensors(), n) for n in INSTRUCTION_SETS)
    for other in others:
        for name in ("state", "model_in", "model_time", "denoised"):
            assert same_bits(getattr(first, name), getattr(other, name)), name


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES])
def test_a_learned_spread_is_an_exponential(instruction_set: int, dtype: torch.dtype) -> None:
    exponents = torch.linspace(-30, 30, 100_003).to(dtype)
    case = Case(
        shape=(len(exponents),), batch=1, guided=False, spread=True, injected=True, terms=1, rows=1, registers=1,
        model_dtype=dtype,
    )  # fmt: skip
    tensors = case.tensors()
    passing_on(tensors)
    tensors.coef[0, [at.OUTPUT + at.OUT_B, at.SPREAD_SLOPE, at.NOISE]] = torch.tensor([0.0, 1.0, 1.0])
    tensors.ids[0, [at.FLAGS, at.TERMS]] = torch.tensor([at.READS_MODEL + at.SPREADS_NOISE, 1], dtype=torch.int32)
    tensors.ids[0, at.TERM_IDS] = 0
    tensors.noise.fill_(1.0)  # type: ignore[union-attr]
    tensors.variance = exponents[None].clone()
    run(tensors, instruction_set)
    want = exponents.double().exp()
    assert ((tensors.state[0, 0].double() - want).abs() <= 1.5e-7 * want).all()
    tensors.variance[0, :3] = torch.tensor([float("nan"), -1e30, 1e30])
    tensors.row.zero_()
    run(tensors, instruction_set)
    none, least, most = tensors.state[0, 0, :3].tolist()
    assert none != none
    assert 0 <= least < 1e-37
    assert most > 1e38


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_every_half_precision_value_loads_and_stores(instruction_set: int, dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    edges = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    exact = torch.cat([values.float(), edges.view(torch.float32), values.float() * (1 + 2**-11), values.float() * 0.75])
    exact = exact[~exact.isnan()]
    case = Case(shape=(len(values),), batch=1, guided=False, terms=0, rows=1, registers=1, emit_dtype=dtype)
    passing_on(tensors := case.tensors())
    tensors.model_out = values[None].clone()
    run(tensors, instruction_set)
    finite = ~values.isnan()
    assert torch.equal(tensors.state[0, 0][finite], values.float()[finite])
    assert tensors.state[0, 0][~finite].isnan().all()
    assert torch.equal(tensors.model_in[0][finite], values[finite])

    case = Case(shape=(len(exact),), batch=1, guided=False, terms=0, rows=1, registers=1, emit_dtype=dtype)
    passing_on(tensors := case.tensors())
    tensors.model_out = exact[None].clone()
    run(tensors, instruction_set)
    assert same_bits(tensors.model_in[0], exact.to(dtype))


def passing_on(tensors: ops.StepTensors) -> None:
    """Turn row 0 into: register 0 = next input = F."""
    tensors.coef.zero_()
    tensors.coef[0, [at.Q, at.EMIT_SCALE, at.OUTPUT + at.OUT_B]] = 1.0
    tensors.coef[0, [at.CLAMP_LO, at.CLAMP_HI]] = torch.tensor([-float("inf"), float("inf")])
    tensors.ids[0] = 0
    tensors.ids[0, at.DEST + 1 : at.DEST + 3] = -1
    tensors.ids[0, at.FLAGS] = at.READS_MODEL


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 63, 64, 70, -1])
def test_a_value_that_is_not_finite_names_its_row(
    instruction_set: int, dtype: torch.dtype, bad: float, place: int
) -> None:
    case = Case(shape=(197,), batch=4, guided=True, rows=3, registers=1, terms=0, model_dtype=dtype)
    tensors = case.tensors()
    passing_on(tensors)
    tensors.coef[:] = tensors.coef[0].clone()
    tensors.ids[:] = tensors.ids[0].clone()
    tensors.coef[:, at.GAIN] = 1.0
    tensors.row[:] = torch.tensor([0, 1, 2, 2], dtype=torch.int32)
    tensors.guidance[:] = torch.tensor([3.0, 1.0, 3.0, 3.0])
    tensors.status[3] = 0
    tensors.model_out[4, place] = bad  # unconditional half of sample 0
    tensors.model_out[5, place] = bad  # of sample 1, which is not guided and so does not read it
    tensors.model_out[3, place] = bad  # sample 3, whose status is taken
    run(tensors, instruction_set)
    assert tensors.status.tolist() == [0, -1, -1, 0]
    assert tensors.row.tolist() == [1, 2, 3, 3]


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("branches", ["stacked", "apart"])
def test_only_branches_that_are_read_are_watched(instruction_set: int, branches: str) -> None:
    case = Case(shape=(70,), batch=3, rows=1, registers=1, terms=0, branches=branches, perturbed=True)
    tensors = case.tensors()
    passing_on(tensors)
    tensors.row.zero_()
    tensors.coef[0, [at.GAIN, at.PERTURB]] = 1.0
    tensors.guidance.fill_(1.0)
    tensors.mix[:] = torch.tensor(at.PLAIN_MIX)  # type: ignore[index]
    tensors.mix[1, at.MIX_S] = 0.5  # type: ignore[index]
    apart = branches == "apart"
    unguided = tensors.unguided if apart else tensors.model_out[3:6]
    perturbed = tensors.perturbed if apart else tensors.model_out[6:]
    unguided.fill_(float("nan"))  # type: ignore[union-attr]
    perturbed[:2, -1] = float("inf")  # type: ignore[index]
    conditional = tensors.model_out[0].clone()
    run(tensors, instruction_set)
    assert tensors.status.tolist() == [-1, 0, -1]
    assert torch.equal(tensors.state[0, 0], conditional)

    # A second estimate by the unguided branch reads it, whatever the weight.
    tensors.row.zero_()
    tensors.status.fill_(-1)
    tensors.coef[0, at.OUTPUT + at.OUT_E] = 1.0
    tensors.ids[0, at.FLAGS] = at.READS_MODEL + at.E_UNGUIDED
    run(tensors, instruction_set)
    assert tensors.status.tolist() == [0, 0, 0]


def test_a_step_on_tensors_given_each_time() -> None:
    """The same numbers as the bound step; what is wrong with a row, and what is no tensor, is an error of Python's."""
    case = Case(batch=1, guided=False, terms=1, injected=True, emit_dtype=torch.float32, rows=1, seed=4)
    tensors, bound = case.tensors(), case.tensors()
    for each in (tensors, bound):
        each.model_time, each.ids[0, at.FLAGS] = None, at.READS_MODEL
        each.coef[0, [at.EMIT_SCALE, at.P]] = torch.tensor([1.0, 0.3])
        each.state.nan_to_num_(0.25)
    run(bound)
    step = ops.bind_apart(tensors, "cpp")
    first, denoised = torch.empty_like(tensors.model_out), torch.empty_like(tensors.model_out)
    model_out, tensors.model_out = tensors.model_out, torch.empty(0)  # it is read where it is given
    step(0, model_out, None, first, denoised)
    assert same_bits(first[0], bound.state[int(bound.ids[0, at.DEST]), 0])
    assert bound.denoised is not None and torch.equal(denoised, bound.denoised)
    with pytest.raises(AttributeError, match="data_ptr"):
        step(0, 3, None, first, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected i, model_out, x, first, denoised"):
        step(0, model_out)  # type: ignore[call-arg]
    tensors.ids[0, at.DEST] = 99
    with pytest.raises(RuntimeError, match="affine_step on cpp, 1 rows, state .*a row names a register.*code 4"):
        step(0, model_out, None, first, None)


def one_row(batch: int, layout: torch.memory_format, shape: tuple[int, ...]) -> ops.StepTensors:
    """A row that reads everything, the same for each sample; sample b's data depend on its seed alone."""
    case = Case(shape=shape, batch=batch, layout=layout, rows=1, registers=3, terms=3, emit_dtype=torch.bfloat16)
    tensors = case.tensors()
    tensors.row.zero_()
    tensors.seed[:] = torch.arange(100, 100 + batch)
    tensors.guidance.fill_(2.0)
    generator = np.random.default_rng(7)
    tensors.coef[0, : at.NOISE] = torch.from_numpy(generator.normal(size=at.NOISE).astype(np.float32))
    tensors.coef[0, at.NOISE :] = 0.5
    tensors.coef[0, [at.CLAMP_LO, at.CLAMP_HI]] = torch.tensor([-1.0, 1.0])
    deltas = [at.OUTPUT + at.OUT_DELTA + at.OUTPUT_STRIDE * o for o in range(3)]
    tensors.coef[0, deltas] = torch.tensor([1.0, 0.0, 1.0])
    tensors.ids[0] = torch.tensor([0, 1, 2, -1, -1, -1, 0, 2, 1, 1, 3, 2, 0, 0, 0, 0, 4, 1, 9, 2, 4, 1])
    for b in range(batch):
        own = torch.Generator().manual_seed(int(tensors.seed[b]))
        tensors.state[:, b] = torch.randn(3, *shape, generator=own)
        tensors.model_out[b] = torch.randn(*shape, generator=own)
        tensors.model_out[batch + b] = torch.randn(*shape, generator=own)
    return tensors


@pytest.mark.parametrize("shape", [(3, 32, 32), (4, 9, 11), (19, 7, 5)])
def test_a_sample_is_the_same_alone_in_a_batch_and_in_either_layout(shape: tuple[int, ...]) -> None:
    batches = [run(one_row(64, layout, shape)) for layout in LAYOUTS]
    for layout in LAYOUTS:
        for b in (0, 1, 31, 63):
            alone = one_row(64, layout, shape)
            for name in ("row", "seed", "guidance", "status", "ticket"):
                setattr(alone, name, getattr(alone, name)[b : b + 1].clone())
            alone.state = alone.state[:, b : b + 1].flatten(0, 1).contiguous(memory_format=layout).unflatten(0, (3, 1))
            for name in ("model_out", "model_in"):
                stack = getattr(alone, name)[b::64]
                setattr(alone, name, stack.contiguous(memory_format=layout))
            alone.model_time, alone.denoised = alone.model_time[b::64].clone(), None
            run(alone)
            for batch in batches:
                assert same_bits(alone.state[:, 0], batch.state[:, b])
                assert same_bits(alone.model_in, batch.model_in[b::64])


def test_the_number_of_threads_changes_nothing() -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(one_row(64, torch.channels_last, (5, 24, 24))))
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(results[0].state, other.state) for other in results[1:])


def test_a_large_batch_on_all_threads() -> None:
    large = one_row(96, LAYOUTS[0], (3, 64, 64))
    want = expected(large)["state"]
    run(large)
    torch.testing.assert_close(large.state.double(), want, rtol=1e-5, atol=1e-5)
    scaled = large.coef[0, at.EMIT_SCALE] * large.state[0]
    assert same_bits(large.model_in, torch.cat([scaled, scaled]).to(torch.bfloat16))


# -- refusals


def test_a_register_that_is_not_there_is_refused_and_nothing_written() -> None:
    tensors = one_row(2, LAYOUTS[0], (3, 4, 4))
    before = copy.deepcopy(tensors)
    for column, value in ((1, 3), (6, 3), (6, -1), (0, 9)):
        tensors.ids[0, column], kept = value, int(tensors.ids[0, column])
        with pytest.raises(RuntimeError, match="names a register the state does not hold"):
            run(tensors)
        tensors.ids[0, column] = kept
    tensors.ids[0, 10] = 4
    with pytest.raises(RuntimeError, match="more noise terms"):
        run(tensors)
    assert same_bits(tensors.state, before.state)
    assert torch.equal(tensors.row, before.row)


def test_an_unlike_model_output_is_refused() -> None:
    tensors = one_row(2, LAYOUTS[1], (3, 4, 4))
    step = ops.bind(tensors, "cpp")
    for other in (tensors.model_out[:2], tensors.model_out.double(), tensors.model_out.contiguous()):
        with pytest.raises(ValueError, match="the model output is .* the one bound was"):
            step(other)
    with pytest.raises(ValueError, match="unguided was absent when it was bound and is given now"):
        step(tensors.model_out, tensors.model_out[:2])

    tensors = Case(shape=(3, 4, 4), branches="apart").tensors()
    step = ops.bind(tensors, "cpp")
    with pytest.raises(ValueError, match="unguided was given when it was bound and is absent now"):
        step(tensors.model_out)
    with pytest.raises(ValueError, match="the unguided branch is .* the one bound was"):
        step(tensors.model_out, tensors.unguided.half())  # type: ignore[union-attr]


@pytest.mark.parametrize("rule", [at.PLAIN, at.RESCALE, at.APG, at.CFG_ZERO])
@pytest.mark.parametrize("shape", [(3,), (3, 5, 7), (4, 37, 41)])
def test_instruction_sets_guide_alike_to_the_bit(rule: int, shape: tuple[int, ...]) -> None:
    found = []
    for instruction_set in INSTRUCTION_SETS:
        assert native.load().fastdiff_cpu_isa(instruction_set) == instruction_set
        step = Case(shape=shape, batch=6, perturbed=True, mixed=True, model_dtype=torch.bfloat16, seed=3).tensors()
        tensors = guide.GuideTensors(
            **{name: getattr(step, name) for name in ("state", "model_out", "coef", "ids", "row", "guidance", "mix")},
            settings=torch.tensor([0.7, 0.3, -0.5, 1.0, 0.9, 3.0, 0.0, 0.0]),
            partial=torch.zeros(6, at.PARTS, at.SUMS),
            ticket=step.ticket,
            momentum=step.momentum,
        )
        guide.bind(tensors, rule, True, "cpp")(tensors.model_out)
        found.append(tensors)
    for other in found[1:]:
        assert same_bits(found[0].mix, other.mix)
        assert same_bits(found[0].momentum, other.momentum)


def test_a_guide_whose_row_names_a_register_that_is_not_there_is_refused() -> None:
    step = Case(shape=(5,), batch=1, rows=1, mixed=True).tensors()
    passing_on(step)
    step.row.zero_()
    step.coef[0, at.P], step.ids[0, at.SLOT] = 1.0, 7
    names = ("state", "model_out", "coef", "ids", "row", "guidance", "mix", "ticket")
    tensors = guide.GuideTensors(
        **{name: getattr(step, name) for name in names},
        settings=torch.zeros(at.SETTINGS),
        partial=torch.zeros(1, at.PARTS, at.SUMS),
    )
    with pytest.raises(RuntimeError, match="guide on cpp: a row names a register the state does not hold"):
        guide.bind(tensors, at.PLAIN, True, "cpp")(tensors.model_out)


def test_a_missing_extension_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "__file__", str(tmp_path / "fastdiff" / "engine" / "native.py"))
    native.load.cache_clear()
    with pytest.raises(BackendUnavailable, match="is not in .*install a C\\+\\+17 compiler"):
        native.load()
    (tmp_path / "fastdiff").mkdir()
    (tmp_path / "fastdiff" / "_C.abi3.so").write_bytes(b"not a shared object")
    with pytest.raises(BackendUnavailable, match="does not load"):
        native.load()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, any NaN equal to any NaN."""
    return (
        a.dtype == b.dtype
        and torch.equal(a.nan_to_num(1234.5), b.nan_to_num(1234.5))
        and torch.equal(a.isnan(), b.isnan())
    )


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_short_rows_have_a_kernel_of_their_own(instruction_set: int) -> None:
    """Rows of few inputs without a next model input run elsewhere in the code, and give the same numbers.

    The same row with a model input to write goes the general way, which the tests above hold against float64.
    """
    native.load().fastdiff_cpu_isa(instruction_set)
    short = clipped = 0
    for seed in range(120):
        case = Case(shape=SHAPES[seed % len(SHAPES)], guided=False, terms=seed % 2, injected=True, rows=1, seed=seed)
        results = []
        for emits in (True, False):
            tensors = case.tensors()
            coef, ids = tensors.coef, tensors.ids
            if seed % 3 == 0 and ids[0, at.DEST + 1] >= 0:  # a record of D, as multistep solvers keep
                last = 1 if ids[0, at.DEST + 2] < 0 else 2
                start = at.OUTPUT + at.OUTPUT_STRIDE * last
                coef[0, start : start + at.OUTPUT_STRIDE] = 0.0
                coef[0, start + at.OUT_B] = 1.0
                coef[0, at.NOISE + last :: at.NOISE_STRIDE] = 0.0
            elif seed % 3 == 1:  # D clamped, and D before it, as DDIM with clip_sample has them
                ids[0, at.SLOTS], ids[0, at.FLAGS] = 0, at.READS_MODEL
                coef[0, [at.CLAMP_LO, at.CLAMP_HI]] = torch.tensor([-0.7, 0.9])
                coef[0, [at.OUTPUT + at.OUT_E, at.OUTPUT + at.OUT_B]] = torch.tensor([0.4, 0.3])
                tensors.state.nan_to_num_(0.25)
            if not emits:
                tensors.model_in = None
            ops.bind(tensors, "cpp")(tensors.model_out)
            results.append(tensors)
        general, own = results
        for name in ("state", "denoised", "status"):
            assert torch.equal(getattr(general, name).nan_to_num(7e30), getattr(own, name).nan_to_num(7e30)), seed
        outputs = int((ids[0, at.DEST : at.DEST + 3] >= 0).sum())
        short += outputs <= 2 and int(ids[0, at.SLOTS]) <= 4
        clipped += outputs <= 2 and seed % 3 == 1 and bool(ids[0, at.SLOT] >= 0)
    assert short > 50 and clipped > 20
