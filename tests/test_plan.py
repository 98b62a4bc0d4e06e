"""The compiler: symbolic registers, liveness, plans, their JSON, their packed form, and what they refuse."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.compiler import layout as at
from fastdiff.compiler import solvers
from fastdiff.compiler.assemble import assemble
from fastdiff.compiler.build import compile_levels
from fastdiff.compiler.build import plan as build
from fastdiff.compiler.lin import Lin
from fastdiff.compiler.plan import Packed, Plan
from fastdiff.compiler.run import Run, record
from fastdiff.compiler.verify import execute
from fastdiff.models.exact import Mixture, Points
from fastdiff.process import schedules
from fastdiff.process.schedules import Level

Array = np.ndarray[Any, np.dtype[np.float64]]
DATA = Mixture([1.0, 2.0, 1.0], [[-1.0, 0.5], [0.3, 0.2], [0.8, -1.0]], [0.05, 0.2, 0.1])


GIVEN = 0.3


class Numeric(Run):
    """A run on arrays instead of registers: the sampler's function itself, which its table must reproduce."""

    def __init__(self, plan: Plan, denoiser: Callable[[Array, Level], Array], normals: Array) -> None:
        super().__init__(plan.solver, plan.levels, plan.schedule)
        self.denoiser = denoiser
        self.normals = normals

    def denoise(self, x: Any, level: Level) -> Any:
        return self.denoiser(x, level)

    def noise(self, *_: Level) -> Any:
        self.draws += 1
        return self.normals[self.draws - 1]

    white_noise = noise

    def given(self, name: str, *, centre: bool = False) -> Any:
        return GIVEN

    def keep(self, value: Any) -> Any:
        return value


def levels(count: int = 4) -> list[Level]:
    schedule = schedules.edm()
    return [schedule.level(float(s)) for s in np.geomspace(10.0, 0.1, count)] + [schedules.CLEAN]


def trace(function: Callable[..., Any], count: int = 4) -> Plan:
    """Compile a function that is not registered."""
    points = levels(count)
    run = Run("mine", points, schedules.edm())
    rows, registers, result = assemble("mine", record("mine", function, run, {}))
    return Plan("mine", {}, schedules.edm(), "custom", tuple(points), rows, registers, result, run.draws)


@pytest.mark.parametrize("name", [name for name in solvers.names() if not solvers.get(name).adaptive])
@pytest.mark.parametrize("schedule", [schedules.vp(), schedules.edm(), schedules.rectified_flow()], ids=repr)
def test_the_table_computes_what_the_function_computes(name: str, schedule: schedules.Schedule) -> None:
    if solvers.get(name).flow_only and schedule.kind != "flow":
        schedule = schedules.rectified_flow()
    options = {"s_churn": 4.0} if name in ("euler", "heun") else {}
    plan = build(name, schedule, 8, "karras", grid_options={"sigma_max": 40.0}, **options)
    rng = np.random.default_rng(3)
    start, normals = rng.standard_normal((5, 2)), rng.standard_normal((200, 5, 2))
    expected = solvers.get(name).function(Numeric(plan, DATA, normals), start, **options)
    got = execute(plan, DATA, start, lambda i, _: normals[i], dict.fromkeys(plan.given, GIVEN))
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7))
def test_random_samplers(seed: int, count: int) -> None:
    """Random linear multistep samplers with memory, records and reused noise run the same from their tables."""

    def sampler(run: Run, x: Any) -> Any:
        rng = np.random.default_rng(seed)
        memory: list[Any] = []
        for i, s, _ in run.intervals():
            memory = [*memory[-2:], run.denoise(x, s)]
            x = rng.standard_normal() * x
            for value in memory:
                x = x + value * rng.standard_normal()
            if rng.random() < 0.6:
                z = run.noise()
                x = rng.standard_normal() * z + x
                if rng.random() < 0.3:
                    memory[-1] = run.keep(memory[-1] - 0.5 * z)
            if rng.random() < 0.3:
                x = (x - memory[0] / (i + 2.0)) - 0.0
        return x

    plan = trace(sampler, count)
    assert plan.nfe == count
    rng = np.random.default_rng(seed + 1)
    start, normals = rng.standard_normal((5, 2)), rng.standard_normal((20, 5, 2))
    expected = sampler(Numeric(plan, DATA, normals), start)
    np.testing.assert_allclose(execute(plan, DATA, start, lambda i, _: normals[i]), expected, rtol=1e-9, atol=1e-9)


