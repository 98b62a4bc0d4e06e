"""What sampling refuses or warns of, and what it says to do: networks, arguments, models, samplers in use."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from sampler_cases import bumpy, bumpy_model  # noqa: F401
from torch import Tensor

import fastdiff as fd
from fastdiff.models import UNet, UNetConfig


@pytest.mark.parametrize(
    ("output", "error", "words"),
    [
        (lambda x: x[:, :2], ValueError, r"returned shape \(2, 2, 4, 4\).*\(2, 3, 4, 4\)"),
        (lambda x: x.double(), TypeError, "float64"),
        (lambda x: x.long(), TypeError, "int64"),
        (lambda x: "no", TypeError, "returned str"),
        (lambda x: x / 0, FloatingPointError, r"row 0 of 3 \(sample 0, time=80"),
    ],
)
def test_bad_network(output: Callable[[Tensor], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fd.sample(fd.Denoiser(lambda x, t: output(x), fd.schedules.edm(), "x0"), (2, 3, 4, 4), steps=3)


def test_non_finite_output_names_the_row_and_sample_and_stops() -> None:
    calls = []

    def breaks(x: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        output = torch.zeros_like(x)
        if len(calls) == 3:
            output[1, 0, 0, 0] = float("inf")
        return output

    with pytest.raises(FloatingPointError, match=r"row 2 of 9 \(sample 1"):
        fd.sample(fd.Denoiser(breaks, fd.schedules.edm(), "x0"), (2, 3, 4, 4), steps=9)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seed": [1, 2, 3]}, "one integer per sample.*is 2, got 3"),
        ({"seed": 2**64}, "64-bit"),
        ({"guidance": 1e39}, "finite in float32"),
        ({"init": torch.full((2, 3, 4, 4), float("nan")), "strength": 0.5}, "init holds inf or nan"),
        ({"guidance": 2.0}, "needs uncond"),
        ({"guidance": [1.0, 2.0, 3.0]}, r"one per sample \(2\), got 3"),
        ({"guidance": float("nan")}, "finite"),
        ({"noise": "pink"}, "noise must be"),
        ({"init": torch.zeros(2, 3, 4, 5), "strength": 0.5}, r"init must be.*\(2, 3, 4, 4\)"),
        ({"init": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "strength": 0.5}, "floating-point"),
        ({"strength": 0.5}, "needs init"),
        ({"cond": torch.zeros(3)}, r"one entry per sample \(2, the first"),
        (
            {"cond": {"a": torch.zeros(2)}, "uncond": {"b": torch.zeros(2)}, "guidance": 2.0},
            "mappings with the same keys",
        ),
        ({"backend": "cpu"}, "Did you mean 'cpp'"),
        ({"graph": True}, "needs a CUDA device"),
        ({"graph": "maybe"}, "graph must be"),
    ],
)
def test_bad_arguments(model: fd.Denoiser, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fd.sample(model, (2, 3, 4, 4), steps=3, **arguments)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("device", "model.to"),
        ("num_inference_steps", "steps="),
        ("generator", "seed="),
        ("guidance_scale", "guidance="),
    ],
)
def test_names_of_other_libraries_are_known(model: fd.Denoiser, name: str, words: str) -> None:
    with pytest.raises(TypeError, match=f"sample has no argument '{name}': .*{words}"):
        fd.sample(model, (1, 3, 4, 4), steps=3, **{name: 3})  # type: ignore[arg-type]


def test_a_rule_without_guidance_is_said_to_do_nothing(model: fd.Denoiser) -> None:
    plain = fd.sample(model, (1, 3, 4, 4), steps=3)
    with pytest.warns(UserWarning, match=r"Rescale\(phi=0.7\) changes what guidance does, and guidance is 1"):
        assert torch.equal(fd.sample(model, (1, 3, 4, 4), steps=3, rule=fd.guidance.Rescale()), plain)


@pytest.mark.parametrize("known", ["shape", "config", "nothing"])
def test_channels_are_checked_where_they_are_known(known: str) -> None:
    """Before the network is called: from `shape`, or from a network of images; a function says nothing."""
    calls = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        calls.append(x.shape)
        return x

    unet = UNet(UNetConfig(sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",),
                           up_block_types=("UpBlock2D",), layers_per_block=1))  # fmt: skip
    model = fd.Denoiser(
        unet if known == "config" else net, "linear", "x0", shape=(3, 4, 4) if known == "shape" else None
    )
    for shape in ((2, 1, 4, 4), (3, 4, 4), (2, 4, 4, 3)):
        if known == "nothing":
            fd.sample(model, shape, steps=1)
            continue
        words = rf"must be \(batch, 3, height, width\): the network takes 3 channels; got {re.escape(str(shape))}"
        words += re.escape("; one sample is (1, 3, 4, 4)") * (shape == (3, 4, 4)) + "$"
        with pytest.raises(ValueError, match=words):
            fd.sample(model, shape, steps=1)
    assert len(calls) == (3 if known == "nothing" else 0)
    assert fd.sample(model, (2, 3, 8, 6), steps=1).shape == (2, 3, 8, 6)


def test_tensors_without_values_are_refused(model: fd.Denoiser) -> None:
    sampler = fd.Sampler(fd.plan("ddim", model.schedule, 3), model)
    with torch.device("meta"):
        for draw in (lambda: fd.sample(model, (1, 3, 4, 4), steps=3), lambda: sampler.sample((1, 3, 4, 4))):
            with pytest.raises(ValueError, match=r"'meta' here, which have no values.*outside torch.device\('meta'\)"):
                draw()
    assert torch.equal(fd.sample(model, (1, 3, 4, 4), "ddim", steps=3), sampler.sample((1, 3, 4, 4)))


@pytest.mark.parametrize("name", ["guidance", "perturbed_scale"])
def test_a_number_without_a_value_is_named(name: str, model: fd.Denoiser) -> None:
    with pytest.raises(ValueError, match=f"^{name} is a tensor on 'meta', which has no values .*: give a number, or a"):
        fd.sample(model, (1, 3, 4, 4), steps=3, **{name: torch.tensor(2.0, device="meta")})


def test_a_callback_that_is_none_is_refused_before_the_network_is_asked(model: fd.Denoiser) -> None:
    with pytest.raises(TypeError, match=r"callback must be a function f\(at\).*got 3"):
        fd.sample(model, (1, 3, 4, 4), callback=3)  # type: ignore[arg-type]


def test_an_image_of_bytes_is_pointed_out(model: fd.Denoiser) -> None:
    image, how = torch.full((1, 3, 4, 4), 255.0), {"steps": 2, "strength": 0.5}
    image[0, 0, 0, 0] = 0
    with pytest.warns(UserWarning, match=r"init goes from 0 to 255, .* give init / 127.5 - 1") as caught:
        fd.sample(model, image.shape, init=image, **how)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fd.sample(model, image.shape, init=image / 127.5 - 1, **how)
        fd.sample(model, image.shape, init=100 * torch.randn(image.shape), **how)


def test_bad_models() -> None:
    with pytest.raises(ValueError, match="Did you mean prediction='eps'"):
        fd.Denoiser(bumpy, "linear", "epsilon")
    with pytest.raises(ValueError, match="Unknown schedule 'linaer'.*'linear'"):
        fd.Denoiser(bumpy, "linaer")
    with pytest.raises(TypeError, match="module or function"):
        fd.Denoiser("net", "linear")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Denoiser\(bumpy, linear, .*\) is one already; use it as it is"):
        fd.Denoiser(fd.Denoiser(bumpy, "linear"), "linear")
    with pytest.raises(TypeError, match="wrap the network"):
        fd.sample(torch.nn.Identity(), (1, 3, 4, 4))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="float64"):
        fd.Denoiser(torch.nn.Linear(2, 2).double(), "linear")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda' was asked for, and torch sees no CUDA device"):
            fd.Denoiser(bumpy, "linear").to("cuda")
    assert repr(fd.Denoiser(bumpy, "linear")) == "Denoiser(bumpy, linear, eps, torch.float32 on cpu)"
    zero_snr = fd.schedules.rescale_zero_terminal_snr(fd.schedules.linear())
    with pytest.raises(ValueError, match="zero signal-to-noise"):
        fd.sample(fd.Denoiser(bumpy, zero_snr, "eps"), (1, 3, 4, 4), grid="trailing", steps=4)


def test_missing_backend_says_why_and_what_to_do(model: fd.Denoiser) -> None:
    missing = [name for name, backend in fd.backends().items() if not backend.ok]
    for name in missing:
        with pytest.raises(fd.BackendUnavailable, match="To fix it: "):
            fd.sample(model, (1, 3, 4, 4), backend=name)


@pytest.mark.parametrize(
    ("seed", "words"), [([1.7, 2.2], "1.7"), ("12", "'12'"), (True, "True"), (torch.tensor([0.5, 1.5]), "0.5")]
)
def test_seeds_must_be_integers(model: fd.Denoiser, seed: object, words: str) -> None:
    with pytest.raises(TypeError, match=f"one integer per sample, got .*{words}"):
        fd.sample(model, (2, 3, 4, 4), steps=2, seed=seed)  # type: ignore[arg-type]


def test_a_plan_for_another_schedule_is_refused(model: fd.Denoiser) -> None:
    with pytest.raises(ValueError, match="made for schedule linear.*trained on edm"):
        fd.Sampler(fd.plan("euler", "linear", 5), model)


def test_an_overflowing_sample_is_not_returned() -> None:
    huge = fd.Denoiser(lambda x, t, c: c.view(-1, 1, 1, 1).expand_as(x) * 3e38, fd.schedules.edm(), "x0")
    one = torch.ones(1)
    with pytest.raises(FloatingPointError, match="overflowed float32"):
        fd.sample(huge, (1, 1, 2, 2), steps=1, cond={"c": one}, uncond={"c": -one}, guidance=2.0)
    with pytest.raises(ValueError, match="coefficient outside float32"):
        fd.plan("euler", fd.schedules.ve(1e-3, 1e39), 3).pack("x0")


def test_one_sampler_in_two_threads_is_refused_and_two_samplers_agree(model: fd.Denoiser) -> None:
    plan = fd.plan("euler", model.schedule, 3)
    inside, leave = threading.Event(), threading.Event()

    def waits(x: Tensor, t: Tensor) -> Tensor:
        inside.set()
        leave.wait(10)
        return x

    sampler = fd.Sampler(plan, fd.Denoiser(waits, model.schedule, "x0"))
    worker = threading.Thread(target=lambda: sampler.sample((1, 3, 4, 4)))
    worker.start()
    inside.wait(10)
    with pytest.raises(RuntimeError, match="one per thread"):
        sampler.sample((1, 3, 4, 4))
    leave.set()
    worker.join()
    assert sampler.sample((1, 3, 4, 4)).shape == (1, 3, 4, 4)


def test_an_image_to_start_from_needs_a_level_to_start_at(model: fd.Denoiser) -> None:
    with pytest.raises(ValueError, match="init= needs strength= below 1"):
        fd.sample(model, (1, 3, 4, 4), steps=3, init=torch.zeros(1, 3, 4, 4))
    fd.sample(model, (1, 3, 4, 4), steps=3, init=torch.zeros(1, 3, 4, 4), start_step=1)
    with pytest.raises(TypeError, match=r"shape must be \[batch, \*sample\]"):
        fd.sample(model, 4, steps=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: fd.sample(m, (1, 1, 2, 2), fd.plan("ddim", m.schedule, 2)), TypeError, "fd.Sampler"),
        (lambda m: fd.sample(m, (1, 1, 2, 2), guidence=2.0), TypeError, "Did you mean 'guidance'"),
        (
            lambda m: fd.sample(m, (1, 1, 2, 2), guidance="two"),
            TypeError,
            "guidance must be a number or one per sample",
        ),
        (lambda m: fd.sample(m, (1, 1, 2.0, 2)), TypeError, "shape must hold integers"),
        (lambda m: fd.sample(m, (1, 1, 2, 2), "ddim_inverse"), ValueError, "ddim_inverse goes from an image up.*init="),
        (lambda m: fd.Sampler("ddim", m), TypeError, "needs a plan first, got str"),
        (lambda m: fd.Sampler(fd.plan("ddim", m.schedule, 2), m.net), TypeError, "needs a Denoiser second"),
        (lambda m: fd.plan("ddim", 20), TypeError, "needs a schedule or its name second, got 20"),
        (lambda m: fd.plan("ddim", "from_betas"), ValueError, r"Make it with schedules.from_betas\(...\)"),
        (lambda m: fd.plan("ddim", "edm", 4, guidance_schedule="cosine"), TypeError, "guidance_schedule must hold num"),
        (lambda m: fd.Denoiser(m.net, fd.schedules.edm), TypeError, "schedule must be a name or what"),
        (lambda m: fd.Denoiser(m.net, "edm", "x0", time_dtype="long"), TypeError, "torch dtype such as torch.long"),
        (lambda m: fd.models.skip_layers(m.net, ["a"]), TypeError, "skip_layers needs a Denoiser"),
    ],
)
def test_what_users_mistake_says_what_to_do(
    call: Callable[[fd.Denoiser], object], error: type[Exception], words: str
) -> None:
    model = fd.Denoiser(lambda x, t: 0.5 * x, "edm", "x0")
    with pytest.raises(error, match=words):
        call(model)
