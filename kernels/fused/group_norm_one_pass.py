"""GroupNorm in one pass, for small images: a program has all pixels of a bundle of whole groups in its registers.

Also what both paths compute alike. Arguments that stand in many kernels, without a comment there (B samples of pixels ×
channels, channels-last):

    y, dy           (B, pixels, channels): the result and its gradient
    x, dx           (B, pixels, seam): the image, but for the channels of skip, and its gradient
    skip, dskip     (B, pixels, channels − seam): the rest of the image's channels; None, and seam = channels
    mean, rstd      (B, groups) float32
    weight, bias    (channels,)
    scale, shift    (B, channels), rows `…_stride` elements apart; or None
    x_bias          (seam,), added to x first; or None
    SILU            whether SiLU follows
    SIZE            channels of a group

A tile lies in x or in skip, never in both.
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
def load_tile(image, pitch, sample, pixels, row, channel, mask):
    """Of an image (B, pixels, …) whose rows are `pitch` elements apart."""
    return load(image + sample.to(tl.int64) * pixels * pitch, row[:, None] * pitch + channel[None, :], mask)


@triton.jit
def load_if_given(image, pitch, sample, pixels, row, channel, mask):
    value = 0.0
    if image is not None:
        value = load_tile(image, pitch, sample, pixels, row, channel, mask)
    return value


@triton.jit
def store_tile(image, pitch, sample, pixels, row, channel, value, mask):
    store(image + sample.to(tl.int64) * pixels * pitch, row[:, None] * pitch + channel[None, :], value, mask)


@triton.jit
def image_of(x, skip, seam, channels, of_x):
    """The image in which a tile lies, the elements of its rows, and which channel is its first; of_x: whether in x."""
    image, pitch, start = x, seam, 0
    if skip is not None:
        image = tl.where(of_x, x, skip)
        pitch, start = tl.where(of_x, seam, channels - seam), tl.where(of_x, 0, seam)
    return image, pitch, start


@triton.jit
def load_image(x, skip, seam, channels, of_x, sample, pixels, row, channel, mask):
    image, pitch, start = image_of(x, skip, seam, channels, of_x)
    return load_tile(image, pitch, sample, pixels, row, channel - start, mask)


@triton.jit
def load_sum(total, x, h, x_bias, factor, skip, seam, channels, of_x, sample, pixels, row, channel, mask):
    """A tile of skip, or of (x + h + x_bias)·factor, rounded as it is kept in `total`, if it is."""
    v = load_image(x, skip, seam, channels, of_x, sample, pixels, row, channel, mask)
    summed, factor = mask, tl.cast(factor, tl.float32)
    if skip is not None:
        summed, factor = mask & of_x, tl.where(of_x, factor, 1.0)
    if h is not None:
        v += load_tile(h, seam, sample, pixels, row, channel, summed)
    if x_bias is not None:
        v = tl.where(mask, v + load(x_bias, channel, channel < seam)[None, :], 0.0)
    if total is not None:
        v = (v * factor).to(total.dtype.element_ty).to(tl.float32)
        store_tile(total, seam, sample, pixels, row, channel, v, summed)
    return v


@triton.jit
def store_gradients(
    dx,
    dskip,
    also,  # (B, pixels, seam), rows `…_pitch` elements apart: another gradient of the sum; or None
    also_pitch,
    other,  # of skip or, without skip, of the sum again; or None
    other_pitch,
    factor,  # of the sum
    gradient,  # of a tile
    seam,
    channels,
    of_x,
    sample,
    pixels,
    row,
    channel,
    mask,
):
    """Add the other gradients to a tile's, and store it as that of skip, or of x, h and x_bias; it is returned."""
    image, pitch, start = image_of(dx, dskip, seam, channels, of_x)
    at, factor = channel - start, tl.cast(factor, tl.float32)
    if dskip is not None:
        factor = tl.where(of_x, factor, 1.0)
    if dskip is None:
        gradient += load_if_given(also, also_pitch, sample, pixels, row, at, mask)
        gradient += load_if_given(other, other_pitch, sample, pixels, row, at, mask)
    elif also is not None and other is not None:
        more, more_pitch = tl.where(of_x, also, other), tl.where(of_x, also_pitch, other_pitch)
        gradient += load_tile(more, more_pitch, sample, pixels, row, at, mask)
    else:
        gradient += load_if_given(also, also_pitch, sample, pixels, row, at, mask & of_x)
        gradient += load_if_given(other, other_pitch, sample, pixels, row, at, mask & (not of_x))
    gradient = tl.where(mask, gradient * factor, 0.0)
    store_tile(image, pitch, sample, pixels, row, at, gradient, mask)
    return gradient


