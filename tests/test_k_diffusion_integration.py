"""fastdiff.integrations.k_diffusion beside the installed k-diffusion: the same calls, the same generator, every number.

"The same" is 1e-5 of the largest value in fp32: k-diffusion rounds its scalars to fp32 at every step, we do not.
"""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import k_diffusion_modules
import pytest
import torch
from k_diffusion_cases import (
    BY_SIGMAS,
    SHAPE,
    TABLES,
    TOLERANCE,
    Net,
    Recorder,
    apart,
    crashes,
    each_case,
    levels_of,
    model,
    run,
    sigmas_of,
    start,
    wrappers,
)
from torch import Tensor, nn

from fastdiff.integrations import k_diffusion as K
from fastdiff.integrations.k_diffusion import tables

pytest_plugins = ["k_diffusion_cases"]  # the fixture `theirs`


@pytest.mark.parametrize("zero", [True, False], ids=["to_zero", "to_noise"])
@pytest.mark.parametrize("steps", [1, 2, 10])
@each_case()
def test_same_numbers(theirs: Any, name: str, options: dict[str, Any], steps: int, zero: bool) -> None:
    """From the same generator, noise samplers left to each library; and the generator ends where theirs does."""
    if crashes(name, steps) and zero:
        return
    ours, mine = run(getattr(K, name), model, start(), *levels_of(name, steps, zero), **options)
    expected, state = run(getattr(theirs, name), model, start(), *levels_of(name, steps, zero), **options)
    assert apart(ours, expected) < TOLERANCE
    assert torch.equal(mine, state)


