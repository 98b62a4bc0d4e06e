"""fastdiff.integrations.k_diffusion beside the installed k-diffusion: the same calls, the same generator, every number.

"The same" is 1e-5 of the largest value in fp32: k-diffusion rounds its scalars to fp32 at every step, we do not.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import k_diffusion_modules
import pytest
import torch
from torch import Tensor, nn

from fastdiff.integrations import k_diffusion as K
from fastdiff.integrations.k_diffusion import loop, tables

TOLERANCE = 1e-5
SHAPE = (2, 4, 8, 8)
ALL = [name for name in dir(K) if name.startswith("sample_")]
TABLES = [name for name in ALL if name != "sample_dpm_adaptive"]
BY_SIGMAS = [name for name in TABLES if name != "sample_dpm_fast"]
CHURN = {"s_churn": 3.0, "s_tmin": 0.1, "s_tmax": 8.0, "s_noise": 1.02}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "sample_euler": [{}, CHURN, {"s_churn": 200.0}],
    "sample_heun": [{}, CHURN],
    "sample_dpm_2": [{}, CHURN],
    "sample_lms": [{}, {"order": 1}, {"order": 3}],
    "sample_dpmpp_2m": [{}],
    "sample_dpmpp_2m_sde": [{}, {"eta": 0.0}, {"eta": 0.5, "s_noise": 1.1, "solver_type": "heun"}],
    "sample_dpmpp_sde": [{}, {"eta": 0.0}, {"eta": 0.5, "r": 0.3}],
    "sample_dpm_fast": [{}, {"eta": 1.0}, {"eta": 0.4, "s_noise": 1.1}],
}
OTHERS: list[dict[str, Any]] = [{}, {"eta": 0.0}, {"eta": 0.4, "s_noise": 0.9}, {"s_noise": 0.0}]
CASES = [(name, options) for name in TABLES for options in OPTIONS.get(name, OTHERS)]


def shown(value: Any) -> str:
    return "-".join(f"{k}={v}" for k, v in value.items()) or "default" if isinstance(value, dict) else str(value)


def each_case() -> Any:
    return pytest.mark.parametrize(("name", "options"), CASES, ids=shown)


class Net(nn.Module):
    """A UNet in small: down, time embedding, skip connection, up; called as net(x, t) or net(x, t, cond=...)."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Conv2d(channels, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.time = nn.Linear(2, 16)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.out = nn.Conv2d(16, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, **_: Any) -> Tensor:
        t = t.to(x.dtype) / 1000.0
        h = self.inner(x)
        d = torch.tanh(self.down(h) + self.time(torch.stack([t.sin(), t.cos()], 1))[:, :, None, None])
        out = self.out(torch.tanh(h + self.up(d)))
        return out if cond is None else out + 0.1 * cond[:, None, None, None].to(x.dtype)


def model(x: Tensor, sigma: Tensor, scale: float = 1.0, **_: Any) -> Tensor:
    """A denoiser bent enough that a wrong weight shows."""
    s = sigma.view(-1, *[1] * (x.ndim - 1))
    return scale * (x / (1.0 + s * s) + 0.3 * torch.sin(x + s))


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    return k_diffusion_modules.load(monkeypatch)[0]


@pytest.fixture
def external(monkeypatch: pytest.MonkeyPatch) -> Any:
    return k_diffusion_modules.load(monkeypatch)[1]


def lowest(steps: int) -> float:
    """The last noisy level of a few steps or many; for steps longer than this, see test_long_steps."""
    return max(0.03, 14.6 / 6.0 ** max(1, steps - 1))


def sigmas_of(steps: int, zero: bool = True) -> Tensor:
    levels = torch.linspace(math.log(14.6), math.log(lowest(steps)), steps if zero else steps + 1).exp()
    return torch.cat([levels, levels.new_zeros(1)]) if zero else levels


def levels_of(name: str, steps: int, zero: bool = True) -> tuple[Any, ...]:
    return (lowest(steps), 14.6, steps) if name == "sample_dpm_fast" else (sigmas_of(steps, zero),)