@triton.jit
def normalized_and_gradient(v, dy, middle, r, gain, offset, SILU: tl.constexpr):
    """(x̂, the gradient of u) of a tile of the image and of dy; middle (the `center`) and the rest: of its channels."""
    xhat = (v - middle[None, :]) * r[None, :]
    g = dy
    if SILU:
        g *= _silu_slope(xhat * gain[None, :] + offset[None, :])
    return xhat, g


@triton.jit
def input_gradient(xhat, g, r, gain, mean_g, mean_gx):
    """dx of a tile; r, gain and the means over groups: of its channels."""
    return (r * gain)[None, :] * g - (r * mean_gx)[None, :] * xhat - (r * mean_g)[None, :]


@triton.jit
def _bundle(pixels, seam, bundles, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """(sample, first group, rows, channels, which of these exist, whether they are x's, the tile's mask) of a program.

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
    return sample, first, row, channel, inside, first * SIZE < seam, (row < pixels)[:, None] & inside[None, :]


@triton.jit
def _sum_groups(columns, GROUPS: tl.constexpr, PADDED: tl.constexpr):
    """(GROUPS·PADDED,) -> (GROUPS,)"""
    return tl.sum(tl.reshape(columns, (GROUPS, PADDED)), axis=1)


@triton.jit
def _to_columns(of_groups, GROUPS: tl.constexpr, PADDED: tl.constexpr):
    """(GROUPS,) -> (GROUPS·PADDED,)"""
    if GROUPS == 1:  # one register, not one for each column
        return tl.broadcast_to(tl.sum(of_groups, axis=0), (PADDED,))
    return tl.reshape(tl.broadcast_to(of_groups[:, None], (GROUPS, PADDED)), (GROUPS * PADDED,))


@triton.jit
def one_pass_kernel(
    y,
    mean,
    rstd,
    total,  # (B, pixels, seam): the sum, where it is wanted; or None
    x,
    h,  # (B, pixels, seam): the other part of the sum; or None
    factor,  # of the sum
    skip,
    weight,
    bias,
    scale,
    shift,
    scale_stride,
    shift_stride,
    x_bias,
    eps,
    pixels,
    seam,
    channels,
    groups,
    bundles,  # of GROUPS groups, of a sample
    SILU: tl.constexpr,
    ROWS: tl.constexpr,  # of the tile: the pixels, rounded up to a power of two
    GROUPS: tl.constexpr,  # of a program
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,  # SIZE rounded up to a power of two
):
    sample, first, row, channel, inside, of_x, mask = _bundle(pixels, seam, bundles, ROWS, GROUPS, SIZE, PADDED)
    v = load_sum(total, x, h, x_bias, factor, skip, seam, channels, of_x, sample, pixels, row, channel, mask)
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
    store_tile(y, channels, sample, pixels, row, channel, u, mask)


@triton.jit
def one_pass_backward_kernel(
    dx,  # None: not needed, nor dskip
    dskip,
    sum_g,  # (B, channels) float32: Σ g
    sum_gx,  # (B, channels) float32: Σ g·x̂
    sum_dx,  # (B, channels) float32: Σ dx; None: not needed
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
    bundles,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,  # these four as above
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
):
    sample, first, row, channel, inside, of_x, mask = _bundle(pixels, seam, bundles, ROWS, GROUPS, SIZE, PADDED)
    group = sample.to(tl.int64) * groups + first + tl.arange(0, GROUPS)
    mu, r = _to_columns(tl.load(mean + group), GROUPS, PADDED), _to_columns(tl.load(rstd + group), GROUPS, PADDED)
    middle = center(mu, x_bias, channel, inside)
    gain, offset = affine(weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, inside)
    v = load_image(x, skip, seam, channels, of_x, sample, pixels, row, channel, mask)
    of_y = load_tile(dy, channels, sample, pixels, row, channel, mask)
    xhat, g = normalized_and_gradient(v, of_y, middle, r, gain, offset, SILU)
    of_g, of_gx = tl.sum(g, axis=0), tl.sum(g * xhat, axis=0)
    at = sample.to(tl.int64) * channels + channel
    tl.store(sum_g + at, of_g, mask=inside)
    tl.store(sum_gx + at, of_gx, mask=inside)
    if dx is not None:
        mean_g = _to_columns(_sum_groups(gain * of_g, GROUPS, PADDED) / (pixels * SIZE), GROUPS, PADDED)
        mean_gx = _to_columns(_sum_groups(gain * of_gx, GROUPS, PADDED) / (pixels * SIZE), GROUPS, PADDED)
        gradient = input_gradient(xhat, g, r, gain, mean_g, mean_gx)
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
            tl.store(sum_dx + at, tl.sum(gradient, axis=0), mask=inside)
