"""The blocks of a U-Net: residual blocks with optional attention, and changes of resolution."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels

if TYPE_CHECKING:
    from fastdiff.unet import UNetConfig

# What a stage is given of time, label and guidance: their embedding (B, 4·channels), or what it would make of that:
# scale and shift (B, width), or a shift alone.
Condition = Tensor | tuple[Tensor, ...]


class Branches(NamedTuple):
    """The end of a residual block, (x + h + bias)·scale, that the norm after it sums up as it reads."""

    x: Tensor
    h: Tensor | None = None
    bias: Tensor | None = None
    """(C,): of the convolutions before."""
    scale: float = 1.0

    def total(self) -> Tensor:
        if self.h is not None:
            return kernels.residual_sum(self.x, self.h, x_bias=self.bias, scale=self.scale)
        return self.x if self.bias is None else self.x + self.bias.to(self.x.dtype)[:, None, None]


class Stage(nn.Module):
    """A residual block with optional attention, or a change of resolution."""

    def __init__(
        self, config: UNetConfig, channels: int, out: int, *, attention: bool = False, resample: str | None = None
    ):
        super().__init__()
        self.resample = resample
        if resample is None or config.resample == "block":
            self.block = ResidualBlock(config, channels, out, resample)
        else:
            self.block = ResamplingConv(config, channels, resample)
        self.attention = Attention(config, out) if attention else None

    def drops(self) -> bool:
        return isinstance(self.block, ResidualBlock) and self.block.dropout.p > 0

    def forward(self, branches: Branches, condition: Condition, skip: Tensor | None = None) -> tuple[Branches, Tensor]:
        """What comes out, and what came in, summed up, with skip beside it."""
        branches, entered = self.block(branches, condition, skip)
        return branches if self.attention is None else self.attention(branches), entered


class ResidualBlock(nn.Module):
    def __init__(self, config: UNetConfig, channels: int, out: int, resample: str | None):
        super().__init__()
        self.resample, self.scale_shift, self.residual_scale = resample, config.scale_shift, config.residual_scale
        self.norm1 = ResidualNorm(config, channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.embed = nn.Linear(4 * config.channels, 2 * out if config.scale_shift else out)
        self.norm2 = GroupNorm(config, out)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = zeroed(nn.Conv2d(out, out, 3, padding=1))
        projected = channels != out or (resample is not None and config.resample_skip_conv)
        self.skip = nn.Conv2d(channels, out, 1) if projected else nn.Identity()

    def forward(self, branches: Branches, condition: Condition, skip: Tensor | None = None) -> tuple[Branches, Tensor]:
        if skip is not None and not fuses(skip):
            branches, skip = Branches(torch.cat([branches.total(), skip], dim=1)), None
        h, x, entered = self.norm1(branches, skip, silu=True)
        h, bias = convolved(self.conv1, _resample(h, self.resample))
        if isinstance(condition, Tensor):
            condition = self.embed(condition).chunk(2 if self.scale_shift else 1, dim=1)
        if self.scale_shift:
            h = self.norm2(h, *condition, silu=True, x_bias=bias)
        else:
            h = self.norm2(h + condition[0][:, :, None, None], silu=True, x_bias=bias)
        h, bias = convolved(self.conv2, dropped(h, self.dropout))
        if skip is None:
            x, x_bias = convolved(self.skip, _resample(x, self.resample))
        else:
            x, x_bias = _joint(self.skip, x, entered)
        return Branches(x, h, bias if x_bias is None else bias + x_bias, self.residual_scale), entered


class ResamplingConv(nn.Module):
    """A 3×3 convolution with stride 2, or after doubling the image."""

    def __init__(self, config: UNetConfig, channels: int, resample: str):
        super().__init__()
        self.up, self.asymmetric = resample == "up", config.resample == "conv-asymmetric"
        stride, padding = (1, 1) if self.up else (2, 0 if self.asymmetric else 1)
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=padding)

    def forward(self, branches: Branches, condition: Condition, skip: None = None) -> tuple[Branches, Tensor]:
        x = branches.total()
        padded = _resample(x, "up") if self.up else F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x
        h, bias = convolved(self.conv, padded)
        return Branches(h, bias=bias), x


class Attention(nn.Module):
    """Self-attention over all pixels, with a residual."""

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        self.heads = config.heads or channels // (config.head_width or channels)
        self.order, self.residual_scale = config.qkv_order, config.residual_scale
        self.norm = ResidualNorm(config, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = zeroed(nn.Linear(channels, channels))

    def forward(self, branches: Branches) -> Branches:
        h, x, _ = self.norm(branches)
        tokens = h.flatten(2).transpose(1, 2)  # (B, H·W, C), a view where x is channels-last
        h, bias = convolved(self.project, kernels.attention(self.packed(self.qkv(tokens)), self.heads))
        h = h.transpose(1, 2).unflatten(2, x.shape[2:])
        return Branches(x, h, bias, self.residual_scale)

    def packed(self, qkv: Tensor) -> Tensor:
        """(B, N, 3·C) in the network's own order, as q, k, v with heads inside each."""
        if self.order == "qkv-head":
            return qkv
        if self.order == "head-qkv":
            return qkv.unflatten(2, (self.heads, 3, -1)).transpose(2, 3).flatten(2)
        return qkv.unflatten(2, (self.heads, -1, 3)).movedim(-1, 2).flatten(2)


