"""What the tests of the k-diffusion integration share: every function with options, a model, one run from one seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import k_diffusion_modules
import pytest
import torch
from torch import Tensor, nn

from fastdiff.integrations import k_diffusion as K

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
    "sample_dpm_fast": [{}, {"eta": 0.4, "s_noise": 1.1}],
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


def wrappers(external: Any, net: nn.Module) -> dict[str, nn.Module]:
    alphas_cumprod = torch.cumprod(1 - torch.linspace(0.0001**0.5, 0.02**0.5, 1000) ** 2, 0)

    class Diffusion:  # what OpenAIDenoiser asks of guided-diffusion's object
        def __init__(self) -> None:
            self.alphas_cumprod = alphas_cumprod.numpy()

        def _scale_timesteps(self, t: Tensor) -> Tensor:
            return t

    class CompVis(nn.Module):  # what CompVisDenoiser asks of latent diffusion's model
        def __init__(self) -> None:
            super().__init__()
            self.alphas_cumprod = alphas_cumprod
            self.net = net

        def apply_model(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            return self.net(x, t, cond=cond)

    both = lambda x, t, **kw: torch.cat([net(x, t, **kw), net(x, t)], 1)  # noqa: E731
    learned = type("Learned", (nn.Module,), {"forward": lambda self, x, t, **kw: both(x, t, **kw)})()
    return {
        "eps": external.DiscreteEpsDDPMDenoiser(net, alphas_cumprod, quantize=False),
        "eps_quantized": external.DiscreteEpsDDPMDenoiser(net, alphas_cumprod, quantize=True),
        "v": external.DiscreteVDDPMDenoiser(net, alphas_cumprod, quantize=False),
        "openai": external.OpenAIDenoiser(learned, Diffusion()),
        "v_diffusion": external.VDenoiser(net),
        "compvis": external.CompVisDenoiser(CompVis()),
        "compvis_v": external.CompVisVDenoiser(CompVis()),
    }


def model(x: Tensor, sigma: Tensor, scale: float = 1.0, **_: Any) -> Tensor:
    """A denoiser bent enough that a wrong weight shows."""
    s = sigma.view(-1, *[1] * (x.ndim - 1))
    return scale * (x / (1.0 + s * s) + 0.3 * torch.sin(x + s))


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    return k_diffusion_modules.load(monkeypatch)[0]


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


class Recorder:
    """A noise sampler that remembers what it was asked."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.asked = x, []

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        self.asked.append((sigma, sigma_next))
        return torch.cos(17.0 * sigma + 3.0 * sigma_next + torch.arange(self.x.numel()).view_as(self.x))
