"""guided-diffusion's networks, schedules and respacing strings, beside its own UNet and its own equations."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from network_peers import guided_unet
from safetensors.torch import save_file
from torch import Tensor, nn

import fastdiff as fd
from fastdiff.integrations import guided_diffusion as G
from fastdiff.models import guided_diffusion_names
from fastdiff.models.unet import UNet

# What the published checkpoints differ in, at a size that a test can afford.
LEGACY = {"num_res_blocks": 1, "num_heads": 4, "use_scale_shift_norm": True, "attention_resolutions": "8,4"}
CASES: dict[str, dict[str, Any]] = {
    "improved": {**LEGACY, "learn_sigma": True, "class_cond": True},
    "plain": {**LEGACY, "use_scale_shift_norm": False, "num_heads": 1},
    "adm": {
        "num_res_blocks": 2, "num_head_channels": 16, "use_scale_shift_norm": True, "attention_resolutions": "8",
        "resblock_updown": True, "learn_sigma": True, "class_cond": True,
    },
    "new-order": {**LEGACY, "use_new_attention_order": True, "resblock_updown": True},
    "half-width": {**LEGACY, "channel_mult": (0.5, 1, 2), "attention_resolutions": "4"},
}  # fmt: skip
SIZE = 16


def flags(name: str) -> dict[str, Any]:
    return {"image_size": SIZE, "num_channels": 64, "channel_mult": (1, 1, 2), **CASES[name]}


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """guided-diffusion's own UNetModel with these flags, no parameter left at 0 or 1; called (t, x, y) by torchcfm."""

    def make(name: str) -> nn.Module:
        torch.manual_seed(0)
        net: nn.Module = guided_unet(monkeypatch)(dim=(3, SIZE, SIZE), num_classes=11, **_theirs(flags(name))).eval()
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.ndim == 1 or not parameter.any():
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        return net

    return make


def _theirs(given: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key != "image_size"}


def inputs(name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, SIZE, SIZE, generator=generator)
    labels = torch.tensor([0, 7, 10]) if CASES[name].get("class_cond") else None
    return x, torch.tensor([0.0, 17.5, 999.0]), labels


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_our_unet_is_theirs(name: str, peer: Any) -> None:
    """The same weights give the same output to 1e-5 of its largest value."""
    theirs, (x, t, y) = peer(name), inputs(name)
    expected = theirs(t, x, y)
    got = UNet.from_guided_diffusion(theirs.state_dict(), flags(name))(x, t, y)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


ADM = {"learn_sigma": True, "resblock_updown": True, "use_scale_shift_norm": True, "attention_resolutions": "32,16,8"}
IMPROVED = {"learn_sigma": True, "num_channels": 128, "num_res_blocks": 3, "noise_schedule": "cosine"}
# The flags of published checkpoints, and the millions of parameters that the paper gives them.
PUBLISHED: dict[str, tuple[dict[str, Any], int | None]] = {
    "adm-64": (
        {**ADM, "image_size": 64, "class_cond": True, "num_channels": 192, "num_res_blocks": 3, "num_head_channels": 64,
         "use_new_attention_order": True, "dropout": 0.1, "noise_schedule": "cosine", "use_fp16": True}, 296,
    ),
    "adm-128": ({**ADM, "image_size": 128, "class_cond": True, "num_channels": 256, "num_heads": 4}, 422),
    "adm-256": ({**ADM, "image_size": 256, "class_cond": True, "num_channels": 256, "num_head_channels": 64}, 554),
    "adm-512": ({**ADM, "image_size": 512, "class_cond": True, "num_channels": 256, "num_head_channels": 64}, 559),
    "improved-32": ({**IMPROVED, "image_size": 32, "dropout": 0.3, "diffusion_steps": 4000}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter of their network with these flags has its place in ours, and none is left over."""
    given, millions = PUBLISHED[name]
    of_network = {k: v for k, v in given.items() if k not in guided_diffusion_names.OTHER_FLAGS and k != "image_size"}
    defaults = {k: v for k, v in guided_diffusion_names.DEFAULTS.items() if k not in ("image_size", "channel_mult")}
    size = given["image_size"]
    with torch.device("meta"):
        theirs = guided_unet(monkeypatch)(dim=(3, size, size), num_classes=1000, **{**defaults, **of_network})
    ours = UNet.from_guided_diffusion(theirs.state_dict(), given)
    counts = [sum(parameter.numel() for parameter in net.parameters()) for net in (ours, theirs)]
    assert counts[0] == counts[1]
    assert millions is None or round(counts[0] / 1e6) == millions


def test_the_order_of_heads_matters(peer: Any) -> None:
    """Read in the other order of qkv, the weights of an attention layer are another network's."""
    theirs, (x, t, y) = peer("improved"), inputs("improved")
    wrong = UNet.from_guided_diffusion(theirs.state_dict(), {**flags("improved"), "use_new_attention_order": True})
    with torch.no_grad():
        assert (wrong(x, t, y) - theirs(t, x, y)).abs().max() > 1e-2


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files(suffix: str, tmp_path: Path, peer: Any) -> None:
    theirs, (x, t, y) = peer("improved"), inputs("improved")
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save(theirs.state_dict(), path)
    else:
        save_file(theirs.state_dict(), path)
    model = G.load(path, {**flags("improved"), "diffusion_steps": 4000, "noise_schedule": "cosine", "use_fp16": True})
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, {"class_labels": y}), theirs(t, x, y), rtol=1e-4, atol=1e-4)
    assert (model.shape, model.learned_variance, model.prediction) == ((3, SIZE, SIZE), True, "eps")
    assert model.schedule == fd.schedules.cosine(4000)


