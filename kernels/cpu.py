"""What runs on CPU tensors where it is faster than the reference: GroupNorm of channels-last images, sums of two."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from . import reference

CHUNK = 1 << 18  # elements worked on at a time, whose float32 copies are allocated once and stay in the cache
HALVES = (torch.float16, torch.bfloat16)
FAR = 1.5  # deviations of a group's mean from 0, beyond which E[x²] − E[x]² of a channels-last x has lost digits
NEVER = 99
ENOUGH_VISITS = {  # binary logarithms, measured, for groups of up to 2, 4 and 8 channels; see `_chunks_pay`
    # half precision, large, plain
    (False, False, False): (16, 16, NEVER),
    (False, False, True): (17, 19, NEVER),
    (False, True, False): (18, 18, 18),
    (False, True, True): (19, NEVER, NEVER),
    (True, False, False): (16, 16, 16),
    (True, False, True): (17, 17, NEVER),
    (True, True, False): (16, 16, 16),
    (True, True, True): (17, 17, 17),
}


def residual_sum(x, h, *, x_bias, scale) -> Tensor:
    if h is None or x_bias is not None:
        return reference.residual_sum(x, h, x_bias=x_bias, scale=scale)
    return x + h if scale == 1 else (x + h) * scale  # half precision is widened in PyTorch's registers


class _Options(NamedTuple):
    groups: int
    eps: float
    silu: bool


def group_norm(x, num_groups, weight, bias, eps, *, scale, shift, silu, x_bias=None) -> Tensor:
    """The reference, or the quickest of the three ways below.

    In half precision PyTorch is quick only where groups fill vectors, and slower than in float32 at scaling and SiLU,
    which save half the memory for the backward pass though.
    """
    dense = x.is_contiguous(memory_format=torch.channels_last) or x.is_contiguous()
    if x_bias is not None or is_compiling() or not dense:
        # Compilers fuse it into less than the others take, and it knows every memory layout.
        given = {"scale": scale, "shift": shift, "x_bias": x_bias}
        return reference.group_norm(x, num_groups, weight, bias, eps, **given, silu=silu)
    training = torch.is_grad_enabled() and (x.requires_grad or _any_requires_grad(weight, bias, scale, shift))
    plain, half = scale is None and not silu, x.dtype in HALVES
    batch, channels, height, width = x.shape
    size, large = channels // num_groups, height * width >= 1024
    if x.is_contiguous():
        way = _widened if half and not training and not plain else _by_pytorch
    elif large and not training:
        way = _by_pytorch
    elif size <= 8 and _chunks_pay(batch * height * width * num_groups, size, large, x.dtype, training, plain):
        way = _in_chunks
    else:
        way = _widened if half and size % 16 else _by_pytorch
    return way(x, num_groups, weight, bias, eps, scale, shift, silu, training)


residual_norm = functools.partial(reference.residual_norm, residual_sum=residual_sum, group_norm=group_norm)


def _chunks_pay(visits: int, size: int, large: bool, dtype: torch.dtype, training: bool, plain: bool) -> bool:
    """Whether `_GroupNorm` is faster than PyTorch, in x's dtype and in float32.

    Channels-last, each visit of a group at a pixel takes PyTorch 29 ns in half precision and 8 ns in float32, until
    the group's channels, `size`, fill vectors; from 32×32 pixels on (`large`) its forward pass escapes that, its
    backward pass does not. `_GroupNorm` takes 1 to 2 ns per element and direction after a start of 0.1 ms, in training
    0.9 ms, and saves memory, which takes time too, if there is more to do than to normalize.
    """
    if dtype == torch.float64:
        return False
    least = ENOUGH_VISITS[dtype in HALVES, large, plain] if training else (16, 16, NEVER)
    return visits >= 2 ** least[0 if size <= 2 else 1 if size <= 4 else 2]


def _widened(x, num_groups, weight, bias, eps, scale, shift, silu, training) -> Tensor:
    """In x's memory order, which the reference gives up for the sake of precision."""
    return _by_pytorch(x.float(), num_groups, weight, bias, eps, scale, shift, silu, training).to(x.dtype)