def test_registers_are_shared() -> None:
    """One register where the old state dies, one more per value that must outlive its row."""
    assert build("ddim", "vp", 10, "logsnr").registers == 1
    assert build("dpmpp_2m", "vp", 10, "logsnr").registers == 2
    assert build("heun", "vp", 10, "logsnr").registers == 2

    def adams(run: Run, x: Lin) -> Lin:
        old: list[Lin] = []
        for _, s, _ in run.intervals():
            old = [*old[-3:], run.denoise(x, s)]
            x = x + sum((0.1 * value for value in old), 0.0 * x)
        return x

    plan = trace(adams, 8)
    assert plan.registers == 4
    assert all(len(row.outputs) <= 2 for row in plan.rows)


def test_too_many_inputs_name_the_row() -> None:
    def greedy(run: Run, x: Lin) -> Lin:
        old: list[Lin] = []
        for _, s, _ in run.intervals():
            old.append(run.denoise(x, s))
            x = x + sum((0.1 * value for value in old), 0.0 * x)
        return x

    with pytest.raises(ValueError, match=r"'mine', row 6: writes 1 registers and reads 7.*run\.keep"):
        trace(greedy, 7)


def test_numbers_of_numpy_take_part() -> None:
    def function(run: Run, x: Lin) -> Lin:
        d = run.denoise(x, run.levels[0])
        half = np.float64(0.5)
        return half * x + d * half - np.float32(0.25) * d / np.float64(2.0) + np.float64(0.0) + (-x) - 0 * d

    output = trace(function, 1).rows[1].outputs[0]
    assert (output.x, output.denoised) == (-0.5, 0.375)


def _branch(x: Any) -> Any:
    return x if x > 0 else -x


NOT_AFFINE: dict[str, Callable[[Any, Any], Any]] = {
    "x * x": lambda x, d: x * x,
    "x * D": lambda x, d: x * d,
    "x / D": lambda x, d: x / d,
    "1 / D": lambda x, d: 1.0 / d,
    "x ** 2": lambda x, d: x**2,
    "abs(x)": lambda x, d: abs(x),
    "x.abs()": lambda x, d: x.abs(),
    "x.shape": lambda x, d: x.shape,
    "x[0]": lambda x, d: x[0],
    "x > 0": lambda x, d: _branch(x),
    "x == D": lambda x, d: x if x == d else d,
    "bool(x)": lambda x, d: x if x else d,
    "float(x)": lambda x, d: float(x) * d,
    "int(x)": lambda x, d: int(x) * d,
    "math.sqrt(D)": lambda x, d: math.sqrt(d) * x,
    "np.exp(D)": lambda x, d: np.exp(d),
    "np.clip(D)": lambda x, d: np.clip(d, -1.0, 1.0),
    "np.maximum": lambda x, d: np.maximum(x, d),
    "x + 1": lambda x, d: x + 1.0,
    "1 - D": lambda x, d: 1.0 - d,
    "x * array": lambda x, d: x * np.ones(3),
    "array * x": lambda x, d: np.ones(3) * x,
    "x * True": lambda x, d: x * True,
    "x * '2'": lambda x, d: x * "2",
}


@pytest.mark.parametrize("update", NOT_AFFINE.values(), ids=NOT_AFFINE)
def test_what_is_not_affine_is_refused_by_solver_and_row(update: Callable[[Any, Any], Any]) -> None:
    def function(run: Run, x: Lin) -> Lin:
        x = 0.5 * x + run.denoise(x, run.levels[0])
        return update(x, run.denoise(x, run.levels[1]))

    with pytest.raises(TypeError, match=r"solver 'mine', row 1,"):
        trace(function)


@pytest.mark.parametrize("result", [None, 3.0, [1]])
def test_a_solver_must_return_its_state(result: Any) -> None:
    with pytest.raises(TypeError, match=r"'mine' returned .*return x at the end"):
        trace(lambda run, x: result)


