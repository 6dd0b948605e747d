"""What runs on CPU tensors where it is faster than the reference: GroupNorm of channels-last images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference

CHUNK = 1 << 18  # elements worked on at a time, whose float32 copies are allocated once and stay in the cache


class _Options(NamedTuple):
    groups: int
    eps: float
    silu: bool


def group_norm(x, num_groups, weight, bias, eps, *, scale, shift, silu) -> Tensor:
    training = torch.is_grad_enabled() and _any_requires_grad(x, weight, bias, scale, shift)
    plain = scale is None and not silu
    if _chunks_pay(x, num_groups, training, plain):
        return _in_chunks(x, num_groups, weight, bias, eps, scale, shift, silu, training)
    if _own_dtype_pays(x, num_groups, training, plain):
        return _by_pytorch(x, num_groups, weight, bias, eps, scale, shift, silu, training)
    if torch.compiler.is_compiling() or not _is_dense(x):
        return reference.group_norm(x, num_groups, weight, bias, eps, scale=scale, shift=shift, silu=silu)
    wide = x.to(_working_dtype(x))  # in x's memory order, which the reference gives up for the sake of precision
    return _by_pytorch(wide, num_groups, weight, bias, eps, scale, shift, silu, training).to(x.dtype)


def _chunks_pay(x: Tensor, num_groups: int, training: bool, plain: bool) -> bool:
    """Whether `_GroupNorm` is faster than PyTorch, in x's dtype and in float32.

    Channels-last, each visit of a group at a pixel takes PyTorch 29 ns in half precision and 8 ns in float32, until
    the group's channels fill vectors; from 32×32 pixels on its forward pass escapes that, its backward pass does not.
    `_GroupNorm` takes 1 to 2 ns per element and direction after a start of 0.1 ms.
    """
    if torch.compiler.is_compiling():  # compilers fuse the reference into less than either
        return False
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last) or x.dtype == torch.float64:
        return False
    width, pixels, half = x.shape[1] // num_groups, x.shape[2] * x.shape[3], x.dtype != torch.float32
    visits = x.shape[0] * pixels * num_groups
    if pixels >= 1024:
        return training and visits >= 2**14 and width <= (8 if half or not plain else 1)
    return visits >= 2**15 if width <= 2 else visits >= 2**18 and width <= 4


def _own_dtype_pays(x: Tensor, num_groups: int, training: bool, plain: bool) -> bool:
    """Whether PyTorch is as fast in x's dtype as in float32: in half precision not where its groups fill no vectors.

    Scaling and SiLU are slower in half precision too, but save half the memory for the backward pass.
    """
    if torch.compiler.is_compiling() or not _is_dense(x):
        return False
    if x.dtype in (torch.float32, torch.float64):
        return True
    if x.is_contiguous() or (x.shape[1] // num_groups) % 16 == 0:
        return training or plain
    return x.shape[2] * x.shape[3] >= 1024 and not training


def _by_pytorch(x, num_groups, weight, bias, eps, scale, shift, silu, training) -> Tensor:
    dtype = _working_dtype(x)  # of the parameters, because PyTorch keeps the statistics in theirs
    if not weight.dtype == bias.dtype == dtype:
        weight, bias = weight.to(dtype), bias.to(dtype)
    y = torch.group_norm(x, num_groups, weight, bias, eps)  # F.group_norm checks first what our caller has checked
    if scale is not None:
        scale, shift = (t.to(x.dtype)[:, :, None, None] for t in (1 + scale.to(dtype), shift))
        y = torch.addcmul(shift, y, scale)
    return F.silu(y, inplace=not training) if silu else y


def _in_chunks(x, num_groups, weight, bias, eps, scale, shift, silu, training) -> Tensor:
    dtype = _working_dtype(x)
    gain, offset = weight.to(dtype)[None], bias.to(dtype)[None]
    if scale is not None:
        factor = 1 + scale.to(dtype)
        gain, offset = gain * factor, torch.addcmul(shift.to(dtype), offset, factor)
    run = _GroupNorm.apply if training else _GroupNorm.forward  # `apply` alone takes as long as ten small operations
    y, _ = run(x.permute(0, 2, 3, 1).flatten(1, 2), gain, offset, _Options(num_groups, eps, silu))
    return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


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
