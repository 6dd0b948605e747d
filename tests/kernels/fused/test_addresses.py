"""Tensors of more than 2³¹ elements are indexed with 64 bits; nobody needs to allocate them to see it."""

import pytest
import torch
from addresses import assert_last_program_ends_with_its_tensors, launches
from operations import meta

import kernels

pytestmark = pytest.mark.interpreter
SAMPLES, SHAPE = (1 << 20) + 1, (3, 32, 32)


def image(dtype=torch.float32):
    return meta(SAMPLES, *SHAPE, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


COEFS = meta(SAMPLES)
KEY = {"seed": 1, "sample_ids": meta(SAMPLES, dtype=torch.int64), "step": 0}


def update():
    z, a, b = image(), image(torch.bfloat16), image(torch.bfloat16)
    out = kernels.affine_update(
        z, a, b, coef_z=COEFS, coef_a=COEFS, coef_b=COEFS, clip=kernels.Clip(1.0, COEFS, COEFS), coef_noise=COEFS, **KEY
    )
    torch.autograd.grad(out, (z, a, b), out.detach())


def noise():
    kernels.add_noise(image(), COEFS, **KEY)
    kernels.randn((SAMPLES, *SHAPE), device="meta", **KEY)


def losses():
    prediction, z, a, b = image(torch.bfloat16), image(), image(), image()
    loss = kernels.affine_regression_loss(prediction, z, a, b, coef_z=COEFS, coef_a=COEFS, coef_b=COEFS, weight=COEFS)
    torch.autograd.grad(loss, prediction, loss.detach())
    loss = kernels.sid_generator_loss(z, a, b, 1.2)
    torch.autograd.grad(loss, (z, a, b), loss.detach())


@pytest.mark.parametrize(("operation", "count"), [(update, 2), (noise, 2), (losses, 4)])
def test_the_last_program_ends_with_its_tensors(operation, count):
    recorded = launches(operation)
    assert len(recorded) == count
    for one in recorded:
        assert_last_program_ends_with_its_tensors(one)
