"""The benchmark's own conduct: no figure without a right result."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import fact_line

import fastdiff as fd
from bench import brownian, measure, ops, peers, run, stream, table, train, train_ops
from bench.measure import Task, Timing
from fastdiff.training import objectives

pytest.importorskip("diffusers")

CPU = torch.device("cpu")


def small(solver: str) -> ops.Case:
    return ops.Case(solver, (2, 3, 8, 8), torch.float32, "reference")


@pytest.mark.parametrize("solver", peers.SOLVERS)
def test_gate_is_green_for_the_real_row(solver: str) -> None:
    gate = ops.check(ops.Bound(small(solver), CPU), CPU)
    assert gate.green
    assert 0 < gate.error <= gate.tolerance


@pytest.mark.parametrize("solver", peers.SOLVERS)
def test_gate_refuses_a_row_that_is_slightly_off(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = ops.Bound(small(solver), CPU)
    step = bound.step

    def wrong(model_out: torch.Tensor) -> None:
        step(model_out)
        bound.tensors.state.mul_(1 + 1e-5)

    monkeypatch.setattr(bound, "step", wrong)
    assert not ops.check(bound, CPU).green


def test_gate_refuses_other_noise() -> None:
    bound = ops.Bound(small("ddpm"), CPU)
    bound.tensors.seed.add_(1)
    assert not ops.check(bound, CPU).green


def test_gate_refuses_a_step_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = ops.Bound(small("dpmpp_2m"), CPU)
    monkeypatch.setattr(bound, "step", lambda model_out: None)
    assert not ops.check(bound, CPU).green


def test_gate_refuses_nan() -> None:
    assert not ops.Gate(float("nan"), 1.0, 0.0, 1.0).green
    assert not ops.Gate(0.0, 1.0, float("nan"), 1.0).green


def test_red_gate_prints_and_records_no_figure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = peers.formula

    def wrong(*arguments: object) -> tuple[object, object]:
        x, denoised = real(*arguments)  # type: ignore[arg-type]
        return x * 1.001, denoised

    monkeypatch.setattr(peers, "formula", wrong)
    line = ops.measure_case(small("ddim"), CPU, 0.01, 1, None)
    assert line["gate"] == "red"
    assert not [key for key in line if key == "us" or key.endswith("_us") or key.startswith("ratio")]

    monkeypatch.setattr(ops, "run", lambda device, quick: iter([line]))
    results = tmp_path / "results.csv"
    assert run.main(["ops", "--device", "cpu", "--threads", "1", "--force", "--csv", str(results)]) == 1
    assert "WRONG: no figure" in capsys.readouterr().out
    assert not results.exists()


@pytest.mark.parametrize(
    ("solver", "options"),
    [("unipc", {"variant": "bh1"}), ("unipc order 3", {"order": 2}), ("sa_solver", {}), ("sa_solver", {"tau": 0.9})],
)
def test_gate_refuses_a_plan_of_another_algorithm(
    solver: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row does what the table says, and the table is not what diffusers does."""
    monkeypatch.setitem(peers.OPTIONS, solver, options)
    gate = ops.check(ops.Bound(small(solver), CPU), CPU)
    assert gate.error <= gate.tolerance
    assert gate.peer_error > gate.peer_tolerance


