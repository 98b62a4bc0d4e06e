"""`k_diffusion.denoiser`: k-diffusion's wrappers as networks of fastdiff's samplers give k-diffusion's pictures."""

from __future__ import annotations

from typing import Any

import k_diffusion_modules
import pytest
import torch
from k_diffusion_cases import SHAPE, Net, apart, run, sigmas_of, start, wrappers
from torch import Tensor, nn

import fastdiff as fd
from fastdiff.integrations import k_diffusion as K

KINDS = ["eps", "eps_quantized", "v", "openai", "v_diffusion", "compvis", "compvis_v"]
ENDS = {"v_diffusion": (0.03, 14.6)}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    return k_diffusion_modules.load(monkeypatch)


def ours(model: fd.Denoiser, solver: str, sigmas: Tensor, x: Tensor, **cond: Tensor) -> Tensor:
    """The picture from k-diffusion's state x at sigmas[0], whose scale is alpha in the model's coordinates."""
    times = [float(model.schedule.time_from_rho(float(sigma))) for sigma in sigmas[:-1]]
    plan = fd.plan(solver, model.schedule, grid=times)
    return fd.Sampler(plan, model).sample(x.shape, init=x * model.schedule.level(times[0]).alpha, cond=cond)


@pytest.mark.parametrize(("solver", "function"), [("dpmpp_2m", "sample_dpmpp_2m"), ("heun", "sample_heun")])
@pytest.mark.parametrize("kind", KINDS)
def test_same_picture(modules: tuple[Any, Any], kind: str, solver: str, function: str) -> None:
    theirs, external = modules
    wrapper = wrappers(external, Net())[kind].eval()
    sigmas, cond = sigmas_of(8), torch.tensor([1.0, -2.0])
    expected, _ = run(getattr(theirs, function), wrapper, start(), sigmas, extra_args={"cond": cond})
    model = K.denoiser(wrapper, *ENDS.get(kind, ()))
    got = ours(model, solver, sigmas, start(), cond=cond)
    assert apart(got, expected) < 1e-5
    other = ours(model, solver, sigmas, start(), cond=torch.zeros(2))
    assert apart(other, expected) > 1e-3, "the condition reached the network"
    opened = kind != "v_diffusion"
    assert (model.schedule.name == "from_alpha_bar") == opened and (model.prediction == "x0") != opened


@pytest.mark.parametrize("quantize", [False, True])
def test_times_are_the_wrappers(modules: tuple[Any, Any], quantize: bool) -> None:
    """Each call is shown what sigma_to_t gives: between two indices, or the nearer one, as an integer."""
    shown: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            shown.append(t.clone())
            return 0.1 * x

    betas = torch.linspace(0.0001**0.5, 0.02**0.5, 1000) ** 2
    wrapper = modules[1].DiscreteEpsDDPMDenoiser(Spy(), torch.cumprod(1 - betas, 0), quantize=quantize)
    sigmas = torch.tensor([30.0, 14.6, 3.3, 0.71, 0.05, 0.0])
    ours(K.denoiser(wrapper), "euler", sigmas, start())
    want = wrapper.sigma_to_t(sigmas[:-1])
    assert {t.dtype for t in shown} == {want.dtype}
    got = torch.stack([t[0] for t in shown])
    assert torch.equal(got, want) if quantize else torch.allclose(got, want, atol=2e-3, rtol=0)


def test_levels_are_the_wrappers(modules: tuple[Any, Any]) -> None:
    wrapper = wrappers(modules[1], Net())["eps"]
    schedule = K.denoiser(wrapper).schedule
    assert schedule.steps == 1000
    assert schedule.rho(range(1000)) == pytest.approx(wrapper.sigmas.double().numpy(), rel=1e-12)
    unknown = type("Own", (), {"sigma_min": torch.tensor(0.1), "sigma_max": 9.0, "__call__": lambda self, x, s: x})()
    for model, low, high in ((unknown, 0.1, 9.0), (lambda x, s: x, 0.002, 80.0)):
        ends = K.denoiser(model).schedule
        assert (ends.rho_min, ends.rho_max) == pytest.approx((low, high))
    assert K.denoiser(unknown, sigma_max=5.0).schedule.rho_max == 5.0


def test_a_subclass_with_its_own_maths_is_called_as_it_stands(modules: tuple[Any, Any]) -> None:
    theirs, external = modules

    class Halved(external.DiscreteEpsDDPMDenoiser):  # type: ignore[misc]
        def forward(self, x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
            return 0.5 * super().forward(x, sigma, **cond)

    plain = wrappers(external, Net())["eps"]
    halved = Halved(plain.inner_model, 1 / (1 + plain.sigmas**2), quantize=False)
    model = K.denoiser(halved)
    assert model.prediction == "x0" and model.schedule.rho_max == pytest.approx(float(plain.sigma_max))
    expected, _ = run(theirs.sample_dpmpp_2m, halved, start(), sigmas_of(6))
    assert apart(ours(model, "dpmpp_2m", sigmas_of(6), start()), expected) < 1e-5


def test_guidance_in_the_row_is_guidance_in_a_wrapper(modules: tuple[Any, Any]) -> None:
    """k-diffusion guides estimates of x0, the row raw outputs: the same, both are affine in them."""
    theirs, external = modules
    wrapper = wrappers(external, Net())["v"].eval()
    cond, uncond = torch.tensor([1.0, -2.0]), torch.zeros(2)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        without = wrapper(x, sigma, cond=uncond)
        return without + 3.0 * (wrapper(x, sigma, cond=cond) - without)

    expected, _ = run(theirs.sample_dpmpp_2m, guided, start(), sigmas_of(6))
    model = K.denoiser(wrapper)
    times = [float(model.schedule.time_from_rho(float(sigma))) for sigma in sigmas_of(6)[:-1]]
    sampler = fd.Sampler(fd.plan("dpmpp_2m", model.schedule, grid=times), model)
    x = start() * model.schedule.level(times[0]).alpha
    got = sampler.sample(SHAPE, init=x, cond={"cond": cond}, uncond={"cond": uncond}, guidance=3.0)
    assert apart(got, expected) < 1e-5


def test_half_precision_network(modules: tuple[Any, Any]) -> None:
    """The opened network is fed in its own dtype; k-diffusion would need a cast around it."""
    wrapper = wrappers(modules[1], Net().bfloat16())["eps"]
    model = K.denoiser(wrapper)
    assert model.dtype == torch.bfloat16
    single = K.denoiser(wrappers(modules[1], Net())["eps"])
    assert apart(*(ours(m, "dpmpp_2m", sigmas_of(6), start()) for m in (model, single))) < 0.05


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda w: K.denoiser(3), TypeError, "got int, which is not callable"),  # type: ignore[arg-type]
        (lambda w: K.denoiser(w, sigma_min=0.1), ValueError, "DiscreteEpsDDPMDenoiser has its own sigmas"),
        (lambda w: K.denoiser(lambda x, s: x, 5.0, 1.0), ValueError, "sigma_min must be below sigma_max"),
        (lambda w: K.denoiser(lambda x, s: x, dtype=torch.float64), TypeError, "float32, float16 or bfloat16"),
    ],
)
def test_bad_input(modules: tuple[Any, Any], call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(wrappers(modules[1], Net())["eps"])
