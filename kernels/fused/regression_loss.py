"""The fused regression loss in Triton: target, squared error and mean over the sample in one pass, with the gradient.

The forward pass stores target − prediction where a gradient will be wanted, and the backward pass scales it. That moves
fewer bytes than reading everything again: three accesses of the prediction's size (residual written, read, gradient
written) against all inputs read a second time and the gradient written; it also lets the inputs go.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .common import BLOCK, coefficient, have_gradient, load, store, table, tile_of_sample, tiling
from .launch import aligned, differentiable, launch, needs_reference, operator

LONGEST = 32 * BLOCK  # elements that one program sums; larger samples are split

# The rows of the table of coefficients.
OF_Z, OF_A, OF_B, WEIGHT = (tl.constexpr(row) for row in range(4))


@triton.jit
def _loss_kernel(
    loss,  # (B, splits) float32: each program's part of the mean
    residual,  # (B, n): target − prediction; None: not kept
    prediction,  # (B, n)
    z,  # (B, n) or None
    a,  # (B, n)
    b,  # (B, n) or None
    coefs,  # (4, B): the table
    n,
    samples,  # B
    splits,  # programs of a sample
    blocks,  # of BLOCK elements, of a program
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    sample, split = pid // splits, pid % splits
    start = sample.to(tl.int64) * n
    coef_a = coefficient(coefs, OF_A, sample, samples)
    squares = tl.zeros((BLOCK,), tl.float32)
    for block in range(blocks):
        element = (split * blocks + block) * BLOCK + tl.arange(0, BLOCK)
        mask = element < n
        at = start + element
        difference = coef_a * load(a, at, mask) - load(prediction, at, mask)  # 0 beyond the end
        if z is not None:
            difference += coefficient(coefs, OF_Z, sample, samples) * load(z, at, mask)
        if b is not None:
            difference += coefficient(coefs, OF_B, sample, samples) * load(b, at, mask)
        if residual is not None:
            store(residual, at, difference, mask)
        squares += difference * difference
    weight = coefficient(coefs, WEIGHT, sample, samples)
    tl.store(loss + pid, tl.sum(squares, axis=0) / n * weight)


@triton.jit
def _scale_kernel(
    out,  # (B, n): the gradient of the prediction
    residual,  # (B, n)
    grad,  # (B,): the gradient of the loss
    coefs,  # (4, B): the table
    n,
    samples,  # B
    BLOCK: tl.constexpr,
):
    sample, _, _, mask, at = tile_of_sample(n, BLOCK)
    factor = -2.0 / n * coefficient(coefs, WEIGHT, sample, samples) * tl.load(grad + sample).to(tl.float32)
    store(out, at, factor * load(residual, at, mask), mask)


@operator("affine_regression_loss")
def loss(
    prediction: Tensor, z: Tensor | None, a: Tensor, b: Tensor | None, coefs: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """(weight·mean((target − prediction)²) (B,), target − prediction in the prediction's dtype or, not kept, empty)."""
    prediction, z, a, b = aligned(prediction, z, a, b, to=prediction)
    samples, n = prediction.shape[0], math.prod(prediction.shape[1:])
    splits = triton.cdiv(n, LONGEST)
    partial = prediction.new_empty((samples, splits), dtype=torch.float32)
    residual = torch.empty_like(prediction) if keep else prediction.new_empty(0)
    images = {"residual": residual if keep else None, "prediction": prediction, "z": z, "a": a, "b": b}
    sizes = {"n": n, "samples": samples, "splits": splits, "blocks": triton.cdiv(triton.cdiv(n, BLOCK), splits)}
    launch(_loss_kernel, (samples * splits,), loss=partial, **images, coefs=coefs, **sizes, BLOCK=BLOCK)
    return partial.sum(1) if splits > 1 else partial.view(samples), residual


@operator("affine_regression_loss_backward")
def loss_backward(grad: Tensor, residual: Tensor, coefs: Tensor) -> Tensor:
    """The gradient to the prediction, in its dtype: −2·weight/n·grad·(target − prediction)."""
    (residual,) = aligned(residual, to=residual)
    out = torch.empty_like(residual)
    given = {"grad": grad.contiguous(), "coefs": coefs, "samples": len(out)}
    launch(_scale_kernel, **tiling(out), out=out, residual=residual, **given)
    return out


_loss = differentiable(loss, loss_backward, lambda arguments, results: ((results[1], arguments[4]), ()))


def affine_regression_loss(prediction, z, a, b, *, coef_z, coef_a, coef_b, weight) -> Tensor:
    coefs = [coef_z, coef_a, coef_b, weight]
    if needs_reference(prediction, z, a, b) or have_gradient(coefs):
        given = {"coef_z": coef_z, "coef_a": coef_a, "coef_b": coef_b, "weight": weight}
        return reference.affine_regression_loss(prediction, z, a, b, **given)
    z = None if coef_z is None else z
    keep = prediction.requires_grad and torch.is_grad_enabled()
    return _loss(prediction, z, a, b, table(coefs), keep)[0]
