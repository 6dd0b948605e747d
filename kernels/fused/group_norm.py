"""GroupNorm with per-sample scale and shift and SiLU in Triton, channels-last, forward and backward.

y = silu(u), u = gain·x̂ + offset, x̂ = (x − μ)·rstd; per sample and channel gain = γ·(1 + scale) and offset =
β·(1 + scale) + shift. Where a tile of whole groups fits in registers one program does it all and reads x once; else the
statistics of tiles are combined to those of groups, between two passes over x. They are statistics of deviations from
a mean (Welford's and Chan's): a mean square minus a squared mean would lose its digits.

Backward, with g the gradient of u: Σ g and Σ g·x̂ of each sample and channel give the gradients of γ, β, scale and
shift, and dx = rstd·(gain·g − mean(gain·g) − x̂·mean(gain·g·x̂)) with means over the group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import reference
from .affine_update import load
from .launch import Function, last, launch, multiprocessors, needs_reference, operator

# One-pass tiles.
LARGEST = 16384  # elements
LARGEST_BACKWARD = 32768  # bytes of x, and as many of dy: with twice that registers spill on sm_100
NARROWEST, WIDEST = 16, 128  # channels; of 16 each row is 32 bytes of memory or more

# Tiles of the split path.
CHANNELS, ELEMENTS = 64, 4096  # in registers at a time
LONGEST = 512  # rows of one program: its results are then less than 1% of what it reads


@triton.jit
def _silu(u):
    return u * tl.sigmoid(u)


@triton.jit
def _silu_slope(u):
    s = tl.sigmoid(u)
    return s * (1 + u * (1 - s))


@triton.jit
def _affine(weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, inside):
    """(gain, offset) of each channel."""
    gain, offset = load(weight, channel, inside), load(bias, channel, inside)
    if scale is not None:
        factor = 1 + load(scale, sample.to(tl.int64) * scale_stride + channel, inside)
        gain *= factor
        offset = offset * factor + load(shift, sample.to(tl.int64) * shift_stride + channel, inside)
    return gain, offset


# One pass: a program has all pixels of a bundle of groups.


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
def _one_pass_kernel(
    y, mean, rstd, x, weight, bias, scale, shift, scale_stride, shift_stride, eps,
    pixels, channels, groups, bundles,
    SILU: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    sample, first, channel, inside, at, mask = _bundle(pixels, channels, bundles, ROWS, GROUPS, SIZE, PADDED)
    start = sample.to(tl.int64) * pixels * channels
    v = load(x + start, at, mask)
    of_groups = _sum_groups(tl.sum(v, axis=0), GROUPS, PADDED) / (pixels * SIZE)
    deviation = tl.where(mask, v - _to_columns(of_groups, GROUPS, PADDED)[None, :], 0.0)
    variance = _sum_groups(tl.sum(deviation * deviation, axis=0), GROUPS, PADDED) / (pixels * SIZE)
    r = tl.rsqrt(variance + tl.cast(eps, tl.float32))
    group = sample.to(tl.int64) * groups + first + tl.arange(0, GROUPS)
    tl.store(mean + group, of_groups)
    tl.store(rstd + group, r)
    gain, offset = _affine(weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, inside)
    u = deviation * (gain * _to_columns(r, GROUPS, PADDED))[None, :] + offset[None, :]
    if SILU:
        u = _silu(u)
    tl.store(y + start + at, u.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _one_pass_backward_kernel(
    dx, sum_g, sum_gx, dy, x, mean, rstd, weight, bias, scale, shift, scale_stride, shift_stride,
    pixels, channels, groups, bundles,
    SILU: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    sample, first, channel, inside, at, mask = _bundle(pixels, channels, bundles, ROWS, GROUPS, SIZE, PADDED)
    start = sample.to(tl.int64) * pixels * channels
    group = sample.to(tl.int64) * groups + first + tl.arange(0, GROUPS)
    mu, r = _to_columns(tl.load(mean + group), GROUPS, PADDED), _to_columns(tl.load(rstd + group), GROUPS, PADDED)
    gain, offset = _affine(weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, inside)
    xhat = (load(x + start, at, mask) - mu[None, :]) * r[None, :]
    g = load(dy + start, at, mask)
    if SILU:
        g *= _silu_slope(xhat * gain[None, :] + offset[None, :])
    of_g, of_gx = tl.sum(g, axis=0), tl.sum(g * xhat, axis=0)
    tl.store(sum_g + sample.to(tl.int64) * channels + channel, of_g, mask=inside)
    tl.store(sum_gx + sample.to(tl.int64) * channels + channel, of_gx, mask=inside)
    if dx is not None:
        mean_g = _to_columns(_sum_groups(gain * of_g, GROUPS, PADDED) / (pixels * SIZE), GROUPS, PADDED)
        mean_gx = _to_columns(_sum_groups(gain * of_gx, GROUPS, PADDED) / (pixels * SIZE), GROUPS, PADDED)
        of_x = (r * gain)[None, :] * g - (r * mean_g)[None, :] - (r * mean_gx)[None, :] * xhat
        tl.store(dx + start + at, of_x.to(dx.dtype.element_ty), mask=mask)


# Split: a program has SPAN rows, ROWS at a time, of a block of CHANNELS channels, whatever the groups.


@triton.jit
def _part(channels, tiles, blocks, CHANNELS: tl.constexpr):
    """(sample, tile, channels, which exist) of a program."""
    pid = tl.program_id(0)
    sample, tile, block = pid // (tiles * blocks), pid // blocks % tiles, pid % blocks
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    return sample, tile, channel, channel < channels


@triton.jit
def _rows(first, channel, inside, pixels, channels, ROWS: tl.constexpr):
    """(offsets in a sample, mask) of its rows from `first` on."""
    row = first + tl.arange(0, ROWS)
    at = row[:, None] * channels + channel[None, :]
    return at, (row < pixels)[:, None] & inside[None, :]


@triton.jit
def _stats_kernel(
    tile_mean, tile_m2, x, pixels, channels, tiles, blocks,
    SPAN: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and summed squared deviation of each channel in each tile."""
    sample, tile, channel, inside = _part(channels, tiles, blocks, CHANNELS)
    mean = tl.zeros((ROWS, CHANNELS), tl.float32)  # of what each element of the tile has seen: Welford's recurrence
    m2 = tl.zeros((ROWS, CHANNELS), tl.float32)
    start = sample.to(tl.int64) * pixels * channels
    for step in range(SPAN // ROWS):
        at, mask = _rows(tile * SPAN + step * ROWS, channel, inside, pixels, channels, ROWS)
        v = load(x + start, at, mask)
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
def _combine_stats_kernel(
    mean, rstd, tile_mean, tile_m2, eps, pixels, channels, groups, tiles,
    SPAN: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
def _apply_kernel(
    y, x, mean, rstd, weight, bias, scale, shift, scale_stride, shift_stride,
    pixels, channels, groups, tiles, blocks,
    SILU: tl.constexpr, SIZE: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sample, tile, channel, inside = _part(channels, tiles, blocks, CHANNELS)
    group = sample.to(tl.int64) * groups + channel // SIZE
    mu, r = load(mean, group, inside), load(rstd, group, inside)
    gain, offset = _affine(weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, inside)
    start = sample.to(tl.int64) * pixels * channels
    for step in range(SPAN // ROWS):
        at, mask = _rows(tile * SPAN + step * ROWS, channel, inside, pixels, channels, ROWS)
        u = (load(x + start, at, mask) - mu[None, :]) * (r * gain)[None, :] + offset[None, :]
        if SILU:
            u = _silu(u)
        tl.store(y + start + at, u.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _sums_kernel(
    tile_g, tile_gx, dy, x, mean, rstd, weight, bias, scale, shift, scale_stride, shift_stride,
    pixels, channels, groups, tiles, blocks,
    SILU: tl.constexpr, SIZE: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Σ g and Σ g·x̂ of each channel in each tile, with g the gradient of u."""
    sample, tile, channel, inside = _part(channels, tiles, blocks, CHANNELS)
    group = sample.to(tl.int64) * groups + channel // SIZE
    mu, r = load(mean, group, inside), load(rstd, group, inside)
    gain, offset = _affine(weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, inside)
    of_g = tl.zeros((ROWS, CHANNELS), tl.float32)
    of_gx = tl.zeros((ROWS, CHANNELS), tl.float32)
    start = sample.to(tl.int64) * pixels * channels
    for step in range(SPAN // ROWS):
        at, mask = _rows(tile * SPAN + step * ROWS, channel, inside, pixels, channels, ROWS)
        xhat = (load(x + start, at, mask) - mu[None, :]) * r[None, :]
        g = load(dy + start, at, mask)
        if SILU:
            g *= _silu_slope(xhat * gain[None, :] + offset[None, :])
        of_g += g
        of_gx += g * xhat
    at = (sample.to(tl.int64) * tiles + tile) * channels + channel
    tl.store(tile_g + at, tl.sum(of_g, axis=0), mask=inside)
    tl.store(tile_gx + at, tl.sum(of_gx, axis=0), mask=inside)


@triton.jit
def _combine_sums_kernel(
    sum_g, sum_gx, mean_g, mean_gx, tile_g, tile_gx, weight, bias, scale, shift, scale_stride, shift_stride,
    pixels, channels, groups, tiles, SIZE: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of all tiles, and the means over each group of gain·g and gain·g·x̂."""
    pid = tl.program_id(0)
    sample, group = pid // groups, pid % groups
    start, row = sample.to(tl.int64) * tiles * channels, sample.to(tl.int64) * channels
    total_g = tl.zeros((BLOCK,), tl.float32)
    total_gx = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, SIZE, BLOCK):
        column = first + tl.arange(0, BLOCK)
        channel, inside = group * SIZE + column, column < SIZE
        of_g = tl.zeros((TILES, BLOCK), tl.float32)
        of_gx = tl.zeros((TILES, BLOCK), tl.float32)
        for first_tile in range(0, tiles, TILES):
            at, mask = _rows(first_tile, channel, inside, tiles, channels, TILES)
            of_g += load(tile_g + start, at, mask)
            of_gx += load(tile_gx + start, at, mask)
        gain, _ = _affine(weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, inside)
        channel_g, channel_gx = tl.sum(of_g, axis=0), tl.sum(of_gx, axis=0)
        tl.store(sum_g + row + channel, channel_g, mask=inside)
        tl.store(sum_gx + row + channel, channel_gx, mask=inside)
        total_g += gain * channel_g
        total_gx += gain * channel_gx
    tl.store(mean_g + pid, tl.sum(total_g, axis=0) / (pixels * SIZE))
    tl.store(mean_gx + pid, tl.sum(total_gx, axis=0) / (pixels * SIZE))


@triton.jit
def _input_gradient_kernel(
    dx, dy, x, mean, rstd, mean_g, mean_gx, weight, bias, scale, shift, scale_stride, shift_stride,
    pixels, channels, groups, tiles, blocks,
    SILU: tl.constexpr, SIZE: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sample, tile, channel, inside = _part(channels, tiles, blocks, CHANNELS)
    group = sample.to(tl.int64) * groups + channel // SIZE
    mu, r = load(mean, group, inside), load(rstd, group, inside)
    of_g, of_gx = load(mean_g, group, inside), load(mean_gx, group, inside)
    gain, offset = _affine(weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, inside)
    start = sample.to(tl.int64) * pixels * channels
    for step in range(SPAN // ROWS):
        at, mask = _rows(tile * SPAN + step * ROWS, channel, inside, pixels, channels, ROWS)
        xhat = (load(x + start, at, mask) - mu[None, :]) * r[None, :]
        g = load(dy + start, at, mask)
        if SILU:
            g *= _silu_slope(xhat * gain[None, :] + offset[None, :])
        of_x = (r * gain)[None, :] * g - (r * of_g)[None, :] - (r * of_gx)[None, :] * xhat
        tl.store(dx + start + at, of_x.to(dx.dtype.element_ty), mask=mask)


# Both paths: what the sums of g and g·x̂ say about the small inputs.


@triton.jit
def _parameter_gradients_kernel(
    d_weight, d_bias, d_scale, d_shift, sum_g, sum_gx, weight, bias, scale, scale_stride, samples, channels,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    of_weight = tl.zeros((SAMPLES, CHANNELS), tl.float32)
    of_bias = tl.zeros((SAMPLES, CHANNELS), tl.float32)
    for first in range(0, samples, SAMPLES):
        sample = (first + tl.arange(0, SAMPLES)).to(tl.int64)[:, None]
        mask = (sample < samples) & inside[None, :]
        at = sample * channels + channel[None, :]
        g, gx = load(sum_g, at, mask), load(sum_gx, at, mask)
        if d_scale is not None:
            of_scale = load(weight, channel, inside)[None, :] * gx + load(bias, channel, inside)[None, :] * g
            tl.store(d_scale + at, of_scale.to(d_scale.dtype.element_ty), mask=mask)
        if d_shift is not None:
            tl.store(d_shift + at, g.to(d_shift.dtype.element_ty), mask=mask)
        if scale is not None:
            factor = 1 + load(scale, sample * scale_stride + channel[None, :], mask)
            g, gx = g * factor, gx * factor
        of_weight += gx
        of_bias += g
    if d_weight is not None:
        tl.store(d_weight + channel, tl.sum(of_weight, axis=0).to(d_weight.dtype.element_ty), mask=inside)
    if d_bias is not None:
        tl.store(d_bias + channel, tl.sum(of_bias, axis=0).to(d_bias.dtype.element_ty), mask=inside)


def _one_pass(x: Tensor, num_groups: int, largest: int) -> dict[str, int] | None:
    """How the one-pass kernels divide x, or None where the split path has to do it."""
    samples, channels, height, width = x.shape
    size, rows = channels // num_groups, triton.next_power_of_2(height * width)
    padded = triton.next_power_of_2(size)
    widest = min(WIDEST, max(NARROWEST, LARGEST // 2 // rows))
    groups = 1
    while num_groups % (2 * groups) == 0 and 2 * groups * padded <= widest:
        groups *= 2
    bundles = num_groups // groups
    vectors = padded == size or size % 8 == 0  # or else rows would be accessed in pieces of less than 16 bytes
    fits = groups * size >= NARROWEST and rows * groups * padded <= largest
    if not (vectors and fits and samples * bundles >= 2 * multiprocessors(x.device)):
        return None
    return {"bundles": bundles, "ROWS": rows, "GROUPS": groups, "SIZE": size, "PADDED": padded}


def _warps(bundle: dict[str, int], elements: int) -> int:
    """As many as leave each thread so many elements of a tile."""
    return max(4, bundle["ROWS"] * bundle["GROUPS"] * bundle["PADDED"] // (32 * elements))


def _split(x: Tensor, num_groups: int) -> dict[str, int]:
    """How the kernels of the split path divide x: into tiles of SPAN rows, of which ROWS at a time are in registers."""
    samples, channels, height, width = x.shape
    pixels, columns = height * width, min(CHANNELS, triton.next_power_of_2(channels))
    rows, blocks = min(ELEMENTS // columns, triton.next_power_of_2(pixels)), triton.cdiv(channels, columns)
    span = max(rows, min(LONGEST, triton.next_power_of_2(pixels)))
    while span > rows and samples * blocks * triton.cdiv(pixels, span) < 4 * multiprocessors(x.device):
        span //= 2
    size, tiles = channels // num_groups, triton.cdiv(pixels, span)
    return {"tiles": tiles, "blocks": blocks, "SIZE": size, "SPAN": span, "ROWS": rows, "CHANNELS": columns}


def _run(kernel, programs: int, given: dict[str, object], *, num_warps: int = 4, **more: object) -> None:
    """Launch a kernel with those of the values that it has arguments for."""
    given = given | more
    launch(kernel, (programs,), num_warps=num_warps, **{name: given[name] for name in kernel.arg_names})


def _arguments(x, mean, rstd, weight, bias, scale, shift, num_groups, silu) -> dict[str, object]:
    """What most kernels take; scale and shift are read where they lie, since they often are halves of one tensor."""
    scale, shift = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in (scale, shift))
    samples, channels, height, width = x.shape
    return {
        "x": x, "mean": mean, "rstd": rstd, "weight": weight.contiguous(), "bias": bias.contiguous(),
        "scale": scale, "scale_stride": 0 if scale is None else scale.stride(0),
        "shift": shift, "shift_stride": 0 if shift is None else shift.stride(0),
        "samples": samples, "pixels": height * width, "channels": channels, "groups": num_groups, "SILU": silu,
    }  # fmt: skip


@operator("group_norm")
def normalized(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, num_groups: int, eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, mean, rstd) of channels-last x (B, C, H, W); mean and rstd are (B, groups) float32."""
    x = x.contiguous(memory_format=torch.channels_last)  # which compilers need not keep
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=torch.float32) for _ in range(2))
    given = _arguments(x, mean, rstd, weight, bias, scale, shift, num_groups, silu) | {"y": y, "eps": eps}
    if not isinstance(x, FakeTensor):  # no tiles are chosen for symbolic sizes
        _forward(given)
    return y, mean, rstd


def _forward(given: dict[str, object]) -> None:
    x, groups = given["x"], given["groups"]
    samples, channels = x.shape[:2]
    if bundle := _one_pass(x, groups, LARGEST):
        warps = _warps(bundle, 128 // x.element_size())
        _run(_one_pass_kernel, samples * bundle["bundles"], given, **bundle, num_warps=warps)
        return
    split = _split(x, groups)
    programs = samples * split["tiles"] * split["blocks"]
    tile_mean, tile_m2 = (x.new_empty((samples, split["tiles"], channels), dtype=torch.float32) for _ in range(2))
    given = given | split | {"tile_mean": tile_mean, "tile_m2": tile_m2}
    _run(_stats_kernel, programs, given)
    block = min(1024, triton.next_power_of_2(split["tiles"] * split["SIZE"]))
    _run(_combine_stats_kernel, samples * groups, given, BLOCK=block, num_warps=1)
    _run(_apply_kernel, programs, given)


@operator("group_norm_backward")
def normalized_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, num_groups: int, silu: bool, needed: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients of those of x, weight, bias, scale, shift that are needed, in their dtypes."""
    x = x.contiguous(memory_format=torch.channels_last)
    dx = torch.empty_like(x) if needed[0] else None
    small = [
        x.new_empty(t.shape, dtype=t.dtype) if need else None
        for t, need in zip((weight, bias, scale, shift), needed[1:], strict=True)
    ]
    sum_g, sum_gx = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    given = _arguments(x, mean, rstd, weight, bias, scale, shift, num_groups, silu)
    given |= dict(zip(("d_weight", "d_bias", "d_scale", "d_shift"), small, strict=True))
    given |= {"dy": dy.contiguous(memory_format=torch.channels_last), "dx": dx, "sum_g": sum_g, "sum_gx": sum_gx}
    if not isinstance(x, FakeTensor):
        _backward(given)
        if any(needed[1:]):
            _run(_parameter_gradients_kernel, triton.cdiv(x.shape[1], 16), given, SAMPLES=64, CHANNELS=16)
    return [gradient for gradient in (dx, *small) if gradient is not None]


def _backward(given: dict[str, object]) -> None:
    x, groups = given["x"], given["groups"]
    samples, channels = x.shape[:2]
    if bundle := _one_pass(x, groups, LARGEST_BACKWARD // x.element_size()):
        warps = _warps(bundle, 64 // x.element_size())
        _run(_one_pass_backward_kernel, samples * bundle["bundles"], given, **bundle, num_warps=warps)
        return
    split = _split(x, groups)
    programs = samples * split["tiles"] * split["blocks"]
    tile_g, tile_gx = (x.new_empty((samples, split["tiles"], channels), dtype=torch.float32) for _ in range(2))
    mean_g, mean_gx = (x.new_empty((samples, groups), dtype=torch.float32) for _ in range(2))
    given = given | split | {"tile_g": tile_g, "tile_gx": tile_gx, "mean_g": mean_g, "mean_gx": mean_gx}
    _run(_sums_kernel, programs, given)
    block = min(64, triton.next_power_of_2(split["SIZE"]))
    _run(_combine_sums_kernel, samples * groups, given, TILES=16, BLOCK=block, num_warps=1)
    if given["dx"] is not None:
        _run(_input_gradient_kernel, programs, given)


class _GroupNorm(Function):
    @staticmethod
    def forward(*arguments):
        return normalized(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, scale, shift, num_groups, _, silu = inputs
        _, mean, rstd = output
        ctx.options = num_groups, silu
        ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)  # or else they would get gradients of zeros

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 8
        needed = list(ctx.needs_input_grad[:5])
        gradients = iter(last(normalized_backward, dy, *ctx.saved_tensors, *ctx.options, needed))
        return *(next(gradients) if need else None for need in needed), None, None, None


def group_norm(x, num_groups, weight, bias, eps, *, scale, shift, silu) -> Tensor:
    if needs_reference(x, weight, bias, scale, shift) or x.numel() == 0:
        return reference.group_norm(x, num_groups, weight, bias, eps, scale=scale, shift=shift, silu=silu)
    rows = x.contiguous(memory_format=torch.channels_last)
    y, _, _ = _GroupNorm.run(rows, weight, bias, scale, shift, num_groups, eps, silu)
    return y if x.is_contiguous(memory_format=torch.channels_last) else y.contiguous()
