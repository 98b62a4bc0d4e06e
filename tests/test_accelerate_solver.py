"""`accelerate(pipe, solver)` and `Denoiser.from_diffusers`: our plans on the networks and levels of diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accelerate_cases import LATENT, SD, apart, call, tiny

import fastdiff as fd
from fastdiff.integrations.diffusers import accelerate

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")


def test_a_solver_runs_as_it_does_in_a_sampler() -> None:
    """The same plan from the same latents, guided, by `fd.Sampler` on what `Denoiser.from_diffusers` makes of it."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**tiny.LATENT, timestep_spacing="trailing")
    pipe = tiny.make(SD, scheduler)
    options = tiny.arguments(SD, seed=3) | {"output_type": "latent", "latents": torch.randn(1, 4, 8, 8)}
    cond, uncond = ({"encoder_hidden_states": options[f"{side}prompt_embeds"]} for side in ("", "negative_"))
    model = fd.Denoiser.from_diffusers(pipe)
    for solver in ("dpmpp_2m", "heun", "unipc"):
        plan = fd.plan(solver, model.schedule, 7, "trailing")
        noisy = {"init": options["latents"], "cond": cond, "uncond": uncond, "guidance": 3.0}
        expected = fd.Sampler(plan, model).sample((1, 4, 8, 8), **noisy)
        accelerate(pipe, solver, steps=5)
        got = pipe(**options | {"num_inference_steps": 7, "guidance_scale": 3.0}).images
        assert apart(got, expected) <= LATENT


@pytest.mark.parametrize(
    ("kind", "name", "config", "solver"),
    [
        (SD, "EulerDiscrete", {"timestep_spacing": "trailing"}, "euler"),
        (SD, "EulerDiscrete", {"timestep_spacing": "leading", "steps_offset": 1}, "euler"),
        (SD, "DPMSolverMultistep", {"timestep_spacing": "trailing", "final_sigmas_type": "zero"}, "dpmpp_2m"),
        ("StableDiffusion3Pipeline", "FlowMatchEulerDiscrete", {"shift": 3.0}, "flow_euler"),
        ("StableDiffusion3Img2ImgPipeline", "FlowMatchEulerDiscrete", {"shift": 3.0}, "flow_euler"),
        ("FluxPipeline", "FlowMatchEulerDiscrete", {"use_dynamic_shifting": True}, "flow_euler"),
    ],
)
def test_a_solver_on_the_schedulers_own_levels(kind: str, name: str, config: dict[str, Any], solver: str) -> None:
    """The literature's sampler against diffusers' own of the same name: the same pictures to what its levels differ."""
    known = tiny.LATENT if kind == SD else {}
    pipe = tiny.make(kind, getattr(diffusers, f"{name}Scheduler")(**known, **config))
    before = call(pipe, num_inference_steps=8)
    accelerate(pipe, solver)
    after = call(pipe, num_inference_steps=8)
    plain = call(accelerate(pipe, "ddpm" if kind == SD else "flow_heun"), num_inference_steps=8)
    assert apart(after, before) <= 1e-4, plain


def test_a_solver_draws_from_the_callers_generators() -> None:
    """Each picture from its own generator, whatever batch it is in."""
    pipe = accelerate(tiny.make(SD), "dpmpp_2m_sde")
    together = tiny.arguments(SD, seed=2) | {"num_images_per_prompt": 2, "output_type": "latent"}
    both = pipe(**together | {"generator": [torch.Generator().manual_seed(seed) for seed in (5, 6)]}).images
    alone = [pipe(**together | {"num_images_per_prompt": 1, "generator": torch.Generator().manual_seed(seed)}).images
             for seed in (5, 6)]  # fmt: skip
    assert apart(both, torch.cat(alone)) <= LATENT and apart(both[:1], both[1:]) > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0.5}, "eta is for the pipeline's own scheduler"),
        ({"callback_on_step_end": lambda *_: {}}, "heun evaluates the network 11 times in 6 steps"),
    ],
)
def test_a_solver_refuses_what_only_the_scheduler_knows(options: dict[str, Any], message: str) -> None:
    pipe = accelerate(tiny.make(SD), "heun")
    with pytest.raises(ValueError, match=message):
        call(pipe, **options)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDPM", {}),
        ("DDIM", tiny.LATENT),
        ("DDIM", {**tiny.LATENT, "rescale_betas_zero_snr": True}),
        ("DPMSolverMultistep", {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}),
        ("DDIM", {"trained_betas": [0.001, 0.01, 0.1, 0.4], "num_train_timesteps": 4}),
        ("DDPM", {"beta_schedule": "sigmoid", "prediction_type": "sample"}),
    ],
)
def test_from_diffusers_reads_schedule_and_prediction(name: str, config: dict[str, Any]) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler")(**config)
    unet = tiny.make("DDPMPipeline").unet
    model = fd.Denoiser.from_diffusers(unet, scheduler)
    assert model.prediction == {"v_prediction": "v", "sample": "x0"}.get(config.get("prediction_type"), "eps")
    bars = scheduler.alphas_cumprod.double().numpy()
    ours = model.schedule.alpha_bar(np.arange(len(bars)))
    assert np.abs(ours - bars).max() < 2e-6 and np.abs(ours / bars.clip(1e-9) - 1)[:-1].max() < 2e-3
    assert model.shape == (3, 16, 16)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(x, torch.tensor([7.0, 9.0])), unet(x, torch.tensor([7, 9])).sample)


