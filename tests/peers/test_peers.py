"""Independent implementations of what fastdiff computes: diffusers, and single blocks of published networks.

The functions below describe blocks of ADM (Dhariwal and Nichol, 2021) and of DDPM++ (Song et al., 2021, as in EDM's
reimplementation) in plain operations; parameters are looked up by name in a dictionary of a fastdiff module's weights.
"""

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastdiff import rotation, samplers
from fastdiff.blocks import Branches, ResamplingConv, Stage
from fastdiff.schedule import LinearBetaSchedule
from fastdiff.unet import UNet, UNetConfig


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random weights everywhere, also in norms and in what starts at zero; matrices keep variance about 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
    return module.eval()


# --- diffusers' UNet2DModel ---------------------------------------------------------------------------------------


def from_diffusers(peer: dict[str, torch.Tensor], levels: int, blocks: int, *, sine_first: bool) -> dict:
    """A UNet2DModel's weights under fastdiff's names: renaming, reordering and concatenating only."""
    peer, ours = dict(peer), {}

    def copy(name: str, theirs: str) -> None:
        for kind in ("weight", "bias"):
            ours[f"{name}.{kind}"] = peer.pop(f"{theirs}.{kind}")

    def residual(name: str, theirs: str) -> None:
        for part in ("norm1", "conv1", "norm2", "conv2"):
            copy(f"{name}.{part}", f"{theirs}.{part}")
        copy(f"{name}.embed", f"{theirs}.time_emb_proj")
        if f"{theirs}.conv_shortcut.weight" in peer:
            copy(f"{name}.skip", f"{theirs}.conv_shortcut")

    def stage(name: str, theirs: str, index: int) -> None:
        residual(f"{name}.block", f"{theirs}.resnets.{index}")
        attention = f"{theirs}.attentions.{index}"
        if f"{attention}.to_q.weight" in peer:
            copy(f"{name}.attention.norm", f"{attention}.group_norm")
            copy(f"{name}.attention.project", f"{attention}.to_out.0")
            for kind in ("weight", "bias"):
                parts = [peer.pop(f"{attention}.to_{part}.{kind}") for part in "qkv"]
                ours[f"{name}.attention.qkv.{kind}"] = torch.cat(parts)

    def resampler(name: str, theirs: str) -> None:
        if f"{theirs}.norm1.weight" in peer:
            residual(f"{name}.block", theirs)
        else:
            copy(f"{name}.block.conv", f"{theirs}.conv")

    copy("conv_in", "conv_in")
    copy("time_mlp.0", "time_embedding.linear_1")
    copy("time_mlp.2", "time_embedding.linear_2")
    if sine_first:
        sines, cosines = ours["time_mlp.0.weight"].chunk(2, dim=1)
        ours["time_mlp.0.weight"] = torch.cat([cosines, sines], dim=1)
    if "class_embedding.weight" in peer:
        ours["label_embedding.weight"] = peer.pop("class_embedding.weight")
    position = 0
    for level in range(levels):
        for index in range(blocks):
            stage(f"encoder.{position + index}", f"down_blocks.{level}", index)
        position += blocks
        if level < levels - 1:
            resampler(f"encoder.{position}", f"down_blocks.{level}.downsamplers.0")
            position += 1
    stage("middle.0", "mid_block", 0)
    residual("middle.1.block", "mid_block.resnets.1")
    position = 0
    for level in range(levels):
        for index in range(blocks + 1):
            stage(f"decoder.{position + index}", f"up_blocks.{level}", index)
        position += blocks + 1
        if level < levels - 1:
            resampler(f"decoder.{position}", f"up_blocks.{level}.upsamplers.0")
            position += 1
    copy("norm_out", "conv_norm_out")
    copy("conv_out", "conv_out")
    assert not peer, f"left over: {sorted(peer)}"
    return ours


