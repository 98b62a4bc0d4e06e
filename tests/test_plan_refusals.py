"""What `fd.plan` takes and refuses, and what it says to do: names, levels, options, tables of NaN."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from fastdiff.compiler import layout as at
from fastdiff.compiler.build import plan as build
from fastdiff.compiler.plan import Plan
from fastdiff.compiler.solvers import elsewhere
from fastdiff.process import schedules


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("DPMSolverMultistepScheduler", "solver='dpmpp_2m'."),
        ("DPMSolverSinglestepScheduler", "solver='dpmpp_2s'."),
        ("DDIMScheduler", "solver='ddim'."),
        ("EulerAncestralDiscreteScheduler", "solver='euler_ancestral'."),
        ("KDPM2AncestralDiscreteScheduler", "solver='dpm_2_ancestral'."),
        ("UniPCMultistepScheduler", "solver='unipc'."),
        ("FlowMatchEulerDiscreteScheduler", "solver='flow_euler'."),
        ("sample_dpmpp_2m", "solver='dpmpp_2m'."),
        ("dpmpp_2m_sde_gpu", "solver='dpmpp_2m_sde'."),
        ("k_euler_a", "solver='euler_ancestral'."),
        ("dpm++2m", "solver='dpmpp_2m'."),
        ("dpmpp_2m_karras", "solver='dpmpp_2m', grid='karras'."),
        ("DPM++ 2S a Karras", "solver='dpmpp_2s_ancestral', grid='karras'."),
        ("DPM2 a", "solver='dpm_2_ancestral'."),
        ("plms", "solver='pndm', warmup='plms'."),
        ("DPM++ 2M SDE Heun", "solver='dpmpp_2m_sde', correction='heun'."),
        ("DPM++ 2M SDE Heun Karras", "solver='dpmpp_2m_sde', correction='heun', grid='karras'."),
        ("uni_pc_bh2", "solver='unipc'."),
        ("DDIM CFG++", "solver='ddim', cfg_pp=True."),
    ],
)
def test_names_of_other_libraries_are_translated(theirs: str, ours: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"Unknown solver {theirs!r}. Here it is {ours} Known: ")):
        build(theirs, "linear", 5)


def test_every_translation_is_a_plan() -> None:
    for ours in elsewhere._THEIRS.values():
        schedule = "rectified_flow" if "flow" in ours else "linear"
        assert eval(f"build({ours}, schedule={schedule!r}, steps=5)").nfe >= 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "dpmp_2m"}, "Unknown solver 'dpmp_2m'. Did you mean 'dpmpp_2m'"),
        ({"solver": "nobody"}, "Unknown solver 'nobody'. Known: annealed_langevin"),
        ({"schedule": "cosin"}, "Unknown schedule 'cosin'. Did you mean 'cosine'"),
        ({"grid": "karas"}, "Unknown grid 'karas'. Did you mean 'karras'"),
        (
            {"grid": [500, 9], "grid_options": {"levels": [9]}, "steps": None},
            "the levels are given twice, as grid= and",
        ),
        ({"steps": 0}, "steps must be an integer of at least 1.*got 0"),
        ({"steps": -3}, "steps must be an integer of at least 1"),
        ({"steps": 2.5}, "steps must be an integer of at least 1.*got 2.5"),
        ({"steps": "10"}, "steps must be an integer"),
        ({"steps": True}, "steps must be an integer"),
        ({"steps": 1001}, "at most 1000 steps"),
        ({"strength": 0.0}, r"strength must be in \(0, 1\]"),
        ({"strength": 1.1}, r"strength must be in \(0, 1\]"),
        ({"strength": math.nan}, r"strength must be in \(0, 1\]"),
        ({"start_step": 10}, r"start_step must be in 0..9"),
        ({"start_step": -1}, r"start_step must be in 0..9"),
        ({"strength": 0.5, "start_step": 2}, "not both"),
        ({"grid": [900.0, 500.0, 600.0]}, "strictly descend"),
        ({"grid": [900.0, 900.0]}, "strictly descend"),
        ({"grid": [900.0, math.nan, 100.0]}, "not finite"),
        ({"grid": [math.inf, 100.0], "steps": None}, "outside"),
        ({"grid": [2000.0, 100.0], "steps": None}, "outside"),
        ({"grid": [900.0, -5.0], "steps": None}, "outside"),
        ({"grid": [900.0, 5.0]}, "steps is 10, but the custom grid has 2 levels before the clean one. Leave steps out"),
        ({"grid": []}, "at least one level"),
        ({"grid": [[900.0, 100.0]]}, "list of at least one level"),
        ({"grid": "karras", "grid_options": {"sigma_top": 3.0}}, "Its options: sigma_min, sigma_max, rho"),
        ({"solver": "ddpm", "variance": "learned"}, "variance must be"),
        ({"solver": "ddim", "eta": 3.0}, "use eta <= 1"),
        ({"solver": "dpmpp_2m_sde", "correction": "euler"}, "correction must be"),
        ({"solver": "random_walk", "point": "edm"}, "point must be"),
        ({"solver": "random_walk", "tau": [0.1]}, "must hold 10 finite numbers"),
        ({"solver": "annealed_langevin", "epsilon": 0.0}, "epsilon must be > 0"),
        ({"solver": "annealed_langevin", "inner": 0}, "inner must be > 0"),
        ({"solver": "flow_euler"}, "needs a flow schedule"),
        ({"solver": "euler_maruyama"}, "has no SDE"),
    ],
)
def test_bad_input_is_one_clear_error(arguments: dict[str, Any], message: str) -> None:
    call = {"solver": "ddim", "schedule": "linear", "steps": 10, "grid": "trailing", **arguments}
    with pytest.raises(ValueError, match=message):
        build(**call)


def test_an_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(TypeError, match="'ddim' has no option 'etta'; its options: eta"):
        build("ddim", "linear", 10, etta=0.5)


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        ("ddim", {"eta": "0.5"}, "'eta' must be a number, got '0.5'"),
        ("ddim", {"eta": None}, "'eta' must be a number, got None"),
        ("ddim", {"eta": True}, "'eta' must be a number, got True"),
        ("annealed_langevin", {"inner": 2.5}, "'inner' must be an integer, got 2.5"),
        ("annealed_langevin", {"denoise": 1}, "'denoise' must be True or False, got 1"),
        ("ddpm", {"variance": 2}, "'variance' must be a name, got 2"),
    ],
)
def test_an_option_of_the_wrong_kind(solver: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        build(solver, "linear", 10, **options)


def test_options_of_numpy_are_numbers() -> None:
    plan = build("ddim", "linear", 10, eta=np.float32(0.5))
    assert Plan.from_json(plan.to_json()) == plan
    assert build("annealed_langevin", "linear", 2, inner=np.int64(3)).nfe == 7


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("solver", "option"), [("ddim", "eta"), ("dpmpp_2m_sde", "s_noise"), ("random_walk", "epsilon")]
)
def test_a_table_is_never_made_of_nan(solver: str, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=solver):
        build(solver, "linear", 10, **{option: value})


def test_eps_at_zero_snr_is_refused_and_v_is_not() -> None:
    plan = build("ddim", schedules.rescale_zero_terminal_snr(schedules.linear()), 10, "trailing")
    assert plan.levels[0].alpha == 0.0
    with pytest.raises(ValueError, match=r"alpha = 0 \(zero signal-to-noise ratio\).*'v' or 'x0'"):
        plan.pack("eps")
    for prediction in ("v", "x0", "flow"):
        coef = plan.pack(prediction).coef
        assert np.isfinite(np.delete(coef, [at.CLAMP_LO, at.CLAMP_HI], axis=1)).all()