def test_rescaled_timesteps(peer: Any) -> None:
    """rescale_timesteps shows the network t * 1000 / T, whether it is theirs, wrapped, or ours with its weights."""
    theirs, (x, t, _) = peer("plain"), inputs("plain")
    diffusion = {"diffusion_steps": 4000, "rescale_timesteps": True}
    wrapped = G.wrap(lambda x, t: theirs(t, x), **diffusion)
    loaded = G.load(theirs.state_dict(), {**flags("plain"), **diffusion})
    with torch.no_grad():
        expected = theirs(t / 4, x)
        torch.testing.assert_close(wrapped(x, t), expected, rtol=0, atol=0)
        torch.testing.assert_close(loaded(x, t), expected, rtol=1e-4, atol=1e-4)


def test_schedules_are_theirs() -> None:
    """linear: betas from 0.1/T to 20/T; cosine: 1 - f(t + 1)/f(t) up to 0.999 (Nichol & Dhariwal 2021, eq. 17)."""
    for steps in (1000, 4000):
        linear, cosine = G.schedule("linear", steps), G.schedule("cosine", steps)
        assert isinstance(linear, fd.process.clocks.DiscreteSchedule)
        np.testing.assert_allclose(linear.betas, np.linspace(0.1 / steps, 20 / steps, steps), rtol=1e-9)
        f = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        betas = [min(1 - after / before, 0.999) for before, after in itertools.pairwise(f)]
        np.testing.assert_allclose(cosine.betas, betas, rtol=1e-9)
    with pytest.raises(ValueError, match="Unknown noise_schedule 'sigmoid'"):
        G.schedule("sigmoid")
    for steps in (0, "1000", True):
        with pytest.raises(ValueError, match="diffusion_steps must be an integer"):
            G.wrap(nn.Identity(), diffusion_steps=steps, rescale_timesteps=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sections", "steps", "expected"),
    [
        ("", 4, [3, 2, 1, 0]),
        ("5", 10, [9, 7, 4, 2, 0]),  # 0, 2.25, 4.5, 6.75, 9: half to even
        ("3", 10, [9, 4, 0]),
        ("1", 10, [0]),
        ("2,1", 9, [5, 4, 0]),  # sections of 5 and 4
        ("2,0,2", 10, [9, 7, 3, 0]),
        ([2, 2], 7, [6, 4, 3, 0]),
        ("ddim4", 10, [9, 6, 3, 0]),
        ("ddim25", 1000, list(range(960, -1, -40))),
        ("ddim1000", 1000, list(range(999, -1, -1))),
    ],
)
def test_respacing(sections: Any, steps: int, expected: list[int]) -> None:
    """Worked by hand from the rule: equal sections, the first longer by one; both ends of each; halves to even."""
    assert G.respaced(sections, steps) == expected