class GroupNorm(nn.Module):
    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        self.groups = math.gcd(channels, max(1, min(config.groups, channels // config.min_group_width)))
        self.eps = config.eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, **how):
        """`kernels.group_norm`, which says what else there is."""
        given = {"scale": scale, "shift": shift, **how}
        return kernels.group_norm(x, self.groups, self.weight, self.bias, self.eps, **given)


class ResidualNorm(GroupNorm):
    def forward(self, branches: Branches, skip: Tensor | None = None, *, silu: bool = False):
        """`kernels.residual_norm`."""
        x, h, bias, scale = branches
        norm = self.groups, self.weight, self.bias, self.eps
        return kernels.residual_norm(x, h, skip, *norm, x_bias=bias, scale=scale, silu=silu)


def dropped(h: Tensor, dropout: nn.Dropout) -> Tensor:
    """Dropout by one operation on every device, as KEEP_DROPPED asks."""
    return torch.native_dropout(h, dropout.p, True)[0] if dropout.training and dropout.p else h


def _resample(x: Tensor, direction: str | None) -> Tensor:
    if direction == "down":
        return kernels.downsample(x)
    return kernels.upsample(x) if direction == "up" else x


def fuses(x: Tensor) -> bool:
    """Whether launches and passes over memory are to be saved, as on a GPU."""
    return not x.is_cpu


def convolved(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A convolution of x, or the like, and its bias, if that is left to the next operation, which it costs nothing.

    Modules' calls would take 1 % of the time of small images on a CPU.
    """
    if isinstance(layer, nn.Identity):
        return x, None
    bias, left = (None, layer.bias) if fuses(x) else (layer.bias, None)
    if isinstance(layer, nn.Linear):
        return F.linear(x, layer.weight, bias), left
    return F.conv2d(x, layer.weight, bias, layer.stride, layer.padding), left


def _joint(layer: nn.Conv2d, *images: Tensor) -> tuple[Tensor, Tensor]:
    """A 1×1 convolution of two images side by side, as two products that add up; and its bias."""
    first, second = (image.permute(0, 2, 3, 1) for image in images)  # (B, H, W, C), dense where channels-last
    weights = layer.weight.flatten(1).to(first.dtype).split([image.shape[1] for image in images], dim=1)
    rows = torch.mm(first.flatten(0, 2), weights[0].T).addmm_(second.flatten(0, 2), weights[1].T)
    return rows.unflatten(0, first.shape[:3]).permute(0, 3, 1, 2), layer.bias


def zeroed(module: nn.Module) -> nn.Module:
    """Zero weights, so that a new residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
