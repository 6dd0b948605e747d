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
from .affine_update import coefficient, have_gradient, load, table
from .launch import Function, aligned, last, launch, needs_reference, operator

BLOCK = 1024
LONGEST = 32 * BLOCK  # elements that one program sums; larger samples are split

# The rows of the table of coefficients.
OF_Z, OF_A, OF_B, WEIGHT = (tl.constexpr(row) for row in range(4))


@triton.jit
def _loss_kernel(
    loss, residual, prediction, z, a, b, coefs, n, samples, splits, blocks, BLOCK: tl.constexpr
):  # fmt: skip
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
            tl.store(residual + at, difference.to(residual.dtype.element_ty), mask=mask)
        squares += difference * difference
    weight = coefficient(coefs, WEIGHT, sample, samples)
    tl.store(loss + pid, tl.sum(squares, axis=0) / n * weight)


@triton.jit
def _scale_kernel(out, residual, grad, coefs, n, samples, tiles, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    sample, tile = pid // tiles, pid % tiles
    element = tile * BLOCK + tl.arange(0, BLOCK)
    mask = element < n
    at = sample.to(tl.int64) * n + element
    factor = -2.0 / n * coefficient(coefs, WEIGHT, sample, samples) * tl.load(grad + sample).to(tl.float32)
    tl.store(out + at, (factor * load(residual, at, mask)).to(out.dtype.element_ty), mask=mask)


@operator("affine_regression_loss")
def loss(
    prediction: Tensor, z: Tensor | None, a: Tensor, b: Tensor | None, coefs: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """(weight·mean((target − prediction)²) (B,), target − prediction in the prediction's dtype or, not kept, empty)."""
    prediction, z, a, b = aligned(prediction, z, a, b, to=prediction)
    samples, n = prediction.shape[0], math.prod(prediction.shape[1:])
    blocks = triton.cdiv(n, BLOCK)
    splits = triton.cdiv(n, LONGEST)
    partial = prediction.new_empty((samples, splits), dtype=torch.float32)
    residual = torch.empty_like(prediction) if keep else prediction.new_empty(0)
    launch(
        _loss_kernel, (samples * splits,), loss=partial, residual=residual if keep else None, prediction=prediction,
        z=z, a=a, b=b, coefs=coefs, n=n, samples=samples, splits=splits, blocks=triton.cdiv(blocks, splits),
        BLOCK=BLOCK,
    )  # fmt: skip
    return partial.sum(1) if splits > 1 else partial.view(samples), residual


@operator("affine_regression_loss_backward")
def loss_backward(residual: Tensor, grad: Tensor, coefs: Tensor) -> Tensor:
    """The gradient to the prediction, in its dtype: −2·weight/n·grad·(target − prediction)."""
    (residual,) = aligned(residual, to=residual)
    out = torch.empty_like(residual)
    samples, n = residual.shape[0], math.prod(residual.shape[1:])
    tiles = triton.cdiv(n, BLOCK)
    launch(
        _scale_kernel, (samples * tiles,), out=out, residual=residual, grad=grad.contiguous(), coefs=coefs, n=n,
        samples=samples, tiles=tiles, BLOCK=BLOCK,
    )  # fmt: skip
    return out


class _Loss(Function):
    @staticmethod
    def forward(*arguments):
        return loss(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[1], inputs[4])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # or else the residual would get a gradient of zeros

    @staticmethod
    def backward(ctx, grad, _):
        residual, coefs = ctx.saved_tensors
        return None if grad is None else last(loss_backward, residual, grad, coefs), None, None, None, None, None


def affine_regression_loss(prediction, z, a, b, *, coef_z, coef_a, coef_b, weight) -> Tensor:
    coefs = [coef_z, coef_a, coef_b, weight]
    if needs_reference(prediction, z, a, b) or have_gradient(coefs):
        return reference.affine_regression_loss(
            prediction, z, a, b, coef_z=coef_z, coef_a=coef_a, coef_b=coef_b, weight=weight
        )
    z = None if coef_z is None else z
    keep = prediction.requires_grad and torch.is_grad_enabled()
    return _Loss.run(prediction, z, a, b, table(coefs), keep)[0]
