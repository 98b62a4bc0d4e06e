"""Captured schedulers: their table gives what they give, in float64 and through the engine.

Every configuration is run by the test itself, on its own random outputs and draws; the mismatch that `capture` reports
is not trusted. Levels, prediction types and clamps are checked where diffusers says what they are.
"""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pace
import pytest
import torch
from capture_cases import CASES, EXACT, FLOW, IDS, KINDS, SIZE, STEPS, UNABLE, VP_KINDS, Array, Loop, make, tiny

import fastdiff as fd
from fastdiff.compiler import layout
from fastdiff.compiler.verify import execute
from fastdiff.process.schedules import Level

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("name", "config", "options"), CASES, ids=IDS)
def test_the_table_is_the_scheduler(
    name: str, config: dict[str, Any], options: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same random outputs, same draws: every state, in float64."""
    scheduler = make(name, config)
    try:
        loop = Loop(scheduler, steps, options, torch.float64)
        rng = np.random.default_rng(7)
        outputs = rng.standard_normal((len(loop.scheduler.timesteps), *SIZE))
        queue = iter(torch.from_numpy(outputs))
        theirs = loop.run(lambda x, t: next(queue), monkeypatch)
        fails = not bool(torch.isfinite(theirs).all())
    except Exception:
        fails = True
    if fails:  # diffusers cannot do it itself: nor can a capture, and it says so
        assert (name, steps) in UNABLE, (name, config, steps)
        with pytest.raises((RuntimeError, TypeError), match=rf"{name}Scheduler( itself fails|.*inf or nan)"):
            fd.capture(scheduler, steps, step_options=options)
        return
    before = copy.deepcopy(scheduler.__dict__)
    plan = fd.capture(scheduler, steps, step_options=options)
    assert scheduler.__dict__.keys() == before.keys(), "the caller's scheduler is not touched"
    assert plan.nfe == len(outputs)
    assert plan.draws in (0, loop.drawn)
    worst, seen = 0.0, 0

    def denoise(x: Array, level: Level) -> tuple[Array, Array]:
        nonlocal worst, seen
        row = plan.rows[seen + 1]
        state = loop.states[seen].numpy()
        worst = max(worst, float(np.abs(x - state).max() / np.abs(state).max()))
        assert row.reading is not None
        raw = outputs[seen]
        seen += 1
        estimate = row.reading.P * x + row.reading.Q * raw
        return estimate if row.clamp is None else estimate.clip(*row.clamp), estimate

    ours = execute(plan, denoise, loop.start.numpy(), lambda k, _: loop.normals[k])
    worst = max(worst, float(np.abs(ours - theirs.numpy()).max() / np.abs(theirs.numpy()).max()))
    assert worst < EXACT[plan.options["precision"]], plan.options
    assert plan.options["mismatch"] < EXACT[plan.options["precision"]]
    assert max(len(row.outputs) for row in plan.rows) <= layout.MAX_OUTPUTS
    assert fd.Plan.from_json(plan.to_json()).to_json() == plan.to_json()


@pytest.mark.parametrize(("name", "config", "options"), CASES, ids=IDS)
def test_the_engine_runs_the_schedulers_own_loop(
    name: str, config: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same network, latents and draws through `Sampler` and through diffusers, both in float32."""
    scheduler = make(name, config)
    plan = fd.capture(scheduler, 10, step_options=options)
    loop = Loop(scheduler, 10, options, torch.float32)
    theirs = loop.run(tiny, monkeypatch)
    model = fd.Denoiser(tiny, "linear", plan.options.get("prediction", "x0"))
    normals = torch.from_numpy(loop.normals[: plan.draws]).float() if plan.draws else "white"
    ours = fd.Sampler(plan, model).sample(SIZE, init=loop.start, noise=normals)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


def test_latents_and_input_are_scaled_as_the_scheduler_does(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make("EulerDiscrete", {"timestep_spacing": "leading"})
    plan = fd.capture(scheduler, 5)
    scheduler.set_timesteps(5)
    assert plan.latent_scale == pytest.approx(float(scheduler.init_noise_sigma))
    assert plan.latent_scale > plan.levels[0].sigma + 0.01
    seen = []

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append((x.clone(), float(t[0])))
        return torch.zeros_like(x)

    model = fd.Denoiser(net, "linear", "eps")
    fd.Sampler(plan, model).sample(SIZE, seed=1)
    unit = seen[0][0] * (float(scheduler.sigmas[0]) ** 2 + 1) ** 0.5 / float(scheduler.init_noise_sigma)
    assert unit.std() == pytest.approx(1.0, abs=0.2)
    assert [t for _, t in seen] == pytest.approx(scheduler.timesteps.tolist())


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *((name, {"prediction_type": kind}) for name in ("DPMSolverMultistep", "EulerDiscrete") for kind in VP_KINDS),
        *((name, {"prediction_type": kind}) for name in ("DEISMultistep", "UniPCMultistep") for kind in VP_KINDS),
        *(("DDIM", {"prediction_type": kind, "clip_sample": False}) for kind in VP_KINDS),
        ("DPMSolverMultistep", FLOW),
        ("UniPCMultistep", FLOW),
        ("FlowMatchEulerDiscrete", {}),
        ("FlowMatchHeunDiscrete", {}),
    ],
)
def test_d_is_the_denoised_estimate(name: str, config: dict[str, Any]) -> None:
    """A callback sees x0 at the right level: exact data x0 = 0.3 gives D = 0.3 in every row."""
    plan = fd.capture(make(name, config), 6)
    prediction = config.get("prediction_type", "flow_prediction")
    levels = iter(plan.levels)

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        level = next(levels)
        assert float(t[0]) == pytest.approx(level.time)
        flow = prediction == "flow_prediction"
        unit = 1.0 if flow else (level.alpha**2 + level.sigma**2) ** 0.5
        alpha, sigma = level.alpha / unit, level.sigma / unit
        n = (x - alpha * 0.3) / sigma
        forms = {"epsilon": n, "v_prediction": alpha * n - sigma * 0.3, "flow_prediction": n - 0.3}
        return forms.get(prediction, torch.full_like(x, 0.3))

    seen: list[float] = []
    model = fd.Denoiser(net, "linear", KINDS[prediction])
    sampler = fd.Sampler(plan, model)
    result = sampler.sample(SIZE, seed=0, callback=lambda info: seen.append(float((info.denoised - 0.3).abs().max())))
    assert len(seen) == plan.nfe and max(seen) < 1e-3
    if plan.levels[-1].sigma == 0.0:
        assert float((result - plan.levels[-1].alpha * 0.3).abs().max()) < 1e-3


