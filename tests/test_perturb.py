"""The perturbed branch's networks: layers left out, attention to oneself, and the network itself untouched."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import fastdiff as fd
from fastdiff.models import UNet, UNetConfig, identity_attention, skip_layers

ATTENTION = "mid_block.attentions.0"


def model() -> fd.Denoiser:
    torch.manual_seed(0)
    config = UNetConfig(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    )
    net = UNet(config).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return fd.Denoiser(net, "linear", "eps")


@torch.no_grad()
def outputs(denoiser: fd.Denoiser) -> torch.Tensor:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return denoiser(x, torch.tensor([3.0, 400.0]))


def test_a_skipped_layer_is_the_network_without_it() -> None:
    own = model()
    before = outputs(own)
    got = outputs(skip_layers(own, [ATTENTION]))
    layer = own.net.mid_block.attentions[0]
    own.net.mid_block.attentions[0] = nn.Identity()
    assert torch.equal(got, outputs(own))
    own.net.mid_block.attentions[0] = layer
    assert torch.equal(outputs(own), before), "the network is as it was"
    assert (got - before).abs().max() > 1e-3


def test_identity_attention_returns_the_values() -> None:
    own = model()
    before = outputs(own)
    got = outputs(identity_attention(own, [ATTENTION]))
    layer = own.net.mid_block.attentions[0]

    class Values(nn.Module):
        """x + W_o v: what Ahn et al. 2024 write, with the layer's weights."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = layer.group_norm(x).flatten(2).transpose(1, 2)
            h = layer.to_out[0](layer.to_v(h))
            return (x + h.transpose(1, 2).unflatten(2, x.shape[2:])) / layer.scale

    own.net.mid_block.attentions[0] = Values()
    torch.testing.assert_close(got, outputs(own), rtol=1e-5, atol=1e-6)
    own.net.mid_block.attentions[0] = layer
    assert torch.equal(outputs(own), before)
    assert (got - before).abs().max() > 1e-3


def test_the_branch_pushes_away_from_the_perturbed_network() -> None:
    """One Euler step from a given state: D(w, s) - D = s (D - D_p)."""
    own = model()
    worse = skip_layers(own, [ATTENTION])
    plan = fd.plan("euler", own.schedule, 1)
    init = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))

    def run(denoiser: fd.Denoiser, perturbed: fd.Denoiser | None = None, scale: float = 0.0) -> torch.Tensor:
        sampler = fd.Sampler(plan, denoiser, "reference", perturbed=perturbed)
        return sampler.sample(init.shape, init=init, perturbed_scale=scale)

    plain, bad = run(own), run(worse)
    torch.testing.assert_close(run(own, worse, 2.0), plain + 2.0 * (plain - bad), rtol=1e-5, atol=1e-4)


class Cross(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(tokens, tokens[:, :3], tokens[:, :3])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grow, self.cross, self.plain = nn.Conv2d(3, 4, 1), Cross(), nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.grow(x)
        self.cross(x)
        return self.plain(x)


@pytest.mark.parametrize(
    ("change", "names", "words"),
    [
        (skip_layers, ["mid_block.attention.0"], "Unknown module.*Did you mean"),
        (skip_layers, "plain", "list of module names"),
        (skip_layers, [], "list of module names"),
        (skip_layers, ["grow"], "'grow' cannot be left out"),
        (skip_layers, ["mid_block.attentions"], "never called 'mid_block.attentions'; it holds mid_block.attentions.0"),
        (identity_attention, ["mid_block.attentions"], "never called 'mid_block.attentions'"),
        (identity_attention, ["plain"], "'plain' does not call scaled_dot_product_attention"),
        (identity_attention, ["cross"], "'cross' attends to another sequence"),
    ],
)
def test_what_cannot_be_perturbed_says_so(change: object, names: object, words: str) -> None:
    own = model() if "block" in str(names) else fd.Denoiser(Net(), "linear", "eps")
    with pytest.raises(ValueError, match=words):
        outputs(change(own, names))  # type: ignore[operator]
    torch.nn.functional.scaled_dot_product_attention(*[torch.ones(1, 2, 4)] * 3)  # no mode is left behind
    outputs(own)


def test_another_thread_sees_the_network_as_it_is() -> None:
    """A perturbed call in this thread, held open, while another thread asks the same network."""
    own = model()
    expected, seen = outputs(own), []

    class Asks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if threading.current_thread() is threading.main_thread():
                worker = threading.Thread(target=lambda: seen.append(outputs(own)))
                worker.start()
                worker.join()
            return inner(x)

    inner = own.net.mid_block.attentions[0]
    for change in (skip_layers, identity_attention):
        own.net.mid_block.attentions[0] = Asks()
        perturbed = outputs(change(own, ["mid_block.attentions.0"]))
        assert torch.equal(seen.pop(), expected)
        assert not torch.equal(perturbed, expected)


def test_a_function_has_no_layers() -> None:
    with pytest.raises(TypeError, match="torch module, got function"):
        skip_layers(fd.Denoiser(lambda x, t: x, "linear", "eps"), ["a"])
