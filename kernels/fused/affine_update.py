"""The fused sampler step in Triton: a sum of images with per-sample coefficients, clipped, noised, in one pass.

B samples of n elements each, of any floating dtype but float64, all in one memory order. Coefficients are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .common import coefficient, have_gradient, load, store, table, tile_of_sample, tiling
from .launch import aligned, differentiable, launch, memory_format, needs_reference, operator
from .philox import as_int64, key, normals_at, normals_by_pixel, normals_in_order

FEW = 512  # elements of a tile of whole pixels: few, as what does not divide by them is lost

# The rows of the table of coefficients; what is not used has some other row's values.
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
    out,  # (B, n)
    noise_out,  # (B, n): keeps the noise; or None
    z,  # (B, n) or None
    a,  # (B, n)
    b,  # (B, n) or None
    coefs,  # (7, B): the table
    limit,  # of the clip; None: the table's percentiles
    sample_ids,  # (B,) int64; None: no noise
    seed_low,  # int32, like the next two: which stream of noise
    seed_high,
    step,
    n,
    samples,  # B
    Z_IN_SUM: tl.constexpr,  # whether there is a coef_z
    CLIP: tl.constexpr,
    STEP_ON: tl.constexpr,  # from the clipped sum, by the table's CLIP_Z and CLIP_X
    CHANNELS: tl.constexpr,  # of a channels-last image, where there is noise; else None
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,  # how many elements of a block are a tile, if they are to be whole fours of pixels; else None
):
    sample, tile, element, mask, at = tile_of_sample(n, BLOCK, TILE)
    image, total = _weighted_sum(z, a, b, coefs, sample, samples, at, mask, Z_IN_SUM)
    if CLIP:
        largest, factor = _limits(limit, coefs, sample, samples)
        total = tl.clamp(total, -largest, largest, propagate_nan=tl.PropagateNan.ALL) * factor
        if STEP_ON:
            clipped = coefficient(coefs, CLIP_X, sample, samples) * total
            total = coefficient(coefs, CLIP_Z, sample, samples) * image + clipped
    if sample_ids is not None:
        sample_id = tl.load(sample_ids + sample)
        if CHANNELS is None:
            noise = normals_in_order(tile * (BLOCK // 4), sample_id, seed_low, seed_high, step, BLOCK)
        elif TILE is None:
            logical = element % CHANNELS * (n // CHANNELS) + element // CHANNELS
            noise = normals_at(logical, sample_id, seed_low, seed_high, step)
        else:
            four = tile * (TILE // CHANNELS // 4)
            noise = normals_by_pixel(four, n // CHANNELS, sample_id, seed_low, seed_high, step, CHANNELS, BLOCK)
        if noise_out is not None:
            store(noise_out, at, noise, mask)
        total += coefficient(coefs, OF_NOISE, sample, samples) * noise
    store(out, at, total, mask)


@triton.jit
def _update_backward_kernel(
    grad,  # (B, n): the gradient of `out`
    grad_z,  # (B, n), like the next two: to be written; None where it is not needed
    grad_a,
    grad_b,
    z,  # (B, n), like the next two: only read under a clip, else None
    a,
    b,
    coefs,  # (7, B): the table
    limit,  # of the clip; None: the table's percentiles
    n,
    samples,  # B
    Z_IN_SUM: tl.constexpr,  # these three as above
    CLIP: tl.constexpr,
    STEP_ON: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, _, _, mask, at = tile_of_sample(n, BLOCK)
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
        store(grad_z, at, to_z, mask)
    if grad_a is not None:
        store(grad_a, at, coefficient(coefs, OF_A, sample, samples) * inner, mask)
    if grad_b is not None:
        store(grad_b, at, coefficient(coefs, OF_B, sample, samples) * inner, mask)


def _launch_update(a: Tensor, coefs: Tensor, *, sample_ids: Tensor | None, **given) -> None:
    given |= _walking(a) if sample_ids is not None else tiling(a) | {"CHANNELS": None, "TILE": None}
    launch(_update_kernel, a=a, coefs=coefs, sample_ids=sample_ids, samples=len(a), **given)


def _walking(x: Tensor) -> dict[str, object]:
    """The tiles of a kernel that makes noise, which is counted by (channel, row, column), whatever the memory order.

    Four pixels of a channel share a counter block: in a channels-last image a tile has them all, and also begins where
    128 bits of half precision do.
    """
    if memory_format(x) != torch.channels_last:
        return tiling(x) | {"CHANNELS": None, "TILE": None}
    _, channels, height, width = x.shape
    unit = 8 * channels
    if height * width % 4 or unit > FEW:
        return tiling(x) | {"CHANNELS": channels, "TILE": None}
    return tiling(x, FEW, FEW // unit * unit) | {"CHANNELS": channels, "num_warps": 2}


@operator("affine_update")
def update(
    z: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    coefs: Tensor,
    z_in_sum: bool,
    clip: bool,
    limit: float | None,
    step_on: bool,
    sample_ids: Tensor | None,
    seed: int,
    step: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """`kernels.affine_update` on checked arguments, with their table of coefficients; flags as the kernel has them."""
    z, a, b = aligned(z, a, b, to=a if z is None else z)
    out = torch.empty_like(a, dtype=out_dtype)
    images = {"out": out, "noise_out": None, "z": z, "b": b}
    flags = {"Z_IN_SUM": z_in_sum, "CLIP": clip, "STEP_ON": step_on}
    _launch_update(a, coefs, **images, limit=limit, sample_ids=sample_ids, **key(seed, step), **flags)
    return out


@operator("affine_update_backward")
def update_backward(
    grad: Tensor,
    z: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    coefs: Tensor,
    z_in_sum: bool,
    clip: bool,
    limit: float | None,
    step_on: bool,
    dtype_z: torch.dtype | None,
    dtype_a: torch.dtype | None,
    dtype_b: torch.dtype | None,
    needed: list[bool],
) -> list[Tensor]:
    """The needed gradients of z, a, b, in their dtypes; the images themselves only matter under a clip."""
    grad, z, a, b = aligned(grad, z, a, b, to=grad if a is None else a)
    dtypes = zip((dtype_z, dtype_a, dtype_b), needed, strict=True)
    grads = [torch.empty_like(grad, dtype=dtype) if need else None for dtype, need in dtypes]
    images = dict(zip(("grad_z", "grad_a", "grad_b"), grads, strict=True), grad=grad, z=z, a=a, b=b)
    flags = {"Z_IN_SUM": z_in_sum, "CLIP": clip, "STEP_ON": step_on}
    launch(_update_backward_kernel, **tiling(grad), **images, coefs=coefs, limit=limit, samples=len(grad), **flags)
    return [g for g in grads if g is not None]


def _saved(arguments, results):
    z, a, b, coefs, z_in_sum, clip, limit, step_on, *_ = arguments
    images = (z, a, b) if clip else (None, None, None)
    return (*images, coefs), (z_in_sum, clip, limit, step_on, *(None if t is None else t.dtype for t in (z, a, b)))


_update = differentiable(update, update_backward, _saved, inputs=3)


def affine_update(z, a, b, *, coef_z, coef_a, coef_b, clip, coef_noise, seed, sample_ids, step, out_dtype) -> Tensor:
    clip_z, clip_x = (None, None) if clip is None else (clip.coef_z, clip.coef_x)
    percentile = clip.limit if clip is not None and isinstance(clip.limit, Tensor) else None
    coefs = [coef_z, coef_a, coef_b, clip_z, clip_x, coef_noise, percentile]
    if needs_reference(z, a, b) or out_dtype == torch.float64 or have_gradient(coefs):
        given = {"coef_z": coef_z, "coef_a": coef_a, "coef_b": coef_b, "clip": clip, "coef_noise": coef_noise}
        stream = {"seed": seed, "sample_ids": sample_ids, "step": step}
        return reference.affine_update(z, a, b, **given, **stream, out_dtype=out_dtype)
    if coef_z is None and clip_z is None:
        z, a = None, a.contiguous(memory_format=memory_format(z))
    limit = None if clip is None or percentile is not None else float(clip.limit)
    flags = (coef_z is not None, clip is not None, limit, clip_z is not None)
    ids, seed = (None, 0) if coef_noise is None else (sample_ids.contiguous(), as_int64(seed))
    return _update(z, a, b, table(coefs), *flags, ids, seed, step, out_dtype or torch.float32)


@operator("add_noise")
def noised(x: Tensor, coefs: Tensor, sample_ids: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """(coef_a·x + coef_noise·ε, ε), float32."""
    (x,) = aligned(x, to=x)
    out, noise = (torch.empty_like(x, dtype=torch.float32) for _ in range(2))
    images = {"out": out, "noise_out": noise, "z": None, "b": None}
    flags = {"Z_IN_SUM": False, "CLIP": False, "STEP_ON": False}
    _launch_update(x, coefs, **images, limit=None, sample_ids=sample_ids, **key(seed, step), **flags)
    return out, noise


@operator("add_noise_backward")
def noised_backward(grad: Tensor, coefs: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of x, in its dtype: coef_a·grad."""
    (grad,) = aligned(grad, to=grad)
    grad_x = torch.empty_like(grad, dtype=dtype)
    images = {"grad": grad, "grad_z": None, "grad_a": grad_x, "grad_b": None, "z": None, "a": None, "b": None}
    flags = {"Z_IN_SUM": False, "CLIP": False, "STEP_ON": False}
    launch(_update_backward_kernel, **tiling(grad), **images, coefs=coefs, limit=None, samples=len(grad), **flags)
    return grad_x


_add_noise = differentiable(noised, noised_backward, lambda arguments, _: ((arguments[1],), (arguments[0].dtype,)))


def add_noise(x, coef_x, coef_noise, *, seed, sample_ids, step) -> tuple[Tensor, Tensor]:
    if needs_reference(x) or have_gradient([coef_x, coef_noise]):
        return reference.add_noise(x, coef_x, coef_noise, seed=seed, sample_ids=sample_ids, step=step)
    coefs = table([None, coef_x, None, None, None, coef_noise, None])
    return _add_noise(x, coefs, sample_ids.contiguous(), as_int64(seed), step)
