"""The UNet equals diffusers' UNet2DModel, and says what is wrong when it cannot."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff.models.unet import WEIGHTS_NAME, UNet
from fastdiff.models.unet_config import UNetConfig
from fastdiff.models.weight_files import read_metadata

DDPM_CIFAR: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": (32, 64, 64, 64), "layers_per_block": 2,
    "norm_num_groups": 32,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
}  # fmt: skip
CLASSES: dict[str, Any] = {
    "in_channels": 1, "out_channels": 2, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
    "attention_head_dim": 16, "num_class_embeds": 11, "mid_block_scale_factor": 1.41,
}  # fmt: skip
SCALE_SHIFT: dict[str, Any] = {
    "in_channels": 3, "out_channels": 6, "block_out_channels": (32, 48, 64), "layers_per_block": 2,
    "norm_num_groups": 16,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet", "upsample_type": "resnet",
    "attn_norm_num_groups": 4, "attention_head_dim": 16, "time_embedding_dim": 96,
}  # fmt: skip
ODD_HEADS: dict[str, Any] = {
    "in_channels": 2, "out_channels": 2, "block_out_channels": (24, 40), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 7, "resnet_time_scale_shift": "scale_shift", "center_input_sample": True,
}  # fmt: skip
FOURIER: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "time_embedding_type": "fourier", "add_attention": False,
}  # fmt: skip
NO_MIDDLE: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": (17, 34), "layers_per_block": 1, "norm_num_groups": 17,
    "down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "mid_block_type": None,
}  # fmt: skip
CONFIGS = {
    "ddpm-cifar": DDPM_CIFAR, "classes": CLASSES, "scale-shift": SCALE_SHIFT, "odd-heads": ODD_HEADS,
    "fourier": FOURIER, "no-middle": NO_MIDDLE,
}  # fmt: skip


_PEERS: dict[tuple[str, int], tuple[nn.Module, Tensor]] = {}


def random_peer(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """A diffusers network none of whose parameters, norms and biases included, is left at 0 or 1; a copy of the first.

    torch's generator is left as the making of that one left it.
    """
    key = str(config), seed
    if key not in _PEERS:
        torch.manual_seed(seed)
        _PEERS[key] = _random_peer(config), torch.get_rng_state()
    peer, state = _PEERS[key]
    torch.set_rng_state(state)
    return copy.deepcopy(peer)


def _random_peer(config: dict[str, Any]) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.UNet2DModel(sample_size=16, **config).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if parameter.ndim == 1 and "time_proj" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return peer


def random_inputs(config: dict[str, Any], size: int = 16) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, config["in_channels"], size, size, generator=generator)
    t = torch.tensor([0.37, 17.0, 901.5])
    if config.get("num_class_embeds") is None:
        return x, t
    return x, t, torch.randint(config["num_class_embeds"], (3,), generator=generator)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_equals_diffusers(name: str) -> None:
    config = CONFIGS[name]
    peer, inputs = random_peer(config), random_inputs(config)
    expected = peer(*inputs).sample
    got = UNet.from_diffusers(peer)(*inputs)
    assert expected.std() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["ddpm-cifar", "scale-shift"])
@torch.no_grad()
def test_memory_format_is_kept_and_does_not_matter(name: str) -> None:
    peer, (x, t) = random_peer(CONFIGS[name]), random_inputs(CONFIGS[name])
    net = UNet.from_diffusers(peer)
    expected = net(x, t)
    net = net.to(memory_format=torch.channels_last)
    got = net(x.to(memory_format=torch.channels_last), t)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_integer_and_scalar_clocks() -> None:
    peer, (x, _) = random_peer(DDPM_CIFAR), random_inputs(DDPM_CIFAR)
    net = UNet.from_diffusers(peer)
    expected = peer(x, 40).sample
    for t in (40, 40.0, torch.tensor(40), torch.full((3,), 40), torch.full((3,), 40.0)):
        torch.testing.assert_close(net(x, t), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_gradients_equal_diffusers() -> None:
    peer, inputs = random_peer(CLASSES), random_inputs(CLASSES)
    net = UNet.from_diffusers(peer)
    with torch.enable_grad():
        peer(*inputs).sample.square().mean().backward()
        net(*inputs).square().mean().backward()
    expected = dict(peer.named_parameters())
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["classes", "scale-shift"])
@torch.no_grad()
def test_folder_round_trip(name: str, tmp_path: Path) -> None:
    peer, inputs = random_peer(CONFIGS[name]), random_inputs(CONFIGS[name])
    peer.save_pretrained(tmp_path)
    torch.testing.assert_close(UNet.from_diffusers(tmp_path)(*inputs), peer(*inputs).sample, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_reads_attention_names_of_old_checkpoints() -> None:
    peer, inputs = random_peer(CLASSES), random_inputs(CLASSES)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for key, value in peer.state_dict().items():
        for new_name, old_name in old.items():
            key = key.replace(f".{new_name}.", f".{old_name}.")
        weights[key] = value
    net = UNet._build(UNetConfig.from_dict(peer.config), weights, "old checkpoint")
    torch.testing.assert_close(net(*inputs), peer(*inputs).sample, rtol=1e-5, atol=1e-5)


def small_config(**changes: Any) -> UNetConfig:
    values: dict[str, Any] = {
        "in_channels": 1, "out_channels": 1, "block_out_channels": (16, 32), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 8,
    }  # fmt: skip
    return UNetConfig(**{**values, **changes})


@torch.no_grad()
def test_save_and_load(tmp_path: Path) -> None:
    config = small_config(num_class_embeds=5, patch_size=2, time_scale=16.0)
    net = UNet(config).eval()
    for parameter in net.parameters():
        parameter.normal_(0, 0.2)
    path = tmp_path / "net.safetensors"
    net.save(path, torch.float16, {"prediction": "edm"})
    loaded = UNet.load(path)
    assert loaded.config == config
    assert read_metadata(path)["prediction"] == "edm"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    inputs = torch.randn(2, 1, 8, 8), torch.tensor([0.1, -0.4]), torch.tensor([0, 4])
    torch.testing.assert_close(loaded(*inputs), net.half().float()(*inputs))


@torch.no_grad()
def test_starts_as_a_network_of_shortcuts() -> None:
    """Residual branches end in zeros, so at the start the time does not reach the output."""
    net, x = UNet(small_config()).eval(), torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(net(x, torch.tensor([1.0, 2.0])), net(x, torch.tensor([5.0, 9.0])))


@torch.no_grad()
def test_patches_halve_the_working_resolution() -> None:
    net = UNet(small_config(patch_size=2)).eval()
    seen: list[torch.Size] = []
    net.conv_in.register_forward_hook(lambda module, given, output: seen.append(output.shape))
    assert net(torch.randn(2, 1, 16, 16), 0.5).shape == (2, 1, 16, 16)
    assert seen[0] == (2, 16, 8, 8)


def test_config_json_round_trip() -> None:
    config = small_config(num_class_embeds=11, sample_size=32)
    assert UNetConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"down_block_types": ("SkipDownBlock2D", "DownBlock2D")}, ["down_block_types[0]", "SkipDownBlock2D"]),
        ({"up_block_types": ("UpBlock2D", "KUpBlock2D")}, ["up_block_types[1]", "KUpBlock2D"]),
        ({"class_embed_type": "timestep"}, ["class_embed_type", "timestep"]),
        ({"time_embedding_type": "learned"}, ["time_embedding_type", "learned"]),
        ({"resnet_time_scale_shift": "spatial"}, ["resnet_time_scale_shift", "spatial"]),
        ({"act_fn": "gelu"}, ["act_fn", "gelu"]),
        ({"block_out_channels": (16, 30)}, ["block_out_channels[1]", "30", "multiple", "8"]),
        ({"block_out_channels": (16, 32, 64)}, ["one per level"]),
        ({"attention_head_dim": 64}, ["attention_head_dim", "64", "32"]),
        ({"layers_per_block": 0}, ["layers_per_block", "0"]),
        ({"downsample_padding": 2}, ["downsample_padding", "2"]),
        ({"attn_norm_num_groups": 5}, ["attn_norm_num_groups", "5", "32"]),
    ],
)
def test_unsupported_config_says_what_and_how(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        small_config(**changes)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_config_types_and_unknown_entries() -> None:
    with pytest.raises(TypeError, match="norm_num_groups"):
        small_config(norm_num_groups=None)
    with pytest.raises(TypeError, match="block_out_channels"):
        small_config(block_out_channels=64)
    with pytest.raises(ValueError, match=r"unknown entries.*cross_attention_dim"):
        UNetConfig.from_dict({"cross_attention_dim": 768})
    with pytest.raises(ValueError, match="not valid JSON"):
        UNetConfig.from_json('{"in_channels": ')


def test_bad_inputs() -> None:
    net = UNet(small_config(num_class_embeds=5)).eval()
    x, t, labels = torch.randn(2, 1, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected \[B, 1, H, W\].*multiples of 2"):
        net(torch.randn(2, 1, 7, 8), t, labels)
    with pytest.raises(ValueError, match=r"expected \[B, 1, H, W\]"):
        net(torch.randn(2, 3, 8, 8), t, labels)
    with pytest.raises(ValueError, match="got t of shape"):
        net(x, torch.zeros(3), labels)
    with pytest.raises(ValueError, match="got no class_labels"):
        net(x, t)
    with pytest.raises(ValueError, match="got class_labels of shape"):
        net(x, t, labels[:1])
    with pytest.raises(ValueError, match="without classes"):
        UNet(small_config())(x, t, labels)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        UNet.from_diffusers(tmp_path)
    config = tmp_path / "config.json"
    config.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        UNet.from_diffusers(tmp_path)
    config.write_text(json.dumps({**CLASSES, "_class_name": "UNet2DModel"}))
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match="safe_serialization"):
        UNet.from_diffusers(tmp_path)
    UNet(small_config()).save(tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=r"do not fit its configuration.*missing"):
        UNet.from_diffusers(tmp_path)
    whole = (tmp_path / WEIGHTS_NAME).read_bytes()
    (tmp_path / WEIGHTS_NAME).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut short"):
        UNet.from_diffusers(tmp_path)
    config.write_text(json.dumps({**CLASSES, "_class_name": "UNet2DConditionModel"}))
    with pytest.raises(ValueError, match="UNet2DConditionModel, expected UNet2DModel"):
        UNet.from_diffusers(tmp_path)


def test_not_a_diffusers_module() -> None:
    with pytest.raises(TypeError, match="Linear without a `config`"):
        UNet.from_diffusers(nn.Linear(2, 2))


def test_load_refuses_foreign_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError):
        UNet.load(tmp_path / "absent.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no `unet` configuration"):
        UNet.load(tmp_path / "other.safetensors")


def test_class_labels_outside_the_classes_are_named() -> None:
    net = UNet(UNetConfig(in_channels=1, out_channels=1, block_out_channels=(32,), down_block_types=("DownBlock2D",),
                          up_block_types=("UpBlock2D",), num_class_embeds=3))  # fmt: skip
    x, t = torch.zeros(2, 1, 8, 8), torch.zeros(2)
    with pytest.raises(ValueError, match=r"class_labels \[1, 3\], expected integers from 0 to 2; 2 is the null label"):
        net(x, t, torch.tensor([1, 3]))
    with pytest.raises(TypeError, match=r"class_labels \[1, 2\], expected a tensor"):
        net(x, t, [1, 2])
