"""The generator loss of score identity distillation in Triton: one pass for the loss, one for its three gradients."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .common import BLOCK, load, store, tile_of_sample, tiling
from .launch import aligned, differentiable, launch, needs_reference, operator


@triton.jit
def _loss_kernel(
    loss,  # (B,) float32
    norm,  # (B,) float32: ω
    teacher,  # (B, n), like the next two
    fake,
    generated,
    alpha,
    n,
    blocks,  # of BLOCK elements, of a sample
    BLOCK: tl.constexpr,
):
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
    grad_teacher,  # (B, n), like the next two: to be written; None where it is not needed
    grad_fake,
    grad_generated,
    grad,  # (B,): the gradient of the loss
    norm,  # (B,): ω
    teacher,  # (B, n), like the next two
    fake,
    generated,
    alpha,
    n,
    BLOCK: tl.constexpr,
):
    sample, _, _, mask, at = tile_of_sample(n, BLOCK)
    alpha = tl.cast(alpha, tl.float32)
    factor = tl.load(grad + sample).to(tl.float32) / tl.load(norm + sample)
    target = load(teacher, at, mask)
    difference = target - load(fake, at, mask)
    bracket = target - load(generated, at, mask) - alpha * difference
    if grad_teacher is not None:
        store(grad_teacher, at, factor * (bracket + (1 - alpha) * difference), mask)
    if grad_fake is not None:
        store(grad_fake, at, factor * (alpha * difference - bracket), mask)
    if grad_generated is not None:
        store(grad_generated, at, -factor * difference, mask)


@operator("sid_generator_loss")
def loss(teacher_x: Tensor, fake_x: Tensor, generated_x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """(the loss, ω), both (B,) float32."""
    images = _images(teacher_x, fake_x, generated_x)
    samples, n = teacher_x.shape[0], math.prod(teacher_x.shape[1:])
    loss, norm = (teacher_x.new_empty(samples, dtype=torch.float32) for _ in range(2))
    sizes = {"n": n, "blocks": triton.cdiv(n, BLOCK), "BLOCK": BLOCK}
    launch(_loss_kernel, (samples,), loss=loss, norm=norm, **images, alpha=alpha, **sizes)
    return loss, norm


@operator("sid_generator_loss_backward")
def loss_backward(
    grad: Tensor, norm: Tensor, teacher_x: Tensor, fake_x: Tensor, generated_x: Tensor, alpha: float, needed: list[bool]
) -> list[Tensor]:
    """The gradients of those of the three images that are `needed`, each in its dtype (method, section 8)."""
    images = _images(teacher_x, fake_x, generated_x)
    grads = [torch.empty_like(x) if need else None for x, need in zip(images.values(), needed, strict=True)]
    outputs = dict(zip(("grad_teacher", "grad_fake", "grad_generated"), grads, strict=True))
    given = {"grad": grad.contiguous(), "norm": norm, "alpha": alpha}
    launch(_gradient_kernel, **tiling(images["teacher"]), **outputs, **images, **given)
    return [g for g in grads if g is not None]


def _images(*images: Tensor) -> dict[str, Tensor]:
    return dict(zip(("teacher", "fake", "generated"), aligned(*images, to=images[0]), strict=True))


def _saved(arguments, results):
    *images, alpha = arguments
    return (results[1], *images), (alpha,)


_loss = differentiable(loss, loss_backward, _saved, inputs=3)


def sid_generator_loss(teacher_x, fake_x, generated_x, alpha: float) -> Tensor:
    if needs_reference(teacher_x, fake_x, generated_x):
        return reference.sid_generator_loss(teacher_x, fake_x, generated_x, alpha)
    return _loss(teacher_x, fake_x, generated_x, float(alpha))[0]
