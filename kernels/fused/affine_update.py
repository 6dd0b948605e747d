"""The fused sampler step in Triton: a sum of images with per-sample coefficients, clipped, noised, in one pass."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .launch import Function, aligned, last, launch, memory_format, needs_reference, operator
from .philox import as_int64, key, normals_at, normals_in_order

BLOCK = 1024  # 8 elements a thread: 128-bit loads of half-precision tensors


@triton.jit
def load(image, at, mask):
    return tl.load(image + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def coefficient(coefs, ROW: tl.constexpr, sample, samples):
    """One sample's coefficient from a (rows, samples) table."""
    return tl.load(coefs + ROW * tl.cast(samples, tl.int64) + sample)


# The rows of the table of coefficients that `table` makes; what is not used has some other row's values.
OF_Z, OF_A, OF_B, CLIP_Z, CLIP_X, OF_NOISE, PERCENTILE = (tl.constexpr(row) for row in range(7))


@triton.jit
def _weighted_sum(z, a, b, coefs, sample, samples, at, mask, Z_IN_SUM: tl.constexpr):
    """(z, coef_z·z + coef_a·a + coef_b·b), each image read once; z and b may be None, and then count as 0."""
    total = coefficient(coefs, OF_A, sample, samples) * load(a, at, mask)
    image = total * 0
    if z is not None:
        image = load(z, at, mask)
    if Z_IN_SUM:
        total += coefficient(coefs, OF_Z, sample, samples) * image
    if b is not None:
        total += coefficient(coefs, OF_B, sample, samples) * load(b, at, mask)
    return image, total