def start(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Tensor:
    return (14.6 * torch.randn(shape, generator=torch.Generator().manual_seed(3))).to(dtype)


def run(function: Callable[..., Tensor], *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The result and the generator's state after it, both from one seed."""
    torch.manual_seed(5)
    options.setdefault("disable", True)
    end = function(*args, **options)
    return end, torch.get_rng_state()


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def crashes(name: str, steps: int) -> bool:
    """With one step these of k-diffusion read a variable they have not set."""
    return steps == 1 and name in ("sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde")


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


class Recorder:
    """A noise sampler that remembers what it was asked."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.asked = x, []

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        self.asked.append((sigma, sigma_next))
        return torch.cos(17.0 * sigma + 3.0 * sigma_next + torch.arange(self.x.numel()).view_as(self.x))


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


def wrappers(external: Any, net: nn.Module) -> dict[str, nn.Module]:
    alphas_cumprod = torch.cumprod(1 - torch.linspace(0.0001**0.5, 0.02**0.5, 1000) ** 2, 0)

    class Diffusion:  # what OpenAIDenoiser asks of guided-diffusion's object
        def __init__(self) -> None:
            self.alphas_cumprod = alphas_cumprod.numpy()

        def _scale_timesteps(self, t: Tensor) -> Tensor:
            return t

    both = lambda x, t, **kw: torch.cat([net(x, t, **kw), net(x, t)], 1)  # noqa: E731
    learned = type("Learned", (nn.Module,), {"forward": lambda self, x, t, **kw: both(x, t, **kw)})()
    return {
        "eps": external.DiscreteEpsDDPMDenoiser(net, alphas_cumprod, quantize=False),
        "eps_quantized": external.DiscreteEpsDDPMDenoiser(net, alphas_cumprod, quantize=True),
        "v": external.DiscreteVDDPMDenoiser(net, alphas_cumprod, quantize=False),
        "openai": external.OpenAIDenoiser(learned, Diffusion()),
        "v_diffusion": external.VDenoiser(net),
    }


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("kind", ["eps", "eps_quantized", "v", "openai", "v_diffusion"])
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
    unconditional, _ = run(getattr(K, name), wrapper, start(), *levels)
    assert apart(ends[0], unconditional) > 1e-3


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


@pytest.mark.parametrize("disable", [True, False])
def test_progress(theirs: Any, disable: bool, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for library in (K, theirs):
        for name in ("sample_euler", "sample_dpm_fast"):
            run(getattr(library, name), model, start(), *levels_of(name, 5), disable=disable)
        shown.append(capsys.readouterr().err)
    assert [text.count("5/5") for text in shown] == [0 if disable else 2] * 2


def test_tables_and_buffers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated call compiles, binds and allocates nothing; what is kept is bounded."""
    K.clear()
    compiled = []
    real = tables.compile_levels
    monkeypatch.setattr(tables, "compile_levels", lambda *args: compiled.append(args[0]) or real(*args))
    sigmas = sigmas_of(9) + 0.001 * torch.rand(1, generator=torch.Generator().manual_seed(9))
    run(K.sample_dpmpp_2m, model, start(), sigmas)
    (memory,) = loop._kept
    step = next(iter(memory._steps.values()))[0]
    run(K.sample_dpmpp_2m, model, start(), sigmas.clone())
    assert compiled == ["dpmpp_2m"]
    assert loop._kept == [memory] and next(iter(memory._steps.values()))[0] is step
    for steps in range(2, 2 + loop.KEPT_STEPS + 3):
        run(K.sample_euler, model, start(), sigmas_of(steps))
    assert loop._kept == [memory] and len(memory._steps) == loop.KEPT_STEPS
    for width in range(1, loop.KEPT_BUFFERS + 3):
        run(K.sample_euler, model, start((1, width)), sigmas_of(3))
    assert len(loop._kept) == loop.KEPT_BUFFERS
    assert tables.on_sigmas.cache_info().maxsize == tables.TABLES
    K.clear()
    assert loop._kept == []


@pytest.mark.parametrize("name", ["sample_dpmpp_2m", "sample_euler_ancestral"])
def test_two_threads(name: str) -> None:
    """Each call has buffers of its own, also one that starts inside another's model."""
    gate = threading.Barrier(2, timeout=20)
    alone = [getattr(K, name)(model, k * start(), sigmas_of(5), seed=k, disable=True) for k in (1, 2)]
    ends: dict[int, Tensor] = {}

    def meet(x: Tensor, sigma: Tensor) -> Tensor:
        gate.wait()
        return model(x, sigma)

    def work(k: int) -> None:
        ends[k] = getattr(K, name)(meet, k * start(), sigmas_of(5), seed=k, disable=True)

    threads = [threading.Thread(target=work, args=(k,)) for k in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert torch.equal(ends[1], alone[0]) and torch.equal(ends[2], alone[1])


def test_call_inside_a_model() -> None:
    inner = lambda x, sigma: K.sample_euler(model, x, sigmas_of(2), disable=True)  # noqa: E731
    outer, _ = run(K.sample_euler, inner, start(), sigmas_of(3))
    x = start()
    for s, t in zip(sigmas_of(3)[:-1], sigmas_of(3)[1:], strict=True):
        denoised, _ = run(K.sample_euler, model, x, sigmas_of(2))
        x = denoised + t / s * (x - denoised)
    assert apart(outer, x) < TOLERANCE


def test_interrupted_run_leaves_nothing_behind() -> None:
    class Interrupted(BaseException):
        pass

    def stopping(at: dict[str, Any]) -> None:
        if at["i"] == 2:
            raise Interrupted

    expected, _ = run(K.sample_dpmpp_2m, model, start(), sigmas_of(6))
    with pytest.raises(Interrupted):
        run(K.sample_dpmpp_2m, model, start(), sigmas_of(6), callback=stopping)
    assert torch.equal(run(K.sample_dpmpp_2m, model, start(), sigmas_of(6))[0], expected)


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("sample_euler", {"sigmas": torch.tensor([1.0, 2.0, 0.0])}, ValueError, "descending"),
    ("sample_euler", {"sigmas": torch.tensor([2.0, 1.0, 1.0, 0.0])}, ValueError, "no two equal"),
    ("sample_euler_ancestral", {"sigmas": torch.tensor([1.0, 2.0])}, ValueError, "descending"),
    ("sample_euler", {"sigmas": torch.tensor([1.0, 2.0]), "s_churn": 1.0}, ValueError, "descending"),
    ("sample_euler", {"sigmas": torch.tensor([float("nan"), 0.0])}, ValueError, "finite"),
    ("sample_euler", {"sigmas": torch.tensor([1.0, -1.0])}, ValueError, ">= 0, got 1, -1"),
    ("sample_euler", {"sigmas": torch.ones(2, 3)}, ValueError, r"\[steps \+ 1\], got torch.float32 \(2, 3\)"),
    ("sample_euler", {"sigmas": [1.0, 0.0]}, ValueError, "must be a floating-point tensor"),
    ("sample_euler", {"sigmas": torch.tensor([3, 0])}, ValueError, "got torch.int64"),
    ("sample_euler_ancestral", {"eta": torch.tensor(1.0)}, ValueError, "eta is an amount of noise"),
    ("sample_euler", {"x": torch.ones(2, 3, dtype=torch.float64)}, ValueError, "float32, float16 or bfloat16"),
    ("sample_euler", {"x": torch.ones(2, 3, dtype=torch.long)}, ValueError, "got torch.int64"),
    ("sample_euler", {"x": torch.ones(3)}, ValueError, r"\[batch, \*sample\]"),
    ("sample_euler", {"x": torch.ones(0, 3)}, ValueError, "at least one element"),
    ("sample_euler", {"s_churn": -1.0}, ValueError, "s_churn is an amount of noise"),
    ("sample_euler_ancestral", {"eta": float("nan")}, ValueError, "eta is an amount of noise"),
    ("sample_euler", {"eta": 1.0}, TypeError, "eta"),
    ("sample_dpm_2_ancestral", {"eta": 9.0}, ValueError, "leave eta at 1 or below"),
    ("sample_lms", {"order": 5}, ValueError, "order must be an integer of 1..4"),
    ("sample_dpmpp_2m_sde", {"solver_type": "euler"}, ValueError, "'heun' or 'midpoint'"),
    ("sample_dpmpp_sde", {"r": 0.0}, ValueError, r"\(0, 1\]"),
    ("sample_euler", {"model": lambda x, s: x[:1]}, ValueError, r"returned \(1, 4, 8, 8\) on cpu in call 0"),
    ("sample_euler", {"model": lambda x, s: x.to("meta")}, ValueError, "on meta in call 0"),
    ("sample_euler", {"model": lambda x, s: (x,)}, TypeError, "returned tuple in call 0"),
    ("sample_euler", {"model": lambda x, s: x.long()}, TypeError, "returned torch.int64"),
    ("sample_euler_ancestral", {"noise_sampler": lambda s, t: torch.ones(4)}, ValueError, r"returned \(4,\), expected"),
]


@pytest.mark.parametrize(
    ("name", "change", "kind", "text"), BAD, ids=[f"{b[0]}-{next(iter(b[1]))}-{i}" for i, b in enumerate(BAD)]
)
def test_bad_input(name: str, change: dict[str, Any], kind: type[Exception], text: str) -> None:
    arguments = {"model": model, "x": start(), "sigmas": sigmas_of(4), "disable": True} | change
    with pytest.raises(kind, match=text):
        getattr(K, name)(**arguments)
    run(K.sample_euler, model, start(), sigmas_of(4))  # nothing is left half-done


@pytest.mark.parametrize(
    ("levels", "text"),
    [((0.0, 1.0, 5), "0 < sigma_min"), ((2.0, 1.0, 5), "0 < sigma_min"), ((0.1, 1.0, 0), "number of model calls")],
)
def test_bad_input_of_dpm_fast(levels: tuple[Any, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        K.sample_dpm_fast(model, start(), *levels, disable=True)


def test_double_output_is_taken_as_float() -> None:
    ends = [run(K.sample_euler, f, start(), sigmas_of(4))[0] for f in (model, lambda x, s: model(x, s).double())]
    assert torch.equal(*ends)


def test_brownian_without_torchsde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchsde", None)
    with pytest.raises(ImportError, match="pip install torchsde, or give noise_sampler=, or seed="):
        K.sample_dpmpp_2m_sde(model, start(), sigmas_of(4), disable=True)
    assert K.sample_dpmpp_2m_sde(model, start(), sigmas_of(4), disable=True, eta=0.0).isfinite().all()


def test_brownian_tree_is_theirs(theirs: Any) -> None:
    """One seed, seeds per sample, either direction: the same numbers."""
    x, sigmas = start(), torch.tensor([9.0, 4.0, 1.0, 0.2])
    for seed in (None, 3, [3, 4]):
        torch.manual_seed(0)
        ours = K.BrownianTreeNoiseSampler(x, sigmas.min(), sigmas.max(), seed)
        torch.manual_seed(0)
        expected = theirs.BrownianTreeNoiseSampler(x, sigmas.min(), sigmas.max(), seed)
        for s, t in [(sigmas[0], sigmas[1]), (sigmas[1], sigmas[3]), (sigmas[3], sigmas[2])]:
            assert torch.equal(ours(s, t), expected(s, t))
    with pytest.raises(ValueError, match="the batch is 2, got 3"):
        K.BrownianTreeNoiseSampler(x, 0.2, 9.0, [1, 2, 3])


def test_adaptive_is_theirs_or_a_clear_error(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    end, info = K.sample_dpm_adaptive(model, start(), 0.03, 14.6, disable=True, return_info=True)
    expected, known = theirs.sample_dpm_adaptive(model, start(), 0.03, 14.6, disable=True, return_info=True)
    assert torch.equal(end, expected) and info == known
    monkeypatch.setitem(__import__("sys").modules, "k_diffusion.sampling", None)
    with pytest.raises(NotImplementedError, match="sample_dpm_adaptive chooses its steps as it goes"):
        K.sample_dpm_adaptive(model, start(), 0.03, 14.6)


class Test_patch:
    def test_everything_of_k_diffusion_and_back(self, theirs: Any) -> None:
        before = dict(vars(theirs))
        report = K.patch()
        assert report.replaced == tuple(TABLES)
        assert report.left == {"sample_dpm_adaptive": "not a table: it chooses its steps as it goes"}
        assert report.module == "k_diffusion.sampling"
        assert K.patch() == report, "twice is once"
        for name in TABLES:
            assert inspect.signature(getattr(theirs, name)) == inspect.signature(before[name])
            ours, state = run(getattr(theirs, name), model, start(), *levels_of(name, 5))
            expected, their_state = run(before[name], model, start(), *levels_of(name, 5))
            assert not torch.equal(ours, expected) or name == "sample_euler", "it is not their code that ran"
            assert apart(ours, expected) < TOLERANCE and torch.equal(state, their_state)
        assert K.unpatch().replaced == tuple(TABLES)
        assert dict(vars(theirs)) == before
        assert K.unpatch().replaced == ()

    def test_generator_is_left_alone(self, theirs: Any) -> None:
        state = torch.get_rng_state()
        K.patch(theirs)
        assert torch.equal(torch.get_rng_state(), state)
        K.unpatch(theirs)

    def test_programs_noise_is_used(self, theirs: Any) -> None:
        """As A1111 does: another object in torch's place in the module, with a randn_like of its own."""

        class Hijack:
            def __getattr__(self, name: str) -> Any:
                return getattr(torch, name)

            def randn_like(self, x: Tensor) -> Tensor:
                return torch.full_like(x, 0.25)

        ends = []
        for patched in (False, True):
            theirs.torch = torch
            if patched:
                K.patch(theirs)
            theirs.torch = Hijack()
            for name, options in (
                ("sample_euler_ancestral", {}),
                ("sample_euler", CHURN),
                ("sample_dpm_fast", {"eta": 1.0}),
            ):
                ends.append(run(getattr(theirs, name), model, start(), *levels_of(name, 6), **options)[0])
        K.unpatch(theirs)
        for expected, ours in zip(ends[:3], ends[3:], strict=True):
            assert apart(ours, expected) < TOLERANCE

    def test_programs_progress_bar_is_used(self, theirs: Any) -> None:
        seen = []

        def trange(count: int, disable: Any = None) -> Iterator[int]:
            for i in range(count):
                seen.append(i)
                yield i

        K.patch(theirs)
        theirs.trange = trange
        run(theirs.sample_dpmpp_2m, model, start(), sigmas_of(4))
        assert seen == [0, 1, 2, 3]
        K.unpatch(theirs)

    def test_changed_copies(self, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """A program's copy: seeded noise and sparing draws are followed; other maths and other signatures are left."""
        copy = k_diffusion_modules.copy_of("sampling", monkeypatch, as_name="program.sampling")

        def seeded(x: Tensor, seed: int | None = None) -> Any:
            generator = torch.Generator().manual_seed(0 if seed is None else seed + 1)
            return lambda sigma, sigma_next: torch.randn(x.shape, generator=generator)

        @functools.wraps(theirs.sample_euler_ancestral)
        def ancestral(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, **options: Any) -> Tensor:
            if options.get("noise_sampler") is None:
                options["noise_sampler"] = copy.default_noise_sampler(x, seed=(extra_args or {}).get("seed"))
            return theirs.sample_euler_ancestral(model, x, sigmas, extra_args, **options)

        @functools.wraps(theirs.sample_euler)
        def sparing(
            model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, disable: Any = None, s_churn: float = 0.0,
            s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
        ) -> Tensor:  # fmt: skip
            for i in range(len(sigmas) - 1):
                on = s_churn > 0 and s_tmin <= sigmas[i] <= s_tmax
                hat = sigmas[i] * (1 + min(s_churn / (len(sigmas) - 1), 2**0.5 - 1)) if on else sigmas[i]
                if on:
                    x = x + torch.randn_like(x) * s_noise * (hat**2 - sigmas[i] ** 2) ** 0.5
                d = (x - model(x, hat * x.new_ones(len(x)), **(extra_args or {}))) / hat
                x = x + d * (sigmas[i + 1] - hat)
            return x

        def other(model, x, sigmas, extra_args=None, callback=None, disable=None):
            return 1.001 * theirs.sample_dpmpp_2m(model, x, sigmas, extra_args, callback, disable)

        def needs_more(model, x, sigmas, extra_args=None, callback=None, disable=None, order=4):
            return x * model.inner_model.scale

        def with_option(model, x, sigmas, extra_args=None, callback=None, disable=None, flow=False, **options):
            return x

        changed = {
            "sample_euler_ancestral": ancestral, "sample_euler": sparing, "sample_dpmpp_2m": other,
            "sample_lms": needs_more, "sample_heun": with_option, "sample_new": with_option,
        }  # fmt: skip
        copy.default_noise_sampler = seeded
        for name, function in changed.items():
            monkeypatch.setattr(copy, name, function, raising=False)
        report = K.patch(copy)
        left = dict(report.left)
        assert "1.0e-03 apart" in left.pop("sample_dpmpp_2m")
        assert "does not run on a plain model: AttributeError" in left.pop("sample_lms")
        assert "signature differs: it has flow=False" in left.pop("sample_heun")
        assert left.pop("sample_new") == "no table of this function here"
        # the copy's dpm_2_ancestral and 2s_ancestral do not pass the seed on, as its default_noise_sampler now expects
        assert left.keys() <= {"sample_dpm_adaptive"}, left
        for name, options in (("sample_euler_ancestral", {}), ("sample_euler", CHURN), ("sample_euler", {})):
            for seed in (4, 5):
                extra = {"extra_args": {"seed": seed}}
                ours, state = run(getattr(copy, name), model, start(), sigmas_of(6), **options, **extra)
                expected, their_state = run(changed[name], model, start(), sigmas_of(6), **options, **extra)
                assert apart(ours, expected) < TOLERANCE and torch.equal(state, their_state)
        assert K.unpatch(copy).replaced == report.replaced
        assert copy.sample_euler is sparing

    def test_what_no_table_covers_runs_as_before(self, theirs: Any) -> None:
        original = theirs.sample_euler
        x = start().double()
        K.patch(theirs)
        with pytest.warns(UserWarning, match="got torch.float64. The module's own sample_euler runs instead"):
            end = theirs.sample_euler(model, x, sigmas_of(4), disable=True)
        assert torch.equal(end, run(original, model, x, sigmas_of(4))[0])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(theirs.sample_euler, model, start(), sigmas_of(4))
        with pytest.raises(ValueError, match="float64"):
            theirs.sample_euler(model, x, sigmas_of(4), seed=1)
        K.unpatch(theirs)

    def test_errors_of_the_model_are_not_caught(self, theirs: Any) -> None:
        K.patch(theirs)
        with pytest.raises(ValueError, match=r"returned \(1, 4, 8, 8\)"):
            theirs.sample_euler(lambda x, s: x[:1], start(), sigmas_of(4), disable=True)
        K.unpatch(theirs)

    def test_no_module(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "k_diffusion.sampling", None)
        with pytest.raises(ImportError, match=r"comfy.k_diffusion.sampling"):
            K.patch()
        with pytest.raises(TypeError, match="module must be a module"):
            K.patch("k_diffusion.sampling")  # type: ignore[arg-type]


def test_page(theirs: Any, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/k_diffusion.md: its Python runs as it stands, its table has every function, its tests exist."""
    text = (root / "docs" / "k_diffusion.md").read_text()
    torch.manual_seed(0)
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.S)), {})
    printed = capsys.readouterr().out
    assert "5 0.10" in printed and "('sample_dpm_2', " in printed
    lines = re.findall(r"^\| `(sample_\w+)` \| (\S+) \| the same \|", text, re.M)
    assert [name for name, _ in lines] == TABLES
    assert all(float(difference) <= TOLERANCE for _, difference in lines)
    for words in re.findall(r"`pytest -k (\w+)`", text):
        assert f"def test_{words}" in Path(__file__).read_text(), words


@pytest.mark.parametrize("name", ALL)
def test_signatures_are_theirs(theirs: Any, name: str) -> None:
    ours = inspect.signature(getattr(K, name)).parameters.values()
    plain = [(p.name, p.default) for p in ours if p.name not in ("seed", "host")]
    assert plain == [(p.name, p.default) for p in inspect.signature(getattr(theirs, name)).parameters.values()]