def _by_pytorch(x, num_groups, weight, bias, eps, scale, shift, silu, training) -> Tensor:
    dtype = x.dtype
    working = torch.float32 if dtype in HALVES else dtype
    fit = (working,) if training else (working, dtype)  # PyTorch keeps statistics in the dtype of the parameters
    if not (weight.dtype == bias.dtype and weight.dtype in fit):  # `to` takes a microsecond to find nothing to do
        weight, bias = weight.to(working), bias.to(working)
    if x.is_contiguous():
        y = torch.group_norm(x, num_groups, weight, bias, eps)  # F.group_norm checks first what our caller has checked
    else:  # the same, with the statistics that tell whether they can be trusted
        batch, channels, height, width = x.shape
        gain, offset = weight.contiguous(), bias.contiguous()
        y, mean, rstd = torch.native_group_norm(x, gain, offset, batch, channels, height * width, num_groups, eps)
        if training:
            mean, rstd = mean.detach(), rstd.detach()
        if batch and type(mean) is Tensor and _is_far(mean, rstd):  # a fake tensor holds no numbers
            del y  # its memory serves for what follows
            return _in_chunks(x, num_groups, weight, bias, eps, scale, shift, silu, training)
    if scale is not None:
        if scale.dtype == shift.dtype == dtype:
            factor = 1 + scale
        else:
            factor, shift = (1 + scale.to(working)).to(dtype), shift.to(dtype)
        y = torch.addcmul(shift[..., None, None], y, factor[..., None, None])
    return F.silu(y, inplace=not training) if silu else y


def _is_far(mean: Tensor, rstd: Tensor) -> bool:
    """Whether a group's mean is far from 0, in its own deviations, where PyTorch subtracts squares.

    The deviations are too inexact then to be used, but not so much that this would not show.
    """
    low, high = torch.aminmax(mean * rstd)
    return not (low.item() >= -FAR and high.item() <= FAR)  # NaN, too


