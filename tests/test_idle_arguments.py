"""Arguments that have no effect: an error where they can only be a mistake, a warning where a sweep may pass them."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from guided_cases import GUIDED, SHAPE, conditions, wrapped

import fastdiff as fd
from fastdiff import cli

NO_NOISE = r"noise='brownian' is of samplers that draw noise on the way, and ddim draws none"
NO_PART = r"noise='brownian': no draw of edm is part of the way down"
NO_GUIDANCE = r"\(guidance_interval or guidance_schedule\), and guidance is 1: it has no effect"
NO_PERTURBATION = r"\(perturbed_interval\), and perturbed_scale is 0: it has no effect"
COND = conditions("cond")


@pytest.fixture(scope="module")
def model() -> fd.Denoiser:
    return wrapped("edm", "x0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"perturbed": wrapped("edm", "x0")},
            "perturbed= is the network of the perturbed branch.*give perturbed_scale=",
        ),
        (
            conditions("perturbed_cond"),
            "perturbed_cond= is the condition of the perturbed branch.*with perturbed_scale",
        ),
        ({"guide": wrapped("edm", "x0")}, "guide= is the network of the unguided branch.*give guidance= too, 2.0 say"),
        ({"guidance_interval": (0.5, 5.0)}, "guidance_interval= says where guidance applies, and there is none"),
        ({"guidance_schedule": [1.0, 0.5]}, "guidance_schedule= says where guidance applies, and there is none"),
        ({"perturbed_interval": (0.5, 5.0)}, "perturbed_interval= says where perturbed_scale applies"),
    ],
)
def test_what_can_only_be_a_mistake(model: fd.Denoiser, arguments: dict[str, Any], message: str) -> None:
    """Of one call of `fd.sample`; to say that it is off is no mistake."""
    with pytest.raises(ValueError, match=message):
        fd.sample(model, SHAPE, "ddim", 2, **COND, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        off = fd.sample(model, SHAPE, "ddim", 2, **COND, **arguments, guidance=1.0, perturbed_scale=0.0)
    assert torch.equal(off, fd.sample(model, SHAPE, "ddim", 2, **COND))


def test_networks_and_conditions_of_a_sampler_and_of_a_request(model: fd.Denoiser) -> None:
    plan = fd.plan("ddim", "edm", 2)
    plain = fd.Sampler(plan, model).sample(SHAPE, **COND)
    assert torch.equal(fd.Sampler(plan, model, guide=model, perturbed=model).sample(SHAPE, **COND), plain)
    stream = fd.Sampler(plan, model, guide=model, perturbed=model).stream(SHAPE[1:], slots=1)
    one = {name: {"label": given["label"][:1]} for name, given in conditions("cond", "perturbed_cond").items()}
    with pytest.raises(ValueError, match="perturbed_cond= is the condition of the perturbed branch"):
        stream.submit(**one)
    stream.submit(cond=one["cond"]).result()  # its networks are for those requests that ask for them


@pytest.mark.parametrize(
    ("solver", "options", "arguments", "message"),
    [
        ("ddim", {}, {"noise": "brownian"}, NO_NOISE),
        ("edm", {"s_churn": 2.0}, {"noise": "brownian"}, NO_PART),
        ("ddim", {"guidance_interval": (0.5, 5.0)}, {}, NO_GUIDANCE),
        ("ddim", {"guidance_schedule": [0.5] * 4}, {}, NO_GUIDANCE),
        ("rk45", {"guidance_interval": (0.5, 5.0), "rtol": 0.1}, {}, NO_GUIDANCE),
        ("ddim", {"perturbed_interval": (0.5, 5.0)}, {}, NO_PERTURBATION),
    ],
)
def test_what_a_sweep_may_pass(
    model: fd.Denoiser, solver: str, options: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    steps = None if solver == "rk45" else 4
    sampler = fd.Sampler(fd.plan(solver, "edm", steps, **options), model)
    with pytest.warns(UserWarning, match=message) as caught:
        x = sampler.sample(SHAPE, **COND, **arguments)
    assert [Path(warning.filename) for warning in caught] == [Path(__file__)]
    kept = {name: value for name, value in options.items() if name in ("s_churn", "rtol")}
    plain = fd.Sampler(fd.plan(solver, "edm", steps, **kept), model).sample(SHAPE, **COND)
    assert torch.equal(x, plain)
    if solver == "rk45":
        return
    one = {"cond": {"label": COND["cond"]["label"][:1]}, "seed": 0, **arguments}
    with pytest.warns(UserWarning, match=message) as caught:
        fd.stream(model, SHAPE[1:], slots=1).submit(solver, steps=steps, **options, **one)
    assert [Path(warning.filename) for warning in caught] == [Path(__file__)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": "brownian"}, NO_NOISE),
        ({"rule": fd.guidance.Rescale()}, "changes what guidance does, and guidance is 1"),
        ({"solver": "rk45", "steps": 7, "rtol": 0.1}, "so steps=7 has no effect"),
        ({"init": torch.full(SHAPE, 255.0), "strength": 0.5}, "init goes from 255 to 255"),
    ],
)
def test_a_warning_of_one_call_names_its_line(model: fd.Denoiser, arguments: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        fd.sample(model, SHAPE, **{"solver": "ddim", "steps": 2} | arguments, **COND)
        line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
    assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, line)]


def test_what_has_an_effect_is_not_warned_of(model: fd.Denoiser) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fd.sample(model, SHAPE, "dpmpp_2m_sde", 2, **COND, noise="brownian")
        fd.sample(model, SHAPE, "ddim", 4, **GUIDED, guidance=2.0, guidance_interval=(0.3, 20.0))
        fd.sample(model, SHAPE, "ddim", 4, **GUIDED, cfg_pp=True, guidance_interval=(0.3, 20.0))


def test_steps_of_a_solver_that_makes_its_own() -> None:
    """Said where the ends of the grid are the same without them."""
    message = "rk45 makes its own steps between the ends of the grid, so steps=10 has no effect: leave it out"
    with pytest.warns(UserWarning, match=message) as caught:
        plan = fd.plan("rk45", "linear", 10)
    assert Path(caught[0].filename) == Path(__file__)
    assert plan == fd.plan("rk45", "linear")
    with pytest.warns(UserWarning, match="so steps=3 has no effect"):
        fd.plan("dpm_adaptive", "edm", 3, [30.0, 0.5])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tops = [fd.plan("rk45", "linear", steps, "leading").levels[0].time for steps in (5, 10)]
        assert tops == [800.0, 900.0]
        assert fd.plan("dpm_adaptive", "edm", 5, start_step=2).levels[0].rho < 80.0


def test_steps_beside_levels_that_are_given() -> None:
    with pytest.raises(ValueError, match="steps is 5, but the custom grid has 2 levels before the clean one"):
        fd.plan("ddim", "edm", 5, [30.0, 0.5])
    named = fd.plan("ddim", "edm", grid="custom", grid_options={"levels": [30.0, 0.5]})
    assert named == fd.plan("ddim", "edm", 2, [30.0, 0.5]) and named.nfe == 2
    assert fd.plan("ddim", "edm").nfe == 20


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--noise", "brownian"), "noise='brownian' is of samplers that draw noise"),
        (("--guidance", "1", "--option", "guidance_interval=[0.5, 5]"), "and guidance is 1: it has no effect"),
        (("--solver", "rk45", "--option", "rtol=0.3", "--steps", "7"), "so steps=7 has no effect"),
    ],
)
def test_the_command_line_says_it_in_one_line(
    argv: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--count", "1", "--class", "bag", "--out", str(tmp_path / "x.npy"))
    few = () if "--steps" in argv else ("--steps", "2")
    solver = () if "--solver" in argv else ("--solver", "ddim")
    assert cli.main(["sample", *given, *few, *solver, *argv]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "fastdiff: warning: " in line]
    assert len(said) == 1 and message in said[0]


def test_grids_with_options_of_their_own_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["sample", "--count", "1", "--class", "bag", "--guidance", "1", "--solver", "ddim", "--out"]
    first, second = tmp_path / "a.npy", tmp_path / "b.npy"
    levels = fd.plan("ddim", fd.load("fashion").schedule, 3, grid_options={"rho": 5.0}).levels[:-1]
    assert cli.main([*given, str(first), "--steps", "3", "--grid-option", "rho=5"]) == 0
    listed = ", ".join(str(level.time) for level in levels)
    assert cli.main([*given, str(second), "--grid", "custom", "--grid-option", f"levels=[{listed}]"]) == 0
    out = capsys.readouterr().out
    assert "ddim, 3 steps on grid karras" in out and "ddim, 3 steps on grid custom" in out
    assert np.array_equal(np.load(first), np.load(second))
    assert cli.main(["plan", "ddim", "--grid", "gits", "--grid-option", f"cache={tmp_path / 'none.json'}"]) == 2
    assert "none.json" in capsys.readouterr().err