DIFFUSERS_CASES = {
    "DDPM": (
        {
            "block_out_channels": (32, 64),
            "layers_per_block": 2,
            "norm_eps": 1e-6,
            "attention_head_dim": None,
            "freq_shift": 1,
            "flip_sin_to_cos": False,
            "downsample_padding": 0,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        UNetConfig(
            (16, 16),
            3,
            channels=32,
            channel_mult=(1, 2),
            blocks=2,
            attention_resolutions=(8,),
            head_width=None,
            scale_shift=False,
            resample="conv-asymmetric",
            groups=8,
            eps=1e-6,
            time_endpoint=True,
        ),
    ),
    "scale-shift with classes": (
        {
            "block_out_channels": (32, 64, 96),
            "layers_per_block": 1,
            "attention_head_dim": 16,
            "num_class_embeds": 5,
            "resnet_time_scale_shift": "scale_shift",
            "downsample_padding": 1,
            "attn_norm_num_groups": 8,
            "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
        },
        UNetConfig(
            (16, 16),
            3,
            4,
            channels=32,
            channel_mult=(1, 2, 3),
            blocks=1,
            attention_resolutions=(16, 4),
            head_width=16,
            resample="conv",
            groups=8,
        ),
    ),
    "resampling in blocks, as in ADM": (
        {
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "attention_head_dim": 32,
            "num_class_embeds": 5,
            "resnet_time_scale_shift": "scale_shift",
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "attn_norm_num_groups": 8,
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        },
        UNetConfig(
            (16, 16),
            3,
            4,
            channels=32,
            channel_mult=(1, 2),
            blocks=1,
            attention_resolutions=(8,),
            head_width=32,
            groups=8,
        ),
    ),
}


@pytest.mark.parametrize("case", DIFFUSERS_CASES)
def test_diffusers_unet_gives_the_same_images(case):
    diffusers = pytest.importorskip("diffusers")
    peer_options, config = DIFFUSERS_CASES[case]
    peer = randomise(
        diffusers.UNet2DModel(sample_size=16, in_channels=3, out_channels=3, norm_num_groups=8, **peer_options), seed=1
    )
    net = UNet(config).eval()
    sine_first = not peer.config.flip_sin_to_cos
    weights = from_diffusers(peer.state_dict(), len(config.channel_mult), config.blocks, sine_first=sine_first)
    net.load_state_dict(weights)
    z, time = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2)), torch.tensor([0.0, 0.125, 0.875])
    label = torch.tensor([0, 3, 4]) if config.num_classes else None
    with torch.no_grad():
        expected = peer(z, time * 1000, class_labels=label).sample
        found = net(z, time, label)
        swapped = net(z, time.flip(0), label)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(swapped, expected) > 1e-2  # time matters, so the agreement above covers it


# --- Blocks of published networks ---------------------------------------------------------------------------------


