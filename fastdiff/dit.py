"""The diffusion transformer (arXiv 2212.09748), as diffusers' DiTTransformer2DModel computes it.

A `UNetConfig` describes it, too: channels, the width of a token; blocks, how many; heads or head_width; patch_size;
dropout; eps, of the second norm of a block; and what every network has to fit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from fastdiff.blocks import dropped, zeroed
from fastdiff.unet import GUIDANCE_FREQUENCIES, KEEP_DROPPED, UNetConfig, guidance_features, sinusoids, with_null

FREQUENCIES = 256  # sines and cosines of the time
EPS = 1e-6  # of the norms before attention and at the end


class DiT(nn.Module):
    """(z (B, C, H, W), time (B,), label (B,) or None, guidance (B,) or None) -> (B, outputs·C, H, W) float32.

    label None means the null class; guidance None means w = 0. Every block has an embedding of time and label of its
    own; that of w is one, added to all of them. Raises ValueError for images that are not square or do not divide into
    patches, and where the heads do not divide the width.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        _check(config)
        self.config, self.gradient_checkpointing = config, False
        width, patch = config.channels, config.patch_size
        self.patches = nn.Conv2d(config.image_channels, width, patch, stride=patch)
        if config.guidance_input:
            features = nn.Linear(2 * GUIDANCE_FREQUENCIES, width)
            self.guidance_mlp = nn.Sequential(features, nn.SiLU(), zeroed(nn.Linear(width, width)))
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.blocks)])
        self.modulate = zeroed(nn.Linear(width, 2 * width))
        self.project = zeroed(nn.Linear(width, config.outputs * config.image_channels * patch**2))
        self.to(memory_format=torch.channels_last)

    def forward(self, z: Tensor, time: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        config = self.config
        times = sinusoids(time.float() * config.time_scale, FREQUENCIES, endpoint=True)
        label = with_null(label, time, config)
        strength = 0.0
        if config.guidance_input:
            strength = self.guidance_mlp(guidance_features(torch.zeros_like(time) if guidance is None else guidance))
        side = config.image_size[0] // config.patch_size
        h = self.patches(z).flatten(2).transpose(1, 2)  # (B, tokens, width)
        h = h + positions(side, config.channels, z.device)
        for block in self.blocks:
            h = self._run(block, h, times, label, strength)
        shift, scale = self.modulate(F.silu(self.blocks[0].embed(times, label) + strength)).chunk(2, dim=1)
        h = self.project(_normed(h, shift, scale, EPS)).transpose(1, 2)  # a channel's patch after the other's
        return F.pixel_shuffle(h.unflatten(2, (side, side)), config.patch_size).float()

    def _run(self, block: Block, *inputs: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            drops = {"context_fn": KEEP_DROPPED} if self.training and block.dropout.p else {}
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **drops)
        return block(*inputs)


class Block(nn.Module):
    """Attention and two layers on each token, shifted, scaled and gated by the embedding; at first the identity."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        width = config.channels
        self.heads, self.eps = config.heads or width // (config.head_width or width), config.eps
        self.time_mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        if config.num_classes:
            self.label_embedding = nn.Embedding(config.num_classes + config.null_class, width)
        self.modulate = zeroed(nn.Linear(width, 6 * width))
        self.qkv, self.attended = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(config.dropout)

    def embed(self, times: Tensor, label: Tensor | None) -> Tensor:
        return self.time_mlp(times) + (0.0 if label is None else self.label_embedding(label))

    def forward(self, h: Tensor, times: Tensor, label: Tensor | None, strength: Tensor | float) -> Tensor:
        modulation = self.modulate(F.silu(self.embed(times, label) + strength))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        attended = kernels.attention(self.qkv(_normed(h, shift1, scale1, EPS)), self.heads)
        h = h + gate1[:, None] * dropped(self.attended(attended), self.dropout)
        wide = F.gelu(self.widen(_normed(h, shift2, scale2, self.eps)), approximate="tanh")
        return h + gate2[:, None] * self.narrow(dropped(wide, self.dropout))


def positions(side: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """(1, side², width): sines and cosines of each token's column, then of its row, at width/4 frequencies."""
    place = torch.arange(side, dtype=torch.float64, device=device)
    rates = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64, device=device) / (width // 4))
    phase = place[:, None] * rates
    waves = torch.cat([phase.sin(), phase.cos()], dim=1)  # (side, width / 2)
    by_column = waves[None].expand(side, -1, -1)
    by_row = waves[:, None].expand(-1, side, -1)
    return torch.cat([by_column, by_row], dim=2).flatten(0, 1)[None].float()


def _normed(h: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.layer_norm(h, h.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def _check(config: UNetConfig) -> None:
    height, width = config.image_size
    if min(config.channels, config.blocks, config.patch_size, config.image_channels, config.outputs) <= 0:
        raise ValueError("channels, blocks, patch_size, image_channels and outputs must be positive")
    if height != width or height <= 0 or height % config.patch_size:
        raise ValueError(f"an image of {height}×{width} pixels is no square of patches of {config.patch_size}")
    heads = config.heads or config.channels // (config.head_width or config.channels)
    if config.channels % 4 or heads <= 0 or config.channels % heads:
        raise ValueError(f"channels must divide by 4 and by the heads, and are {config.channels} with {heads} heads")