@pytest.mark.parametrize("name", ["sample_dpm_2_ancestral", "sample_dpmpp_2s_ancestral"])
def test_long_steps(theirs: Any, name: str) -> None:
    """sigma_down = sqrt(sigma_next^2 - sigma_up^2) cancels over a step of a grid of two: in fp32 theirs is off.

    Measured against their own code in float64 on the same numbers.
    """
    sigmas = torch.tensor([14.6, 0.03, 0.0])
    noise = Recorder(start())
    draw = lambda *_: noise(torch.tensor(1.0), torch.tensor(2.0))  # noqa: E731
    exact, _ = run(getattr(theirs, name), model, start().double(), sigmas.double(), noise_sampler=draw)
    ours, rounded = (run(getattr(lib, name), model, start(), sigmas, noise_sampler=draw)[0] for lib in (K, theirs))
    assert apart(ours, exact) < 2e-6
    assert apart(rounded, exact) > 5e-4


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_dpm_fast_with_all_its_noise(theirs: Any, steps: int) -> None:
    """At eta = 1 the long steps of ten evaluations multiply rounding by 65: both are held against float64."""
    x = start()
    noise = Recorder(x)
    draw = lambda *_: noise(torch.tensor(1.0), torch.tensor(2.0))  # noqa: E731
    options = {"eta": 1.0, "noise_sampler": draw}
    levels = levels_of("sample_dpm_fast", steps, True)
    ours, rounded = (run(lib.sample_dpm_fast, model, x, *levels, **options)[0] for lib in (K, theirs))
    torch.set_default_dtype(torch.float64)
    try:
        exact, _ = run(theirs.sample_dpm_fast, model, x.double(), *levels, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert apart(ours, exact) < 5e-6
    assert apart(ours, exact) < apart(rounded, exact)


def test_long_steps_of_dpm_fast(theirs: Any) -> None:
    """One step of 14.6 -> 0.03: -log sigma in fp32 costs them 1e-5."""
    x = start()
    ours, rounded = (run(lib.sample_dpm_fast, model, x, 0.03, 14.6, 1)[0] for lib in (K, theirs))
    torch.set_default_dtype(torch.float64)
    try:
        exact, _ = run(theirs.sample_dpm_fast, model, x.double(), 0.03, 14.6, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert apart(ours, exact) < 2e-6
    assert apart(rounded, exact) > 1e-5


@pytest.mark.parametrize("name", ["sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"])
def test_one_step_of_sde_is_the_estimate(name: str) -> None:
    """Where k-diffusion's crashes: the step to 0 is D, and draws nothing."""
    end, _ = run(getattr(K, name), model, start(), torch.tensor([14.6, 0.0]))
    assert torch.equal(end, model(start(), torch.full((2,), 14.6)))


@pytest.mark.parametrize("steps", [1, 2, 10])
@each_case()
def test_noise_sampler(theirs: Any, name: str, options: dict[str, Any], steps: int) -> None:
    """The user's noise sampler is asked for the same sigmas, bit for bit, in the same order, between the same calls."""
    if "noise_sampler" not in inspect.signature(getattr(K, name)).parameters or crashes(name, steps):
        return
    ends, asked, orders = [], [], []
    for library in (K, theirs):
        sampler, order = Recorder(start()), []

        def spy(x: Tensor, sigma: Tensor, order: list[str] = order) -> Tensor:
            order.append("model")
            return model(x, sigma)

        def draw(*sigmas: Tensor, order: list[str] = order, sampler: Recorder = sampler) -> Tensor:
            order.append("draw")
            return sampler(*sigmas)

        end, _ = run(getattr(library, name), spy, start(), *levels_of(name, steps), noise_sampler=draw, **options)
        ends.append(end)
        asked.append(sampler.asked)
        orders.append(order)
    assert apart(*ends) < TOLERANCE
    assert orders[0] == orders[1]
    for ours, expected in zip(*asked, strict=True):
        assert all(torch.equal(a, b) and a.shape == () for a, b in zip(ours, expected, strict=True))


@each_case()
def test_callback(theirs: Any, name: str, options: dict[str, Any]) -> None:
    calls: list[list[dict[str, Any]]] = [[], []]
    for library, seen in zip((K, theirs), calls, strict=True):
        run(getattr(library, name), model, start(), *levels_of(name, 7), callback=seen.append, **options)
    for ours, expected in zip(*calls, strict=True):
        assert ours.keys() == expected.keys()
        assert ours["i"] == expected["i"]
        for key in ("x", "denoised"):
            assert apart(ours[key], expected[key]) < (2 if name == "sample_dpm_fast" else 1) * TOLERANCE
        for key in ("sigma", "sigma_hat"):
            assert ours[key].shape == () and torch.allclose(ours[key], expected[key], rtol=1e-6)
    assert len({call["x"].data_ptr() for call in calls[0]}) == len(calls[0]), "each step has its own x"


@pytest.mark.parametrize("write", ["callback_x", "callback_denoised", "model"])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", BY_SIGMAS)
def test_writes_are_taken_over(theirs: Any, name: str, write: str, inference: bool) -> None:
    """Inpainting scripts write into x or denoised, in the callback or in the model; k-diffusion goes on from that.

    Where it has taken the slope before the callback, only x goes on, and denoised is not read again.
    """

    def writing(x: Tensor, sigma: Tensor) -> Tensor:
        if write == "model":
            x[:, :, :4] = 0.5
        return model(x, sigma)

    def callback(at: dict[str, Any]) -> None:
        if write.startswith("callback"):
            at[write.removeprefix("callback_")][:, :, :4] = 0.5

    with torch.inference_mode(inference):
        ends = [run(getattr(lib, name), writing, start(), sigmas_of(6), callback=callback)[0] for lib in (K, theirs)]
    assert apart(*ends) < TOLERANCE
    unwritten, _ = run(getattr(K, name), model, start(), sigmas_of(6))
    read = write != "callback_denoised" or name.removeprefix("sample_") not in tables.SLOPE_FIRST
    assert (apart(ends[0], unwritten) > 1e-2) == read


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_case()
def test_half_precision(
    theirs: Any, name: str, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x in half precision: the model sees halves, the state is fp32. Theirs keeps a half state and drifts further.

    Both against k-diffusion in fp32 with the same half-precision model and the same noise, which a program that
    replaces torch.randn_like gives to both.
    """
    seen = set()

    def half(x: Tensor, sigma: Tensor) -> Tensor:
        seen.add((x.dtype, sigma.dtype))
        return model(x.to(dtype).float(), sigma.to(dtype).float()).to(dtype).to(x.dtype)

    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(8)).to(dtype)
    monkeypatch.setattr(torch, "randn_like", lambda x: noise.to(x.dtype))
    if name.removeprefix("sample_") in tables.BROWNIAN:
        options = options | {"noise_sampler": lambda *_: noise}
    levels = levels_of(name, 10)
    ours, _ = run(getattr(K, name), half, start(dtype=dtype), *levels, **options)
    assert ours.dtype == dtype
    assert seen == {(dtype, dtype)}
    rounded, _ = run(getattr(theirs, name), half, start(dtype=dtype), *levels, **options)
    exact, _ = run(getattr(theirs, name), half, start(dtype=dtype).float(), *levels, **options)
    step = torch.finfo(dtype).eps
    assert apart(ours.float(), exact) < 4 * step
    assert apart(ours.float(), exact) < apart(rounded.float(), exact) + step


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("kind", ["eps", "eps_quantized", "v", "openai", "v_diffusion", "compvis", "compvis_v"])
def test_wrappers(monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    """k-diffusion's wrappers as they are, with extra_args that reach the network.

    The estimates are of a network that is no denoiser, so the states grow to some hundred and roundings with them.
    """
    theirs, external = k_diffusion_modules.load(monkeypatch)
    wrapper = wrappers(external, Net())[kind].eval()
    extra = {"cond": torch.tensor([1.0, -2.0])}
    levels = levels_of(name, 8)
    ends = [run(getattr(lib, name), wrapper, start(), *levels, extra_args=extra)[0] for lib in (K, theirs)]
    assert apart(*ends) < TOLERANCE
    other, _ = run(getattr(K, name), wrapper, start(), *levels, extra_args={"cond": torch.zeros(2)})
    assert apart(ends[0], other) > 1e-3


class CFGDenoiser(nn.Module):
    """Guidance as programs write it: both branches in one batch, inside the model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner_model = inner

    def forward(self, x: Tensor, sigma: Tensor, uncond: Tensor, cond: Tensor, cond_scale: float) -> Tensor:
        out = self.inner_model(torch.cat([x, x]), torch.cat([sigma, sigma]), cond=torch.cat([uncond, cond]))
        without, with_cond = out.chunk(2)
        return without + (with_cond - without) * cond_scale


@pytest.mark.parametrize("name", ["sample_euler_ancestral", "sample_dpmpp_2m", "sample_dpmpp_2m_sde", "sample_heun"])
def test_guidance_wrapper_in_half_precision_network(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A bf16 network under fp32 x, the usual arrangement."""
    theirs, external = k_diffusion_modules.load(monkeypatch)
    net = Net().bfloat16()
    inner = type("Cast", (nn.Module,), {"forward": lambda self, x, t, **kw: net(x.bfloat16(), t, **kw).float()})()
    wrapper = CFGDenoiser(wrappers(external, inner)["eps"])
    extra = {"uncond": torch.zeros(2), "cond": torch.ones(2), "cond_scale": 7.0}
    ends = [run(getattr(lib, name), wrapper, start(), sigmas_of(5), extra_args=extra)[0] for lib in (K, theirs)]
    assert apart(*ends) < 2e-3  # a rounding of x in fp32 may flip one of bf16 in the network


@pytest.mark.parametrize("name", ["sample_euler", "sample_heun", "sample_dpm_2", "sample_lms", "sample_dpmpp_2m"])
def test_upward(theirs: Any, name: str) -> None:
    """From an image to its noise: ascending sigmas, where nothing is added."""
    sigmas = sigmas_of(8, zero=False).flip(0)
    x = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))
    ends = [run(getattr(lib, name), model, x, sigmas)[0] for lib in (K, theirs)]
    assert apart(*ends) < TOLERANCE


@pytest.mark.parametrize("layout", ["channels_last", "slice", "video", "vector"])
@pytest.mark.parametrize("name", ["sample_euler_ancestral", "sample_dpmpp_3m_sde", "sample_lms"])
def test_layouts(theirs: Any, name: str, layout: str) -> None:
    shape = {"video": (2, 4, 3, 8, 8), "vector": (3, 10)}.get(layout, SHAPE)
    x = start(shape)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "slice":
        x = start((2, 4, 8, 16))[..., ::2]
    ends = [run(getattr(lib, name), model, x, sigmas_of(5))[0] for lib in (K, theirs)]
    assert apart(*ends) < TOLERANCE


def test_sigma_written_by_a_model_stays_in_its_run() -> None:
    """What a model is shown is kept from run to run, unless one wrote into it."""

    def writing(x: Tensor, sigma: Tensor) -> Tensor:
        denoised = model(x, sigma)
        sigma.zero_()
        return denoised

    ends = [run(K.sample_dpmpp_2m, f, start(), sigmas_of(5))[0] for f in (model, writing, model, writing)]
    assert all(torch.equal(end, ends[0]) for end in ends)


def test_gradients_inside_a_model(theirs: Any) -> None:
    """Guidance by a gradient, as programs write it: torch.enable_grad around their own leaf, or around x itself."""

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.enable_grad():
            x.requires_grad_()
            denoised = model(x, sigma)
            (slope,) = torch.autograd.grad(denoised.square().sum(), x)
        return denoised - 0.01 * slope

    for name in ("sample_euler_ancestral", "sample_dpmpp_2m"):
        ends = [run(getattr(lib, name), guided, start(), sigmas_of(5))[0] for lib in (K, theirs)]
        assert apart(*ends) < TOLERANCE and not ends[0].requires_grad


def test_input_is_left_alone_and_result_is_new() -> None:
    x = start()
    before = x.clone()
    first, _ = run(K.sample_euler, model, x, sigmas_of(4))
    kept = first.clone()
    run(K.sample_euler, model, 2 * x, sigmas_of(4))
    assert torch.equal(x, before)
    assert torch.equal(first, kept)


def test_no_step_returns_x() -> None:
    x = start()
    assert K.sample_euler(model, x, sigmas_of(4)[:1]) is x


def test_nan_goes_through_as_theirs(theirs: Any) -> None:
    """Programs look for nan themselves; a sampler that raised would take that from them."""
    broken = lambda x, sigma: x * float("nan")  # noqa: E731
    for library in (K, theirs):
        assert run(library.sample_dpmpp_2m, broken, start(), sigmas_of(3))[0].isnan().all()


class Test_seed:
    """The added keyword: noise from each sample's own seed, made in the row."""

    STOCHASTIC = ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", *tables.BROWNIAN)

    @pytest.mark.parametrize("name", STOCHASTIC)
    def test_sample_depends_on_its_seed_alone(self, name: str) -> None:
        function = functools.partial(getattr(K, f"sample_{name}"), disable=True)
        state = torch.get_rng_state()
        both = function(model, start(), sigmas_of(6), seed=[41, 7])
        alone = function(model, start()[1:], sigmas_of(6), seed=7)
        assert torch.equal(torch.get_rng_state(), state), "torch's generator is left alone"
        assert torch.equal(both[1:], alone)
        assert apart(function(model, start(), sigmas_of(6), seed=[41, 8])[1:], alone) > 1e-2
        assert torch.equal(function(model, start(), sigmas_of(6), seed=41)[:1], both[:1])

    @pytest.mark.parametrize("name", STOCHASTIC)
    def test_same_law(self, name: str) -> None:
        """The estimate 0 leaves the noise alone: its variance at the last sigma is sigma^2, whoever draws it."""
        sigmas = torch.tensor([4.0, 3.0, 2.0, 1.0])
        x = 4.0 * torch.randn(1, 100_000, generator=torch.Generator().manual_seed(2))
        end = getattr(K, f"sample_{name}")(lambda x, s: torch.zeros_like(x), x, sigmas, seed=1, disable=True)
        assert float(end.square().mean()) == pytest.approx(1.0, abs=4 * math.sqrt(2 / x.numel()))
        assert float((end * x).mean() / 4.0) < 0.75, "noise was replaced, not scaled down"

    def test_not_with_a_noise_sampler(self) -> None:
        with pytest.raises(ValueError, match="noise_sampler= or seed=, not both"):
            K.sample_euler_ancestral(model, start(), sigmas_of(3), noise_sampler=Recorder(start()), seed=1)

    def test_wrong_number_of_seeds(self) -> None:
        with pytest.raises(ValueError, match="one integer per sample: the batch is 2, got 3"):
            K.sample_euler_ancestral(model, start(), sigmas_of(3), seed=[1, 2, 3])
