"""`fastdiff verify --solver` and `--all`: what is measured, what fails, what is written."""

from __future__ import annotations

import itertools
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fastdiff as fd
from fastdiff import cli
from fastdiff.compiler import convergence, solvers
from fastdiff.compiler.convergence import slope
from fastdiff.compiler.solvers import registry
from fastdiff.compiler.solvers.from_file import load_file
from fastdiff.report import page, plot
from fastdiff.report.families import OTHER, PROMISED, REMARKS, family

DOCS = Path(__file__).resolve().parent.parent / "docs"
measure = cache(convergence.measure)

MIDPOINT = '''
import fastdiff as fd


@fd.solver("{name}", order=2)
def {name}(run, x):
    """Midpoint rule of {name}."""
    for _, s, t in run.intervals():
        denoised = run.denoise(x, s)
        if t.sigma > 0:
            m = run.level_from_rho((s.rho * t.rho) ** 0.5)
            middle = m.sigma / s.sigma * x + (m.alpha - s.alpha * m.sigma / s.sigma) * denoised
            denoised = {stage}
        x = t.sigma / s.sigma * x + (t.alpha - s.alpha * t.sigma / s.sigma) * denoised
    return x
'''
RIGHT = "run.denoise(middle, m)"
FIRST_ORDER_BUG = "0.5 * (denoised + run.denoise(middle, m))"  # the slope a quarter into the step, not half


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's solvers alone: what this and other tests register is not in it."""
    shipped = {n: s for n, s in registry._SOLVERS.items() if s.function.__module__.startswith("fastdiff.")}
    monkeypatch.setattr(registry, "_SOLVERS", shipped)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = cli.main(["verify", *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def midpoint(folder: Path, name: str, stage: str) -> Path:
    path = folder / f"{name}.py"
    path.write_text(MIDPOINT.format(name=name, stage=stage))
    return path


@pytest.mark.parametrize(
    ("solver", "order"),
    [("ddim", 0.99), ("dpmpp_2m", 2.05), ("heun", 2.03), ("dpmpp_2s", 2.00), ("dpmpp_3s", 2.97), ("lms", 3.85)],
)
def test_measured_order(solver: str, order: float) -> None:
    assert measure(solver).order == pytest.approx(order, abs=0.01)


def test_ddim_is_what_its_closed_form_gives() -> None:
    """With D = v x/(v + sigma^2) a step multiplies x by 1 + (sigma_t/sigma_s - 1) sigma_s^2/(v + sigma_s^2)."""
    levels = convergence.build("ddim", "edm", 20, "karras", grid_options=convergence.ENDS).levels
    assert (levels[0].sigma, levels[-2].sigma) == pytest.approx((20.0, 0.01))
    errors = []
    for v in (0.05, 0.25, 1.0, 4.0):
        gain = 1.0
        for s, t in itertools.pairwise(levels[:-1]):
            gain *= 1.0 + (t.sigma / s.sigma - 1.0) * s.sigma**2 / (v + s.sigma**2)
        errors.append(gain**2 * (v + 20.0**2) / (v + 0.01**2) - 1.0)
    measured = measure("ddim")
    bias = next(b for b in measured.bias if b.budget == 20)
    assert bias.nfe == 20
    assert bias.error == pytest.approx(max(errors, key=abs), rel=1e-12) == pytest.approx(-0.2079, abs=1e-4)


def test_cost_of_the_tables() -> None:
    """Registers, width and evaluations, and the run of most steps within each budget: 2 n - 1 evaluations for heun."""
    heun = measure("heun")
    assert (heun.nfe, heun.registers, heun.width, heun.draws) == (39, 2, (2, 2), 0)
    assert [b.nfe for b in heun.bias] == [9, 19, 49]
    sde = measure("dpmpp_3m_sde")
    assert (sde.nfe, sde.registers, sde.width, sde.draws) == (20, 3, (2, 3), 19)
    langevin = measure("annealed_langevin")  # 20 evaluations at every noisy level, and the last: 41 for two levels
    assert [b.error is None for b in langevin.bias] == [True, True, False]
    assert "two steps cost more than 10" in str(langevin)


def test_slope() -> None:
    assert slope((20, 40, 80), (1.0, -0.25, 0.125)) == pytest.approx(1.0)
    assert slope((20, 40, 80), (1.0, 0.25, 1e-16)) == pytest.approx(2.0)  # rounding has no slope
    assert slope((20, 40), (0.0, 1e-16)) == math.inf
    assert math.isnan(slope((20, 40), (0.1, math.nan)))


def test_promised_orders_do_not_hold() -> None:
    """Each note of the page is true: the order is below the promise by more than a measurement's tolerance."""
    for name, (promised, _) in PROMISED.items():
        assert measure(name).order < promised - convergence.TOLERANCE, name


def test_noise_that_no_level_holds_is_left_out_of_the_order(capsys: pytest.CaptureFixture[str]) -> None:
    """edm's s_noise of 1.003 stops its error at +0.6 %; with 1 the order is Heun's."""
    edm = measure("edm")
    assert edm.order_options == {"s_noise": 1.0}
    assert edm.order == pytest.approx(1.68, abs=0.01)
    assert slope(convergence.STEPS, [error for _, error in edm.curve[2:]]) == pytest.approx(1.20, abs=0.01)
    assert "declared 2, measured 1.68 with s_noise = 1;" in str(edm)
    assert "stated and not judged: with s_noise other than 1" in str(edm.report)
    assert measure("heun").order_options == {}


def test_every_remark_is_of_a_sampler() -> None:
    assert set(REMARKS) <= set(solvers.names())
    assert measure("sa_solver").order > 3.0 - convergence.TOLERANCE > solvers.get("sa_solver").order
    assert 0.8 <= measure("langevin_pc").order <= 1.45


def test_solver_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dpmpp_2m").write_text("not a solver")  # a registered name is that solver, whatever lies here
    status, text, _ = run(capsys, "--solver", "dpmpp_2m")
    assert status == 0
    assert "ok   point mass" in text and "ok   last row" in text
    assert "ok   order: declared 2, measured 2.05" in text
    assert "+17.98% at 10; +5.32% at 20; +0.75% at 50 evaluations" in text
    assert "20 evaluations at 20 steps, 2 registers, rows of at most 2 outputs and 2 inputs, deterministic" in text


def test_an_order_that_has_no_meaning_is_not_judged(capsys: pytest.CaptureFixture[str]) -> None:
    status, text, _ = run(capsys, "--solver", "lcm")
    assert status == 0
    assert "stated and not judged, it takes D for a sample" in text


def test_a_users_file_registers_and_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text, _ = run(capsys, "--solver", str(midpoint(tmp_path, "users_midpoint", RIGHT)))
    assert status == 0, text
    assert "users_midpoint: Midpoint rule of users_midpoint." in text
    assert "ok   order: declared 2, measured 2.00" in text
    assert "-33.73% at 9; -9.71% at 19;" in text  # dpmpp_2s, which it is
    np.testing.assert_allclose(measure("users_midpoint").curve, measure("dpmpp_2s").curve, rtol=1e-9)
    assert family(solvers.get("users_midpoint").function.__module__) == OTHER


def test_a_first_order_bug_fails_the_declared_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The four laws hold and the pictures would look right; only the order shows it."""
    status, text, _ = run(capsys, "--solver", str(midpoint(tmp_path, "users_bug", FIRST_ORDER_BUG)))
    assert status == 1
    assert "FAIL order: declared 2, measured 1.0" in text
    assert text.count("FAIL ") == 3


def test_a_file_beside_another_imports_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "beside_the_solver.py").write_text("ORDER = 1\n")
    path = tmp_path / "mine.py"
    path.write_text(
        "import fastdiff as fd\nfrom beside_the_solver import ORDER\n\n"
        "@fd.solver('users_ddim', order=ORDER)\ndef users_ddim(run, x):\n"
        "    for _, s, t in run.intervals():\n        d = run.denoise(x, s)\n"
        "        x = t.sigma / s.sigma * x + (t.alpha - s.alpha * t.sigma / s.sigma) * d\n    return x\n"
    )
    status, text, _ = run(capsys, "--solver", str(path))
    assert status == 0
    assert "declared 1, measured 0.99" in text


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("x = 1\n", "registers no solver; decorate one with @fd.solver"),
        ("import no_such_module_here\n", "cannot be imported: ModuleNotFoundError: No module named"),
        ("def broken(:\n", "cannot be imported: SyntaxError"),
        ("raise SystemExit(3)\n", "cannot be imported: SystemExit: 3"),
        (MIDPOINT.format(name="ddim", stage=RIGHT), "a solver named 'ddim' exists already"),
        (MIDPOINT.format(name="users_zero", stage="denoised * (1 / 0)"), "mine.py:13: ZeroDivisionError"),
        (MIDPOINT.format(name="users_square", stage="denoised * denoised"), "users_square"),
    ],
)
def test_bad_files_are_one_line(source: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.py"
    path.write_text(source)
    status, out, err = run(capsys, "--solver", str(path))
    assert (status, out) == (2, "")
    assert says in err and len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--solver", "dpmp_2m"], "Did you mean 'dpmpp_2m'"),
        (["--solver", "missing.py"], "no solver file missing.py"),
        (["--out", "x.md"], "--out goes with --all"),
        (["--all", "--out", "x.txt"], "must end in .md"),
        (["--all", "--out", "no/such/x.md"], "does not exist"),
    ],
)
def test_bad_arguments(
    argv: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert says in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_the_page_in_docs_is_what_verify_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured once; that the numbers are the same in every run is what the comparison with docs/ shows."""
    monkeypatch.setattr(convergence, "measure", measure)
    out = tmp_path / "solvers.md"
    status, text, _ = run(capsys, "--all", "--out", str(out))
    assert status == 0, text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["solvers.md", "solvers.png"]
    written = out.read_text()
    assert written == (DOCS / "solvers.md").read_text(), "docs/solvers.md is old: fastdiff verify --all --out it again"
    assert Image.open(tmp_path / "solvers.png").size == Image.open(DOCS / "solvers.png").size
    assert all(f"| `{name}` |" in written for name in solvers.names())
    assert "| `heun` | 2 | 2.03 | +27% | 2 | 2, 2 | deterministic |" in written
    first = (tmp_path / "solvers.png").read_bytes()
    page.write(out, page.measure_all(fd.solvers.names()))
    assert (out.read_text(), (tmp_path / "solvers.png").read_bytes()) == (written, first)


def test_a_failing_solver_is_named_on_the_page(tmp_path: Path) -> None:
    load_file(midpoint(tmp_path, "users_bug", FIRST_ORDER_BUG))
    measured = page.measure_all(["ddim", "users_bug"])
    text = page.text(measured, "p.png")
    assert "2 samplers, failing: users_bug." in text
    assert "| `users_bug` | 2 | 1.0" in text and "**fails**" in text
    assert list(page.curves(measured)) == ["One slope or two", OTHER]


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "solvers.md"
    out.write_text("old")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        page.write(out, page.measure_all(["ddim"]))
    assert [path.name for path in tmp_path.iterdir()] == ["solvers.md"]
    assert out.read_text() == "old"


def test_lines_are_where_their_numbers_are() -> None:
    """A line through (10, 1e-2) and (100, 1e-4) puts ink at (31.6, 1e-3), and none of its colour elsewhere."""
    picture = plot.draw("", {"panel": [plot.Curve("a", [(10, 1e-2), (100, 1e-4)])]}).convert("RGB")
    left, top = plot.LEFT, plot.MARGIN + 2 * plot.TOP

    def at(x: float, y: float) -> tuple[int, ...]:
        across = math.log(x / plot.X_RANGE[0]) / math.log(plot.X_RANGE[1] / plot.X_RANGE[0])
        down = math.log(plot.Y_RANGE[1] / y) / math.log(plot.Y_RANGE[1] / plot.Y_RANGE[0])
        pixel = picture.getpixel((round(left + across * plot.WIDTH), round(top + down * plot.HEIGHT)))
        assert isinstance(pixel, tuple)
        return pixel

    for x, y in ((10, 1e-2), (31.62, 1e-3), (100, 1e-4)):
        red, green, blue = at(x, y)
        assert blue > red + 60 and green > red, (x, y)
    for x, y in ((10, 1e-4), (100, 1e-2), (300, 1e-5)):
        red, _, blue = at(x, y)
        assert abs(blue - red) < 10, (x, y)
