"""`accelerate(pipe)`: every pipeline, with tiny random components, against itself before.

Pictures in [0, 1] agree to a hundredth of an 8-bit level, latents to 2e-5 of the largest element.
"""

from __future__ import annotations

import copy
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff as fd
from fastdiff.integrations.diffusers import accelerate, fast, restore
from fastdiff.integrations.diffusers import desk as desk_module
from fastdiff.integrations.diffusers.accelerate import ENGINE
from fastdiff.integrations.diffusers.loop import Loop

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import tiny_pipelines as tiny

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers", reason="diffusers' text pipelines need transformers (pip install transformers)")

PICTURE = 0.01 / 255
LATENT = 2e-5
KINDS = list(tiny.MAKERS)
TEXT = [kind for kind in KINDS if "Diffusion" in kind or "Flux" in kind]
SD = "StableDiffusionPipeline"


@pytest.fixture(autouse=True)
def quiet() -> None:
    diffusers.utils.logging.set_verbosity_error()


def apart(one: Any, other: Any) -> float:
    """Largest difference of latents, over the largest element."""
    one, other = (torch.as_tensor(value).double() for value in (one, other))
    return float((one - other).abs().max() / other.abs().max())


def call(pipe: Any, seed: int = 1, **more: Any) -> Any:
    """The latents of one call, or what output_type in `more` says."""
    options = tiny.arguments(type(pipe).__name__, seed=seed)
    options["output_type"] = "latent" if "Diffusion" in type(pipe).__name__ or "Flux" in type(pipe).__name__ else "np"
    made = pipe(**{**options, **more})
    return made[0] if isinstance(made, tuple) else made.images


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_pictures(kind: str) -> None:
    """Other prompts, sizes, batches, steps and guidance through one pipeline; the generators end where they did."""
    pipe = tiny.make(kind)
    cases: list[dict[str, Any]] = [
        {"seed": 1, "steps": 6, "guidance": 4.0},
        {"seed": 2, "steps": 9, "guidance": 2.0, "batch": 2, "size": (24, 16)},
        {"seed": 3, "steps": 5, "guidance": 1.0},
    ]

    forms = ["np", "latent", "latent"] if kind in TEXT else ["np"] * 3

    def run() -> tuple[list[Any], list[Tensor]]:
        calls = [tiny.arguments(kind, **case) | {"output_type": form} for case, form in zip(cases, forms, strict=True)]
        return [pipe(**one).images for one in calls], [one["generator"].get_state() for one in calls]

    before, left_before = run()
    assert accelerate(pipe) is pipe
    after, left = run()
    assert all(torch.equal(a, b) for a, b in zip(left, left_before, strict=True))
    for a, b in zip(after, before, strict=True):
        assert a.shape == b.shape and float(b.std()) > 0.05
        assert apart(a, b) <= (PICTURE if isinstance(b, np.ndarray) else LATENT)
    restore(pipe)
    assert type(pipe) is getattr(diffusers, kind) and not [key for key in vars(pipe) if "fastdiff" in key]
    assert np.array_equal(pipe(**tiny.arguments(kind, **cases[0])).images, before[0])


