"""The benchmark's tables: they depend on the results alone, and go where the page marks it."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path

import pytest
from bench_cases import fact_line

from bench import run, table


def test_table_depends_on_the_results_alone() -> None:
    lines = [
        fact_line(run="2026-01-01T00:00:00Z", us=999.0),
        fact_line(),
        fact_line(solver="ddpm", ratio_diffusers="", diffusers_us=""),
        fact_line(machine="Another CPU"),
    ]
    text = table.render(lines)
    assert text == table.render(lines)
    assert "999" not in text, "an older run of the same machine"
    assert text.count("| ddim |") == 2
    assert "2.50 [2.00–3.00]" in text
    assert "Another CPU" in text


def test_table_goes_between_the_markers(tmp_path: Path) -> None:
    results, readme = tmp_path / "results.csv", tmp_path / "README.md"
    table.append(results, [fact_line()])
    table.append(results, [fact_line(solver="ddpm")])
    with results.open(newline="") as file:
        assert [line["solver"] for line in csv.DictReader(file)] == ["ddim", "ddpm"]
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    assert run.main(["table", "--csv", str(results), "--readme", str(readme)]) == 0
    once = readme.read_text()
    assert once.startswith("before\n") and once.endswith("\nafter\n") and "old" not in once and "| ddpm |" in once
    assert run.main(["table", "--csv", str(results), "--readme", str(readme)]) == 0
    assert readme.read_text() == once


def test_table_leaves_a_readme_without_markers_alone(tmp_path: Path) -> None:
    results, readme = tmp_path / "results.csv", tmp_path / "README.md"
    assert run.main(["table", "--csv", str(results), "--readme", str(readme)]) == 1
    table.append(results, [fact_line()])
    readme.write_text("text\n")
    assert run.main(["table", "--csv", str(results), "--readme", str(readme)]) == 1
    assert readme.read_text() == "text\n"


def test_results_of_another_version_are_not_mixed(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    results.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        table.append(results, [fact_line()])


def test_columns_that_came_later_are_added(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    table.append(results, [fact_line()])
    before = results.read_text().splitlines()
    results.write_text("\n".join(line.rpartition(",")[0] for line in before) + "\n")
    table.append(results, [fact_line(solver="ddpm")])
    with results.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == table.COLUMNS and [line["solver"] for line in lines] == ["ddim", "ddpm"]


def test_brownian_has_a_table_of_its_own() -> None:
    numbers = {"ratio_k_diffusion": 41.0, "ratio_noise": 33.0, "variance": 0.998, "path_correlation": 0.9991}
    line = fact_line(bench="brownian", solver="dpmpp_2m_sde", **numbers)
    for key in ("noise_us", "k_diffusion_us", "k_diffusion_noise_us"):
        line |= {key: 2.5, f"{key}_p20": 2.0, f"{key}_p80": 3.0}
    text = table.render([line, fact_line()])
    assert text.index("| ddim |") < text.index("| dpmpp_2m_sde |")
    assert "| 41.0 |" in text and "| 0.9991 |" in text


def test_train_ops_has_a_table_of_its_own() -> None:
    line = fact_line(bench="train-ops", solver="", bytes_per_element="16 / 52", ratio_diffusers=4.4)
    text = table.render([line, fact_line()])
    assert text.index("| ddim |") < text.index("| 16 / 52 |")
    assert "| 4.4 |" in text


def test_the_page_of_pipelines_shows_the_latest_run_on_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "docs"))
    page = importlib.import_module("pipelines_table")
    case = {"bench": "pipelines", "network": "DDPMPipeline", "solver": "DDPMScheduler", "gate": "green", "us": 20.0}
    case |= {"diffusers_us": 250.0, "seconds": 0.1, "diffusers_seconds": 0.12}
    others = {"bench": "ops"}, {"device": "cuda"}, {"run": "2026-01-01", "us": 10.0}
    results = tmp_path / "results.csv"
    table.append(results, [fact_line(**case | {"run": "2026-01-02"} | other) for other in ({}, *others)])
    times = page.measured(results)[case["network"], case["solver"]]
    monkeypatch.setattr(page, "difference", lambda kind, scheduler: (0.0, 0.0))
    shown = page.row(case["network"], case["solver"], {}, times)
    assert shown.endswith("| 12.5 (250 / 20 µs) | 1.20 (120.0 / 100.0 ms) |")
