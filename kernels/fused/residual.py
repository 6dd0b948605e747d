"""The sum of a residual branch and its skip path in Triton, with the bias of the convolutions before, in one pass.

Images are walked channels-last, as matrices of rows (the pixels of all samples) and channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import reference
from .common import load, part_and_channels, rows_of, store, tile_of_rows, walking
from .launch import differentiable, last, launch, multiprocessors, needs_reference, operator

LONGEST = 16  # tiles of one program that adds up rows: its sums are then less than 1% of what it reads


@triton.jit
def _add_kernel(
    out,  # (rows, channels), like the next two
    x,
    h,
    x_bias,  # (channels,); or None
    scale,
    rows,
    channels,
    blocks,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    part, channel, inside = part_and_channels(channels, blocks, CHANNELS)
    start, at, mask = tile_of_rows(part * ROWS, rows, channels, channel, inside, ROWS)
    total = load(x + start, at, mask) + load(h + start, at, mask)
    if x_bias is not None:
        total += load(x_bias, channel, inside)[None, :]
    store(out + start, at, total * tl.cast(scale, tl.float32), mask)


@triton.jit
def _gradient_kernel(
    dx,  # (rows, channels): scale·dy; None: not needed
    sums,  # (parts, channels) float32: of scale·dy; None: not needed
    dy,  # (rows, channels), rows `pitch` elements apart
    pitch,
    scale,
    rows,
    channels,
    blocks,
    TILES: tl.constexpr,  # of a part, one after the other
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    part, channel, inside = part_and_channels(channels, blocks, CHANNELS)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for tile in range(TILES):
        first = (part * TILES + tile) * ROWS
        start, at, mask = tile_of_rows(first, rows, pitch, channel, inside, ROWS)
        gradient = load(dy + start, at, mask) * tl.cast(scale, tl.float32)
        total += gradient
        if dx is not None:
            start, at, mask = tile_of_rows(first, rows, channels, channel, inside, ROWS)
            store(dx + start, at, gradient, mask)
    if sums is not None:
        tl.store(sums + part.to(tl.int64) * channels + channel, tl.sum(total, axis=0), mask=inside)


@triton.jit
def _total_kernel(
    d_x_bias,  # (channels,): the sum of all parts
    sums,  # (parts, channels) float32
    rows,  # parts
    channels,
    blocks,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    _, channel, inside = part_and_channels(channels, blocks, CHANNELS)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(0, rows, ROWS):
        start, at, mask = tile_of_rows(first, rows, channels, channel, inside, ROWS)
        total += load(sums + start, at, mask)
    store(d_x_bias, channel, tl.sum(total, axis=0), inside)


@operator("residual_sum")
def summed(x: Tensor, h: Tensor, x_bias: Tensor | None, scale: float) -> Tensor:
    """`kernels.residual_sum` of images of one dtype, channels-last."""
    x, h = (t.contiguous(memory_format=torch.channels_last) for t in (x, h))
    out = torch.empty_like(x)
    if not isinstance(x, FakeTensor):  # no tiles are chosen for symbolic sizes
        x_bias, walk = None if x_bias is None else x_bias.contiguous(), walking(x)
        programs = triton.cdiv(walk["rows"], walk["ROWS"]) * walk["blocks"]
        launch(_add_kernel, (programs,), out=out, x=x, h=h, x_bias=x_bias, scale=scale, **walk)
    return out


@operator("residual_sum_backward")
def summed_backward(dy: Tensor, scale: float, image: bool, x_bias: torch.dtype | None) -> list[Tensor]:
    """Of scale·dy, as wanted: the image, channels-last; its sum over all pixels, (C,), in the dtype of the bias."""
    dx = torch.empty_like(dy, memory_format=torch.channels_last) if image else None
    d_x_bias = None if x_bias is None else dy.new_empty(dy.shape[1], dtype=x_bias)
    if not isinstance(dy, FakeTensor):
        _backward(dy, scale, dx, d_x_bias)
    return [t for t in (dx, d_x_bias) if t is not None]


def _backward(dy: Tensor, scale: float, dx: Tensor | None, d_x_bias: Tensor | None) -> None:
    dy, pitch = rows_of(dy)
    walk, tiles = walking(dy), LONGEST
    rows, blocks = walk["rows"], walk["blocks"]
    while tiles > 1 and triton.cdiv(rows, tiles * walk["ROWS"]) * blocks < 4 * multiprocessors(dy.device):
        tiles //= 2
    parts = triton.cdiv(rows, tiles * walk["ROWS"])
    sums = dy.new_empty((parts, dy.shape[1]), dtype=torch.float32) if d_x_bias is not None else None
    given = {"dx": dx, "sums": sums, "dy": dy, "pitch": pitch, "scale": scale, "TILES": tiles}
    launch(_gradient_kernel, (parts * blocks,), **given, **walk)
    if d_x_bias is not None:
        few = walking(dy, columns=16) | {"rows": parts}
        launch(_total_kernel, (few["blocks"],), d_x_bias=d_x_bias, sums=sums, **few)


def _gradients(dy: Tensor, scale: float, x_bias: torch.dtype | None, needed: list[bool]) -> list[Tensor]:
    """Those of x, h and x_bias that are needed: but for the scale, dy is that of both images."""
    image = scale != 1 and any(needed[:2])
    found = last(summed_backward, dy, scale, image, x_bias if needed[2] else None) if image or needed[2] else []
    of_image, *of_bias = found if image else (dy, *found)
    return [of_image] * sum(needed[:2]) + of_bias


def _saved(arguments, results):
    *_, x_bias, scale = arguments
    return (), (scale, None if x_bias is None else x_bias.dtype)


_residual_sum = differentiable(summed, _gradients, _saved, inputs=3)


def residual_sum(x, h, *, x_bias, scale) -> Tensor:
    if h is None or needs_reference(x, h, x_bias) or x.numel() == 0:
        return reference.residual_sum(x, h, x_bias=x_bias, scale=scale)
    if x.dtype != h.dtype:
        dtype = torch.promote_types(x.dtype, h.dtype)
        x, h = x.to(dtype), h.to(dtype)
    out = _residual_sum(x, h, x_bias, scale)
    return out if x.is_contiguous(memory_format=torch.channels_last) else out.contiguous()
