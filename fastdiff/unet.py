"""The U-Net of guided diffusion models, with the few choices in which the published ones differ as plain fields."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice, repeat
from typing import Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fastdiff import blocks
from fastdiff.blocks import Branches, Condition, ResidualBlock, ResidualNorm, Stage, convolved, zeroed
from fastdiff.cast import as_autocast, is_whole

GUIDANCE_FREQUENCIES = 32  # per cosine and sine, geometric between the two below, in radians per unit of w
GUIDANCE_SLOWEST, GUIDANCE_FASTEST = 0.05, 10.0
KEEP_DROPPED = partial(create_selective_checkpoint_contexts, [torch.ops.aten.native_dropout.default])


@dataclass(frozen=True)
class UNetConfig:
    """Architecture of a U-Net. Defaults: a small ADM; the last group is what other published nets do otherwise."""

    image_size: tuple[int, int] = (32, 32)
    """Height and width, each divisible by patch_size·2^(levels − 1)."""
    image_channels: int = 3
    num_classes: int = 0
    """0: unconditional. Otherwise label num_classes is the null class, where there is one."""
    channels: int = 64
    channel_mult: tuple[int | float, ...] = (1, 2, 2)
    """Width of each level, in units of channels; fractions such as 0.5 that give whole widths, too."""
    blocks: int = 2
    """Residual blocks a level (one more on the way up)."""
    attention_resolutions: tuple[int, ...] = ()
    """Heights of the feature maps at which self-attention follows a residual block."""
    head_width: int | None = 64
    """Channels of one attention head; None: a single head."""
    heads: int | None = None
    """The same number of attention heads at all levels, whatever head_width; None: as that says."""
    patch_size: int = 1
    """The U-Net works on patches of this side as channels: p times smaller images, about p² times cheaper."""
    dropout: float = 0.0
    guidance_input: bool = False
    """Whether guidance strength w is an input."""
    outputs: int = 1
    """Images that it predicts: one, or ε̃ and x̃ one after the other in its channels."""

    input_mult: int | None = None
    """Width after the first convolution, in units of channels (1 in DDPM++); None: that of the first level."""
    scale_shift: bool = True
    """The embedding scales and shifts after the second norm (ADM), or is added before it (DDPM)."""
    resample: Literal["block", "conv", "conv-asymmetric"] = "block"
    """Resolution changes inside a residual block, or by a convolution (asymmetric: padded right and below only)."""
    resample_skip_conv: bool = False
    """A resampling block's skip path has a 1×1 convolution even where the width stays (DDPM++)."""
    residual_scale: float = 1.0
    """Factor on the sum of a residual branch and its skip path: 1, or √½ (DDPM++)."""
    groups: int = 32
    min_group_width: int = 4
    """GroupNorm has min(groups, channels / min_group_width) groups, or fewer where those do not divide the channels."""
    eps: float = 1e-5
    middle_attention: bool = True
    decoder_attention: Literal["all", "last"] = "all"
    """Attention after every block of a level on the way up, or after the last one (DDPM++)."""
    qkv_order: Literal["qkv-head", "head-qkv", "head-width-qkv"] = "qkv-head"
    """How rows of the qkv projection are nested, slowest first (ADM new, ADM legacy, EDM)."""
    time_scale: float = 1000.0
    """Factor on the network's time before its sinusoids."""
    time_endpoint: bool = False
    """Whether the slowest sinusoid is exactly 1e-4 radians per unit (DDPM, DDPM++) or one step short of it (ADM)."""
    label_before_mlp: bool = False
    """Class embedding added before the time embedding's two layers (DDPM++) or after them."""
    null_class: bool = True
    """Whether a network with classes knows the null class; most that were trained elsewhere never saw one."""

    def width(self, level: int) -> int:
        """Channels of a level, 0 being the finest."""
        return round(self.channels * self.channel_mult[level])

    def height(self, level: int) -> int:
        """Height of the feature maps at a level, 0 being the finest."""
        return self.image_size[0] // self.patch_size >> level


PRESETS: dict[str, UNetConfig] = {
    "digits": UNetConfig(
        (8, 8), 1, 10, channels=32, channel_mult=(1, 1), blocks=1, resample="conv", middle_attention=False
    ),
    "fashion-mnist": UNetConfig(
        (32, 32),
        1,
        10,
        channels=32,
        channel_mult=(1, 2, 2),
        blocks=1,
        patch_size=2,
        resample="conv",
        middle_attention=False,
    ),
    "cifar10": UNetConfig(
        (32, 32),
        3,
        10,
        channels=256,
        channel_mult=(1, 1, 1),
        blocks=3,
        attention_resolutions=(16, 8),
        head_width=64,
        dropout=0.2,
    ),
    "imagenet64": UNetConfig(
        (64, 64),
        3,
        1000,
        channels=192,
        channel_mult=(1, 2, 3, 4),
        blocks=3,
        attention_resolutions=(32, 16, 8),
        head_width=64,
        dropout=0.1,
    ),
}