@pytest.mark.parametrize("name", ["DDIM", "DPMSolverMultistep", "EulerDiscrete", "HeunDiscrete", "UniPCMultistep"])
def test_a_captured_table_obeys_the_laws_of_a_sampler(name: str) -> None:
    config = {"clip_sample": False} if name in ("DDIM",) else {}
    report = fd.capture(make(name, {**config, "timestep_spacing": "trailing"}), 20).verify()
    law = {check.name: check for check in report.checks}
    assert law["finite"].ok and law["point mass"].value < 1e-4, str(report)


def test_the_clamp_is_in_the_table_and_in_the_text() -> None:
    plan = fd.capture(make("DDPM", {"clip_sample_range": 1.5}), 4)
    assert all(row.clamp == (-1.5, 1.5) for row in plan.rows[1:])
    packed = plan.pack("eps")
    np.testing.assert_array_equal(packed.coef[1:, [layout.CLAMP_LO, layout.CLAMP_HI]], [[-1.5, 1.5]] * 4)
    assert "clamped to [-1.5, 1.5]" in plan.explain()
    assert fd.Plan.from_json(plan.to_json()) == plan


def test_custom_timesteps_and_sigmas() -> None:
    plan = fd.capture(make("DDPM", {"clip_sample": False}), timesteps=[900, 500, 100])
    assert [level.time for level in plan.levels[:-1]] == [900, 500, 100]
    plan = fd.capture(make("FlowMatchEulerDiscrete", {}), sigmas=[1.0, 0.6, 0.2])
    assert [level.sigma for level in plan.levels] == pytest.approx([1.0, 0.6, 0.2, 0.0])
    plan = fd.capture(make("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True}), 4, mu=0.8)
    assert plan.options["mu"] == 0.8


@pytest.mark.alone
def test_a_capture_of_fifty_steps_takes_less_than_a_second() -> None:
    """Every configuration of the table; processor time, the best of three where the first is not good enough."""
    times: dict[str, float] = {}
    missing = []
    for case, (name, config, options) in zip(IDS, CASES, strict=True):
        try:
            # this one cannot make more steps than it was trained for, 40 by default
            scheduler = make(name, config if name != "CMStochasticIterative" else {"num_train_timesteps": 60})
        except pytest.skip.Exception as reason:
            missing.append(f"{case}: {reason}")
            continue
        for _ in range(3):
            took, plan = pace.timed(fd.capture, scheduler, 50, limit=1.0, step_options=options)
            times[case] = min(times.get(case, math.inf), took)
            if times[case] < 1.0:
                break
        assert plan.nfe >= 49
    slowest = sorted(times, key=times.__getitem__, reverse=True)[:3]
    print("slowest: " + ", ".join(f"{case} {1e3 * times[case]:.0f} ms" for case in slowest), *missing, sep="\n")
    assert len(times) + len(missing) == len(CASES)
    assert times[slowest[0]] < 1.0, slowest[0]


@pytest.mark.parametrize("steps", [25, 100])
def test_a_scheduler_may_keep_a_tensor_of_every_step(steps: int) -> None:
    """IPNDM never forgets one: the table needs the last four of them, whatever the number of steps."""
    plan = fd.capture(make("IPNDM", {}), steps)
    assert (plan.nfe, plan.registers) == (steps, 4)
    assert plan.options["mismatch"] < EXACT[plan.options["precision"]]


def test_a_network_of_diffusers_in_its_own_loop() -> None:
    """UNet2DModel, DDPM with its default clipping, draws from one generator: the loop of diffusers' pipeline."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    ).eval()
    scheduler = make("DDPM", {})
    plan = fd.capture(scheduler, 8)
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(2, 1, 8, 8, generator=generator)
    x = start
    scheduler.set_timesteps(8)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x, generator=generator).prev_sample
    generator.manual_seed(5)
    torch.randn(2, 1, 8, 8, generator=generator)
    draws = torch.stack([torch.randn(2, 1, 8, 8, generator=generator) for _ in range(plan.draws)])
    model = fd.Denoiser(unet, "linear", "eps")
    for backend in ("reference", "auto"):
        ours = fd.Sampler(plan, model, backend=backend).sample((2, 1, 8, 8), init=start, noise=draws)
        assert float((ours - x).abs().max() / x.abs().max()) < 1e-5


def test_every_scheduler_of_diffusers_is_in_the_table(root: Path) -> None:
    folder = Path(diffusers.__file__).parent / "schedulers"
    text = (root / "docs" / "capture.md").read_text()
    names = {
        name
        for path in folder.glob("scheduling_*.py")
        for name in re.findall(r"^class (\w+Scheduler)\(", path.read_text(), re.MULTILINE)
    }
    assert len(names) > 40
    missing = sorted(name for name in names if f"| {name} |" not in text)
    assert not missing, f"run python docs/capture_table.py: {missing}"
