"""GroupNorm with per-sample scale and shift and SiLU in Triton, channels-last, forward and backward.

y = silu(u), u = gain·x̂ + offset, x̂ = (x + b − μ)·rstd, b a bias of each channel; per sample and channel gain =
γ·(1 + scale) and offset = β·(1 + scale) + shift. Or x + b is a residual sum, (x + h + b)·factor, which is written, too;
and more channels may lie in another image, `skip`: the two are never concatenated. Where a tile of whole groups fits in
registers one program does it all and reads x once; else the statistics of tiles are combined to those of groups,
between two passes over x. They are statistics of deviations from a mean (Welford's and Chan's): a mean square minus a
squared mean would lose its digits.

Backward, with g the gradient of u: Σ g and Σ g·x̂ of each sample and channel give the gradients of γ, β, scale and
shift, and dx = rstd·(gain·g − mean(gain·g) − x̂·mean(gain·g·x̂)) with means over the group. Σ dx is the gradient of b.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import reference
from .common import load, rows_of, store
from .group_norm_one_pass import one_pass_backward_kernel, one_pass_kernel
from .group_norm_split import (
    apply_kernel,
    combine_stats_kernel,
    combine_sums_kernel,
    input_gradient_kernel,
    stats_kernel,
    sums_kernel,
)
from .launch import differentiable, last, launch, multiprocessors, needs_reference, operator, plain_eager

# One-pass tiles.
LARGEST = 65536  # bytes of the image; rows of 64 bytes for 1024 pixels
LARGEST_BACKWARD = 32768  # bytes of x, and as many of dy: with twice that registers spill
NARROWEST, WIDEST = 16, 128  # channels
ROW, ROW_BACKWARD = 64, 32  # bytes that a tile's rows have at least, where all else allows it
USUAL = 16384  # bytes of a tile whose rows are wide enough: with twice that some of float32 spill

# Tiles of the split path.
CHANNELS, ELEMENTS = 64, 4096  # in registers at a time
LONGEST = 512  # rows of one program: its results are then less than 1% of what it reads


@triton.jit
def _parameter_gradients_kernel(
    d_weight,  # (channels,), like the next; None: not needed
    d_bias,
    d_scale,  # (B, channels), like the next; None: not needed
    d_shift,
    d_x_bias,  # (seam,); None: not needed
    sum_g,  # (B, channels) float32: Σ g
    sum_gx,  # (B, channels) float32: Σ g·x̂
    sum_dx,  # (parts, channels) float32: Σ dx; or None
    weight,  # (channels,)
    bias,  # (channels,)
    scale,  # (B, channels), rows `scale_stride` elements apart; or None
    scale_stride,
    samples,  # B
    parts,
    seam,  # d_x_bias has so many channels
    channels,
    SAMPLES: tl.constexpr,  # at a time
    CHANNELS: tl.constexpr,  # of a program
):
    """What the sums of g and g·x̂ say about the small inputs."""
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
            store(d_scale, at, of_scale, mask)
        if d_shift is not None:
            store(d_shift, at, g, mask)
        if scale is not None:
            factor = 1 + load(scale, sample * scale_stride + channel[None, :], mask)
            g, gx = g * factor, gx * factor
        of_weight += gx
        of_bias += g
    if d_weight is not None:
        store(d_weight, channel, tl.sum(of_weight, axis=0), inside)
    if d_bias is not None:
        store(d_bias, channel, tl.sum(of_bias, axis=0), inside)
    if d_x_bias is not None:
        of_x_bias = tl.zeros((SAMPLES, CHANNELS), tl.float32)
        for first in range(0, parts, SAMPLES):
            part = (first + tl.arange(0, SAMPLES)).to(tl.int64)[:, None]
            of_x_bias += load(sum_dx, part * channels + channel[None, :], (part < parts) & inside[None, :])
        store(d_x_bias, channel, tl.sum(of_x_bias, axis=0), channel < seam)


def _one_pass(y: Tensor, seam: int, num_groups: int, largest: int, row: int) -> dict[str, int] | None:
    """How the one-pass kernels divide an image, or None where the split path has to do it.

    seam: the channel at which a second image begins; a tile lies on one side of it.
    """
    samples, channels, height, width = y.shape
    size, rows, programs = channels // num_groups, triton.next_power_of_2(height * width), samples * num_groups
    padded = triton.next_power_of_2(size)
    widest = min(WIDEST, max(row // y.element_size(), USUAL // (rows * y.element_size())))
    groups, enough = 1, 2 * multiprocessors(y.device)
    whole = math.gcd(seam, channels)
    while whole % (2 * groups * size) == 0 and 2 * groups * padded <= widest and programs // (2 * groups) >= enough:
        groups *= 2
    vectors = padded == size or size % 8 == 0  # or else rows would be accessed in pieces of less than 16 bytes
    fits = groups * size >= NARROWEST and rows * groups * padded * y.element_size() <= largest
    if not (vectors and fits and programs // groups >= enough and whole % (groups * size) == 0):
        return None
    return {"bundles": num_groups // groups, "ROWS": rows, "GROUPS": groups, "SIZE": size, "PADDED": padded}


def _warps(bundle: dict[str, int], elements: int) -> int:
    """As many as leave each thread so many elements of a tile."""
    return max(4, bundle["ROWS"] * bundle["GROUPS"] * bundle["PADDED"] // (32 * elements))


def _split(y: Tensor, seam: int, num_groups: int) -> dict[str, int]:
    """How those of the split path divide it: into tiles of SPAN rows, of which ROWS at a time are in registers."""
    samples, channels, height, width = y.shape
    pixels, columns = height * width, min(CHANNELS, triton.next_power_of_2(channels))
    rows = min(ELEMENTS // columns, triton.next_power_of_2(pixels))
    blocks = triton.cdiv(seam, columns) + triton.cdiv(channels - seam, columns)
    span = max(rows, min(LONGEST, triton.next_power_of_2(pixels)))
    while span > rows and samples * blocks * triton.cdiv(pixels, span) < 4 * multiprocessors(y.device):
        span //= 2
    size, tiles = channels // num_groups, triton.cdiv(pixels, span)
    return {"tiles": tiles, "blocks": blocks, "SIZE": size, "SPAN": span, "ROWS": rows, "CHANNELS": columns}


def _run(kernel, programs: int, given: dict[str, object], *, num_warps: int = 4, **more: object) -> None:
    """Launch a kernel with those of the values that it has arguments for."""
    given = given | more
    launch(kernel, (programs,), num_warps=num_warps, **{name: given[name] for name in kernel.arg_names})


def _arguments(x, skip, mean, rstd, weight, bias, scale, shift, x_bias, silu) -> dict[str, object]:
    """What most kernels take; scale and shift are read where they lie, since they often are halves of one tensor."""
    scale, shift = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in (scale, shift))
    images = {"x": x, "skip": skip, "mean": mean, "rstd": rstd}
    parameters = {"weight": weight.contiguous(), "bias": bias.contiguous(), "scale": scale, "shift": shift}
    parameters["x_bias"] = None if x_bias is None else x_bias.contiguous()
    samples, seam, height, width = x.shape
    sizes = {"samples": samples, "pixels": height * width, "groups": mean.shape[1]}
    sizes |= {"seam": seam, "channels": weight.shape[0]}
    strides = {
        "scale_stride": 0 if scale is None else scale.stride(0),
        "shift_stride": 0 if shift is None else shift.stride(0),
    }
    return images | parameters | strides | sizes | {"SILU": silu}


def _channels_last(x: Tensor | None) -> Tensor | None:
    """Which compilers need not keep."""
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


def _empty(like: Tensor, channels: int) -> Tensor:
    samples, _, *size = like.shape
    options = {"dtype": like.dtype, "device": like.device, "memory_format": torch.channels_last}
    return torch.empty((samples, channels, *size), **options)


def _results(x: Tensor, channels: int, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd, to be filled."""
    return _empty(x, channels), *(x.new_empty((x.shape[0], num_groups), dtype=torch.float32) for _ in range(2))


