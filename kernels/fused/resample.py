"""Half and double resolution in Triton, channels-last: 2×2 means and repetitions, each the other's gradient.

A program has a tile of rows (pixels) and channels of the small image, and the four pixels of the large one for each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import reference
from .common import load, part_and_channels, store, tile_of_rows, walking
from .launch import differentiable, launch, needs_reference, operator


@triton.jit
def _large_rows(first, width, channels, channel, ROWS: tl.constexpr):
    """(where the large image's row 4·first lies, offsets from there of each small row's upper left pixel).

    Row r of the small image, in column j = r mod width, is there row 2·(2·width)·(r − j)/width + 2·j = 4·r − 2·j.
    """
    row = tl.arange(0, ROWS)
    at = (4 * row - 2 * ((first + row) % width))[:, None] * channels + channel[None, :]
    return tl.cast(first, tl.int64) * 4 * channels, at


@triton.jit
def _down_kernel(
    small,  # (rows, channels)
    large,  # (4·rows, channels)
    factor,  # of the sum of four
    width,  # of the small image
    rows,
    channels,
    blocks,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    part, channel, inside = part_and_channels(channels, blocks, CHANNELS)
    start, at, mask = tile_of_rows(part * ROWS, rows, channels, channel, inside, ROWS)
    origin, corner = _large_rows(part * ROWS, width, channels, channel, ROWS)
    upper, lower = large + origin, large + origin + 2 * width * channels
    total = load(upper, corner, mask) + load(upper + channels, corner, mask)
    total += load(lower, corner, mask) + load(lower + channels, corner, mask)
    store(small + start, at, total * tl.cast(factor, tl.float32), mask)


@triton.jit
def _up_kernel(
    large,  # (4·rows, channels)
    small,  # (rows, channels)
    factor,
    width,  # of the small image
    rows,
    channels,
    blocks,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    part, channel, inside = part_and_channels(channels, blocks, CHANNELS)
    start, at, mask = tile_of_rows(part * ROWS, rows, channels, channel, inside, ROWS)
    origin, corner = _large_rows(part * ROWS, width, channels, channel, ROWS)
    upper, lower = large + origin, large + origin + 2 * width * channels
    value = load(small + start, at, mask) * tl.cast(factor, tl.float32)
    store(upper, corner, value, mask)
    store(upper + channels, corner, value, mask)
    store(lower, corner, value, mask)
    store(lower + channels, corner, value, mask)


def _launch(kernel, small: Tensor, large: Tensor, factor: float) -> None:
    if not isinstance(small, FakeTensor):  # no tiles are chosen for symbolic sizes
        walk = walking(small)
        programs = triton.cdiv(walk["rows"], walk["ROWS"]) * walk["blocks"]
        launch(kernel, (programs,), small=small, large=large, factor=factor, width=small.shape[3], **walk)


@operator("downsample")
def halved(x: Tensor, factor: float) -> Tensor:
    """factor · the sum of each 2×2 pixels, channels-last."""
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    size = (batch, channels, height // 2, width // 2)
    small = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    _launch(_down_kernel, small, x, factor)
    return small


@operator("upsample")
def doubled(x: Tensor, factor: float) -> Tensor:
    """factor · each pixel, 2×2 times, channels-last."""
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    size = (batch, channels, 2 * height, 2 * width)
    large = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    _launch(_up_kernel, x, large, factor)
    return large


def _saved(arguments, results):
    return (), arguments[1:]


_downsample = differentiable(halved, doubled, _saved)
_upsample = differentiable(doubled, halved, _saved)


def downsample(x: Tensor) -> Tensor:
    return _resampled(_downsample, 0.25, x) if _runs(x) else reference.downsample(x)


def upsample(x: Tensor) -> Tensor:
    return _resampled(_upsample, 1.0, x) if _runs(x) else reference.upsample(x)


def _runs(x: Tensor) -> bool:
    return not needs_reference(x) and x.numel() > 0


def _resampled(operation, factor: float, x: Tensor) -> Tensor:
    out = operation(x, factor)
    return out if x.is_contiguous(memory_format=torch.channels_last) else out.contiguous()