def conv(weights: dict, name: str, x: torch.Tensor, **options) -> torch.Tensor:
    weight = weights[f"{name}.weight"]
    return F.conv2d(x, weight, weights[f"{name}.bias"], padding=weight.shape[-1] // 2, **options)


def norm(weights: dict, name: str, x: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """Group normalization written out: biased variance over a group's channels and pixels."""
    grouped = x.reshape(len(x), groups, -1)
    variance, mean = torch.var_mean(grouped, dim=2, keepdim=True, correction=0)
    normal = ((grouped - mean) / torch.sqrt(variance + eps)).reshape(x.shape)
    return normal * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]


def box_filter(x: torch.Tensor, resample: str | None) -> torch.Tensor:
    """Resampling with the filter [1, 1] in each direction, as a depthwise convolution."""
    channels = x.shape[1]
    ones = torch.ones(channels, 1, 2, 2)
    if resample == "down":
        return F.conv2d(x, ones / 4, stride=2, groups=channels)
    return x if resample is None else F.conv_transpose2d(x, ones, stride=2, groups=channels)


def adm_block(weights: dict, x, embedding, resample: str | None = None, groups: int = 32) -> torch.Tensor:
    """ADM's ResBlock with use_scale_shift_norm and resblock_updown."""
    h = box_filter(F.silu(norm(weights, "block.norm1", x, groups, 1e-5)), resample)
    h = conv(weights, "block.conv1", h)
    modulation = F.silu(embedding) @ weights["block.embed.weight"].T + weights["block.embed.bias"]
    scale, shift = modulation[:, :, None, None].split(h.shape[1], dim=1)
    h = norm(weights, "block.norm2", h, groups, 1e-5) * (1 + scale) + shift
    h = conv(weights, "block.conv2", F.silu(h))
    x = box_filter(x, resample)
    return h + (conv(weights, "block.skip", x) if "block.skip.weight" in weights else x)


def ddpmpp_block(weights: dict, x, embedding, resample: str | None = None) -> torch.Tensor:
    """DDPM++'s block: additive embedding, a 1×1 convolution wherever width or size changes, and a factor √½."""
    h = box_filter(F.silu(norm(weights, "block.norm1", x, min(32, x.shape[1] // 4), 1e-6)), resample)
    h = conv(weights, "block.conv1", h)
    h = h + (F.silu(embedding) @ weights["block.embed.weight"].T + weights["block.embed.bias"])[:, :, None, None]
    h = conv(weights, "block.conv2", F.silu(norm(weights, "block.norm2", h, min(32, h.shape[1] // 4), 1e-6)))
    if x.shape[1] != h.shape[1] or resample is not None:
        x = conv(weights, "block.skip", box_filter(x, resample))
    return (h + x) * math.sqrt(0.5)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """(rows, width, pixels) each."""
    scale = q.shape[1] ** -0.25
    return v @ torch.softmax((q * scale).mT @ (k * scale), dim=2).mT


def attention_block(
    weights: dict, x: torch.Tensor, heads: int, order: str, groups: int, eps: float, residual_scale: float
) -> torch.Tensor:
    """Self-attention with its residual; `order` is the network whose nesting of q, k, v, heads and width is meant."""
    batch, channels, height, width = x.shape
    flat = norm(weights, "attention.norm", x, groups, eps).reshape(batch, channels, height * width)
    qkv = weights["attention.qkv.weight"] @ flat + weights["attention.qkv.bias"][:, None]
    rows, head_width = batch * heads, channels // heads
    if order == "ADM":  # split q, k and v first, then heads
        q, k, v = (part.reshape(rows, head_width, -1) for part in qkv.chunk(3, dim=1))
    elif order == "ADM legacy":  # split heads first
        q, k, v = qkv.reshape(rows, 3 * head_width, -1).split(head_width, dim=1)
    else:  # EDM: q, k and v are neighbours
        q, k, v = qkv.reshape(rows, head_width, 3, -1).unbind(2)
    h = attend(q, k, v).reshape(batch, channels, -1)
    h = weights["attention.project.weight"] @ h + weights["attention.project.bias"][:, None]
    return (x + h.reshape(x.shape)) * residual_scale


ADM = UNetConfig((16, 16), 3, 4, channels=32, min_group_width=1, head_width=32)
EDM_ADM = replace(ADM, min_group_width=4, qkv_order="head-width-qkv")
DDPMPP = UNetConfig(
    (16, 16),
    3,
    4,
    channels=32,
    head_width=None,
    scale_shift=False,
    resample_skip_conv=True,
    residual_scale=0.5**0.5,
    eps=1e-6,
    decoder_attention="last",
    qkv_order="head-width-qkv",
    time_endpoint=True,
    label_before_mlp=True,
)


def stage_inputs(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, channels, 4, 6, generator=generator), torch.randn(2, 4 * 32, generator=generator)


def outcome(stage: torch.nn.Module, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    branches, _ = stage(Branches(x), embedding)
    return branches.total()


@pytest.mark.parametrize("widths", [(32, 32), (96, 64)])
@pytest.mark.parametrize("resample", [None, "down", "up"])
@pytest.mark.parametrize("family", ["ADM", "EDM's ADM", "DDPM++"])
def test_published_residual_blocks(family, resample, widths):
    channels, out = widths if resample is None else widths[:1] * 2
    config = {"ADM": ADM, "EDM's ADM": EDM_ADM, "DDPM++": DDPMPP}[family]
    stage = randomise(Stage(config, channels, out, resample=resample), seed=4)
    weights = stage.state_dict()
    x, embedding = stage_inputs(channels)
    if family == "DDPM++":
        assert ("block.skip.weight" in weights) == (channels != out or resample is not None)
        expected = ddpmpp_block(weights, x, embedding, resample)
    elif family == "ADM":
        expected = adm_block(weights, x, embedding, resample)
    else:  # min(32, C / 4) groups, which is not the same for the block's two norms
        stage = randomise(Stage(config, 64, 64, resample=resample), seed=4)
        x, embedding = stage_inputs(64)
        expected = adm_block(stage.state_dict(), x, embedding, resample, groups=16)
    with torch.no_grad():
        assert relative_error(outcome(stage, x, F.silu(embedding)), expected) < 1e-5


@pytest.mark.parametrize(
    "order, config, groups",
    [
        ("ADM", ADM, 32),
        ("ADM legacy", replace(ADM, qkv_order="head-qkv"), 32),
        ("EDM", EDM_ADM, 16),
        ("EDM", replace(DDPMPP, head_width=16), 16),
        ("EDM", DDPMPP, 16),
    ],
    ids=["ADM", "ADM legacy", "EDM's ADM", "DDPM++ with heads", "DDPM++"],
)
def test_published_attention(order, config, groups):
    stage = randomise(Stage(config, 64, 64, attention=True), seed=5)
    weights = stage.state_dict()
    x, embedding = stage_inputs(64)
    heads = 64 // (config.head_width or 64)
    with torch.no_grad():
        found, h = (outcome(part, x, F.silu(embedding)) for part in (stage, stage.block))
        expected = attention_block(weights, h, heads, order, groups, config.eps, config.residual_scale)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("mode", ["conv", "conv-asymmetric"])
def test_published_resampling_convolutions(mode):
    """DDPM pads right and below before its strided convolution, as TensorFlow does; Improved DDPM on all sides."""
    down = randomise(Stage(replace(ADM, resample=mode), 32, 32, resample="down"), seed=6)
    up = randomise(Stage(replace(ADM, resample=mode), 32, 32, resample="up"), seed=7)
    x, embedding = stage_inputs(32)
    assert isinstance(down.block, ResamplingConv)
    everywhere = conv(down.state_dict(), "block.conv", x)  # a strided convolution is a subsampled one
    offset = 1 if mode == "conv-asymmetric" else 0
    with torch.no_grad():
        assert relative_error(outcome(down, x, embedding), everywhere[:, :, offset::2, offset::2]) < 1e-5
        doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        assert relative_error(outcome(up, x, embedding), conv(up.state_dict(), "block.conv", doubled)) < 1e-5


@pytest.mark.parametrize("channels, groups", [(20, 5), (64, 16), (128, 32), (256, 32)])
def test_edm_group_rule(channels, groups):
    assert Stage(DDPMPP, channels, channels).block.norm1.groups == groups


@pytest.mark.parametrize("channels", [32, 64, 96, 192])
def test_adm_has_32_groups(channels):
    assert Stage(ADM, channels, channels).block.norm1.groups == 32


def embedding_of(net: UNet, time: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net.embed(time, label, None)


def test_adm_embedding():
    """Cosines before sines; the label is added after two layers."""
    net = randomise(UNet(ADM), seed=8)
    weights = net.state_dict()
    time, label = torch.tensor([0.125, 0.5]), torch.tensor([1, 3])
    phase = 1000 * time[:, None] * 10_000 ** (-torch.arange(16) / 16)
    h = torch.cat([torch.cos(phase), torch.sin(phase)], dim=1)
    h = F.silu(h @ weights["time_mlp.0.weight"].T + weights["time_mlp.0.bias"])
    h = h @ weights["time_mlp.2.weight"].T + weights["time_mlp.2.bias"] + weights["label_embedding.weight"][label]
    assert relative_error(embedding_of(net, time, label), h) < 1e-5


def test_ddpmpp_embedding():
    """EDM feeds c_noise itself, sines before cosines, and a linear layer of the scaled one-hot label before two more.

    Its label layer is an embedding whose null row is the bias; the order of sines is one of the next layer's columns.
    """
    net = randomise(UNet(replace(DDPMPP, time_scale=1.0)), seed=9)
    label_weight, label_bias = torch.randn(32, 4), torch.randn(32)
    with torch.no_grad():
        rows = [label_weight[:, i] * math.sqrt(4) + label_bias for i in range(4)]
        net.label_embedding.weight.copy_(torch.cat([torch.stack(rows), label_bias[None]]).roll(16, dims=1))
    weights = net.state_dict()
    first = weights["time_mlp.0.weight"].roll(16, dims=1)  # its columns, sines first
    time, label = torch.tensor([-1.3, 0.9]), torch.tensor([2, 4])
    phase = time[:, None] * 10_000 ** (-torch.arange(16) / 15)
    one_hot = F.one_hot(label, 5)[:, :4].float()  # zeros for the null label
    h = torch.cat([torch.sin(phase), torch.cos(phase)], dim=1) + (one_hot * 2) @ label_weight.T + label_bias
    h = F.silu(h @ first.T + weights["time_mlp.0.bias"])
    h = h @ weights["time_mlp.2.weight"].T + weights["time_mlp.2.bias"]
    assert relative_error(embedding_of(net, time, label), h) < 1e-5


# --- Order and widths of blocks -----------------------------------------------------------------------------------


def outline(net: UNet) -> list[list[str]]:
    """Encoder, middle and decoder as "kind in-out", with @ for attention."""

    def line(stage: Stage) -> str:
        if isinstance(stage.block, ResamplingConv):
            channels, out = stage.block.conv.in_channels, stage.block.conv.out_channels
        else:
            channels, out = stage.block.conv1.in_channels, stage.block.conv2.out_channels
        return f"{stage.resample or 'res'} {channels}-{out}" + ("@" if stage.attention else "")

    return [[line(stage) for stage in part] for part in (net.encoder, net.middle, net.decoder)]


def test_outline_of_adm():
    """Three residual blocks at every level on the way up for two on the way down, each attending where the level does.

    The middle attends in any case. Skips: 32 (input), 32, 32, 32 (down), 64, 64.
    """
    config = replace(ADM, channel_mult=(1, 2), blocks=2, attention_resolutions=(8,))
    encoder, middle, decoder = outline(UNet(config))
    assert encoder == ["res 32-32", "res 32-32", "down 32-32", "res 32-64@", "res 64-64@"]
    assert middle == ["res 64-64@", "res 64-64"]
    assert decoder == ["res 128-64@", "res 128-64@", "res 96-64@", "up 64-64", "res 96-32", "res 64-32", "res 64-32"]
    assert outline(UNet(replace(config, attention_resolutions=())))[1] == middle


def test_outline_of_ddpmpp():
    """As ADM, but only the last block of a level attends on the way up."""
    config = replace(DDPMPP, channel_mult=(1, 2), blocks=2, attention_resolutions=(16,))
    encoder, middle, decoder = outline(UNet(config))
    assert encoder == ["res 32-32@", "res 32-32@", "down 32-32", "res 32-64", "res 64-64"]
    assert middle == ["res 64-64@", "res 64-64"]
    assert decoder == ["res 128-64", "res 128-64", "res 96-64", "up 64-64", "res 96-32", "res 64-32", "res 64-32@"]


def test_outline_of_ddpm():
    """Convolutions between levels, attention after every block of the level of 16×16 pixels and in the middle."""
    config = UNetConfig(
        (32, 32),
        3,
        channels=32,
        channel_mult=(1, 2),
        blocks=1,
        attention_resolutions=(16,),
        head_width=None,
        scale_shift=False,
        resample="conv-asymmetric",
        eps=1e-6,
        time_endpoint=True,
    )
    net = UNet(config)
    assert outline(net) == [
        ["res 32-32", "down 32-32", "res 32-64@"],
        ["res 64-64@", "res 64-64"],
        ["res 128-64@", "res 96-64@", "up 64-64", "res 96-32", "res 64-32"],
    ]
    assert isinstance(net.encoder[1].block, ResamplingConv) and isinstance(net.decoder[2].block, ResamplingConv)


def test_published_parameter_count_of_ddpm():
    """DDPM's CIFAR-10 network has 35.7 M in its paper, and 35,746,307 in diffusers' port."""
    ddpm = UNetConfig(
        (32, 32),
        3,
        channels=128,
        channel_mult=(1, 2, 2, 2),
        blocks=2,
        attention_resolutions=(16,),
        head_width=None,
        scale_shift=False,
        resample="conv-asymmetric",
        eps=1e-6,
        time_endpoint=True,
    )
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(ddpm).parameters()) == 35_746_307


# --- DDIM ---------------------------------------------------------------------------------------------------------


class AtTimesteps:
    """The schedule whose grid of N steps is a list of N of DDPM's timesteps, noisiest first."""

    def __init__(self, timesteps: list[int]):
        self.timesteps, self.linear = timesteps, LinearBetaSchedule()

    def angle(self, t: float) -> float:
        return self.linear.angle(self.timesteps[len(self.timesteps) - round(t * len(self.timesteps))] / 999)


def gaussian_epsilon(z: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """E[ε | z] of two Gaussians at ±0.6, of deviation 0.3 each, in every pixel alone."""
    variance = (0.3 * cos) ** 2 + sin**2
    mean = 0.6 * torch.tanh(0.6 * cos * z / variance)
    return sin * (z - cos * mean) / variance


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_diffusers_ddim_gives_the_same_trajectory(spacing, prediction, clip):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type=prediction,
        set_alpha_to_one=True,
        timestep_spacing=spacing,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )
    scheduler.set_timesteps(20)
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(10))
    expected, trajectory = noise, []
    for timestep in scheduler.timesteps:
        alpha_bar = scheduler.alphas_cumprod[timestep]
        cos, sin = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        output = gaussian_epsilon(expected, cos, sin)
        if prediction == "v_prediction":
            output = (output - sin * expected) / cos
        expected = scheduler.step(output, timestep, expected, eta=0.0, use_clipped_model_output=True).prev_sample
        trajectory.append(expected)

    def model(z, angle, label, guidance):
        cos, sin = (f(angle)[:, None, None, None].float() for f in (torch.cos, torch.sin))
        return rotation.velocity_from_eps(z, gaussian_epsilon(z, cos, sin), angle)

    found = []
    schedule = AtTimesteps(scheduler.timesteps.tolist())
    out = samplers.ddim(
        model, noise, None, None, 20, schedule=schedule, clip=clip, on_step=lambda i, z: found.append(z)
    )
    assert len(found) == 20 and torch.equal(out, found[-1])
    for ours, theirs in zip(found, trajectory, strict=True):
        assert relative_error(ours, theirs) < 1e-4
    assert (out.abs().max() <= 0.5) == (clip is not None)  # so clipping was not idle


def test_linear_beta_schedule_is_the_one_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    expected = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear").alphas_cumprod
    angles = LinearBetaSchedule().angle(torch.arange(1000, dtype=torch.float64) / 999)
    torch.testing.assert_close(torch.cos(angles).square().float(), expected, rtol=1e-4, atol=0)


# --- Living beside Hugging Face's packages, which look for another package called `kernels` -----------------------

COMPANIONS = """
import diffusers, transformers
from diffusers import DDIMScheduler, UNet2DModel
from transformers import AutoConfig, BertConfig, BertModel
import transformers.integrations.hub_kernels
import transformers.utils
import diffusers.utils
import torch

for package in (transformers.utils, diffusers.utils):
    available = getattr(package, "is_kernels_available", None)
    assert available is None or not available(), f"{package.__name__} takes our kernels for another"
config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
assert BertModel(config)(torch.tensor([[1, 2]])).last_hidden_state.shape == (1, 2, 8)
"""
OURS = """
import fastdiff, kernels
import torch
from fastdiff.unet import UNet, UNetConfig

assert kernels.attention(torch.zeros(1, 2, 6), 1).shape == (1, 2, 2)
assert UNet(UNetConfig((4, 4), 1, channels=4, channel_mult=(1,), head_width=None)).conv_in.in_channels == 1
"""


@pytest.mark.parametrize("order", [OURS + COMPANIONS, COMPANIONS + OURS], ids=["ours first", "ours last"])
def test_hugging_face_packages_do_not_mistake_our_kernels_for_theirs(order):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", order], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