@pytest.mark.parametrize("steps", [25, 50, 100, 250, 1000])
def test_respacing_of_one_section(steps: int) -> None:
    """N of 1000 steps are round(i 999/(N - 1)), exactly: no rounding of the running sum may show."""
    exact = [round(i * 999 / (steps - 1)) for i in range(steps)]
    assert G.respaced(str(steps)) == sorted(set(exact), reverse=True)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ("ddim75", "no whole stride leaves so many of 1000.*near it: .*ddim72, ddim77"),
        ("ddimfast", "no whole stride"),
        ("2000", "section 0 of 1 has 1000 of the 1000 training steps, 2000 are asked"),
        ("10,x", "must be numbers of steps"),
        ("10,-5", "must be numbers of steps"),
        ("0", "keeps no step"),
        ([], "must be numbers of steps"),
    ],
)
def test_bad_respacing(sections: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        G.respaced(sections)


def spaced_loop(net: Any, betas: np.ndarray, kept: list[int], x: Tensor, normals: Tensor, ddim: bool) -> Tensor:
    """Their spaced sampling loop from its equations, float64: new betas of the kept steps, x0 clipped, learned range.

    ddim: eta = 0 (Song et al. 2021, eq. 12); else Ho et al. 2020, eq. 7 with the variance of Nichol & Dhariwal 2021,
    eq. 15: exp(v log beta + (1 - v) log beta~), v = (V + 1)/2.
    """
    products = np.cumprod(1 - betas)[sorted(kept)]
    before = np.append(1.0, products[:-1])
    beta = 1 - products / before
    posterior = beta * (1 - before) / (1 - products)
    for i, t in reversed(list(enumerate(sorted(kept)))):
        output = net(x.float(), torch.full((len(x),), float(t))).double()
        eps, spread = output.chunk(2, dim=1)
        x0 = ((x - math.sqrt(1 - products[i]) * eps) / math.sqrt(products[i])).clamp(-1, 1)
        if ddim:
            eps = (x - math.sqrt(products[i]) * x0) / math.sqrt(1 - products[i])
            x = math.sqrt(before[i]) * x0 + math.sqrt(1 - before[i]) * eps
            continue
        x = (
            math.sqrt(before[i]) * beta[i] / (1 - products[i]) * x0
            + math.sqrt(1 - beta[i]) * (1 - before[i]) / (1 - products[i]) * x
        )
        if i:
            v = (spread + 1) / 2
            log_variance = v * math.log(beta[i]) + (1 - v) * math.log(posterior[i])
            x = x + (0.5 * log_variance).exp() * normals[len(kept) - 1 - i]
    return x


@pytest.mark.parametrize(("sections", "ddim"), [("25", False), ("10,3,5", False), ("ddim25", True)])
@pytest.mark.parametrize("noise_schedule", ["linear", "cosine"])
def test_sampling_is_theirs(sections: str, ddim: bool, noise_schedule: str) -> None:
    """A respaced run on the same noise, every x0 clipped to [-1, 1], beside their equations in float64."""

    def net(x: Tensor, t: Tensor) -> Tensor:
        eps = 0.9 * torch.tanh(x) + 0.1 * torch.cos(3 * x + t.view(-1, 1, 1, 1) / 300)
        return torch.cat([eps, torch.sin(2 * x)], dim=1)

    model = G.wrap(net, noise_schedule=noise_schedule, learn_sigma=True)
    kept = G.respaced(sections)
    options = {} if ddim else {"variance": "learned_range"}
    plan = fd.plan("ddim" if ddim else "ddpm", model.schedule, grid=kept, clamp=(-1, 1), **options)
    assert plan.nfe == len(kept)
    torch.manual_seed(0)
    x, normals = torch.randn(2, 3, 4, 4).double(), torch.randn(max(plan.draws, 1), 2, 3, 4, 4).double()
    assert isinstance(model.schedule, fd.process.clocks.DiscreteSchedule)
    expected = spaced_loop(net, model.schedule.betas, kept, x, normals, ddim)
    noise = normals[: plan.draws].float() if plan.draws else "white"
    got = fd.Sampler(plan, model).sample(x.shape, init=x.float(), noise=noise)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_chanels": 64}, ValueError, "Did you mean 'num_channels'"),
        ({"learn_sigma": False}, ValueError, "flag learn_sigma is False, these weights are of learn_sigma=True"),
        ({"class_cond": False}, ValueError, "flag class_cond is False"),
        ({"num_heads_upsample": 2}, ValueError, "one number of heads"),
        ({"num_channels": 32}, ValueError, "do not fit its configuration.*of other shape"),
        ({"resblock_updown": True}, ValueError, "do not fit its configuration: missing"),
        ({"channel_mult": ""}, ValueError, "no default at image_size 16"),
    ],
)
def test_flags_that_do_not_fit(change: dict[str, Any], error: type[Exception], words: str, peer: Any) -> None:
    with pytest.raises(error, match=words):
        UNet.from_guided_diffusion(peer("improved").state_dict(), {**flags("improved"), **change})


def test_what_is_no_unet() -> None:
    with pytest.raises(ValueError, match="not the weights of a guided-diffusion UNetModel"):
        UNet.from_guided_diffusion({"model.diffusion_model.x": torch.zeros(1)}, {})
    upsampler = {"input_blocks.0.0.weight": torch.zeros(128, 6, 3, 3), "out.2.weight": torch.zeros(3, 128, 3, 3)}
    with pytest.raises(ValueError, match="take 6 channels and give 3.*upsampler"):
        UNet.from_guided_diffusion(upsampler, {})


def test_labels_and_shapes_are_checked(peer: Any) -> None:
    theirs = peer("improved")

    class Called(nn.Module):  # (x, t, y), as guided-diffusion itself is called
        num_classes = 11

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return theirs(t, x, y)

    model = G.wrap(Called(), learn_sigma=True)

    def run(model: fd.Denoiser = model, **cond: Any) -> Tensor:
        return fd.sample(model, (2, 3, SIZE, SIZE), "ddim", grid=[500], steps=1, cond=cond)

    assert run(y=torch.tensor([3, 10])).isfinite().all()
    for labels, error, words in (
        (None, ValueError, r"got no y, expected \[B\] integers below 11"),
        ([1, 2], TypeError, r"got y \[1, 2\], expected a tensor"),
        (torch.tensor([1.0, 2.0]), TypeError, "dtype torch.float32, expected integers"),
        (torch.tensor([1, 11]), ValueError, "expected integers from 0 to 10"),
    ):
        with pytest.raises(error, match=words):
            run(y=labels)
    with pytest.raises(TypeError, match=r"the network takes \(x.*y.*label=\.\.\."):
        run(y=torch.tensor([1, 2]), label=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="needs Denoiser.*learned_variance=True"):
        run(G.wrap(Called()), y=torch.tensor([1, 2]))
