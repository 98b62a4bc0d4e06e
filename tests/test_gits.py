"""GITS: the dynamic program against all paths, the costs in closed form, what it gains, and its file."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.compiler.layout import STREAM_LATENT
from fastdiff.engine.noise import normal
from fastdiff.models.exact import Gaussian, Mixture
from fastdiff.process.clocks import Array, Schedule
from fastdiff.process.gits import Costs, best_path

SCHEDULES = [fd.schedules.edm(), fd.schedules.linear(), fd.schedules.rectified_flow()]
DATA = Mixture(np.ones(5), np.random.default_rng(0).standard_normal((5, 16)), 0.05)
SHAPE = (64, 16)


class Net:
    """An exact denoiser as a network x, t -> x0 that counts its calls."""

    def __init__(self, data: Gaussian | Mixture, schedule: Schedule) -> None:
        self.data, self.schedule, self.calls = data, schedule, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.data(x.double(), self.schedule.level(float(t[0]))).float()


def exact(data: Gaussian | Mixture, schedule: Schedule) -> fd.Denoiser:
    return fd.Denoiser(Net(data, schedule), schedule, "x0")


def total(cost: Array, path: tuple[int, ...], coefficient: float) -> float:
    """The cost of a whole path, summed from its end as the recurrence does."""
    value, to = None, len(cost) - 1
    for i in reversed(path):
        value = cost[i, to] if value is None else cost[i, to] + coefficient * value
        to = i
    assert value is not None
    return float(value)


@pytest.mark.parametrize("coefficient", [0.7, 1.0, 1.05, 1.15])
@pytest.mark.parametrize("end", range(1, 9))
def test_best_path_is_the_best_of_all_paths(end: int, coefficient: float) -> None:
    rng = np.random.default_rng(end)
    for _ in range(20):
        cost = rng.random((end + 1, end + 1)) ** 3
        for jumps in range(1, end + 1):
            every = [(0, *rest) for rest in itertools.combinations(range(1, end), jumps - 1)]
            path = tuple(best_path(cost, jumps, coefficient))
            assert path in every
            assert total(cost, path, coefficient) == min(total(cost, other, coefficient) for other in every)


def test_of_equal_paths_the_earliest_is_taken() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        cost = rng.integers(0, 3, (7, 7)).astype(float)  # small integers: many ties, and sums are exact
        for jumps in range(1, 7):
            every = [(0, *rest) for rest in itertools.combinations(range(1, 6), jumps - 1)]
            assert tuple(best_path(cost, jumps, 1.0)) == min(every, key=lambda path: total(cost, path, 1.0))


def test_all_levels_are_used_when_there_are_no_more() -> None:
    assert best_path(np.ones((6, 6)), 5) == [0, 1, 2, 3, 4]
    assert best_path(np.ones((2, 2)), 1) == [0]


def test_the_lower_half_of_the_matrix_is_not_read() -> None:
    cost = np.random.default_rng(1).random((9, 9))
    poisoned = np.where(np.triu(np.ones((9, 9)), 1) > 0, cost, math.nan)
    assert best_path(poisoned, 4) == best_path(cost, 4)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_costs_on_gaussian_data_are_the_closed_form(schedule: Schedule, tmp_path: Path) -> None:
    """With x/alpha = |z| sqrt(v + rho^2): the jump i -> j ends at (v + rho_i rho_j)/sqrt(v + rho_i^2) |z| instead."""
    v, file = 0.3, tmp_path / "gits.json"
    fd.gits(exact(Gaussian(variance=v), schedule), (8, 12), 5, cache=file, seed=3, teacher="ipndm_v", teacher_steps=60)
    costs = Costs.from_json(file.read_text())
    np.testing.assert_array_equal(costs.times, fd.grids.make("karras", schedule, 60))
    rho = np.append(schedule.rho(costs.times), 0.0)
    z = np.mean([np.linalg.norm(normal(3 + i, 12, 0, STREAM_LATENT)) for i in range(8)])
    scale = z * rho[0] / math.hypot(math.sqrt(v), rho[0]) if math.isfinite(rho[0]) else z
    # divided by rho_i, so that it holds at rho = inf; at the clean end nothing starts
    jumped = scale * (v / rho[:-1, None] + rho) / np.sqrt(v / rho[:-1, None] ** 2 + 1)
    above = np.triu(np.ones(jumped.shape, dtype=bool), 1)
    expected = np.abs(jumped[above] - np.broadcast_to(scale * np.sqrt(v + rho**2), jumped.shape)[above])
    # the teacher is not exact: 60 steps of order 4, the first ones lower
    np.testing.assert_allclose(costs.cost[:-1][above], expected, rtol=5e-3, atol=2e-3 * z)
    assert expected.max() > 1.0


def test_a_point_mass_has_straight_trajectories(tmp_path: Path) -> None:
    file = tmp_path / "gits.json"
    schedule = fd.schedules.linear()
    fd.gits(exact(Gaussian(mean=0.4, variance=0.0), schedule), (4, 6), 5, cache=file)
    costs = Costs.from_json(file.read_text())
    top = float(schedule.rho_max) * math.sqrt(6)
    assert np.abs(costs.cost).max() < 1e-5 * top


def endpoint_error(model: fd.Denoiser, solver: str, steps: int, reference: Tensor, **grid: Any) -> float:
    sample = fd.sample(model, SHAPE, solver, steps, seed=1000, **grid)
    return float((sample - reference).norm(dim=1).mean())


# (schedule, error of karras / error of gits at 6 steps of ddim), measured
GAINS = [(SCHEDULES[0], 1.4), (SCHEDULES[1], 1.6), (SCHEDULES[2], 1.6)]


@pytest.mark.parametrize(("schedule", "gain"), GAINS, ids=repr)
def test_what_it_gains(schedule: Schedule, gain: float, tmp_path: Path) -> None:
    """Euler steps on fresh seeds end nearer to the exact ODE than with karras and with exponential."""
    model, file = exact(DATA, schedule), tmp_path / "gits.json"
    fd.gits(model, SHAPE, 6, cache=file)
    reference = fd.sample(model, SHAPE, "dpmpp_3m", 400, seed=1000)
    ratios = {}
    for steps in range(5, 11):
        ours = endpoint_error(model, "ddim", steps, reference, grid="gits", grid_options={"cache": file})
        for other in ("karras", "exponential"):
            ratios[other, steps] = endpoint_error(model, "ddim", steps, reference, grid=other) / ours
    assert min(ratios.values()) > 1.2, ratios
    assert ratios["karras", 6] > gain, ratios


def test_levels_are_a_grid_and_the_file_serves_every_number_of_steps(tmp_path: Path) -> None:
    schedule, file = fd.schedules.cosine(), tmp_path / "gits.json"
    model = exact(DATA, schedule)
    levels = fd.gits(model, SHAPE, 6, cache=file)
    assert levels[0] == schedule.time_range[1] and len(levels) == 6
    options = {"cache": file}
    np.testing.assert_array_equal(fd.grids.make("gits", schedule, 6, **options), levels)
    named, given = fd.plan("ddim", schedule, 6, "gits", grid_options=options), fd.plan("ddim", schedule, grid=levels)
    assert named.rows == given.rows and named.grid == "gits"
    calls = model.net.calls
    for steps in (1, 2, 9, 60):
        again = fd.gits(model, SHAPE, steps, cache=file)
        np.testing.assert_array_equal(again, fd.gits(model, SHAPE, steps, cache=tmp_path / f"{steps}.json"))
        np.testing.assert_array_equal(again, fd.grids.make("gits", schedule, steps, **options))
        assert (tmp_path / f"{steps}.json").read_text() == file.read_text()
    assert model.net.calls == calls + 4 * 60  # only the four new files
    np.testing.assert_array_equal(again, fd.grids.make("karras", schedule, 60))
    free = fd.gits(model, SHAPE, 6, cache=file, coefficient=2.0)
    assert not np.array_equal(free, levels)
    np.testing.assert_array_equal(free, fd.grids.make("gits", schedule, 6, coefficient=2.0, **options))


def test_costs_round_trip_bit_for_bit(tmp_path: Path) -> None:
    file = tmp_path / "gits.json"
    fd.gits(exact(DATA, SCHEDULES[2]), SHAPE, 6, cache=file, seed=range(64), teacher_steps=20)
    costs = Costs.from_json(file.read_text())
    assert costs.to_json() == file.read_text()
    assert costs.schedule == SCHEDULES[2] and costs.measured["seeds"] == list(range(64))
    assert costs.cost.shape == (21, 21) and not np.tril(costs.cost).any()
    assert [p.name for p in tmp_path.iterdir()] == ["gits.json"]


def test_guided_costs_are_those_of_the_guided_denoiser(tmp_path: Path) -> None:
    schedule = fd.schedules.linear()
    wide, narrow = Gaussian(variance=1.0), Gaussian(mean=0.5, variance=0.1)

    def branch(x: Tensor, t: Tensor, which: Tensor) -> Tensor:
        level = schedule.level(float(t[0]))
        return torch.where(which[:, None] > 0, narrow(x, level), wide(x, level))

    def guided(x: Tensor, t: Tensor) -> Tensor:
        level = schedule.level(float(t[0]))
        return wide(x, level) + 2.5 * (narrow(x, level) - wide(x, level))

    shape, on, off = (6, 5), torch.ones(6), torch.zeros(6)
    files = [tmp_path / name for name in ("branches.json", "guided.json", "unguided.json")]
    model = fd.Denoiser(branch, schedule, "x0")
    fd.gits(model, shape, 5, cache=files[0], cond={"which": on}, uncond={"which": off}, guidance=2.5)
    fd.gits(fd.Denoiser(guided, schedule, "x0"), shape, 5, cache=files[1])
    fd.gits(model, shape, 5, cache=files[2], cond={"which": on})
    branches, whole, unguided = (Costs.from_json(file.read_text()).cost for file in files)
    np.testing.assert_allclose(branches, whole, rtol=1e-3, atol=1e-3)
    assert np.abs(unguided - whole).max() > 1.0


def test_a_network_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def net(x: Tensor, t: Tensor) -> Tensor:
        return x if float(t[0]) > 500 else x * math.nan

    with pytest.raises(FloatingPointError, match="inf or nan"):
        fd.gits(fd.Denoiser(net, "linear"), (2, 3), 5, cache=tmp_path / "gits.json")
    assert not list(tmp_path.iterdir())


def damage(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def edited(text: str) -> str:
        document = json.loads(text)
        change(document)
        return json.dumps(document)

    return edited


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text[: len(text) // 2], "Cannot read GITS costs from .*not complete JSON.*Delete it"),
        (lambda text: "", "not complete JSON"),
        (lambda text: "[1, 2]", "not a file of GITS costs"),
        (lambda text: fd.plan("ddim", "linear").to_json(), "not a file of GITS costs"),
        (damage(lambda d: d["costs"]["cost"][3].__setitem__(2, 0.0)), "digest does not match"),
        (damage(lambda d: d["costs"]["times"].pop()), "digest does not match"),
        (damage(lambda d: d.pop("digest")), "digest does not match"),
        (damage(lambda d: d["costs"].update(schedule=fd.schedules.cosine().to_dict())), "digest does not match"),
    ],
)
def test_a_damaged_file_is_refused(edit: Callable[[str], str], message: str, tmp_path: Path) -> None:
    file, model = tmp_path / "gits.json", exact(DATA, SCHEDULES[0])
    fd.gits(model, SHAPE, 6, cache=file, teacher_steps=12)
    file.write_text(edit(file.read_text()))
    for call in (
        lambda: fd.plan("ddim", model.schedule, 6, "gits", grid_options={"cache": file}),
        lambda: fd.gits(model, SHAPE, 6, cache=file, teacher_steps=12),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "gits.json"
    file.write_bytes(b"\xff\xfe\x00\x80" * 100)
    with pytest.raises(ValueError, match="Cannot read GITS costs"):
        fd.grids.make("gits", SCHEDULES[0], 6, cache=file)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of costs on edm(), 12 teacher steps, seed 0."""
    file = tmp_path_factory.mktemp("gits") / "gits.json"
    fd.gits(exact(DATA, SCHEDULES[0]), SHAPE, 6, cache=file, teacher_steps=12)
    return file


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1, "teacher_steps": 12}, r"measured with seeds \[0, 1, .*asked for with \[1, 2, .*delete the file"),
        ({"teacher_steps": 13}, "measured with teacher_steps 12, asked for with 13"),
        ({"teacher": "ddim", "teacher_steps": 12}, "measured with teacher 'ipndm', asked for with 'ddim'"),
        ({"teacher_grid": "exponential", "teacher_steps": 12}, "teacher_grid 'karras'"),
        ({"guidance": 2.0, "teacher_steps": 12}, r"guidance \[1.0\], asked for with \[2.0\]"),
    ],
)
def test_a_file_measured_otherwise_is_refused(options: dict[str, Any], message: str, measured: Path) -> None:
    with pytest.raises(ValueError, match=message):
        fd.gits(exact(DATA, SCHEDULES[0]), SHAPE, 6, cache=measured, **options)


