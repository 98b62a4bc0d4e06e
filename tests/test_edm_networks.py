"""EDM and EDM2 networks: called as NVlabs' classes are, sampled as their Algorithm 2 does, read from files."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fastdiff as fd
from fastdiff.integrations import edm

SHAPE = (2, 3, 8, 8)
LABELS = 5


class Precond(nn.Module):
    """What NVlabs' preconditioned classes have: D = c_skip x + c_out F in fp32, one-hot labels (Karras et al. 2022)."""

    def __init__(self, label_dim: int = LABELS, sigma_min: float = 0.0, sigma_max: float = math.inf, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.img_resolution, self.img_channels, self.label_dim = 8, 3, label_dim
        self.sigma_min, self.sigma_max, self.use_fp16 = sigma_min, sigma_max, True
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.label = nn.Linear(max(label_dim, 1), 3)
        self.asked: list[bool] = []

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, force_fp32: bool = False) -> Tensor:
        self.asked.append(force_fp32)
        x, sigma = x.float(), sigma.float().reshape(-1, 1, 1, 1)
        root = (sigma**2 + 0.25).sqrt()
        inner = torch.tanh(self.conv(x / root) + sigma.log() / 4)
        if self.label_dim:
            given = torch.zeros(1, self.label_dim) if class_labels is None else class_labels.float()
            inner = inner + self.label(given.reshape(-1, self.label_dim))[:, :, None, None]
        return 0.25 / root**2 * x + 0.5 * sigma / root * inner

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return torch.as_tensor(sigma)


class Rounding(Precond):
    """One that was trained on few levels, as iDDPM's preconditioning is."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("known", torch.logspace(math.log10(120.0), math.log10(0.005), 40))
        self.sigma_min, self.sigma_max = 0.005, 120.0

    def round_sigma(self, sigma: Tensor) -> Tensor:
        nearest = (sigma.float().reshape(-1, 1) - self.get_buffer("known")).abs().argmin(1)
        return self.get_buffer("known")[nearest].to(sigma.dtype).reshape(sigma.shape)


class Uncertain(Precond):
    """EDM2's: no sigma_min, sigma_max or round_sigma, half-precision weights, log u beside D."""

    def __init__(self, label_dim: int = LABELS, seed: int = 0) -> None:
        super().__init__(label_dim, seed=seed)
        del self.sigma_min, self.sigma_max
        self.round_sigma = None  # type: ignore[assignment]

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, **options: Any) -> Any:
        return super().forward(x, sigma, class_labels, **options), torch.zeros(len(x))