@operator("group_norm")
def normalized(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    x_bias: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) of channels-last x (B, C, H, W) and skip beside it; mean and rstd are (B, groups) float32."""
    y, mean, rstd = _results(x, weight.shape[0], num_groups)
    if not isinstance(x, FakeTensor):  # no tiles are chosen for symbolic sizes
        x, skip = map(_channels_last, (x, skip))
        given = _arguments(x, skip, mean, rstd, weight, bias, scale, shift, x_bias, silu)
        _forward(y, num_groups, given | {"y": y, "eps": eps, "h": None, "total": None, "factor": 1.0})
    return y, mean, rstd


@operator("residual_norm")
def summed_and_normalized(
    x: Tensor,
    h: Tensor | None,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    factor: float,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, mean, rstd, total): total = (x + h + x_bias)·factor, and what `normalized` makes of it."""
    (y, mean, rstd), total = _results(x, weight.shape[0], num_groups), _empty(x, x.shape[1])
    if not isinstance(x, FakeTensor):
        x, h, skip = map(_channels_last, (x, h, skip))
        given = _arguments(x, skip, mean, rstd, weight, bias, None, None, x_bias, silu)
        _forward(y, num_groups, given | {"y": y, "eps": eps, "h": h, "total": total, "factor": factor})
    return y, mean, rstd, total