def test_json_gives_the_plan_back() -> None:
    for schedule in (schedules.linear(), schedules.edm(), schedules.rescale_zero_terminal_snr(schedules.cosine())):
        for name, options in (("dpmpp_2m_sde", {"eta": 0.7}), ("heun", {"s_churn": 3.0}), ("ddpm", {})):
            plan = build(name, schedule, 5, "trailing", **options)
            again = Plan.from_json(plan.to_json())
            assert again == plan
            assert again.explain() == plan.explain()
            np.testing.assert_array_equal(again.pack("v").coef, plan.pack("v").coef)
            np.testing.assert_array_equal(again.pack("v").ids, plan.pack("v").ids)


def test_json_that_is_damaged_is_refused() -> None:
    text = build("dpmpp_2m", "vp", 4, "logsnr").to_json()
    for cut in (0, 1, len(text) // 2, len(text) - 1):
        with pytest.raises(ValueError, match="truncated or not JSON"):
            Plan.from_json(text[:cut])
    number = str(Plan.from_json(text).rows[2].outputs[0].denoised)
    assert number in text
    with pytest.raises(ValueError, match="edited or damaged"):
        Plan.from_json(text.replace(number, "0.25"))
    body = json.loads(text)
    del body["plan"]["levels"][1]
    with pytest.raises(ValueError, match="edited or damaged"):
        Plan.from_json(json.dumps(body))
    for other in ("[]", "{}", "3", '{"format": "fastdiff-plan-0", "plan": {}}', json.dumps({"format": body["format"]})):
        with pytest.raises(ValueError, match="not a plan"):
            Plan.from_json(other)


def read_row(
    packed: Packed, i: int, registers: Array, raw: Array, drawn: Callable[[int, int], Array]
) -> dict[int, Array]:
    """What a row writes, from its packed numbers alone, in the dtype of the registers."""
    coef, ids = packed.coef[i].astype(registers.dtype), packed.ids[i]
    x = registers[ids[at.SLOT]]
    denoised = coef[at.P] * x + coef[at.Q] * raw if ids[at.FLAGS] & at.READS_MODEL else np.zeros_like(x)
    written = {}
    for o, dest in enumerate(ids[at.DEST : at.DEST + at.MAX_OUTPUTS]):
        if dest < 0:
            continue
        column = at.OUTPUT + at.OUTPUT_STRIDE * o
        base = x * coef[column + at.OUT_DELTA]
        total = coef[column + at.OUT_K] * x + coef[column + at.OUT_B] * (denoised - base)
        for j in range(ids[at.SLOTS]):
            total = total + coef[column + at.OUT_A + j] * (registers[ids[at.SLOT + 1 + j]] - base)
        for t in range(ids[at.TERMS]):
            name = ids[at.TERM_IDS + at.TERM_IDS_STRIDE * t :][:2]
            total = total + coef[at.NOISE + at.NOISE_STRIDE * t + o] * drawn(*name)
        written[int(dest)] = base + total
    return written


def run_packed(plan: Plan, packed: Packed, start: Array, raw: Array, normals: Array) -> Array:
    registers = np.zeros((plan.registers, *start.shape), dtype=start.dtype)
    registers[plan.rows[0].x] = start
    for i in range(len(plan.rows)):
        for dest, value in read_row(packed, i, registers, raw[i - 1], lambda k, _: normals[k]).items():
            registers[dest] = value
    return registers[plan.result]


@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "flow", "score"])
@pytest.mark.parametrize("name", ["ddpm", "heun", "dpmpp_2m_sde", "euler_ancestral"])
def test_the_packed_table_is_the_plan(name: str, prediction: str) -> None:
    """Prediction type folded in, delta form chosen, rounded once: fp32 numbers, same map."""
    from fastdiff.process import predictions

    plan = build(name, "vp", 6, "logsnr")
    rng = np.random.default_rng(5)
    start, raw, normals = rng.standard_normal(8), rng.standard_normal((20, 8)), rng.standard_normal((20, 8))
    calls = iter(raw)

    def denoise(x: Array, level: Level) -> Array:
        fold = predictions.coefficients(prediction, level, plan.schedule or schedules.vp())
        return fold.P * x + fold.Q * next(calls)

    expected = execute(plan, denoise, start, lambda i, _: normals[i])
    got = run_packed(plan, plan.pack(prediction, opening="state"), start, raw, normals)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_openings() -> None:
    plan = build("euler", "vp", 3, "logsnr", s_churn=1.0)
    first = plan.levels[0]
    rng = np.random.default_rng(6)
    image, latent, churn = rng.standard_normal((3, 4))
    opening = plan.rows[0].outputs[0]

    def state(kind: str) -> Array:
        packed = plan.pack("x0", opening=kind, latent_id=7)
        names = {(7, at.STREAM_LATENT): latent, (0, at.STREAM_STEP): churn}
        registers = np.zeros((plan.registers, 4))
        registers[0] = image
        return read_row(packed, 0, registers, image, lambda i, s: names[int(i), int(s)])[opening.dest]

    added = opening.noise[0] * churn
    np.testing.assert_allclose(state("state"), opening.x * image + added, rtol=1e-6)
    np.testing.assert_allclose(state("noise"), opening.x * first.sigma * latent + added, rtol=1e-6)
    np.testing.assert_allclose(
        state("image"), opening.x * (first.alpha * image + first.sigma * latent) + added, rtol=1e-6
    )
    with pytest.raises(ValueError, match="opening must be one of noise, state, image"):
        plan.pack("x0", opening="zero")


