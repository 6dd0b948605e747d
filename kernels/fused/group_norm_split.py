"""GroupNorm of images whose groups fit in no registers: statistics of tiles, those combined, a second pass over x.

A program has SPAN rows (pixels), ROWS at a time, of a block of CHANNELS channels, whatever the groups. Arguments that
stand without a comment are those of `group_norm_one_pass`, and

    tile_…          (B, tiles, channels) float32
    tiles, blocks   of SPAN rows and of CHANNELS channels, of a sample
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import load
from .group_norm_one_pass import (
    affine,
    center,
    input_gradient,
    load_image,
    load_sum,
    load_tile,
    normalized_and_gradient,
    silu,
    store_gradients,
    store_tile,
)

AHEAD = tl.constexpr(2)  # tiles: one is read from memory while the one before is worked on


@triton.jit
def _part(skip, seam, channels, tiles, blocks, CHANNELS: tl.constexpr):
    """(sample, tile, channels, which exist, whether they are x's) of a program."""
    pid = tl.program_id(0)
    sample, tile, block = pid // (tiles * blocks), pid // blocks % tiles, pid % blocks
    first, end, of_x = block * CHANNELS, channels, True
    if skip is not None:
        before = tl.cdiv(seam, CHANNELS)  # blocks of x
        of_x = block < before
        first = tl.where(of_x, first, seam + (block - before) * CHANNELS)
        end = tl.where(of_x, seam, channels)
    channel = first + tl.arange(0, CHANNELS)
    return sample, tile, channel, channel < end, of_x


@triton.jit
def _rows(first, inside, pixels, ROWS: tl.constexpr):
    """(rows of a sample from `first` on, mask of the tile)."""
    row = first + tl.arange(0, ROWS)
    return row, (row < pixels)[:, None] & inside[None, :]


@triton.jit
def stats_kernel(
    tile_mean,
    tile_m2,  # summed squared deviations
    total,  # (B, pixels, seam): the sum, where it is wanted; or None
    x,
    h,  # (B, pixels, seam): the other part of the sum; or None
    factor,  # of the sum
    skip,
    x_bias,
    pixels,
    seam,
    channels,
    tiles,
    blocks,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Mean and summed squared deviation of each channel in each tile."""
    sample, tile, channel, inside, of_x = _part(skip, seam, channels, tiles, blocks, CHANNELS)
    mean = tl.zeros((ROWS, CHANNELS), tl.float32)  # of what each element of the tile has seen: Welford's recurrence
    m2 = tl.zeros((ROWS, CHANNELS), tl.float32)
    ahead: tl.constexpr = AHEAD if total is None else 1  # a sum has several images on their way as it is
    for step in tl.range(SPAN // ROWS, num_stages=ahead):
        row, mask = _rows(tile * SPAN + step * ROWS, inside, pixels, ROWS)
        v = load_sum(total, x, h, x_bias, factor, skip, seam, channels, of_x, sample, pixels, row, channel, mask)
        deviation = tl.where(mask, v - mean, 0.0)
        mean += deviation * (1.0 / (step + 1))
        m2 += deviation * (v - mean)
    left = pixels - tile * SPAN
    seen = tl.maximum(left - tl.arange(0, ROWS) + ROWS - 1, 0) // ROWS
    count = tl.minimum(seen, SPAN // ROWS).to(tl.float32)[:, None]
    of_channel = tl.sum(count * mean, axis=0) / tl.minimum(left, SPAN)
    deviation = mean - of_channel[None, :]
    at = (sample.to(tl.int64) * tiles + tile) * channels + channel
    tl.store(tile_mean + at, of_channel, mask=inside)
    tl.store(tile_m2 + at, tl.sum(m2 + count * deviation * deviation, axis=0), mask=inside)


@triton.jit
def combine_stats_kernel(
    mean,
    rstd,
    tile_mean,
    tile_m2,
    eps,
    pixels,
    channels,
    groups,
    tiles,
    SIZE: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,  # of the group's channels in all tiles, how many at a time
):
    """Mean and 1/√(variance + eps) of each group, from those of its channels in all tiles."""
    pid = tl.program_id(0)
    start = (pid // groups).to(tl.int64) * tiles * channels + pid % groups * SIZE
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, tiles * SIZE, BLOCK):
        part = first + tl.arange(0, BLOCK)
        tile = part // SIZE
        count = tl.minimum(pixels - tile * SPAN, SPAN).to(tl.float32)
        total += count * load(tile_mean, start + tile * channels + part % SIZE, part < tiles * SIZE)
    mu = tl.sum(total, axis=0) / (pixels * SIZE)
    m2 = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, tiles * SIZE, BLOCK):
        part = first + tl.arange(0, BLOCK)
        mask = part < tiles * SIZE
        tile = part // SIZE
        at = start + tile * channels + part % SIZE
        count = tl.minimum(pixels - tile * SPAN, SPAN).to(tl.float32)
        deviation = load(tile_mean, at, mask) - mu
        m2 += load(tile_m2, at, mask) + tl.where(mask, count * deviation * deviation, 0.0)
    tl.store(mean + pid, mu)
    tl.store(rstd + pid, tl.rsqrt(tl.sum(m2, axis=0) / (pixels * SIZE) + tl.cast(eps, tl.float32)))


@triton.jit
def apply_kernel(
    y,
    x,
    skip,
    mean,
    rstd,
    weight,
    bias,
    scale,
    shift,
    scale_stride,
    shift_stride,
    x_bias,
    pixels,
    seam,
    channels,
    groups,
    tiles,
    blocks,
    SILU: tl.constexpr,
    SIZE: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    sample, tile, channel, inside, of_x = _part(skip, seam, channels, tiles, blocks, CHANNELS)
    group = sample.to(tl.int64) * groups + channel // SIZE
    middle, r = center(load(mean, group, inside), x_bias, channel, inside), load(rstd, group, inside)
    gain, offset = affine(weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, inside)
    for step in tl.range(SPAN // ROWS, num_stages=AHEAD):
        row, mask = _rows(tile * SPAN + step * ROWS, inside, pixels, ROWS)
        v = load_image(x, skip, seam, channels, of_x, sample, pixels, row, channel, mask)
        u = (v - middle[None, :]) * (r * gain)[None, :] + offset[None, :]
        if SILU:
            u = silu(u)
        store_tile(y, channels, sample, pixels, row, channel, u, mask)


@triton.jit
def sums_kernel(
    tile_g,  # Σ g
    tile_gx,  # Σ g·x̂
    dy,
    x,
    skip,
    mean,
    rstd,
    weight,
    bias,
    scale,
    shift,
    scale_stride,
    shift_stride,
    x_bias,
    pixels,
    seam,
    channels,
    groups,
    tiles,
    blocks,
    SILU: tl.constexpr,
    SIZE: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Σ g and Σ g·x̂ of each channel in each tile, with g the gradient of u."""
    sample, tile, channel, inside, of_x = _part(skip, seam, channels, tiles, blocks, CHANNELS)
    group = sample.to(tl.int64) * groups + channel // SIZE
    middle, r = center(load(mean, group, inside), x_bias, channel, inside), load(rstd, group, inside)
    gain, offset = affine(weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, inside)
    of_g = tl.zeros((ROWS, CHANNELS), tl.float32)
    of_gx = tl.zeros((ROWS, CHANNELS), tl.float32)
    for step in tl.range(SPAN // ROWS, num_stages=AHEAD):
        row, mask = _rows(tile * SPAN + step * ROWS, inside, pixels, ROWS)
        v = load_image(x, skip, seam, channels, of_x, sample, pixels, row, channel, mask)
        of_y = load_tile(dy, channels, sample, pixels, row, channel, mask)
        xhat, g = normalized_and_gradient(v, of_y, middle, r, gain, offset, SILU)
        of_g += g
        of_gx += g * xhat
    at = (sample.to(tl.int64) * tiles + tile) * channels + channel
    tl.store(tile_g + at, tl.sum(of_g, axis=0), mask=inside)
    tl.store(tile_gx + at, tl.sum(of_gx, axis=0), mask=inside)


@triton.jit
def combine_sums_kernel(
    sum_g,  # (B, channels) float32
    sum_gx,  # (B, channels) float32
    mean_g,  # (B, groups) float32: of gain·g
    mean_gx,  # (B, groups) float32: of gain·g·x̂
    tile_g,
    tile_gx,
    weight,
    bias,
    scale,
    shift,
    scale_stride,
    shift_stride,
    pixels,
    channels,
    groups,
    tiles,
    SIZE: tl.constexpr,
    TILES: tl.constexpr,  # at a time
    BLOCK: tl.constexpr,  # channels at a time
):
    """The sums of all tiles, and the means over each group of gain·g and gain·g·x̂."""
    pid = tl.program_id(0)
    sample, group = pid // groups, pid % groups
    start = sample.to(tl.int64) * channels
    total_g = tl.zeros((BLOCK,), tl.float32)
    total_gx = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, SIZE, BLOCK):
        column = first + tl.arange(0, BLOCK)
        channel, inside = group * SIZE + column, column < SIZE
        of_g = tl.zeros((TILES, BLOCK), tl.float32)
        of_gx = tl.zeros((TILES, BLOCK), tl.float32)
        for first_tile in range(0, tiles, TILES):
            tile, mask = _rows(first_tile, inside, tiles, TILES)
            of_g += load_tile(tile_g, channels, sample, tiles, tile, channel, mask)
            of_gx += load_tile(tile_gx, channels, sample, tiles, tile, channel, mask)
        gain, _ = affine(weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, inside)
        channel_g, channel_gx = tl.sum(of_g, axis=0), tl.sum(of_gx, axis=0)
        tl.store(sum_g + start + channel, channel_g, mask=inside)
        tl.store(sum_gx + start + channel, channel_gx, mask=inside)
        total_g += gain * channel_g
        total_gx += gain * channel_gx
    tl.store(mean_g + pid, tl.sum(total_g, axis=0) / (pixels * SIZE))
    tl.store(mean_gx + pid, tl.sum(total_gx, axis=0) / (pixels * SIZE))


@triton.jit
def input_gradient_kernel(
    dx,
    dskip,
    sum_dx,  # (B·tiles, channels) float32: Σ dx; None: not needed
    also,  # as `store_gradients` has these
    also_pitch,
    other,
    other_pitch,
    factor,
    dy,
    x,
    skip,
    mean,
    rstd,
    mean_g,  # (B, groups), like the next: what `combine_sums_kernel` found
    mean_gx,
    weight,
    bias,
    scale,
    shift,
    scale_stride,
    shift_stride,
    x_bias,
    pixels,
    seam,
    channels,
    groups,
    tiles,
    blocks,
    SILU: tl.constexpr,
    SIZE: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    sample, tile, channel, inside, of_x = _part(skip, seam, channels, tiles, blocks, CHANNELS)
    group = sample.to(tl.int64) * groups + channel // SIZE
    middle, r = center(load(mean, group, inside), x_bias, channel, inside), load(rstd, group, inside)
    of_g, of_gx = load(mean_g, group, inside), load(mean_gx, group, inside)
    gain, offset = affine(weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, inside)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for step in range(SPAN // ROWS):
        row, mask = _rows(tile * SPAN + step * ROWS, inside, pixels, ROWS)
        v = load_image(x, skip, seam, channels, of_x, sample, pixels, row, channel, mask)
        of_y = load_tile(dy, channels, sample, pixels, row, channel, mask)
        xhat, g = normalized_and_gradient(v, of_y, middle, r, gain, offset, SILU)
        gradient = input_gradient(xhat, g, r, gain, of_g, of_gx)
        gradient = store_gradients(
            dx,
            dskip,
            also,
            also_pitch,
            other,
            other_pitch,
            factor,
            gradient,
            seam,
            channels,
            of_x,
            sample,
            pixels,
            row,
            channel,
            mask,
        )
        if sum_dx is not None:
            total += gradient
    if sum_dx is not None:
        at = (sample.to(tl.int64) * tiles + tile) * channels + channel
        tl.store(sum_dx + at, tl.sum(total, axis=0), mask=inside)
