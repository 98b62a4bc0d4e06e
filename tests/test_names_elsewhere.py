"""Names that users bring from other libraries for predictions and schedules."""

from __future__ import annotations

import pytest

import fastdiff as fd
from fastdiff.models.from_diffusers import PREDICTIONS, trained_with
from fastdiff.process import elsewhere, predictions, schedules


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


def test_every_hint_is_a_name_of_ours_and_a_foreign_one_has_none() -> None:
    assert set(elsewhere._PREDICTIONS) <= set(predictions.names())
    assert set(elsewhere._SCHEDULES) <= set(schedules.names())
    with pytest.raises(ValueError, match=r"Unknown prediction 'trigflow'\. (Did you mean 'flow'\? )?Known"):
        fd.Denoiser(lambda x, t: x, "edm", "trigflow")