def fp32_error(plan: Plan, delta: bool, monkeypatch: pytest.MonkeyPatch) -> float:
    """Largest fp32 error of the run, on a memorised image with a perfect denoiser's outputs given in fp32."""
    rng = np.random.default_rng(7)
    shape = (2000,)
    image, latent = rng.uniform(-1.0, 1.0, shape), rng.standard_normal(shape)
    noisy = 0.1 * rng.standard_normal((plan.nfe, *shape))
    raw = (image + noisy).astype(np.float32)
    normals = rng.standard_normal((max(plan.draws, 1), *shape)).astype(np.float32)
    first = plan.levels[0]
    start = (first.alpha * image + first.sigma * latent).astype(np.float32)
    exact = iter(raw.astype(np.float64))
    expected = execute(plan, lambda x, level: next(exact), start, lambda i, _: normals[i])
    with monkeypatch.context() as patch:
        if not delta:
            patch.setattr("fastdiff.compiler.plan.is_delta", lambda output: False)
        packed = plan.pack("x0", opening="state")
    got = run_packed(plan, packed, start, raw, normals)
    assert got.dtype == np.float32
    return float(np.sqrt(np.mean((got - expected) ** 2)))


def uses_delta(plan: Plan) -> bool:
    packed = plan.pack("x0", opening="state")
    return bool(packed.coef[1:, at.OUTPUT + at.OUT_DELTA].mean() > 0.5)


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2m", "euler_ancestral", "dpmpp_2m_sde", "ddpm"])
def test_the_delta_form_rounds_less(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 error after 50 steps, delta against plain form, where pack() chooses it for most rows.

    The last row x' = D forgets the state, so the plan is cut before it.
    """
    whole = build(solver, "vp", 50, "logsnr")
    plan = compile_levels(solver, whole.levels[:-1], whole.schedule, "cut", {})
    assert uses_delta(plan)
    delta, plain = (fp32_error(plan, chosen, monkeypatch) for chosen in (True, False))
    print(f"{solver}: delta {delta:.2e}, plain {plain:.2e}")
    assert delta < plain


def test_strength_starts_at_its_level() -> None:
    plan = build("ddim", "rectified_flow", 10, "trailing", strength=0.45)
    assert [level.time for level in plan.levels] == pytest.approx([0.45, 0.4, 0.3, 0.2, 0.1, 0.0])
    shorter = build("ddim", "rectified_flow", 10, "trailing", start_step=7)
    assert [level.time for level in shorter.levels] == pytest.approx([0.3, 0.2, 0.1, 0.0])


def test_a_plan_that_draws_wants_normals() -> None:
    with pytest.raises(ValueError, match="this plan draws noise"):
        execute(build("ddpm", "linear", 3), Points([[0.0]]), np.zeros((1, 1)))


def test_explain_says_what_each_row_does() -> None:
    text = build("dpmpp_2m", "edm", 3, "karras").explain()
    assert "3 model evaluations, 2 registers, deterministic" in text
    assert text.count("D = model(") == 3
    assert text.rstrip().splitlines()[-2].endswith("<- D")