def _forward(y: Tensor, num_groups: int, given: dict[str, object]) -> None:
    samples, channels = y.shape[:2]
    if bundle := _one_pass(y, given["seam"], num_groups, LARGEST, ROW):
        warps = _warps(bundle, 128 // y.element_size())
        _run(one_pass_kernel, samples * bundle["bundles"], given, **bundle, num_warps=warps)
        return
    split = _split(y, given["seam"], num_groups)
    tiles, programs = split["tiles"], samples * split["tiles"] * split["blocks"]
    tile_mean, tile_m2 = (y.new_empty((samples, tiles, channels), dtype=torch.float32) for _ in range(2))
    given = given | split | {"tile_mean": tile_mean, "tile_m2": tile_m2}
    _run(stats_kernel, programs, given)
    block = min(1024, triton.next_power_of_2(tiles * split["SIZE"]))
    _run(combine_stats_kernel, samples * num_groups, given, BLOCK=block, num_warps=1)
    if given["total"] is not None:
        given |= {"x": given["total"], "x_bias": None}
    _run(apply_kernel, programs, given)


@operator("group_norm_backward")
def normalized_backward(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    x_bias: Tensor | None,
    also: Tensor | None,
    other: Tensor | None,
    factor: float,
    summed: bool,
    silu: bool,
    needed: list[bool],
) -> list[Tensor]:
    """The gradients of those of x, skip, weight, bias, scale, shift, x_bias that are needed, in their dtypes.

    also, other: gradients of the shapes of x and of skip (without skip, of x), which are added to theirs. summed: x is
    a sum that has x_bias in it, and times `factor` its gradient is that of what was summed.
    """
    images = needed[0] or needed[1] or needed[-1]
    dx, dskip = (None if t is None or not images else _empty(t, t.shape[1]) for t in (x, skip))
    small = [
        x.new_empty(t.shape, dtype=t.dtype) if need else None
        for t, need in zip((weight, bias, scale, shift, x_bias), needed[2:], strict=True)
    ]
    if not isinstance(x, FakeTensor):
        dy, x, skip = map(_channels_last, (dy, x, skip))
        added = None if summed else x_bias
        given = _arguments(x, skip, mean, rstd, weight, bias, scale, shift, added, silu)
        given |= {"dy": dy, "dx": dx, "dskip": dskip, "factor": factor}
        given |= {name: dy.new_empty(dy.shape[:2], dtype=torch.float32) for name in ("sum_g", "sum_gx")}
        for name, t in (("also", also), ("other", other)):
            given[name], given[f"{name}_pitch"] = (None, 0) if t is None else rows_of(t)
        given |= _backward(dy, mean.shape[1], given, needed[-1])
        if any(needed[2:]):
            given |= dict(zip(("d_weight", "d_bias", "d_scale", "d_shift", "d_x_bias"), small, strict=True))
            _run(_parameter_gradients_kernel, triton.cdiv(dy.shape[1], 16), given, SAMPLES=64, CHANNELS=16)
    return [gradient for gradient, need in zip((dx, dskip, *small), needed, strict=True) if need]


def _backward(dy: Tensor, num_groups: int, given: dict[str, object], sum_wanted: bool) -> dict[str, object]:
    """Fill sums and dx; returns Σ dx, if wanted, of so many parts of the image as went through registers."""
    samples, channels = dy.shape[:2]

    def sums(parts: int) -> dict[str, object]:
        return {"parts": parts, "sum_dx": dy.new_empty((parts, channels), dtype=torch.float32) if sum_wanted else None}

    if bundle := _one_pass(dy, given["seam"], num_groups, LARGEST_BACKWARD, ROW_BACKWARD):
        warps, of_dx = _warps(bundle, 64 // dy.element_size()), sums(samples)
        _run(one_pass_backward_kernel, samples * bundle["bundles"], given | of_dx, **bundle, num_warps=warps)
        return of_dx
    split = _split(dy, given["seam"], num_groups)
    tiles, programs = split["tiles"], samples * split["tiles"] * split["blocks"]
    tile_g, tile_gx = (dy.new_empty((samples, tiles, channels), dtype=torch.float32) for _ in range(2))
    mean_g, mean_gx = (dy.new_empty((samples, num_groups), dtype=torch.float32) for _ in range(2))
    of_dx = sums(samples * tiles)
    given = given | split | of_dx | {"tile_g": tile_g, "tile_gx": tile_gx, "mean_g": mean_g, "mean_gx": mean_gx}
    _run(sums_kernel, programs, given)
    block = min(64, triton.next_power_of_2(split["SIZE"]))
    _run(combine_sums_kernel, samples * num_groups, given, TILES=16, BLOCK=block, num_warps=1)
    if given["dx"] is not None:
        half = sum_wanted and dy.element_size() == 4 and split["ROWS"] > 1  # or else registers would spill on sm_80
        _run(input_gradient_kernel, programs, given, ROWS=split["ROWS"] // (2 if half else 1))
    return of_dx


def _saved(arguments, results):
    x, skip, weight, bias, scale, shift, x_bias, _, _, silu = arguments
    _, mean, rstd = results
    return (x, skip, mean, rstd, weight, bias, scale, shift, x_bias, None, None), (1.0, False, silu)


_group_norm = differentiable(normalized, normalized_backward, _saved, inputs=7)


class _ResidualNorm(torch.autograd.Function):
    """(y, total, skip or else total again): what else is done with them gives its gradients here, for a read each."""

    @staticmethod
    def forward(ctx, x, h, skip, weight, bias, x_bias, factor, *options):
        if h is None and x_bias is None and factor == 1:
            y, mean, rstd = normalized(x, skip, weight, bias, None, None, None, *options)
            total = x
        else:
            y, mean, rstd, total = summed_and_normalized(x, h, skip, weight, bias, x_bias, factor, *options)
        ctx.save_for_backward(total, skip, mean, rstd, weight, bias, x_bias)
        ctx.factor, ctx.silu = factor, options[-1]
        ctx.set_materialize_grads(False)
        return y, total, total.detach() if skip is None else skip

    @staticmethod
    def backward(ctx, dy, also, other):
        total, skip, mean, rstd, weight, bias, x_bias = ctx.saved_tensors
        of_x, of_h, *needed, of_bias = ctx.needs_input_grad[:6]
        if dy is None:
            dy = _empty(total, weight.shape[0]).zero_()
        given = (dy, total, skip, mean, rstd, weight, bias, None, None, x_bias, also, other, ctx.factor, True, ctx.silu)
        needed = [of_x or of_h, *needed, False, False, of_bias]
        gradients = iter(last(normalized_backward, *given, needed))
        dx, dskip, d_weight, d_bias, _, _, d_x_bias = (next(gradients) if need else None for need in needed)
        return dx if of_x else None, dx if of_h else None, dskip, d_weight, d_bias, d_x_bias, None, None, None, None


def group_norm(x, num_groups, weight, bias, eps, *, scale, shift, x_bias, silu) -> Tensor:
    given = {"scale": scale, "shift": shift, "x_bias": x_bias}
    if needs_reference(x, weight, bias, *given.values()) or x.numel() == 0:
        return reference.group_norm(x, num_groups, weight, bias, eps, **given, silu=silu)
    rows = x.contiguous(memory_format=torch.channels_last)
    y, _, _ = _group_norm(rows, None, weight, bias, *given.values(), num_groups, eps, silu)
    return y if _is_channels_last(x) else y.contiguous()


def residual_norm(x, h, skip, num_groups, weight, bias, eps, *, x_bias, scale, silu) -> tuple[Tensor, Tensor, Tensor]:
    mixed = any(t is not None and t.dtype != x.dtype for t in (h, skip))
    if mixed or needs_reference(x, h, skip, weight, bias, x_bias) or x.numel() == 0:
        given = {"x_bias": x_bias, "scale": scale, "silu": silu}
        return reference.residual_norm(x, h, skip, num_groups, weight, bias, eps, **given)
    if plain_eager() and _is_channels_last(x):
        return _ResidualNorm.apply(x, h, skip, weight, bias, x_bias, scale, num_groups, eps, silu)
    total = reference.residual_sum(x, h, x_bias=x_bias, scale=scale)  # which compilers fuse with other things
    rows = total.contiguous(memory_format=torch.channels_last)
    y, _, _ = _group_norm(rows, skip, weight, bias, None, None, None, num_groups, eps, silu)
    return y if _is_channels_last(total) else y.contiguous(), total, total if skip is None else skip


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)
