"""The generator loss of score identity distillation in Triton: one pass for the loss, one for its three gradients."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .affine_update import load
from .launch import Function, aligned, last, launch, needs_reference, operator

BLOCK = 1024


@triton.jit
def _loss_kernel(loss, norm, teacher, fake, generated, alpha, n, blocks, BLOCK: tl.constexpr):
    sample = tl.program_id(0)
    start = sample.to(tl.int64) * n
    alpha = tl.cast(alpha, tl.float32)
    products, distances = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for block in range(blocks):
        element = block * BLOCK + tl.arange(0, BLOCK)
        mask = element < n
        at = start + element
        target = load(teacher, at, mask)
        difference = target - load(fake, at, mask)
        distance = target - load(generated, at, mask)
        products += difference * (distance - alpha * difference)
        distances += tl.abs(distance)
    omega = tl.maximum(tl.sum(distances, axis=0) / n, 1e-5, propagate_nan=tl.PropagateNan.ALL)
    tl.store(norm + sample, omega)
    tl.store(loss + sample, tl.sum(products, axis=0) / omega)


@triton.jit
def _gradient_kernel(
    grad_teacher, grad_fake, grad_generated, grad, norm, teacher, fake, generated, alpha, n, tiles, BLOCK: tl.constexpr
):  # fmt: skip
    pid = tl.program_id(0)
    sample, tile = pid // tiles, pid % tiles
    element = tile * BLOCK + tl.arange(0, BLOCK)
    mask = element < n
    at = sample.to(tl.int64) * n + element
    alpha = tl.cast(alpha, tl.float32)
    factor = tl.load(grad + sample).to(tl.float32) / tl.load(norm + sample)
    target = load(teacher, at, mask)
    difference = target - load(fake, at, mask)
    bracket = target - load(generated, at, mask) - alpha * difference
    if grad_teacher is not None:
        to_teacher = factor * (bracket + (1 - alpha) * difference)
        tl.store(grad_teacher + at, to_teacher.to(grad_teacher.dtype.element_ty), mask=mask)
    if grad_fake is not None:
        to_fake = factor * (alpha * difference - bracket)
        tl.store(grad_fake + at, to_fake.to(grad_fake.dtype.element_ty), mask=mask)
    if grad_generated is not None:
        to_generated = -factor * difference
        tl.store(grad_generated + at, to_generated.to(grad_generated.dtype.element_ty), mask=mask)


@operator("sid_generator_loss")
def loss(teacher_x: Tensor, fake_x: Tensor, generated_x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """(the loss, ω), both (B,) float32."""
    teacher_x, fake_x, generated_x = aligned(teacher_x, fake_x, generated_x, to=teacher_x)
    samples, n = teacher_x.shape[0], math.prod(teacher_x.shape[1:])
    loss, norm = (teacher_x.new_empty(samples, dtype=torch.float32) for _ in range(2))
    launch(
        _loss_kernel, (samples,), loss=loss, norm=norm, teacher=teacher_x, fake=fake_x, generated=generated_x,
        alpha=alpha, n=n, blocks=triton.cdiv(n, BLOCK), BLOCK=BLOCK,
    )  # fmt: skip
    return loss, norm


@operator("sid_generator_loss_backward")
def loss_backward(
    grad: Tensor, norm: Tensor, teacher_x: Tensor, fake_x: Tensor, generated_x: Tensor, alpha: float, needed: list[bool]
) -> list[Tensor]:
    """The gradients of those of the three images that are `needed`, each in its dtype (method, section 8)."""
    teacher_x, fake_x, generated_x = aligned(teacher_x, fake_x, generated_x, to=teacher_x)
    samples, n = teacher_x.shape[0], math.prod(teacher_x.shape[1:])
    tiles = triton.cdiv(n, BLOCK)
    images = (teacher_x, fake_x, generated_x)
    grads = [torch.empty_like(x) if need else None for x, need in zip(images, needed, strict=True)]
    launch(
        _gradient_kernel, (samples * tiles,), grad_teacher=grads[0], grad_fake=grads[1], grad_generated=grads[2],
        grad=grad.contiguous(), norm=norm, teacher=teacher_x, fake=fake_x, generated=generated_x, alpha=alpha, n=n,
        tiles=tiles, BLOCK=BLOCK,
    )  # fmt: skip
    return [g for g in grads if g is not None]


class _Loss(Function):
    @staticmethod
    def forward(*arguments):
        return loss(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *images, ctx.alpha = inputs
        ctx.save_for_backward(output[1], *images)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # or else ω would get a gradient of zeros

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return None, None, None, None
        needed = list(ctx.needs_input_grad[:3])
        grads = iter(last(loss_backward, grad, *ctx.saved_tensors, ctx.alpha, needed))
        return *(next(grads) if need else None for need in needed), None


def sid_generator_loss(teacher_x, fake_x, generated_x, alpha: float) -> Tensor:
    if needs_reference(teacher_x, fake_x, generated_x):
        return reference.sid_generator_loss(teacher_x, fake_x, generated_x, alpha)
    return _Loss.run(teacher_x, fake_x, generated_x, float(alpha))[0]
