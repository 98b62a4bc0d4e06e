"""The UNetModel of guided-diffusion and improved-diffusion in our UNet's terms: its flags, its parameters' names.

May import: unet_config. The network is that of Dhariwal & Nichol 2021, section 3; what differs is how parameters are
called and how the rows of an attention layer's qkv are ordered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastdiff.errors import unknown_name

from .unet_config import UNetConfig

DEFAULTS: dict[str, Any] = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "channel_mult": "",
    "attention_resolutions": "16,8",
    "num_heads": 4,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_new_attention_order": False,
    "dropout": 0.0,
    "class_cond": False,
    "learn_sigma": False,
}
# Flags that say nothing of the weights: of the diffusion, of training, of memory.
OTHER_FLAGS = (
    "diffusion_steps",
    "noise_schedule",
    "timestep_respacing",
    "predict_xstart",
    "rescale_timesteps",
    "rescale_learned_sigmas",
    "use_kl",
    "sigma_small",
    "use_checkpoint",
    "use_fp16",
)
# channel_mult where the flag is empty, by image_size
_MULTIPLES: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}
_FIRST = "input_blocks.0.0"
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    _FIRST: "conv_in",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_INSIDE = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "op": "conv",
    "norm": "group_norm",
    "proj_out": "to_out.0",
}


def convert(weights: Mapping[str, Tensor], flags: Mapping[str, Any]) -> tuple[UNetConfig, dict[str, Tensor]]:
    """Our configuration, and the same weights under our names; a name that is not theirs stays as it is.

    weights: the state dict of a UNetModel. flags: as its training script has them, see DEFAULTS.
    Raises: ValueError for a flag that is unknown or that these weights contradict.
    """
    known = {*DEFAULTS, *OTHER_FLAGS}
    for name in flags:
        if name not in known:
            raise unknown_name("flag of guided-diffusion", name, known)
    chosen = {**DEFAULTS, **flags}
    config = _config(weights, chosen)
    blocks = _ENDS | _levels(config)
    renamed: dict[str, Tensor] = {}
    for key, value in weights.items():
        block, inner = _split(key, blocks)
        if inner.startswith("qkv."):
            heads = value.shape[0] // 3 // config.head_dim(value.shape[0] // 3)
            parts = _separate(value, heads, chosen["use_new_attention_order"])
            for name, part in zip(("to_q", "to_k", "to_v"), parts, strict=True):
                renamed[f"{blocks[block]}.{name}.{inner.removeprefix('qkv.')}"] = part
        elif block:
            layer, _, kind = inner.rpartition(".")
            name = ".".join(part for part in (blocks[block], _INSIDE.get(layer, layer), kind) if part)
            renamed[name] = value.flatten(1) if layer == "proj_out" and value.ndim == 3 else value
        else:
            renamed[key] = value
    return config, renamed


def _config(weights: Mapping[str, Tensor], flags: Mapping[str, Any]) -> UNetConfig:
    first, last = weights.get(f"{_FIRST}.weight"), weights.get("out.2.weight")
    if first is None or last is None:
        raise ValueError(
            f"not the weights of a guided-diffusion UNetModel: expected {_FIRST}.weight and out.2.weight, got "
            f"{list(weights)[:3]} ...; where they are nested, give the inner mapping"
        )
    _check_flags(weights, flags, first.shape[1], last.shape[0])
    size = flags["image_size"]
    attended = {size // int(resolution) for resolution in _numbers(flags["attention_resolutions"])}
    multiples = _numbers(flags["channel_mult"]) or _MULTIPLES.get(size)
    if not multiples:
        raise ValueError(f"channel_mult has no default at image_size {size!r}; give it, one number per level")
    resblocks = flags["resblock_updown"]
    plain = "Resnet{}sampleBlock2D" if resblocks else "{}Block2D"
    kinds = ["Attn{}Block2D" if 2**level in attended else plain for level in range(len(multiples))]
    width, heads, head = flags["num_channels"], flags["num_heads"], flags["num_head_channels"]
    return UNetConfig(
        sample_size=size,
        in_channels=first.shape[1],
        out_channels=last.shape[0],
        down_block_types=tuple(kind.format("Down") for kind in kinds),
        up_block_types=tuple(kind.format("Up") for kind in reversed(kinds)),
        block_out_channels=tuple(int(multiple * width) for multiple in multiples),
        layers_per_block=flags["num_res_blocks"],
        downsample_type="resnet" if resblocks else "conv",
        upsample_type="resnet" if resblocks else "conv",
        dropout=flags["dropout"],
        attention_head_dim=None if head == -1 else head,
        attention_heads=heads if head == -1 else None,
        attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift" if flags["use_scale_shift_norm"] else "default",
        num_class_embeds=weights["label_emb.weight"].shape[0] if flags["class_cond"] else None,
        time_embedding_dim=4 * width,
        time_feature_dim=width,
    )


def _check_flags(weights: Mapping[str, Tensor], flags: Mapping[str, Any], inputs: int, outputs: int) -> None:
    if outputs not in (inputs, 2 * inputs):
        raise ValueError(
            f"these weights take {inputs} channels and give {outputs}: not a UNetModel of images but one that is shown "
            "something beside the state (an upsampler, a classifier); wrap the network itself"
        )
    for flag, there in (("learn_sigma", outputs == 2 * inputs), ("class_cond", "label_emb.weight" in weights)):
        if bool(flags[flag]) != there:
            raise ValueError(f"the flag {flag} is {flags[flag]}, these weights are of {flag}={there}")
    upsample = flags["num_heads_upsample"]
    if flags["num_head_channels"] == -1 and upsample not in (-1, flags["num_heads"]):
        raise ValueError(
            f"num_heads_upsample={upsample} with num_heads={flags['num_heads']}: our UNet has one number of heads; "
            "wrap the network itself"
        )


def _levels(config: UNetConfig) -> dict[str, str]:
    """Their input_blocks and output_blocks, one per entry of the skip connections, as our blocks of each level."""
    found: dict[str, str] = {}
    last, layers = len(config.block_out_channels) - 1, config.layers_per_block
    block = 1
    for level, kind in enumerate(config.down_block_types):
        for layer in range(layers):
            found[f"input_blocks.{block}.0"] = f"down_blocks.{level}.resnets.{layer}"
            if "Attn" in kind:
                found[f"input_blocks.{block}.1"] = f"down_blocks.{level}.attentions.{layer}"
            block += 1
        if level < last:
            found[f"input_blocks.{block}.0"] = f"down_blocks.{level}.downsamplers.0"
            block += 1
    for level, kind in enumerate(config.up_block_types):
        for layer in range(layers + 1):
            parts = [f"up_blocks.{level}.resnets.{layer}"]
            if "Attn" in kind:
                parts.append(f"up_blocks.{level}.attentions.{layer}")
            if layer == layers and level < last:
                parts.append(f"up_blocks.{level}.upsamplers.0")
            for part, ours in enumerate(parts):
                found[f"output_blocks.{level * (layers + 1) + layer}.{part}"] = ours
    return found


def _split(key: str, blocks: Mapping[str, str]) -> tuple[str, str]:
    """(block, the rest) of one of their names; no block where it is none of theirs."""
    parts = key.split(".")
    for length in (3, 2, 1):
        block = ".".join(parts[:length])
        if block in blocks:
            return block, ".".join(parts[length:])
    return "", key


def _separate(qkv: Tensor, heads: int, whole: bool) -> tuple[Tensor, ...]:
    """q, k, v of a joint layer [3 C, ...]: rows by head and then q, k, v, or (`whole`) by q, k, v and then head."""
    flat = qkv.flatten(1) if qkv.ndim == 3 else qkv
    if whole:
        return flat.chunk(3)
    rows = flat.unflatten(0, (heads, 3, -1))
    return tuple(rows[:, part].flatten(0, 1) for part in range(3))


def _numbers(given: Any) -> tuple[float, ...]:
    """A flag that holds several numbers: "32,16,8" or a sequence."""
    if isinstance(given, str):
        given = [part for part in given.split(",") if part]
    return tuple(float(number) for number in given)
