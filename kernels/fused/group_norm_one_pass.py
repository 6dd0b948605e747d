"""GroupNorm in one pass, for small images: a program has all pixels of a bundle of whole groups in its registers.

Also what both paths compute alike. Arguments that stand in many kernels, without a comment there (B samples of pixels ×
channels, channels-last):

    x, y, dx, dy    (B, pixels, channels): the image, the result and their gradients
    mean, rstd      (B, groups) float32
    weight, bias    (channels,)
    scale, shift    (B, channels), rows `…_stride` elements apart; or None
    x_bias          (channels,), added to x first; or None
    SILU            whether SiLU follows
    SIZE            channels of a group
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import load, store


@triton.jit
def silu(u):
    return u * tl.sigmoid(u)


@triton.jit
def _silu_slope(u):
    s = tl.sigmoid(u)
    return s * (1 + u * (1 - s))


@triton.jit
def affine(weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, inside):
    """(gain, offset) of each channel."""
    gain, offset = load(weight, channel, inside), load(bias, channel, inside)
    if scale is not None:
        factor = 1 + load(scale, sample.to(tl.int64) * scale_stride + channel, inside)
        gain *= factor
        offset = offset * factor + load(shift, sample.to(tl.int64) * shift_stride + channel, inside)
    return gain, offset


@triton.jit
def center(mu, x_bias, channel, inside):
    """What x without its bias lies around: x + x_bias − μ = x − center."""
    if x_bias is not None:
        mu -= load(x_bias, channel, inside)
    return mu


@triton.jit
def normalized_and_gradient(x, dy, at, mask, middle, r, gain, offset, SILU: tl.constexpr):
    """(x̂, the gradient of u) of a tile; middle (the `center`), r, gain, offset: of its channels."""
    xhat = (load(x, at, mask) - middle[None, :]) * r[None, :]
    g = load(dy, at, mask)
    if SILU:
        g *= _silu_slope(xhat * gain[None, :] + offset[None, :])
    return xhat, g


@triton.jit
def input_gradient(xhat, g, r, gain, mean_g, mean_gx):
    """dx of a tile; r, gain and the means over groups: of its channels."""
    return (r * gain)[None, :] * g - (r * mean_g)[None, :] - (r * mean_gx)[None, :] * xhat


@triton.jit
def _bundle(
    pixels, channels, bundles, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr
):
    """(sample, first group, channels, which exist, offsets in the sample and mask of the tile) of a program.

    Each group of SIZE channels takes PADDED columns of the tile, a power of two.
    """
    pid = tl.program_id(0)
    sample, first = pid // bundles, pid % bundles * GROUPS
    column = tl.arange(0, GROUPS * PADDED)
    if SIZE == PADDED:
        channel, inside = first * SIZE + column, column >= 0
    else:
        channel, inside = (first + column // PADDED) * SIZE + column % PADDED, column % PADDED < SIZE
    row = tl.arange(0, ROWS)
    at = row[:, None] * channels + channel[None, :]
    return sample, first, channel, inside, at, (row < pixels)[:, None] & inside[None, :]


@triton.jit
def _sum_groups(columns, GROUPS: tl.constexpr, PADDED: tl.constexpr):
    """(GROUPS·PADDED,) -> (GROUPS,)"""
    return tl.sum(tl.reshape(columns, (GROUPS, PADDED)), axis=1)


@triton.jit
def _to_columns(of_groups, GROUPS: tl.constexpr, PADDED: tl.constexpr):
    """(GROUPS,) -> (GROUPS·PADDED,)"""
    return tl.reshape(tl.broadcast_to(of_groups[:, None], (GROUPS, PADDED)), (GROUPS * PADDED,))


@triton.jit
def one_pass_kernel(
    y,
    mean,
    rstd,
    x,
    weight,
    bias,
    scale,
    shift,
    scale_stride,
    shift_stride,
    x_bias,
    eps,
    pixels,
    channels,
    groups,
    bundles,  # of GROUPS groups, of a sample
    SILU: tl.constexpr,
    ROWS: tl.constexpr,  # of the tile: the pixels, rounded up to a power of two
    GROUPS: tl.constexpr,  # of a program
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,  # SIZE rounded up to a power of two
):
    sample, first, channel, inside, at, mask = _bundle(pixels, channels, bundles, ROWS, GROUPS, SIZE, PADDED)
    start = sample.to(tl.int64) * pixels * channels
    v = load(x + start, at, mask)
    if x_bias is not None:
        v = tl.where(mask, v + load(x_bias, channel, inside)[None, :], 0.0)
    of_groups = _sum_groups(tl.sum(v, axis=0), GROUPS, PADDED) / (pixels * SIZE)
    deviation = tl.where(mask, v - _to_columns(of_groups, GROUPS, PADDED)[None, :], 0.0)
    variance = _sum_groups(tl.sum(deviation * deviation, axis=0), GROUPS, PADDED) / (pixels * SIZE)
    r = tl.rsqrt(variance + tl.cast(eps, tl.float32))
    group = sample.to(tl.int64) * groups + first + tl.arange(0, GROUPS)
    tl.store(mean + group, of_groups)
    tl.store(rstd + group, r)
    gain, offset = affine(weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, inside)
    u = deviation * (gain * _to_columns(r, GROUPS, PADDED))[None, :] + offset[None, :]
    if SILU:
        u = silu(u)
    store(y + start, at, u, mask)


@triton.jit
def one_pass_backward_kernel(
    dx,  # None: not needed
    sum_g,  # (B, channels) float32: Σ g
    sum_gx,  # (B, channels) float32: Σ g·x̂
    sum_dx,  # (B, channels) float32: Σ dx; None: not needed
    also,  # (B, pixels, channels), rows `also_pitch` elements apart: a gradient to be added to dx; or None
    also_pitch,
    dy,
    x,
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
    channels,
    groups,
    bundles,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,  # these four as above
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
):
    sample, first, channel, inside, at, mask = _bundle(pixels, channels, bundles, ROWS, GROUPS, SIZE, PADDED)
    start = sample.to(tl.int64) * pixels * channels
    group = sample.to(tl.int64) * groups + first + tl.arange(0, GROUPS)
    mu, r = _to_columns(tl.load(mean + group), GROUPS, PADDED), _to_columns(tl.load(rstd + group), GROUPS, PADDED)
    middle = center(mu, x_bias, channel, inside)
    gain, offset = affine(weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, inside)
    xhat, g = normalized_and_gradient(x + start, dy + start, at, mask, middle, r, gain, offset, SILU)
    of_g, of_gx = tl.sum(g, axis=0), tl.sum(g * xhat, axis=0)
    tl.store(sum_g + sample.to(tl.int64) * channels + channel, of_g, mask=inside)
    tl.store(sum_gx + sample.to(tl.int64) * channels + channel, of_gx, mask=inside)
    if dx is not None:
        mean_g = _to_columns(_sum_groups(gain * of_g, GROUPS, PADDED) / (pixels * SIZE), GROUPS, PADDED)
        mean_gx = _to_columns(_sum_groups(gain * of_gx, GROUPS, PADDED) / (pixels * SIZE), GROUPS, PADDED)
        gradient = input_gradient(xhat, g, r, gain, mean_g, mean_gx)
        if sum_dx is not None:
            of_dx = tl.sum(tl.where(mask, gradient, 0.0), axis=0)
            tl.store(sum_dx + sample.to(tl.int64) * channels + channel, of_dx, mask=inside)
        if also is not None:
            apart = tl.arange(0, ROWS)[:, None] * also_pitch + channel[None, :]
            gradient += load(also + sample.to(tl.int64) * pixels * also_pitch, apart, mask)
        store(dx + start, at, gradient, mask)