def algorithm_2(
    denoise: Callable[[Tensor, Tensor], Tensor],
    net: Any,
    latents: Tensor,
    normals: Tensor,
    steps: int,
    sigma_max: float = 80.0,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Karras et al. 2022, Alg. 2 in float64 with NVlabs' rounding: levels t_i and t_hat as the network rounds them."""
    rounded = getattr(net, "round_sigma", None) or (lambda sigma: sigma)
    top = min(sigma_max, getattr(net, "sigma_max", math.inf))
    bottom = max(0.002, getattr(net, "sigma_min", 0.0))
    ramp = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    t = rounded((top ** (1 / 7) + ramp * (bottom ** (1 / 7) - top ** (1 / 7))) ** 7)
    t = torch.cat([t, torch.zeros(1)]).double()
    x = latents.double() * t[0]
    for i in range(steps):
        gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_min <= t[i] <= s_max else 0.0
        hat = rounded(t[i] + gamma * t[i])
        x = x + (hat**2 - t[i] ** 2).sqrt() * s_noise * normals[i]
        slope = (x - denoise(x, hat).double()) / hat
        ahead = x + (t[i + 1] - hat) * slope
        if i < steps - 1:
            second = (ahead - denoise(ahead, t[i + 1]).double()) / t[i + 1]
            ahead = x + (t[i + 1] - hat) * 0.5 * (slope + second)
        x = ahead
    return x


def asking(net: nn.Module, labels: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        output = net(x.float(), sigma, labels)
        return output[0] if isinstance(output, tuple) else output

    return denoise


def draws(steps: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(SHAPE, generator=generator), torch.randn(steps, *SHAPE, generator=generator)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "churn", [{}, {"s_churn": 40.0}, {"s_churn": 30.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}]
)
@torch.no_grad()
def test_heun_is_their_sampler(churn: dict[str, float]) -> None:
    """18 steps of `heun` on the karras grid are Alg. 2; with their default S_max the first level is churned past 80."""
    net, steps = Precond().eval(), 18
    model = edm.wrap(net)
    labels = torch.tensor([4, 1])
    one_hot = nn.functional.one_hot(labels, LABELS)
    latents, normals = draws(steps)
    expected = algorithm_2(asking(net, one_hot), net, latents, normals, steps, **churn)
    options = {"s_tmin" if k == "s_min" else "s_tmax" if k == "s_max" else k: v for k, v in churn.items()}
    plan = fd.plan("heun", model.schedule, steps, "karras", **options)
    # levels outside [s_min, s_max] draw nothing here, and have a normal of their own there
    levels = [level.sigma for level in plan.levels[:-1]]
    used = [i for i, t in enumerate(levels) if churn and churn.get("s_min", 0.0) <= t <= churn.get("s_max", math.inf)]
    assert plan.draws == len(used)
    noise = normals[used] if used else "white"
    got = fd.Sampler(plan, model).sample(SHAPE, init=80.0 * latents, noise=noise, cond={"class_labels": labels})
    close(got, expected)
    if not churn:
        plan = fd.plan("edm", model.schedule, steps, "karras", s_churn=0.0)
        close(fd.Sampler(plan, model).sample(SHAPE, init=80.0 * latents, cond={"class_labels": one_hot}), expected)


@torch.no_grad()
def test_levels_are_rounded_as_the_network_rounds() -> None:
    """A network trained on 40 levels: 18 steps go through 18 of them, from the one next to 80 to its own sigma_min."""
    net = Rounding().eval()
    model, steps = edm.wrap(net), 18
    levels = edm.levels(model, steps)
    assert len(levels) == steps and levels[-1] == pytest.approx(0.005) and abs(math.log(levels[0] / 80.0)) < 0.14
    latents, normals = draws(steps)
    labels = torch.tensor([0, 2])
    expected = algorithm_2(asking(net, torch.eye(LABELS)[labels]), net, latents, normals, steps)
    plan = fd.plan("heun", model.schedule, grid=levels)
    got = fd.Sampler(plan, model).sample(SHAPE, init=levels[0] * latents, cond={"class_labels": labels})
    close(got, expected)
    assert edm.levels(model, 200) == edm.levels(model, 200, rho=7.0) and len(edm.levels(model, 200)) < 40
    karras = fd.grids.make("karras", edm.wrap(Precond()).schedule, steps)
    assert edm.levels(edm.wrap(Precond()), steps) == pytest.approx(karras.tolist(), rel=1e-14)
    assert edm.levels(edm.wrap(Precond()), 1) == [80.0]


@torch.no_grad()
def test_edm2_and_autoguidance() -> None:
    """EDM2's sampler with a second network: D = Dg + w (D - Dg) at every evaluation, the guide without labels."""
    net, worse = Uncertain().half(), Uncertain(0, seed=5)
    net.float()  # half-precision weights, as its snapshots are stored, computed in fp32
    model, guide = edm.wrap(net), edm.wrap(worse)
    labels, steps, w = torch.tensor([3, 3]), 8, 2.2
    strong, weak = asking(net, torch.eye(LABELS)[labels]), asking(worse)
    latents, normals = draws(steps)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.lerp(weak(x, sigma).double(), strong(x, sigma).double(), w)

    expected = algorithm_2(guided, net, latents, normals, steps)
    sampler = fd.Sampler(fd.plan("heun", model.schedule, steps, "karras"), model, guide=guide)
    init = 80.0 * latents
    close(sampler.sample(SHAPE, init=init, cond={"class_labels": labels}, uncond={}, guidance=w), expected)
    with pytest.raises(ValueError, match=r"without classes.*as a guide give it uncond=\{\}"):
        sampler.sample(SHAPE, init=init, cond={"class_labels": labels}, guidance=w)


def test_what_is_read_from_the_network() -> None:
    model = edm.wrap(Precond(sigma_max=50.0))
    assert model.shape == (3, 8, 8) and model.null_label == LABELS and model.dtype == torch.float32
    assert (model.schedule, model.prediction) == (fd.schedules.edm(0.002, 50.0), "x0")
    assert edm.wrap(Uncertain(0)).null_label is None and edm.wrap(Uncertain()).schedule == fd.schedules.edm()
    assert edm.wrap(Precond(), sigma_min=0.01).schedule == fd.schedules.edm(0.01, 80.0)
    half = edm.wrap(Uncertain().half())
    assert half.dtype == torch.float32  # EDM2's snapshots: weights in half precision, x never


@torch.no_grad()
def test_labels() -> None:
    """Integers, one-hot rows and the integer for no class are what the network itself makes of rows, and of none."""
    net = Precond()
    model, x, sigma = edm.wrap(net, force_fp32=True), torch.randn(SHAPE), torch.tensor([2.0, 30.0])
    rows = torch.eye(LABELS)[[4, 0]]
    expected = net(x, sigma, rows)
    for labels in (torch.tensor([4, 0]), rows, rows.long()):
        torch.testing.assert_close(model(x, sigma, {"class_labels": labels}), expected, rtol=0, atol=0)
    torch.testing.assert_close(model(x, sigma, rows), expected, rtol=0, atol=0)
    nothing = torch.tensor([model.null_label, model.null_label])
    torch.testing.assert_close(model(x, sigma, {"class_labels": nothing}), net(x, sigma), rtol=0, atol=0)
    assert net.asked == [False, True, True, True, True, True, False]
    for bad, error, words in (
        (None, ValueError, "got no class_labels"),
        (7, TypeError, "expected a tensor"),
        (torch.tensor([1.0, 2.0]), TypeError, "expected integers"),
        (torch.tensor([0, LABELS + 1]), ValueError, "expected integers from 0 to 5; 5 is no class"),
        (torch.tensor([0, 1, 2]), ValueError, r"shape \(3,\), expected one per sample"),
        (torch.ones(2, 3), ValueError, r"shape \(2, 3\), expected \(2, 5\), or integers \(2,\)"),
    ):
        with pytest.raises(error, match=words):
            model(x, sigma, {"class_labels": bad})
    with pytest.raises(TypeError, match=r"the network takes \(x.*text=\.\.\."):
        model(x, sigma, {"class_labels": rows, "text": rows})
    with pytest.raises(ValueError, match="expected 3 channels"):
        model(torch.zeros(2, 4, 8, 8), sigma, {"class_labels": rows})


class Plain(nn.Module):
    """The least that is called as theirs are."""

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return 0.5 * x


class Inner(nn.Module):
    """Called as the network that their preconditioning holds."""

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None) -> Tensor:
        return x


class Trap:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_is_not_opened_without_trust(tmp_path: Path) -> None:
    path, trace = tmp_path / "network-snapshot.pkl", tmp_path / "ran"
    path.write_bytes(pickle.dumps({"ema": Precond(), "loss_fn": Trap(trace)}))
    for trust in (False, "yes", 1):
        with pytest.raises(ValueError, match="is a pickle: reading it runs whatever code.*trust=True.*safetensors"):
            edm.load(path, trust=trust)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pickles of another kind are not opened"):
        edm.load(path, Precond())
    assert not trace.exists()
    model = edm.load(path, trust=True, sigma_max=40.0)
    assert trace.exists() and model.schedule.rho_max == 40.0
    x, sigma, rows = torch.randn(SHAPE), torch.ones(2), torch.eye(LABELS)[:2]
    with torch.no_grad():
        torch.testing.assert_close(model(x, sigma, rows), Precond()(x, sigma, rows), rtol=0, atol=0)


def test_files_of_weights(tmp_path: Path) -> None:
    trained, x, sigma, rows = Precond(seed=9), torch.randn(SHAPE), torch.ones(2), torch.eye(LABELS)[:2]
    save_file(trained.state_dict(), tmp_path / "net.safetensors")
    torch.save(trained.state_dict(), tmp_path / "net.pt")
    torch.save({"net": trained.state_dict(), "step": 3}, tmp_path / "run.pt")
    for name, key in (("net.safetensors", None), ("net.pt", None), ("run.pt", "net")):
        model = edm.load(tmp_path / name, Precond(), key=key)
        with torch.no_grad():
            torch.testing.assert_close(model(x, sigma, rows), trained(x, sigma, rows), rtol=0, atol=0)
    torch.save(trained, tmp_path / "whole.pt")
    (tmp_path / "other.bin").write_bytes(b"hello")
    assert edm.load(tmp_path / "whole.pt", trust=True).shape == (3, 8, 8)
    (tmp_path / "other.pkl").write_bytes(pickle.dumps({"G": 1}))
    (tmp_path / "needs.pkl").write_bytes(b"cno_such_module\nNet\n.")
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps({"ema": 1})[:-3])
    for name, net, options, error, words in (
        ("run.pt", Precond(), {}, ValueError, r"holds a mapping with entries \['net', 'step'\]; say which of them"),
        ("run.pt", Precond(), {"key": "ema"}, ValueError, "has no entry 'ema'"),
        ("whole.pt", Precond(), {}, ValueError, "not a file of tensors alone, it holds .*Precond, and reading"),
        ("other.bin", Precond(), {}, ValueError, "neither safetensors nor a whole file of tensors"),
        ("none.pt", Precond(), {}, FileNotFoundError, "no such file"),
        ("none.pkl", None, {}, FileNotFoundError, "none.pkl: no such file; expected a pickled network such as NVlabs'"),
        ("net.safetensors", None, {}, ValueError, "give edm.load the network too"),
        ("other.pkl", None, {"trust": True}, ValueError, r"holds \['G'\], expected a network as 'ema'"),
        ("run.pt", None, {"trust": True, "key": "step"}, ValueError, "holds a int, expected a network"),
        ("needs.pkl", None, {"trust": True}, ModuleNotFoundError, "'no_such_module'.*PYTHONPATH"),
        ("cut.pkl", None, {"trust": True}, ValueError, "not a pickle or cut short"),
    ):
        with pytest.raises(error, match=words):
            edm.load(tmp_path / name, net, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: edm.wrap("net.pkl"), TypeError, "a file is for edm.load"),  # type: ignore[arg-type]
        (lambda: edm.wrap(torch.nn.Linear(2, 2)), TypeError, r"net\(x, sigma, .* got Linear: too many positional arg"),
        (lambda: edm.wrap(Inner()), TypeError, "got Inner: it has 'noise_labels' for sigma. The raw network inside"),
        (lambda: edm.wrap(torch.nn.ModuleList()), TypeError, "got ModuleList: it has no forward"),
        (
            lambda: edm.wrap(fd.load("fashion").net),
            TypeError,
            r"UNet: its output is raw\. .*fd.Denoiser\(net, schedule",
        ),
        (
            lambda: edm.wrap(Plain(), force_fp32=True),
            TypeError,
            "Plain: got an unexpected keyword argument 'force_fp32'",
        ),
        (lambda: edm.wrap(Precond(sigma_max=1.0), sigma_min=2.0), ValueError, "must be 0 < low < high"),
        (lambda: edm.wrap(Precond(), sigma_max=math.inf), ValueError, "must be 0 < low < high"),
        (lambda: edm.levels(fd.load("fashion")), TypeError, "needs what edm.wrap"),
        (lambda: edm.levels(edm.wrap(Precond()), 0), ValueError, "steps must be an integer"),
    ],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_a_forward_of_the_instance_or_a_call_of_the_class_is_one() -> None:
    class Called(torch.nn.Module):
        def __call__(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: object = None) -> torch.Tensor:
            return x

    net, outer = Precond(), torch.nn.Identity()
    outer.forward = net.forward  # type: ignore[method-assign]
    for given in (outer, torch.compile(net, backend="eager"), Called()):
        assert edm.wrap(given).prediction == "x0"


def test_a_network_of_diffusers_is_refused() -> None:
    """Its output is eps or what else its scheduler says, and was taken for D."""
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (32,)}
    net = diffusers.UNet2DModel(8, layers_per_block=1, **blocks)
    with pytest.raises(TypeError, match=r"got diffusers' UNet2DModel.*Denoiser.from_diffusers\(network, scheduler\)"):
        edm.wrap(net)