@pytest.mark.parametrize("solver", peers.SOLVERS)
def test_a_scheduler_put_back_repeats_its_steps(solver: str) -> None:
    scheduler = peers.scheduler_of(solver)
    x = torch.randn(1, 3, 4, 4)

    def steps(first: int, last: int, x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        for time in scheduler.timesteps[first:last]:
            x = scheduler.step(x.tanh(), time, x, return_dict=False)[0]
        return x

    x = steps(0, 5, x)
    back = peers.place(scheduler)
    once = steps(5, 9, x)
    for _ in range(2):
        back()
        assert torch.equal(steps(5, 9, x), once)


@pytest.mark.parametrize("solver", peers.SOLVERS)
def test_compiled_row_is_checked(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    peers._compiled.cache_clear()
    bound = ops.Bound(small(solver), CPU)
    registers = list(bound.start.clone())
    row = peers.CompiledRow(bound.plan.rows[11], CPU)
    row.check(registers, bound.model_out)
    assert all(torch.equal(a, b) for a, b in zip(registers, bound.start, strict=True)), "a check changes nothing"
    row.coefficients[0, 1] *= 1.01
    with pytest.raises(RuntimeError, match="off by"):
        row.check(registers, bound.model_out)
    peers._compiled.cache_clear()


def test_bytes_are_counted_from_the_row() -> None:
    widths = {solver: ops.Bound(small(solver), CPU).bytes_per_element() for solver in peers.SOLVERS}
    assert widths == {
        "ddim": (12, 8),
        "euler_ancestral": (12, 8),
        "ddpm": (12, 8),
        "dpmpp_2m": (20, 12),
        "unipc": (28, 16),
        "unipc order 3": (32, 20),
        "sa_solver": (28, 16),
    }


def test_quantiles_and_interleaving() -> None:
    timing = Timing.of([float(i) for i in range(101)])
    assert (timing.p10, timing.p20, timing.median, timing.p80, timing.repetitions) == (10, 20, 50, 80, 101)
    order: list[str] = []
    tasks = {name: Task(lambda name=name: order.append(name)) for name in "ab"}  # type: ignore[misc]
    timings = measure.interleave(tasks, CPU, budget=0.0, least=4, warm_up=1)
    assert "".join(order[2:]) == "abbaabba"
    assert timings["a"].repetitions == timings["b"].repetitions == 4


def test_settling_waits_for_what_has_ended_and_not_for_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(measure.time, "sleep", slept.append)
    loads = iter([3.0, 2.0, 0.5])
    monkeypatch.setattr(measure, "load", lambda: next(loads))
    monkeypatch.setattr(measure.Watch, "others", lambda self: 0.01)
    measure.settle(1.0)
    assert len(slept) == 2
    monkeypatch.setattr(measure, "load", lambda: 3.0)
    monkeypatch.setattr(measure.Watch, "others", lambda self: 0.9)
    measure.settle(1.0)
    assert len(slept) == 3


def test_stream_has_a_table_and_a_gate_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {f"{way}_latency{suffix}": 0.25 for way in stream.CONTENDERS for suffix in ("", "_p95")}
    numbers |= {f"{way}_seconds{s}": 0.0125 for way in stream.CONTENDERS for s in ("", "_p20", "_p80")}
    text = table.render([fact_line(bench="stream", network="tiny", batch=4, **numbers)])
    assert text.endswith("| tiny | 4 |" + " 12.5 [12.5–12.5] | 0.25 / 0.25 |" * 3)

    real = stream._streamed

    def slightly_off(*arguments: Any) -> Any:
        return [(1.01 * image, seconds) for image, seconds in real(*arguments)]

    monkeypatch.setattr(stream, "_streamed", slightly_off)
    (line,) = stream.run(CPU, quick=True)
    assert line["gate"] == "red" and "stream_seconds" not in line


@pytest.fixture
def sampling(monkeypatch: pytest.MonkeyPatch) -> Any:
    """k-diffusion's samplers, and a law checked on fewer numbers."""
    monkeypatch.setattr(brownian, "CHECKED_ELEMENTS", 1 << 15)
    try:
        return brownian.k_diffusion()
    except brownian.Missing as missing:
        pytest.skip(str(missing))


SMALL = (2, 3, 32, 32)


def test_brownian_gate_is_green(sampling: Any) -> None:
    line = brownian.gate(sampling, SMALL, ops.executors(CPU)[0], CPU)
    assert line["gate"] == "green"
    assert 0 < line["error"] < 2e-6
    assert 0 < abs(line["variance"] - 1) < 0.03
    assert line["path_correlation"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "wrong", "column", "limit"),
    [
        # another sampler, noise that is no path, a path that is too loud
        ("plan_of", lambda steps=20: fd.plan("dpmpp_2m_sde", "edm", steps, "karras", eta=0.99), "error", 1e-4),
        ("on_path", lambda plan: plan, "path_correlation", None),
        ("noise_only", lambda plan, real=brownian.noise_only: louder(real(plan)), "variance", 1.05),
    ],
)
def test_brownian_gate_refuses(
    name: str,
    wrong: Callable[..., Any],
    column: str,
    limit: float | None,
    sampling: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(brownian, name, wrong)
    line = brownian.gate(sampling, SMALL, ops.executors(CPU)[0], CPU)
    assert line["gate"] == "red"
    assert line[column] < 0.9 if limit is None else line[column] > limit


def louder(plan: fd.Plan) -> fd.Plan:
    """The plan with every noise 4 % stronger."""

    def scaled(output: Any) -> Any:
        return dataclasses.replace(output, noise=tuple(1.04 * c for c in output.noise))

    rows = (dataclasses.replace(row, outputs=tuple(map(scaled, row.outputs))) for row in plan.rows)
    return dataclasses.replace(plan, rows=tuple(rows))


@pytest.mark.parametrize("package", ["torchsde", "k_diffusion"])
def test_brownian_without_its_peer_says_why(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    arguments = ["brownian", "--quick", "--device", "cpu", "--threads", str(torch.get_num_threads())]
    assert run.main([*arguments, "--csv", str(tmp_path / "results.csv")]) == 0
    assert f"{package.replace('_', '-')} is not installed" in capsys.readouterr().out


def test_train_ops_gate() -> None:
    line = train_ops.gate(train_ops.Step((2, 3, 8, 8), CPU))
    assert line["gate"] == "green"
    assert 0 < line["error"] < 1e-6 and 0 < line["diffusers_error"] < 1e-6


def test_train_ops_gate_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    step = train_ops.Step((2, 3, 8, 8), CPU)
    step.objective = fd.training.objectives.get("ddpm", perturbation=0.01)  # an input with another noise in it
    assert train_ops.gate(step)["gate"] == "red"
    step = train_ops.Step((2, 3, 8, 8), CPU)
    step.objective = fd.training.objectives.get("ddpm", weighting={"kind": "min_snr", "gamma": 1e-3})  # other gradients
    assert train_ops.gate(step)["gate"] == "red"


def test_bytes_of_the_operators() -> None:
    x, y = torch.zeros(10), torch.zeros(10)
    with train_ops.Traffic() as traffic:
        z = x + y
        z.view(2, 5)
        torch.empty(10)
        z.mul_(2)
    assert traffic.bytes == 4 * (30 + 20)


@pytest.mark.parametrize("command", ["ops", "loop", "brownian", "pipelines", "stream", "train-ops", "norm", "unet"])
def test_quick_mode_runs_one_tiny_case(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the formula is run as it is: compiling it takes longer than everything else here
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    peers._compiled.cache_clear()
    results, threads = tmp_path / "results.csv", torch.get_num_threads()
    try:
        assert run.main([command, "--quick", "--device", "cpu", "--threads", "1", "--csv", str(results)]) == 0
    finally:
        torch.set_num_threads(threads)
        peers._compiled.cache_clear()
    printed = capsys.readouterr().out
    assert "WRONG" not in printed and ("%" in printed or command in ("brownian", "pipelines", "stream", "train-ops"))
    assert not results.exists(), "quick figures are not worth keeping"


@pytest.mark.parametrize(("load", "others"), [(5.0, 0.0), (0.1, 0.9)])
def test_a_busy_machine_records_nothing(
    load: float, others: float, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = fact_line(gate="green", others=others, diffusers_error=0.0, diffusers_tolerance=1.0)
    monkeypatch.setattr(ops, "run", lambda device, quick: iter([line]))
    monkeypatch.setattr(measure, "load", lambda: load)
    monkeypatch.setattr(measure, "settle", lambda limit: None)
    results = tmp_path / "results.csv"
    command = ["ops", "--device", "cpu", "--threads", str(torch.get_num_threads()), "--csv", str(results)]
    assert run.main(command) == 0
    assert "busy" in capsys.readouterr().out
    assert not results.exists()
    assert run.main([*command, "--force"]) == 0
    assert results.exists()


def test_the_train_step_is_held_against_diffusers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate compares gradients for the same draw; a schedule that is slightly another one turns it red."""
    assert run.main(["train", "--quick", "--threads", "1", "--device", "cpu"]) == 0
    assert "optimizer + EMA" in capsys.readouterr().out
    cosine = objectives.get("ddpm", schedule="cosine")
    monkeypatch.setattr(train.objectives, "get", lambda name: cosine)
    assert run.main(["train", "--quick", "--threads", "1", "--device", "cpu"]) == 1
    assert "WRONG: no figure" in capsys.readouterr().out