def test_solvers_that_are_no_names_are_refused() -> None:
    pipe = tiny.make(SD)
    with pytest.raises(TypeError, match=r"must be a name of fd.solvers.names\(\), got Plan"):
        accelerate(pipe, fd.plan("ddim", "linear", 3))
    with pytest.raises(ValueError, match=r"pipe.scheduler = UniPCMultistepScheduler.from_config\(pipe.scheduler"):
        accelerate(pipe, "UniPCMultistepScheduler")


def test_from_diffusers_flows_and_what_it_does_not_know() -> None:
    pipe = tiny.make("StableDiffusion3Pipeline")
    model = fd.Denoiser.from_diffusers(pipe)
    assert (model.schedule, model.prediction, model.shape) == (fd.schedules.rectified_flow(), "flow", (4, 8, 8))
    options = tiny.arguments("StableDiffusion3Pipeline")
    cond = {"encoder_hidden_states": options["prompt_embeds"], "pooled_projections": options["pooled_prompt_embeds"]}
    x = torch.randn(1, 4, 8, 8)
    shown = pipe.transformer(hidden_states=x, timestep=torch.tensor([250.0]), **cond).sample
    assert torch.equal(model(x, torch.tensor([0.25]), cond), shown)
    assert fd.Denoiser.from_diffusers(tiny.make("DiTPipeline")).learned_variance
    assert fd.Denoiser.from_diffusers(tiny.make("FluxPipeline")).net.scale == 1.0
    edm = fd.Denoiser.from_diffusers(tiny.make("DDPMPipeline").unet, diffusers.EDMEulerScheduler(sigma_max=40.0))
    assert (edm.prediction, edm.sigma_data, edm.schedule) == ("edm", 0.5, fd.schedules.edm(0.002, 40.0))
    with pytest.raises(TypeError, match="needs a scheduler with a config"):
        fd.Denoiser.from_diffusers(pipe.transformer)
    with pytest.raises(TypeError, match="takes a pipeline with a unet or transformer"):
        fd.Denoiser.from_diffusers(3, pipe.scheduler)
    with pytest.raises(ValueError, match="prediction_type 'learned'"):
        fd.Denoiser.from_diffusers(pipe.transformer, diffusers.DDIMScheduler(prediction_type="learned"))


def test_a_network_that_takes_more_than_the_sample_is_not_held_to_its_channels() -> None:
    """A video network, one that is given a condition's channels too, by a subclass or a hook; images are held to."""
    small = {"sample_size": 8, "out_channels": 4, "block_out_channels": (32, 32), "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    scheduler = diffusers.DDIMScheduler()
    plain = diffusers.UNet2DModel(in_channels=4, **small, **blocks)
    wider = diffusers.UNet2DModel(in_channels=9, **small, **blocks)

    class Upscaler(diffusers.UNet2DModel):
        """The sample beside an image of the same size."""

        def forward(self, sample: torch.Tensor, timestep: Any, **kw: Any) -> Any:
            return super().forward(torch.cat([sample, sample], 1), timestep, **kw)

    upscaler = Upscaler(in_channels=8, **small, **blocks)
    for net in (wider, upscaler):
        assert fd.Denoiser.from_diffusers(net, scheduler).channels is None
    model = fd.Denoiser.from_diffusers(upscaler, scheduler)
    assert fd.sample(model, (1, 4, 8, 8), steps=1).shape == (1, 4, 8, 8)
    model = fd.Denoiser.from_diffusers(plain, scheduler)
    assert model.shape == (4, 8, 8)
    with pytest.raises(ValueError, match="the network takes 4 channels"):
        fd.sample(model, (1, 3, 8, 8), steps=1)
    plain.register_forward_pre_hook(lambda module, args: args)
    assert fd.Denoiser.from_diffusers(plain, scheduler).channels is None
    video = diffusers.UNet3DConditionModel(
        in_channels=4, cross_attention_dim=16, attention_head_dim=8, norm_num_groups=32,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        **small,
    )  # fmt: skip
    assert fd.Denoiser.from_diffusers(video, scheduler).channels is None


def test_another_library_s_name_with_a_grid_is_no_argument_here() -> None:
    with pytest.raises(ValueError, match=r"Here it is solver='dpmpp_2m'.* a pipeline is given no grid"):
        accelerate(tiny.make("DDIMPipeline"), solver="dpmpp_2m_karras")