@triton.jit
def _limits(limit, coefs, sample, samples):
    """(largest value, factor): a number limits as it is, a percentile s as max(s, 1), which also divides."""
    if limit is None:
        largest = tl.maximum(coefficient(coefs, PERCENTILE, sample, samples), 1.0)
        factor = 1.0 / largest
    else:
        largest = tl.cast(limit, tl.float32)
        factor = largest * 0.0 + 1.0
    return largest, factor


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step"])
def _update_kernel(
    out, noise_out, z, a, b, coefs, limit, sample_ids, seed_low, seed_high, step, n, pixels, channels, tiles, samples,
    Z_IN_SUM: tl.constexpr, CLIP: tl.constexpr, STEP_ON: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    sample, tile = pid // tiles, pid % tiles
    element = tile * BLOCK + tl.arange(0, BLOCK)
    mask = element < n
    at = sample.to(tl.int64) * n + element
    image, total = _weighted_sum(z, a, b, coefs, sample, samples, at, mask, Z_IN_SUM)
    if CLIP:
        largest, factor = _limits(limit, coefs, sample, samples)
        total = tl.clamp(total, -largest, largest, propagate_nan=tl.PropagateNan.ALL) * factor
        if STEP_ON:
            clipped = coefficient(coefs, CLIP_X, sample, samples) * total
            total = coefficient(coefs, CLIP_Z, sample, samples) * image + clipped
    if sample_ids is not None:
        sample_id = tl.load(sample_ids + sample)
        if CHANNELS_LAST:  # noise is counted by (channel, row, column), whatever the memory order
            logical = (element % channels) * pixels + element // channels
            noise = normals_at(logical, sample_id, seed_low, seed_high, step)
        else:
            noise = normals_in_order(tile * (BLOCK // 4), sample_id, seed_low, seed_high, step, BLOCK)
        if noise_out is not None:
            tl.store(noise_out + at, noise, mask=mask)
        total += coefficient(coefs, OF_NOISE, sample, samples) * noise
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _update_backward_kernel(
    grad, grad_z, grad_a, grad_b, z, a, b, coefs, limit, n, tiles, samples,
    Z_IN_SUM: tl.constexpr, CLIP: tl.constexpr, STEP_ON: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    sample, tile = pid // tiles, pid % tiles
    element = tile * BLOCK + tl.arange(0, BLOCK)
    mask = element < n
    at = sample.to(tl.int64) * n + element
    outer = load(grad, at, mask)
    inner = outer  # the gradient of the sum, before the clip
    if CLIP:
        _, total = _weighted_sum(z, a, b, coefs, sample, samples, at, mask, Z_IN_SUM)
        largest, factor = _limits(limit, coefs, sample, samples)
        if STEP_ON:
            inner *= coefficient(coefs, CLIP_X, sample, samples)
        inner = tl.where(tl.abs(total) <= largest, inner * factor, 0.0)
    if grad_z is not None:
        to_z = inner * 0
        if Z_IN_SUM:
            to_z += coefficient(coefs, OF_Z, sample, samples) * inner
        if STEP_ON:
            to_z += coefficient(coefs, CLIP_Z, sample, samples) * outer
        tl.store(grad_z + at, to_z.to(grad_z.dtype.element_ty), mask=mask)
    if grad_a is not None:
        to_a = coefficient(coefs, OF_A, sample, samples) * inner
        tl.store(grad_a + at, to_a.to(grad_a.dtype.element_ty), mask=mask)
    if grad_b is not None:
        to_b = coefficient(coefs, OF_B, sample, samples) * inner
        tl.store(grad_b + at, to_b.to(grad_b.dtype.element_ty), mask=mask)


def _tiling(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """(grid, arguments) of a kernel that walks each sample in tiles of BLOCK."""
    samples, n = x.shape[0], math.prod(x.shape[1:])
    tiles = triton.cdiv(n, BLOCK)
    return (samples * tiles,), {"n": n, "tiles": tiles, "samples": samples, "BLOCK": BLOCK}


@operator("affine_update")
def update(
    z: Tensor | None, a: Tensor, b: Tensor | None, coefs: Tensor, z_in_sum: bool, clip: bool, limit: float | None,
    step_on: bool, sample_ids: Tensor | None, seed: int, step: int, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`kernels.affine_update` on checked arguments, with their `table` of coefficients.

    z_in_sum: whether coef_z is given; clip: at limit, None for the percentiles; step_on: the clip has coefficients.
    """
    z, a, b = aligned(z, a, b, to=a if z is None else z)
    out = torch.empty_like(a, dtype=out_dtype)
    _launch_update(out, None, z, a, b, coefs, z_in_sum, clip, limit, step_on, sample_ids, seed, step)
    return out


def _launch_update(out, noise_out, z, a, b, coefs, z_in_sum, clip, limit, step_on, sample_ids, seed, step) -> None:
    grid, tiling = _tiling(a)
    channels_last = memory_format(a) == torch.channels_last
    channels = a.shape[1] if channels_last else 1
    launch(
        _update_kernel, grid, out=out, noise_out=noise_out, z=z, a=a, b=b, coefs=coefs, limit=limit,
        sample_ids=sample_ids, **key(seed, step), **tiling, channels=channels, pixels=tiling["n"] // channels,
        Z_IN_SUM=z_in_sum, CLIP=clip, STEP_ON=step_on, CHANNELS_LAST=channels_last,
    )  # fmt: skip


@operator("affine_update_backward")
def update_backward(
    grad: Tensor, z: Tensor | None, a: Tensor | None, b: Tensor | None, coefs: Tensor, z_in_sum: bool, clip: bool,
    limit: float | None, step_on: bool,
    dtype_z: torch.dtype | None, dtype_a: torch.dtype | None, dtype_b: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    """The gradients of those of z, a, b that have a dtype given; the images themselves only matter under a clip."""
    grad, z, a, b = aligned(grad, z, a, b, to=grad if a is None else a)
    grads = [None if dtype is None else torch.empty_like(grad, dtype=dtype) for dtype in (dtype_z, dtype_a, dtype_b)]
    grid, tiling = _tiling(grad)
    launch(
        _update_backward_kernel, grid, grad=grad, grad_z=grads[0], grad_a=grads[1], grad_b=grads[2], z=z, a=a, b=b,
        coefs=coefs, limit=limit, **tiling, Z_IN_SUM=z_in_sum, CLIP=clip, STEP_ON=step_on,
    )  # fmt: skip
    return [g for g in grads if g is not None]


class _Update(Function):
    @staticmethod
    def forward(*arguments):
        return update(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, a, b, coefs, z_in_sum, clip, limit, step_on, *_ = inputs
        ctx.flags = z_in_sum, clip, limit, step_on
        ctx.dtypes = [None if t is None else t.dtype for t in (z, a, b)]
        ctx.save_for_backward(*((z, a, b) if clip else (None, None, None)), coefs)

    @staticmethod
    def backward(ctx, grad):
        dtypes = [dtype if needed else None for dtype, needed in zip(ctx.dtypes, ctx.needs_input_grad[:3], strict=True)]
        grads = iter(last(update_backward, grad, *ctx.saved_tensors, *ctx.flags, *dtypes))
        return *(None if dtype is None else next(grads) for dtype in dtypes), *[None] * 9


def affine_update(z, a, b, *, coef_z, coef_a, coef_b, clip, coef_noise, seed, sample_ids, step, out_dtype) -> Tensor:
    clip_z, clip_x = (None, None) if clip is None else (clip.coef_z, clip.coef_x)
    percentile = clip.limit if clip is not None and isinstance(clip.limit, Tensor) else None
    coefs = [coef_z, coef_a, coef_b, clip_z, clip_x, coef_noise, percentile]
    if needs_reference(z, a, b) or out_dtype == torch.float64 or have_gradient(coefs):
        return reference.affine_update(
            z, a, b, coef_z=coef_z, coef_a=coef_a, coef_b=coef_b, clip=clip, coef_noise=coef_noise, seed=seed,
            sample_ids=sample_ids, step=step, out_dtype=out_dtype,
        )  # fmt: skip
    if coef_z is None and clip_z is None:
        z, a = None, a.contiguous(memory_format=memory_format(z))
    return _Update.run(
        z, a, b, table(coefs), coef_z is not None, clip is not None,
        None if clip is None or percentile is not None else float(clip.limit), clip_z is not None,
        None if coef_noise is None else sample_ids.contiguous(), 0 if seed is None else as_int64(seed), step,
        out_dtype or torch.float32,
    )  # fmt: skip


def table(coefs: list[Tensor | None]) -> Tensor:
    """(rows, B) float32: one tensor for all coefficients, made by one copy; absent ones repeat one that is there."""
    some = next(coef for coef in coefs if coef is not None)
    return torch.stack([some if coef is None else coef for coef in coefs]).to(torch.float32)


def have_gradient(coefs: list[Tensor | None]) -> bool:
    return any(coef is not None and coef.requires_grad for coef in coefs)


@operator("add_noise")
def noised(x: Tensor, coefs: Tensor, sample_ids: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """(coef_a·x + coef_noise·ε, ε), float32."""
    (x,) = aligned(x, to=x)
    out, noise = (torch.empty_like(x, dtype=torch.float32) for _ in range(2))
    _launch_update(out, noise, None, x, None, coefs, False, False, None, False, sample_ids, seed, step)
    return out, noise


class _AddNoise(Function):
    @staticmethod
    def forward(*arguments):
        return noised(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtype = inputs[0].dtype
        ctx.save_for_backward(inputs[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # or else the noise would get a gradient of zeros

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return None, None, None, None, None
        (coefs,) = ctx.saved_tensors
        (grad_x,) = last(
            update_backward, grad, None, None, None, coefs, False, False, None, False, None, ctx.dtype, None
        )
        return grad_x, None, None, None, None


def add_noise(x, coef_x, coef_noise, *, seed, sample_ids, step) -> tuple[Tensor, Tensor]:
    if needs_reference(x) or have_gradient([coef_x, coef_noise]):
        return reference.add_noise(x, coef_x, coef_noise, seed=seed, sample_ids=sample_ids, step=step)
    coefs = table([None, coef_x, None, None, None, coef_noise, None])
    return _AddNoise.run(x, coefs, sample_ids.contiguous(), as_int64(seed), step)
