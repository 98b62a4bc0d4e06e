"""Names that users bring from other libraries for predictions and schedules."""

from __future__ import annotations

import itertools

import pytest

import fastdiff as fd
from fastdiff.models.from_diffusers import PREDICTIONS, trained_with
from fastdiff.process import elsewhere, predictions, schedules
from fastdiff.training import objectives


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        *PREDICTIONS.items(),
        ("flow_prediction", "flow"),
        ("V-Prediction", "v"),
        ("START_X", "x0"),
        ("pred_noise", "eps"),
    ],
)
def test_predictions(name: str, ours: str) -> None:
    if name in predictions.names():
        return
    with pytest.raises(ValueError, match=f"Unknown prediction '{name}'. Did you mean prediction='{ours}'\\? Known: "):
        fd.Denoiser(lambda x, t: x, "edm", name)
    level = schedules.linear().level(500.0)
    for call in (lambda: predictions.coefficients(name, level, None), lambda: predictions.targets(name, 1.0, 1.0)):
        with pytest.raises(ValueError, match=f"Did you mean prediction='{ours}'"):
            call()


@pytest.mark.parametrize(
    ("name", "ours"),
    [("squaredcos_cap_v2", "cosine"), ("Scaled-Linear", "scaled_linear"), ("flow", "rectified_flow"), ("VPSDE", "vp")],
)
def test_schedules(name: str, ours: str) -> None:
    with pytest.raises(ValueError, match=f"Unknown schedule '{name}'. Did you mean schedule='{ours}'\\? Known: "):
        fd.plan("ddim", name)


def test_diffusers_beta_schedules_are_the_ones_meant() -> None:
    diffusers = pytest.importorskip("diffusers")
    for name in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        schedule, *_ = trained_with(diffusers.DDPMScheduler(beta_schedule=name, beta_start=1e-4, beta_end=0.02))
        hint = elsewhere.schedule(name)
        meant = hint.split("'")[1]
        assert schedule.name == meant


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("epsilon", "ddpm"), ("eps", "ddpm"), ("v_prediction", "v"), ("v-prediction", "v"), ("sample", "x0"),
        ("flow_matching", "flow"), ("rectified_flow", "flow"), ("OT-CFM", "transport_cfm"),
    ],
)  # fmt: skip
def test_objectives(name: str, ours: str) -> None:
    with pytest.raises(ValueError, match=f"Unknown objective '{name}'. Did you mean objective='{ours}'\\? Known: "):
        objectives.get(name)


SIGMAS = [10.0, 3.0, 1.0]


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("sigmas", r"write grid=\[...\], grid_options={'unit': 'rho'}, descending sigma/alpha"),
        ("levels", r"write grid=\[...\], descending times on the schedule's clock"),
        ("timesteps", r"write grid=\[...\], descending times on the schedule's clock: 0 .. 999"),
        ("num_inference_steps", "write steps="),
    ],
)
def test_arguments_of_a_plan(name: str, instead: str) -> None:
    with pytest.raises(TypeError, match=f"'ddim' has no option '{name}', {instead}.*; its options: eta"):
        fd.plan("ddim", **{name: SIGMAS})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=f"sample has no argument '{name}': {instead}"):
        fd.sample(fd.Denoiser(lambda x, t: x, "edm", "x0"), (1, 1), "ddim", **{name: SIGMAS})  # type: ignore[arg-type]


def test_what_is_to_be_written_for_sigmas_are_the_levels_of_trace() -> None:
    def euler(model, x, sigmas):  # type: ignore[no-untyped-def]
        for s, t in itertools.pairwise(sigmas):
            x = x + (x - model(x, s)) / s * (t - s)
        return x

    plan = fd.plan("ddim", "linear", grid=SIGMAS, grid_options={"unit": "rho"})
    traced = fd.trace(euler, [*SIGMAS, 0.0], "linear")
    assert [level.rho for level in plan.levels[:-1]] == pytest.approx(SIGMAS, rel=1e-12)
    assert [row.level.time for row in traced.rows if row.level] == pytest.approx(
        [level.time for level in plan.levels[:-1]]
    )
    assert [level.time for level in fd.plan("ddim", "linear", grid=SIGMAS).levels[:-1]] == SIGMAS  # times of the clock


def test_every_hint_is_a_name_of_ours_and_a_foreign_one_has_none() -> None:
    assert set(elsewhere._PREDICTIONS) <= set(predictions.names())
    assert set(elsewhere._SCHEDULES) <= set(schedules.names())
    assert set(elsewhere._OBJECTIVES) <= set(objectives.names())
    with pytest.raises(ValueError, match=r"Unknown prediction 'trigflow'\. (Did you mean 'flow'\? )?Known"):
        fd.Denoiser(lambda x, t: x, "edm", "trigflow")