def _in_chunks(x, num_groups, weight, bias, eps, scale, shift, silu, training) -> Tensor:
    dtype = _working_dtype(x)
    gain, offset = weight.to(dtype)[None], bias.to(dtype)[None]
    if scale is not None:
        factor = 1 + scale.to(dtype)
        gain, offset = gain * factor, torch.addcmul(shift.to(dtype), offset, factor)
    run = _GroupNorm.apply if training else _GroupNorm.forward  # `apply` alone takes as long as ten small operations
    y, _ = run(x.permute(0, 2, 3, 1).flatten(1, 2), gain, offset, _Options(num_groups, eps, silu))
    return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _GroupNorm(torch.autograd.Function):
    """silu(gain·x̂ + offset) for x (B, pixels, C), gain and offset (B or 1, C); and the statistics for the gradient.

    They are those of d = x − center, where center is the mean of every eighth pixel: it lies within √7 standard
    deviations of the mean, whatever x is, so E[d²] − E[d]² keeps the digits that E[x²] − E[x]² loses. Values per
    channel have shape (b, G, C/G) and values per group (b, G, 1), for the b samples of a chunk.
    """

    @staticmethod
    def forward(x: Tensor, gain: Tensor, offset: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
        y, statistics = torch.empty_like(x), gain.new_empty(3, len(x), options.groups, 1)
        gain, offset = (_by_group(t, len(x), options.groups) for t in (gain, offset))
        for rows, out, d in _chunks(y, gain.dtype, scratch=1):
            center = _group_mean(x[rows, ::8].mean(1, dtype=gain.dtype).view_as(gain[rows]))
            _subtract(x[rows], center.expand_as(gain[rows]), out=d)
            mean = _group_mean(d.mean(1).view_as(gain[rows]))
            square = _group_mean(torch.mul(d, d, out=out).mean(1).view_as(gain[rows]))
            rstd = square.addcmul_(mean, mean, value=-1).clamp_(min=0).add_(options.eps).rsqrt_()
            a = rstd * gain[rows]
            _line(a, d, torch.addcmul(offset[rows], mean, a, value=-1), out=out)
            if options.silu:
                F.silu(out, inplace=True)
            statistics[:, rows] = torch.stack((center, mean, rstd))
        return y, statistics

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        x, gain, offset, ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, gain, offset, output[1])

    @staticmethod
    def backward(ctx, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        run = _Gradient.apply if torch.is_grad_enabled() else _Gradient.forward
        return *run(dy, *ctx.saved_tensors, ctx.options), None


class _Gradient(torch.autograd.Function):
    """The gradients of `_GroupNorm`. A function of its own, lest a second derivative be taken for zero."""

    @staticmethod
    def forward(dy: Tensor, x: Tensor, *inputs) -> tuple[Tensor, Tensor, Tensor]:
        *parameters, statistics, options = inputs
        gain, offset = (_by_group(t, len(x), options.groups) for t in parameters)
        dx, dgain, doffset = torch.empty_like(x), torch.empty_like(gain), torch.empty_like(offset)
        dy, pixels, widen = dy.contiguous(), x.shape[1], dy.dtype != gain.dtype
        for rows, out, d, *wide in _chunks(dx, gain.dtype, scratch=1 + (widen or options.silu)):
            g = wide[0].copy_(dy[rows]) if widen else dy[rows]
            center, mean, rstd = statistics[:, rows]
            _subtract(x[rows], center.expand_as(gain[rows]), out=d)
            a = rstd * gain[rows]
            if options.silu:
                _line(a, d, torch.addcmul(offset[rows], mean, a, value=-1), out=out)
                g = torch.ops.aten.silu_backward.grad_input(g, out, grad_input=wide[0])
            doffset[rows] = g.sum(1).view_as(a)
            products = torch.mul(g, d, out=out).sum(1).view_as(a)
            dgain[rows] = products.addcmul_(mean, doffset[rows], value=-1).mul_(rstd)
            # dx = rstd·(gain·g − ⟨gain·g⟩ − x̂·⟨gain·g·x̂⟩) with x̂ = rstd·(d − mean) and averages over the group
            slope = _group_mean(gain[rows] * dgain[rows]).mul_(rstd).mul_(rstd).div_(-pixels)
            constant = _group_mean(gain[rows] * doffset[rows]).mul_(rstd).div_(-pixels).addcmul_(slope, mean, value=-1)
            _line(slope.expand_as(a), d, constant.expand_as(a), out=d)
            torch.addcmul(d, g, _over_pixels(a), out=out)
        dgain, doffset = (t.flatten(1).sum_to_size(p.shape) for t, p in zip((dgain, doffset), parameters, strict=True))
        return dx, dgain, doffset

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> None:
        raise RuntimeError("group_norm: no second derivative here; kernels.use('reference') has one")


def _chunks(result: Tensor, dtype: torch.dtype, scratch: int) -> Iterator[tuple[slice | Tensor, ...]]:
    """Slices of the batch, each with where to write its result in `dtype`, and scratch tensors of the same shape.

    The result's own memory serves if it has that dtype; otherwise what was written is rounded into it afterwards.
    """
    size = max(1, CHUNK // max(1, result[:1].numel()))
    rounded = result.dtype != dtype
    buffers = result.new_empty(scratch + rounded, min(size, len(result)), *result.shape[1:], dtype=dtype)
    for start in range(0, len(result), size):
        rows = slice(start, min(start + size, len(result)))
        chunk = buffers[:, : rows.stop - start]
        if rounded:
            yield rows, *chunk
            result[rows] = chunk[0]
        else:
            yield rows, result[rows], *chunk


def _by_group(per_channel: Tensor, batch: int, groups: int) -> Tensor:
    return per_channel.unflatten(1, (groups, -1)).expand(batch, -1, -1)


def _over_pixels(per_channel: Tensor) -> Tensor:
    return per_channel.flatten(1)[:, None]


def _group_mean(per_channel: Tensor) -> Tensor:
    return per_channel.mean(2, keepdim=True)


def _line(a: Tensor, x: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a·x + b."""
    torch.addcmul(_over_pixels(b), x, _over_pixels(a), out=out)


def _subtract(x: Tensor, center: Tensor, out: Tensor) -> None:
    """out = x − center, in the precision of `out`."""
    torch.sub(x if x.dtype == out.dtype else out.copy_(x), _over_pixels(center), out=out)
