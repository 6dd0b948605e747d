"""diffusers' UNet2DModel as our U-Net."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.imports.account import Settings, Tensors
from fastdiff.imports.model import Layout, Place, buildable, image_outputs, sine_first, weights
from fastdiff.unet import UNetConfig

NETWORK = "unet"
DEFAULTS = {  # for settings that an older version did not write down
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": "UNetMidBlock2D",
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
}
BLOCKS = {  # (whether it attends, how it changes the resolution; None: as downsample_type or upsample_type says)
    "DownBlock2D": (False, "conv"),
    "AttnDownBlock2D": (True, None),
    "ResnetDownsampleBlock2D": (False, "resnet"),
    "UpBlock2D": (False, "conv"),
    "AttnUpBlock2D": (True, None),
    "ResnetUpsampleBlock2D": (False, "resnet"),
}
DECIDED_BY = (
    ("class_embedding", "num_class_embeds"),
    ("time_embedding", "block_out_channels"),
    ("time_emb_proj", "resnet_time_scale_shift or block_out_channels"),
    ("samplers", "down_block_types, up_block_types, downsample_type or upsample_type"),
    ("mid_block.attentions", "add_attention"),
    ("attentions", "down_block_types or up_block_types"),
    ("", "block_out_channels, layers_per_block or block types"),
)
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # before version 0.15


def read(
    settings: Settings, tensors: Tensors, *, learned: bool, null_class: bool
) -> tuple[UNetConfig, dict[str, Tensor]]:
    """The U-Net and its weights. Raises UserError for what it cannot be.

    learned: whether half of the outputs predict the variance, as the scheduler says. null_class: whether the last class
    stands for no class.
    """
    unet, sine = _unet(settings, null_class)
    outputs = unet.image_channels * (1 + learned)
    if settings.whole("out_channels") != outputs:
        raise settings.refuse("out_channels", f"{outputs} with the scheduler's variance_type")

    def special(name: str, theirs: str, shape: tuple[int, ...]) -> Tensor | None:
        if ".attention.qkv." in name:
            kind, each = name.rpartition(".")[2], (shape[0] // 3, *shape[1:])
            prefix = theirs.removesuffix(f".qkv.{kind}")
            parts = [_new_or_old(tensors, prefix, f"to_{part}", kind) for part in "qkv"]
            return torch.cat([tensors.take(part, each) for part in parts])
        if ".attention.project." in name:
            kind = name.rpartition(".")[2]
            prefix = theirs.removesuffix(f".to_out.0.{kind}")
            return tensors.take(_new_or_old(tensors, prefix, "to_out.0", kind), shape)
        if name == "time_mlp.0.weight" and sine:
            return sine_first(tensors.take(theirs, shape))
        if name.startswith("conv_out"):
            return image_outputs(tensors, theirs, shape, learned=learned, setting="out_channels")
        return None

    return unet, weights(unet, layout(unet), tensors, special)


def _unet(settings: Settings, null_class: bool) -> tuple[UNetConfig, bool]:
    """The U-Net, and whether its time embedding has its sines first."""
    settings.ignore("num_train_timesteps")
    settings.expect("center_input_sample", False)
    settings.expect("time_embedding_type", "positional")
    settings.expect("mid_block_type", "UNetMidBlock2D")
    settings.expect("mid_block_scale_factor", 1)
    settings.expect("act_fn", "silu", "swish")
    settings.expect("class_embed_type", None)
    channels = settings.numbers("block_out_channels")
    if not channels or not all(type(width) is int and width > 0 for width in channels):
        raise settings.refuse("block_out_channels", "positive whole numbers")
    settings.expect("time_embedding_dim", None, 4 * channels[0])
    shift = settings.expect("resnet_time_scale_shift", "default", "scale_shift")
    groups = settings.whole("norm_num_groups")
    # Without a number of its own, the middle's attention has no norm beside scales and shifts.
    settings.expect("attn_norm_num_groups", groups, *([None] if shift == "default" else []))
    attends, resample = _levels(settings, len(channels))
    size = settings["sample_size"]
    sizes = (size, size) if type(size) is int else tuple(settings.numbers("sample_size"))
    if len(sizes) != 2 or not all(type(one) is int and one > 0 for one in sizes):
        raise settings.refuse("sample_size", "one or two positive whole numbers")
    embedded = settings["num_class_embeds"]
    classes = 0 if embedded is None else settings.whole("num_class_embeds")
    if null_class and classes < 2:
        raise settings.refuse("num_class_embeds", "2 and more with --null-class")
    heads = settings["attention_head_dim"]
    unet = UNetConfig(
        sizes,
        settings.whole("in_channels"),
        classes - null_class,
        channels=channels[0],
        channel_mult=tuple(_ratio(width, channels[0]) for width in channels),
        blocks=settings.whole("layers_per_block"),
        attention_resolutions=tuple(sizes[0] >> level for level, attending in enumerate(attends) if attending),
        head_width=None if heads is None else settings.whole("attention_head_dim"),
        dropout=settings.number("dropout"),
        scale_shift=shift == "scale_shift",
        resample=resample,
        groups=groups,
        min_group_width=1,
        eps=settings.number("norm_eps"),
        middle_attention=settings.expect("add_attention", True, False),
        time_scale=1.0,
        time_endpoint=settings.expect("freq_shift", 0, 1) == 1,
        null_class=null_class,
    )
    if any(width % math.gcd(width, groups) or width % groups for width in channels):
        raise settings.refuse("norm_num_groups", "a divisor of every width")
    return buildable(unet, settings.place), settings.expect("flip_sin_to_cos", True, False) is False


def _ratio(width: int, unit: int) -> int | float:
    return width // unit if width % unit == 0 else width / unit


def _levels(settings: Settings, levels: int) -> tuple[list[bool], str]:
    """Which levels attend, and how the resolution changes between them. Raises UserError unless both ways agree."""
    types = {"down": settings["down_block_types"], "up": settings["up_block_types"]}
    padding = settings.expect("downsample_padding", 0, 1)
    attends, ways = {}, set()
    for way, names in types.items():
        usual = settings.expect(f"{way}sample_type", "conv", "resnet")
        known = [name for name in BLOCKS if way in name.lower()]
        if not isinstance(names, (list, tuple)) or len(names) != levels or any(name not in known for name in names):
            raise settings.refuse(f"{way}_block_types", f"{levels} of {', '.join(known)}")
        attends[way] = [BLOCKS[name][0] for name in names]
        ways |= {BLOCKS[name][1] or usual for name in names[:-1]}
    if attends["down"] != attends["up"][::-1]:
        raise settings.refuse("up_block_types", "networks that attend on the way up where they do on the way down")
    if len(ways) > 1:
        raise settings.refuse("down_block_types", "networks that change the resolution in one way at all levels")
    if ways == {"conv"}:
        return attends["down"], "conv" if padding else "conv-asymmetric"
    return attends["down"], "block"


def _new_or_old(tensors: Tensors, prefix: str, name: str, kind: str) -> str:
    old = f"{prefix}.{OLD_NAMES[name]}.{kind}"
    return old if old in tensors else f"{prefix}.{name}.{kind}"


def layout(unet: UNetConfig) -> Layout:
    last = len(unet.channel_mult) - 1

    def at(place: Place) -> str:
        match place.part:
            case "encoder":
                return f"down_blocks.{place.level}"
            case "decoder":
                return f"up_blocks.{last - place.level}"
        return "mid_block"

    def block(place: Place) -> str:
        if place.resample is None:
            return f"{at(place)}.resnets.{place.index}"
        return f"{at(place)}.{place.resample}samplers.0"

    return Layout(
        ends={
            "time_mlp.0": "time_embedding.linear_1",
            "time_mlp.2": "time_embedding.linear_2",
            "label_embedding": "class_embedding",
            "conv_in": "conv_in",
            "norm_out": "conv_norm_out",
            "conv_out": "conv_out",
        },
        residual={
            "norm1": "norm1",
            "conv1": "conv1",
            "embed": "time_emb_proj",
            "norm2": "norm2",
            "conv2": "conv2",
            "skip": "conv_shortcut",
        },
        attention={"norm": "group_norm", "qkv": "qkv", "project": "to_out.0"},
        block=block,
        attends=lambda place: f"{at(place)}.attentions.{place.index}",
    )