SCHEDULERS: list[tuple[str, dict[str, Any]]] = [
    ("DDIM", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    ("DDPM", {"clip_sample": False}),
    ("PNDM", {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    ("DPMSolverMultistep", {"use_karras_sigmas": True}),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
    ("UniPCMultistep", {}),
    ("DEISMultistep", {}),
    ("EulerDiscrete", {}),
    ("DDIM", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ("EulerAncestralDiscrete", {}),
    ("HeunDiscrete", {}),
    ("KDPM2Discrete", {}),
    ("LMSDiscrete", {}),
    ("LCM", {}),
]


@pytest.mark.parametrize("kind", [SD, "StableDiffusionImg2ImgPipeline"])
@pytest.mark.parametrize(("name", "config"), SCHEDULERS, ids=lambda value: value if isinstance(value, str) else "")
def test_schedulers(name: str, config: dict[str, Any], kind: str) -> None:
    """Text to image, and from the middle of the schedule."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(**tiny.LATENT, **config)
    pipe = tiny.make(kind, scheduler)
    strength = {"strength": 0.7} if "Img2Img" in kind else {}
    before = call(pipe, **strength)
    accelerate(pipe)
    assert apart(call(pipe, **strength), before) <= LATENT


def test_where_the_original_rounds_coarsely_ours_is_nearer_to_float64() -> None:
    """Its Euler holds a state of 4096 standard deviations in the first step of a schedule that ends in noise."""
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    pipe = tiny.make(SD, diffusers.EulerDiscreteScheduler(**tiny.LATENT, **config))
    options = tiny.arguments(SD, seed=1) | {"output_type": "latent", "latents": torch.randn(1, 4, 8, 8)}

    def run(dtype: torch.dtype) -> Tensor:
        cast = {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in options.items()}
        return pipe.to(dtype)(**cast).images

    before, exact = run(torch.float32), run(torch.float64)
    accelerate(pipe)
    assert apart(run(torch.float32), exact) < 1e-6 < apart(before, exact) / 5
    with pytest.raises(TypeError, match="float64"):
        run(torch.float64)


ARGUMENTS: list[tuple[str, dict[str, Any]]] = [
    (SD, {"eta": 0.7}),
    (SD, {"guidance_rescale": 0.7}),
    (SD, {"num_images_per_prompt": 3}),
    (SD, {"generator": [3, 4], "num_images_per_prompt": 2, "eta": 1.0}),
    (SD, {"latents": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(8))}),
    (SD, {"timesteps": [900, 500, 220, 30]}),
    ("StableDiffusionXLPipeline", {"guidance_rescale": 0.4}),
    ("StableDiffusionXLPipeline", {"denoising_end": 0.6}),
    ("StableDiffusionXLPipeline", {"sigmas": [14.0, 5.0, 2.0, 0.4, 0.0]}),
    ("StableDiffusionXLPipeline", {"original_size": (32, 8), "negative_target_size": (8, 8)}),
    ("StableDiffusionXLImg2ImgPipeline", {"denoising_start": 0.4, "image": torch.ones(1, 4, 8, 8)}),
    ("StableDiffusion3Pipeline", {"sigmas": [1.0, 0.7, 0.2]}),
    ("FluxPipeline", {"guidance_scale": 7.0, "true_cfg_scale": 1.0}),
    ("FluxPipeline", {"sigmas": [1.0, 0.7, 0.2]}),
    ("DDIMPipeline", {"eta": 0.6}),
    ("DDIMPipeline", {"eta": 0.6, "use_clipped_model_output": True}),
    ("DDIMPipeline", {"batch_size": 2, "generator": [1, 2], "eta": 0.3}),
]


@pytest.mark.parametrize(("kind", "options"), ARGUMENTS, ids=lambda value: value if isinstance(value, str) else "")
def test_arguments(kind: str, options: dict[str, Any]) -> None:
    scheduler = None
    if kind == SD:
        scheduler = diffusers.DDIMScheduler(**tiny.LATENT, clip_sample=False)
    if "timesteps" in options:
        scheduler = diffusers.DPMSolverMultistepScheduler(**tiny.LATENT)
    pipe = tiny.make(kind, scheduler)

    def run() -> Any:
        given = dict(options)
        if "generator" in given:
            given["generator"] = [torch.Generator().manual_seed(seed) for seed in given["generator"]]
        return call(pipe, **given)

    before = run()
    plain = call(pipe)
    assert plain.shape != before.shape or apart(plain, before) > 1e-4
    accelerate(pipe)
    assert apart(run(), before) <= LATENT


@pytest.mark.parametrize("form", ["np", "pil", "pt", "latent"])
def test_outputs(form: str) -> None:
    pipe = tiny.make(SD)
    before = call(pipe, output_type=form, return_dict=False)
    named = pipe(**tiny.arguments(SD) | {"output_type": form})
    accelerate(pipe)
    after = call(pipe, output_type=form, return_dict=False)
    assert type(after) is type(before)
    assert type(pipe(**tiny.arguments(SD) | {"output_type": form})) is type(named)
    if form == "pil":
        assert np.abs(np.asarray(after[0], dtype=int) - np.asarray(before[0], dtype=int)).max() <= 1
    else:
        assert apart(after, before) <= LATENT


def watching(log: list[Any], change: bool) -> Any:
    """A callback that notes what it is given and what the pipeline looks like, and changes the run."""

    def seen(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        guided = getattr(pipe, "do_classifier_free_guidance", None)
        network = type(getattr(pipe, "unet", None) or pipe.transformer).__name__
        index = getattr(pipe.scheduler, "step_index", None)
        log.append(((i, float(t), guided, network, type(pipe.scheduler).__name__, index), dict(tensors)))
        log[-1][1]["latents"] = tensors["latents"].clone()
        if change and i == 1:
            tensors["latents"] = tensors["latents"] * 0.9
        if change and i == 2:
            tensors["latents"].mul_(1.1)
        if change and i == 2 and type(pipe).__name__ == SD:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    return seen


@pytest.mark.parametrize("change", [False, True])
@pytest.mark.parametrize("kind", TEXT)
def test_callback_on_step_end(kind: str, change: bool) -> None:
    """It sees the same states, times and pipeline, and what it changes counts."""
    pipe, logs = tiny.make(kind), ([], [])  # type: ignore[var-annotated]
    tensors = ["latents", "prompt_embeds"]

    def run(log: list[Any]) -> Any:
        watch = watching(log, change)
        return call(pipe, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=tensors)

    before = run(logs[0])
    accelerate(pipe)
    assert apart(run(logs[1]), before) <= LATENT
    assert len(logs[0]) == len(logs[1]) >= 3
    for (theirs, given), (ours, got) in zip(*logs, strict=True):
        assert ours == theirs
        assert apart(got["latents"], given["latents"]) <= LATENT
        assert torch.equal(got["prompt_embeds"], given["prompt_embeds"])


def test_the_old_callback_and_a_callback_object() -> None:
    pipe = tiny.make(SD, diffusers.HeunDiscreteScheduler(**tiny.LATENT))
    cutoff = diffusers.callbacks.SDCFGCutoffCallback(cutoff_step_ratio=0.4)
    logs: list[list[Any]] = [[], []]

    def run(log: list[Any]) -> Any:
        old = {"callback": lambda i, t, x: log.append((i, float(t), x.clone())), "callback_steps": 1}
        with pytest.warns(FutureWarning, match="deprecated"):
            call(pipe, **old)
        return call(pipe, callback_on_step_end=cutoff)

    before = run(logs[0])
    accelerate(pipe)
    assert apart(run(logs[1]), before) <= LATENT
    assert [entry[:2] for entry in logs[1]] == [entry[:2] for entry in logs[0]]
    assert all(apart(ours[2], theirs[2]) <= LATENT for ours, theirs in zip(*logs[::-1], strict=True))


@pytest.mark.parametrize("by", ["callback", "network"])
def test_interrupt(by: str) -> None:
    """Set in a callback, or from anywhere while the rows run."""
    pipe = tiny.make(SD)
    calls = []

    def stop(i: int) -> None:
        calls.append(i)
        pipe._interrupt = len(calls) == 3

    if by == "network":
        pipe.unet.register_forward_hook(lambda *_: stop(0))
        more = {}
    else:
        more = {"callback_on_step_end": lambda pipe, i, t, tensors: (stop(i), tensors)[1]}
    before, evaluated = call(pipe, **more), len(calls)
    calls.clear()
    accelerate(pipe)
    assert apart(call(pipe, **more), before) <= LATENT
    assert evaluated == len(calls) == 3
    calls.extend(range(9))
    assert apart(call(pipe), before) > 1e-3 or by == "network"


class Gaps(TorchDispatchMode):
    """The names of torch's operations before each evaluation of a network, since the one before."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.gaps: list[list[str]] = []
        self._inside, self._pending = False, list[str]()
        own = network.forward

        def forward(*args: Any, **kw: Any) -> Any:
            self.gaps.append(self._pending)
            self._inside = True
            output = own(*args, **kw)
            self._inside, self._pending = False, []
            return output

        network.forward = forward

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._inside:
            self._pending.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_row_runs_between_two_evaluations(kind: str) -> None:
    """No operation of scheduler or guidance, no draw, and no copy of DiT's channels and SD3's strides."""
    pipe = tiny.make(kind)
    before = Gaps(getattr(pipe, "unet", None) or pipe.transformer)
    with before:
        call(pipe)
    count = len(before.gaps)
    assert all(before.gaps[1::2]) and count
    accelerate(pipe)
    call(pipe)
    after = Gaps(getattr(pipe, "unet", None) or pipe.transformer)
    with after:
        call(pipe, seed=5)
    assert not any(after.gaps[1:])
    assert len(after.gaps) == count >= 3


def test_progress_bar_and_step_index(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tiny.make(SD, diffusers.HeunDiscreteScheduler(**tiny.LATENT))
    pipe.set_progress_bar_config(disable=False)
    call(pipe)
    index, shown = pipe.scheduler.step_index, capsys.readouterr().err
    accelerate(pipe)
    call(pipe)
    assert "6/6" in shown and "6/6" in capsys.readouterr().err
    assert pipe.scheduler.step_index == index


def test_half_precision_is_nearer_to_single_than_the_original() -> None:
    """The state stays in float32 between steps."""
    single, half = tiny.make(SD), tiny.make(SD).to(torch.bfloat16)
    prompts = {
        name: value.bfloat16() for name, value in tiny.arguments(SD, seed=1).items() if isinstance(value, Tensor)
    }
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = call(single, latents=start.float(), **{name: value.float() for name, value in prompts.items()})
    before = call(half, latents=start, **prompts)
    accelerate(half)
    after = call(half, latents=start, **prompts)
    assert after.dtype == before.dtype == torch.bfloat16
    assert apart(after, exact) <= apart(before, exact)


def test_other_schedulers_sizes_and_dtypes_after_accelerating() -> None:
    """What changes between two calls is looked at anew, and what a call left is not in the way of the next."""
    pipe = tiny.make(SD).to(torch.float16).to(torch.float32)
    schedulers = [
        pipe.scheduler,
        diffusers.EulerAncestralDiscreteScheduler(**tiny.LATENT),
        fast(diffusers.DPMSolverMultistepScheduler)(**tiny.LATENT),
    ]
    cases = [(0, 16, 1), (1, 24, 2), (0, 16, 1), (2, 16, 3), (1, 16, 1)]

    def run() -> list[Any]:
        made = []
        for which, size, batch in cases:
            pipe.scheduler = schedulers[which]
            made.append(pipe(**tiny.arguments(SD, size=(size, 16), batch=batch) | {"output_type": "latent"}).images)
        return [*made, call(pipe.to(torch.float16).to(torch.float32))]

    before = run()
    accelerate(pipe)
    off = [apart(ours, theirs) for ours, theirs in zip(run(), before, strict=True)]
    assert max(off) <= LATENT, off
    pipe.scheduler = diffusers.DDIMScheduler(**tiny.LATENT, thresholding=True, sample_max_value=2.0)
    with pytest.raises(TypeError, match="DDIMScheduler"):
        call(pipe)
    pipe.scheduler = schedulers[0]
    assert apart(call(pipe), before[-1]) > 0


def test_inference_mode_and_another_network() -> None:
    pipe, other = tiny.make(SD), tiny.make(SD, seed=1).unet
    before = call(pipe)
    accelerate(pipe)
    with torch.inference_mode():
        assert apart(call(pipe), before) <= LATENT
        assert apart(call(pipe, callback_on_step_end=lambda pipe, i, t, tensors: tensors), before) <= LATENT
    assert apart(call(pipe), before) <= LATENT
    pipe.unet = other
    assert pipe.unet is other is pipe.components["unet"]
    changed = call(pipe)
    assert apart(changed, before) > 1e-2 and apart(changed, call(restore(pipe))) <= LATENT


class Own(getattr(diffusers, SD)):  # type: ignore[misc]
    """A pipeline of somebody's own."""

    def __call__(self, *args: Any, **kw: Any) -> Any:
        """Not the original's."""
        return super().__call__(*args, **kw)


def test_refused_by_name_and_left_as_it_was() -> None:
    pipe = tiny.make(SD)
    own = Own(**pipe.components, requires_safety_checker=False)
    inpaint = diffusers.StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    thresholding = diffusers.DDIMScheduler(**tiny.LATENT, thresholding=True, sample_max_value=2.0)
    refusals: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (own, {}, TypeError, "Own has a __call__ of its own"),
        (inpaint, {}, TypeError, "StableDiffusionInpaintPipeline is not a pipeline whose loop is known"),
        (torch.nn.Linear(1, 1), {}, TypeError, "Linear is not a pipeline"),
        (3, {}, TypeError, "int is not a pipeline; it takes a diffusers pipeline .*not a part of it or a network"),
        (fd.load("fashion"), {}, TypeError, r"Denoiser is not a pipeline.* sampled with fd.sample\(model, shape\)"),
        (tiny.make(SD, thresholding), {}, TypeError, "DDIMScheduler.*step"),
        (pipe, {"solver": "dpmpp_2n"}, ValueError, "dpmpp_2m"),
        (pipe, {"solver": "dpm_adaptive"}, ValueError, "dpm_adaptive chooses its own steps"),
        (pipe, {"solver": "ddim_inverse"}, ValueError, "ddim_inverse goes from images to noise"),
        (pipe, {"solver": "mean_reverting"}, ValueError, "mean_reverting needs tensors.*mu"),
        (pipe, {"solver": "flow_euler"}, ValueError, "flow_euler needs a flow schedule"),
        (tiny.make(SD, thresholding), {"solver": "euler"}, ValueError, "thresholding=False"),
        (pipe, {"steps": 0}, ValueError, "steps must be"),
        (pipe, {"graph": "yes"}, ValueError, "graph must be"),
    ]
    for object, options, error, message in refusals:
        before = dict(getattr(object, "__dict__", {}))
        with pytest.raises(error, match=message):
            accelerate(object, **options)
        assert getattr(object, "__dict__", {}) == before


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (SD, {"ip_adapter_image_embeds": [torch.zeros(2, 1, 8)]}, ValueError, "ip_adapter_image_embeds.*restore"),
        ("FluxPipeline", {"negative_ip_adapter_image": 1}, ValueError, "negative_ip_adapter_image"),
        ("StableDiffusion3Pipeline", {"skip_guidance_layers": [0]}, ValueError, "skip_guidance_layers.*restore"),
        ("FluxPipeline", {"heigth": 8}, TypeError, "heigth"),
        (SD, {"num_inference_steps": 0}, ValueError, ""),
    ],
)
def test_a_call_that_is_refused_leaves_the_pipeline_ready(
    kind: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    pipe = tiny.make(kind)
    before = call(pipe)
    accelerate(pipe)
    generator = torch.Generator().manual_seed(1)
    if message:
        with pytest.raises(error, match=message):
            call(pipe, generator=generator, **options)
        assert torch.equal(generator.get_state(), torch.Generator().manual_seed(1).get_state())
    else:
        with pytest.raises((ValueError, IndexError, RuntimeError, TypeError, ZeroDivisionError)):
            call(pipe, **options)
    assert apart(call(pipe), before) <= LATENT


def test_refused_for_a_cache_or_a_graph_that_cannot_be() -> None:
    pipe = tiny.make("FluxPipeline")
    accelerate(pipe, graph=True)
    with pytest.raises(ValueError, match="graph=True needs.*cpu"):
        call(pipe)
    accelerate(pipe)
    config = diffusers.FirstBlockCacheConfig(threshold=0.1)
    pipe.transformer.enable_cache(config)
    with pytest.raises(RuntimeError, match="disable_cache"):
        call(pipe)
    pipe.transformer.disable_cache()
    call(pipe)


def test_an_error_in_a_call_changes_nothing() -> None:
    pipe = tiny.make(SD)
    before = call(pipe)
    accelerate(pipe)
    fails = pipe.unet.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(pipe)
    with pytest.raises(ZeroDivisionError):
        call(pipe, callback_on_step_end=lambda pipe, i, t, tensors: tensors)
    fails.remove()
    assert type(pipe.unet).__name__ == "UNet2DConditionModel" and pipe.do_classifier_free_guidance
    assert apart(call(pipe), before) <= LATENT
    assert torch.equal(call(restore(pipe)), before)
    assert restore(pipe) is pipe


def test_accelerating_twice_and_changing_the_settings() -> None:
    pipe = tiny.make(SD)
    before = call(pipe)
    kind = type(pipe)
    accelerate(accelerate(pipe), steps=4)
    options = tiny.arguments(SD) | {"output_type": "latent"}
    del options["num_inference_steps"]
    four = pipe(**options).images
    assert apart(four, call(restore(pipe), seed=0, num_inference_steps=4)) <= LATENT
    assert type(pipe) is kind
    accelerate(pipe, steps=4)
    assert apart(call(pipe), before) <= LATENT, "a call that says how many steps has that many"


def test_one_pipeline_in_two_threads_and_a_copy_for_each() -> None:
    pipe = accelerate(tiny.make(SD))
    expected, twin = call(pipe), copy.deepcopy(pipe)
    inside, go = threading.Event(), threading.Event()
    found: list[Any] = []

    def held(*_: Any) -> None:
        inside.set()
        go.wait(20)

    hook = pipe.unet.register_forward_pre_hook(held)
    thread = threading.Thread(target=lambda: found.append(call(pipe)))
    thread.start()
    assert inside.wait(20)
    try:
        with pytest.raises(RuntimeError, match="running already"):
            call(pipe)
        with pytest.raises(RuntimeError, match="the pipeline is running"):
            restore(pipe)
        assert type(pipe.unet).__name__ == "UNet2DConditionModel" and type(pipe.scheduler).__name__ == "PNDMScheduler"
        assert torch.equal(call(twin), expected)
    finally:
        hook.remove()
        go.set()
        thread.join()
    assert torch.equal(found[0], expected) and torch.equal(call(pipe), expected)


def test_a_saved_pipeline_is_the_original(tmp_path: Path) -> None:
    pipe = accelerate(tiny.make("DDIMPipeline"))
    pipe.save_pretrained(tmp_path)
    back = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(back) is diffusers.DDIMPipeline and "fastdiff" not in (tmp_path / "model_index.json").read_text()
    assert apart(call(pipe), call(back)) <= PICTURE


@pytest.mark.parametrize("kind", KINDS)
def test_the_recorded_step(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU replays, replayed as it is: one record for other prompts, steps and guidance, on the same buffers."""
    pipe = accelerate(tiny.make(kind))
    cases = [{"seed": 1}, {"seed": 2, "steps": 9, "guidance": 2.5}, {"seed": 3, "steps": 4, "guidance": 3.0}]

    def run() -> list[Any]:
        form = "latent" if kind in TEXT else "np"
        return [pipe(**tiny.arguments(kind, **case) | {"output_type": form}).images for case in cases]

    eager, records, twin = run(), [], copy.deepcopy(pipe)  # type: ignore[var-annotated]
    recorder = SimpleNamespace(record=lambda work, warm_up: (records.append(work), work)[1])
    monkeypatch.setattr(desk_module, "recorder_for", lambda device, executor: recorder)
    accelerate(pipe)
    assert all(apart(ours, theirs) <= LATENT for ours, theirs in zip(run(), eager, strict=True))
    assert len(records) == 1
    if kind in TEXT:
        changed = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
        both = [call(one, callback_on_step_end=watching([], True), **changed) for one in (pipe, restore(twin))]
        assert apart(*both) <= LATENT


def test_a_network_that_cannot_be_recorded_runs_eagerly_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(work: Any, warm_up: int) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(desk_module, "recorder_for", lambda device, executor: SimpleNamespace(record=fails))
    pipe = tiny.make(SD)
    before = call(pipe)
    accelerate(pipe)
    with pytest.warns(UserWarning, match="StableDiffusionPipeline: the network cannot be captured.*graph=False"):
        assert apart(call(pipe), before) <= LATENT
    assert apart(call(pipe), before) <= LATENT
    with pytest.raises(RuntimeError, match="not permitted"):
        call(accelerate(pipe, graph=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_one_graph_and_no_sync_in_the_loop(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step graph serves other prompts, steps and guidance; no host sync while rows run; pictures as eager ones."""
    pipe = tiny.make(kind).to("cuda")
    cases = [{"seed": 1}, {"seed": 2, "steps": 9, "guidance": 2.5}, {"seed": 3, "steps": 4, "guidance": 3.0}]

    def run() -> list[Any]:
        made = []
        for case in cases:
            options = tiny.arguments(kind, **case) | {"generator": torch.Generator("cuda").manual_seed(1)}
            on_gpu = {name: v.cuda() if isinstance(v, Tensor) else v for name, v in options.items()}
            made.append(pipe(**on_gpu).images)
        return made

    before = run()
    accelerate(pipe)
    own = Loop.run

    def strict(self: Loop, count: int) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            own(self, count)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    run()
    monkeypatch.setattr(Loop, "run", strict)
    assert all(apart(ours, theirs) <= 0.1 / 255 for ours, theirs in zip(run(), before, strict=True))
    (desk,) = vars(pipe)[ENGINE]._desks
    assert len(desk.recorded) == 1
    accelerate(pipe, graph=False)
    monkeypatch.setattr(Loop, "run", own)
    assert all(apart(ours, theirs) <= 0.1 / 255 for ours, theirs in zip(run(), before, strict=True))