@pytest.mark.parametrize(
    "schedule", [fd.schedules.get(n) for n in ("linear", "cosine", "vp", "ve", "rectified_flow")], ids=repr
)
def test_a_file_of_another_schedule_is_refused_and_both_are_named(schedule: Schedule, measured: Path) -> None:
    message = rf"measured on edm\(.*asked for on {schedule.name}\("
    with pytest.raises(ValueError, match=message):
        fd.plan("ddim", schedule, 6, "gits", grid_options={"cache": measured})
    with pytest.raises(ValueError, match=message):
        fd.sample(exact(DATA, schedule), SHAPE, "ddim", 6, "gits", grid_options={"cache": measured})
    with pytest.raises(ValueError, match=message):
        fd.gits(exact(DATA, schedule), SHAPE, 6, cache=measured)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: fd.plan("ddim", "linear", 6, "gits"), r"fastdiff\.gits\(model, shape, steps, cache='gits.json'\)"),
        (lambda m: fd.gits(m, SHAPE, 61), r"steps must be 1\.\.60, got 61.*teacher_steps"),
        (lambda m: fd.gits(m, SHAPE, 0), "steps must be an integer of at least 1.*got 0"),
        (lambda m: fd.gits(m, SHAPE, True), "got True"),
        (lambda m: fd.gits(m, SHAPE, 5, coefficient=0.0), "coefficient must be finite and above 0, got 0.0"),
        (lambda m: fd.gits(m, SHAPE, 5, teacher="euler_ancestral"), "teacher 'euler_ancestral' draws noise"),
        (lambda m: fd.gits(m, SHAPE, 5, teacher="heun"), "teacher 'heun' does not evaluate once at each level"),
        (lambda m: fd.gits(m, SHAPE, 5, teacher="dimm"), "Did you mean.*ddim"),
        (lambda m: fd.gits(m, SHAPE, 5, teacher_grid="gits"), "Grid gits is measured on a model"),
        (lambda m: fd.gits(m, SHAPE, 5, teacher_steps=0), "steps must be an integer of at least 1"),
        (lambda m: fd.gits(m, SHAPE, 5, guidance=2.0), "guidance != 1 needs uncond="),
        (lambda m: fd.gits(m, SHAPE, 5, uncond=torch.zeros(64)), "give guidance= too, 2.0 say .*leave uncond= out"),
        (lambda m: fd.gits(m, SHAPE, 5, seed=[1, 2]), "the batch is 64, got 2"),
        (lambda m: fd.gits(m, (64,), 5), r"shape must be \[batch, \*sample\]"),
        (lambda m: best_path(np.ones((3, 4)), 1), r"square.*got shape \(3, 4\)"),
        (lambda m: best_path(np.full((3, 3), math.inf), 1), "must be finite"),
        (lambda m: best_path(np.ones((3, 3)), 3), r"steps must be 1\.\.2, got 3"),
    ],
)
def test_errors(call: Callable[[fd.Denoiser], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(exact(DATA, SCHEDULES[0]))


def test_a_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no GITS costs at .*nowhere.json.*fastdiff\.gits\("):
        fd.grids.make("gits", SCHEDULES[0], 6, cache=tmp_path / "nowhere.json")


def test_a_place_that_cannot_be_written_fails_before_the_teacher_runs(tmp_path: Path) -> None:
    model = exact(DATA, SCHEDULES[0])
    with pytest.raises(FileNotFoundError, match="the folder .*nowhere does not exist"):
        fd.gits(model, SHAPE, 6, cache=tmp_path / "nowhere" / "gits.json")
    with pytest.raises(IsADirectoryError, match="it is a folder; choose a file name"):
        fd.gits(model, SHAPE, 6, cache=tmp_path)
    assert model.net.calls == 0


def test_it_needs_a_denoiser() -> None:
    with pytest.raises(TypeError, match="gits needs a Denoiser, got function"):
        fd.gits(lambda x, t: x, SHAPE, 6)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"shape must be \[batch, \*sample\], for example"):
        fd.gits(exact(DATA, SCHEDULES[0]), 16, 6)  # type: ignore[arg-type]