def config_from_dict(values: dict) -> UNetConfig:
    """The config that `dataclasses.asdict` (by way of JSON) described. Raises ValueError for unknown fields."""
    unknown = set(values) - {field.name for field in fields(UNetConfig)}
    if unknown:
        raise ValueError(f"unknown U-Net fields: {', '.join(sorted(unknown))}")
    return UNetConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


class UNet(nn.Module):
    """(z (B, C, H, W), time (B,), label (B,) or None, guidance (B,) or None) -> (B, outputs·C, H, W) float32.

    label None means the null class; guidance None means w = 0. Set `gradient_checkpointing` to trade a second
    forward pass of each residual block for its activations. Raises ValueError where image_size does not halve
    evenly, or where the head width does not divide the channels; and for label None where there is no null class.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        _check(config)
        self.config = config
        self.gradient_checkpointing = False
        width, embed_width = config.channels, 4 * config.channels
        self.time_mlp = nn.Sequential(nn.Linear(width, embed_width), nn.SiLU(), nn.Linear(embed_width, embed_width))
        if config.num_classes:
            label_width = width if config.label_before_mlp else embed_width
            self.label_embedding = nn.Embedding(config.num_classes + config.null_class, label_width)
        if config.guidance_input:
            self.guidance_mlp = nn.Sequential(
                nn.Linear(2 * GUIDANCE_FREQUENCIES, embed_width),
                nn.SiLU(),
                zeroed(nn.Linear(embed_width, embed_width)),
            )

        levels = [config.width(level) for level in range(len(config.channel_mult))]
        heights = [config.height(level) for level in range(len(levels))]
        in_channels = config.image_channels * config.patch_size**2
        channels = levels[0] if config.input_mult is None else width * config.input_mult
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        skips = [channels]
        for level, (out, height) in enumerate(zip(levels, heights, strict=True)):
            for _ in range(config.blocks):
                self.encoder.append(Stage(config, channels, out, attention=height in config.attention_resolutions))
                channels = out
                skips.append(channels)
            if level < len(levels) - 1:
                self.encoder.append(Stage(config, channels, channels, resample="down"))
                skips.append(channels)
        self.middle = nn.ModuleList(
            [Stage(config, channels, channels, attention=config.middle_attention), Stage(config, channels, channels)]
        )
        for level, (out, height) in reversed(list(enumerate(zip(levels, heights, strict=True)))):
            for index in range(config.blocks + 1):
                here = config.decoder_attention == "all" or index == config.blocks
                attention = here and height in config.attention_resolutions
                self.decoder.append(Stage(config, channels + skips.pop(), out, attention=attention))
                channels = out
            if level:
                self.decoder.append(Stage(config, channels, channels, resample="up"))
        self.norm_out = ResidualNorm(config, channels)
        self.conv_out = zeroed(nn.Conv2d(channels, in_channels * config.outputs, 3, padding=1))
        self.to(memory_format=torch.channels_last)

    def forward(self, z: Tensor, time: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        with as_autocast(self, z.device) as weights:
            return self._forward(z, F.silu(self.embed(time, label, guidance)), weights)

    def _forward(self, z: Tensor, embedding: Tensor, weights: AbstractContextManager) -> Tensor:
        if self.config.patch_size > 1:
            z = F.pixel_unshuffle(z, self.config.patch_size)
        h, bias = convolved(self.conv_in, z.contiguous(memory_format=torch.channels_last))
        conditions, branches, skips = self._conditions(embedding), Branches(h, bias=bias), []
        for stage in (*self.encoder, self.middle[0]):
            branches, entered = self._run(stage, branches, next(conditions), weights)
            skips.append(entered)
        branches, _ = self._run(self.middle[1], branches, next(conditions), weights)
        for stage in self.decoder:
            skip = None if stage.resample == "up" else skips.pop()
            branches, _ = self._run(stage, branches, next(conditions), weights, skip)
        h, *_ = self.norm_out(branches, silu=True)
        out = self.conv_out(h)  # channels-last; shuffling pixels ends that on some devices
        return (F.pixel_shuffle(out, self.config.patch_size) if self.config.patch_size > 1 else out).float()

    def embed(self, time: Tensor, label: Tensor | None, guidance: Tensor | None) -> Tensor:
        """The embedding of time, label and guidance, before its last SiLU: (B, 4·channels)."""
        config = self.config
        embedding = sinusoids(time.float() * config.time_scale, config.channels, endpoint=config.time_endpoint)
        label_embedding = 0.0
        if config.num_classes:
            label_embedding = self.label_embedding(with_null(label, time, config))
        if config.label_before_mlp:
            embedding = self.time_mlp(embedding + label_embedding)
        else:
            embedding = self.time_mlp(embedding) + label_embedding
        if config.guidance_input:
            guidance = torch.zeros_like(time) if guidance is None else guidance
            embedding = embedding + self.guidance_mlp(guidance_features(guidance))
        return embedding

    def _conditions(self, embedding: Tensor) -> Iterator[Condition]:
        """What each stage is given of the embedding: itself, or the stage's part of one product for all of them."""
        stages = (*self.encoder, *self.middle, *self.decoder) if blocks.fuses(embedding) else ()
        layers = [stage.block.embed for stage in stages if isinstance(stage.block, ResidualBlock)]
        if not (layers and all(is_whole(layer.weight) for layer in layers)):
            yield from repeat(embedding)
        weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        parts = 2 if self.config.scale_shift else 1
        sizes = [layer.out_features // parts for layer in layers for _ in range(parts)]
        pieces = iter(F.linear(embedding, weight, bias).split(sizes, dim=1))
        for stage in stages:
            yield tuple(islice(pieces, parts if isinstance(stage.block, ResidualBlock) else 0))

    def _run(self, stage: Stage, branches: Branches, condition: Condition, weights, skip: Tensor | None = None):
        if self.gradient_checkpointing and torch.is_grad_enabled():

            def with_weights(*arguments) -> tuple[Branches, Tensor]:
                with weights:
                    return stage(*arguments)

            # What is dropped is kept, not drawn again: the generator cannot be set back where a CUDA graph is recorded.
            drops = {"context_fn": KEEP_DROPPED} if self.training and stage.drops() else {}
            arguments = Branches(branches.total()), condition, skip  # one image to be kept, not two
            return checkpoint(with_weights, *arguments, use_reentrant=False, preserve_rng_state=False, **drops)
        return stage(branches, condition, skip)


def sinusoids(values: Tensor, width: int, *, endpoint: bool) -> Tensor:
    """(B, width): cosines, then sines, of `values` at width/2 frequencies from 1 down to 1e-4."""
    half = width // 2
    exponent = torch.arange(half, device=values.device, dtype=torch.float32) / max(1, half - (1 if endpoint else 0))
    phase = values[:, None] * torch.exp(-math.log(10_000) * exponent)
    return torch.cat([phase.cos(), phase.sin()], dim=1)


def guidance_features(guidance: Tensor) -> Tensor:
    """Fourier features of w: (B, 2·GUIDANCE_FREQUENCIES)."""
    ends = math.log(GUIDANCE_SLOWEST), math.log(GUIDANCE_FASTEST)
    phase = guidance.float()[:, None] * torch.linspace(*ends, GUIDANCE_FREQUENCIES, device=guidance.device).exp()
    return torch.cat([phase.cos(), phase.sin()], dim=1)


def with_null(label: Tensor | None, time: Tensor, config: UNetConfig) -> Tensor | None:
    """Labels (B,), the null class where there are none; None for a network without classes. Raises ValueError."""
    if label is None and config.num_classes:
        if not config.null_class:
            raise ValueError("this network has no null class, so it needs a label")
        return torch.full_like(time, config.num_classes, dtype=torch.int64)
    return label if config.num_classes else None


def _check(config: UNetConfig) -> None:
    levels = len(config.channel_mult)
    if min(config.patch_size, levels, *config.channel_mult, 1 if config.input_mult is None else config.input_mult) <= 0:
        raise ValueError("patch_size, input_mult and every channel_mult must be positive, and channel_mult not empty")
    factor = config.patch_size * 2 ** (levels - 1)
    if any(size <= 0 or size % factor for size in config.image_size):
        raise ValueError(
            f"an image of {config.image_size[0]}×{config.image_size[1]} pixels does not divide by {factor}, "
            f"as {levels} levels on patches of {config.patch_size} need; use fewer levels or pad them"
        )
    products = [config.channels * mult for mult in config.channel_mult]
    if any(abs(product - round(product)) > 1e-6 for product in products):
        raise ValueError(f"channels · channel_mult must be whole numbers, and are {products}")
    if config.channels % 2 or min(config.channels, config.blocks, config.image_channels, config.outputs) <= 0:
        raise ValueError("channels must be even, and channels, blocks, image_channels and outputs positive")
    if min(config.groups, config.min_group_width, 1 if config.head_width is None else config.head_width) <= 0:
        raise ValueError("groups, min_group_width and head_width must be positive")
    for name, hint in get_type_hints(UNetConfig).items():
        if get_origin(hint) is Literal and getattr(config, name) not in get_args(hint):
            raise ValueError(f"{name} is {getattr(config, name)!r}; choose {', '.join(get_args(hint))}")
    attending = {level for level in range(levels) if config.height(level) in config.attention_resolutions}
    attending |= {levels - 1} if config.middle_attention else set()
    widths = sorted({config.width(level) for level in attending})
    if config.heads is not None and (config.heads <= 0 or any(width % config.heads for width in widths)):
        raise ValueError(f"{config.heads} heads do not divide the attention's channels {widths}")
    if config.heads is None and config.head_width and any(width % config.head_width for width in widths):
        raise ValueError(f"head width {config.head_width} does not divide the attention's channels {widths}")
