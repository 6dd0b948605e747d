"""Triton makes constants of integers that are 1: every kernel compiles with each size at its smallest."""

import sys
from functools import partial

import pytest
import torch
from operations import meta

import kernels

pytest.importorskip("triton")
if "kernels.fused.launch" in sys.modules and sys.modules["kernels.fused.launch"].INTERPRETED:
    pytest.skip("compiles, so Triton must not interpret", allow_module_level=True)

from kernels.fused.launch import listen
from kernels.inspect import compile_launch


def launched(operation, *sizes, multiprocessors):
    """The launches of an operation and of its gradient, on tensors without data."""
    seen = []
    with pytest.MonkeyPatch.context() as patch, kernels.use("triton"), listen(seen.append):
        patch.setattr("kernels.fused.launch.MULTIPROCESSORS", multiprocessors)
        inputs, out = operation(*sizes)
        torch.autograd.grad(out, inputs, torch.empty_like(out))
    return seen


def key(batch):
    return {"seed": 1, "sample_ids": meta(batch, dtype=torch.int64), "step": 1}


def update(batch, *shape, clip=None):
    z, a, b = images = tuple(meta(batch, *shape).requires_grad_() for _ in range(3))
    coef = meta(batch)
    step = kernels.Clip(coef if clip == "percentile" else 1.0, coef, coef) if clip else None
    coefs = {"coef_z": coef, "coef_a": coef, "coef_b": coef, "coef_noise": coef}
    return images, kernels.affine_update(z, a, b, clip=step, **coefs, **key(batch))


def noise(batch, *shape):
    kernels.randn((batch, *shape), device="meta", **key(batch))
    kernels.rand((batch, *shape), device="meta", **key(batch))
    x = meta(batch, *shape).requires_grad_()
    return (x,), kernels.add_noise(x, meta(batch), **key(batch))[0]


def regression(batch, *shape):
    p, z, coef = meta(batch, *shape).requires_grad_(), meta(batch, *shape), meta(batch)
    return (p,), kernels.affine_regression_loss(p, z, z, z, coef_z=coef, coef_a=coef, coef_b=coef, weight=coef)


def sid(batch, *shape):
    images = tuple(meta(batch, *shape).requires_grad_() for _ in range(3))
    return images, kernels.sid_generator_loss(*images, 1.0)


def norm(batch, channels, side, groups):
    x, weight, both = meta(batch, channels, side, side), meta(channels), meta(batch, 2 * channels)
    inputs = tuple(t.requires_grad_() for t in (x, weight, both))
    scale, shift = both.chunk(2, 1)
    return inputs, kernels.group_norm(x, groups, weight, weight, scale=scale, shift=shift, silu=True)


def attention(batch, tokens, heads, width):
    qkv = meta(batch, tokens, 3 * heads * width, dtype=torch.bfloat16).requires_grad_()
    return (qkv,), kernels.attention(qkv, heads)


CASES = {
    "update, one sample": (update, 1, 3, 32, 32),
    "update, one pixel": (update, 1, 1, 1, 1),
    "update, clip": (partial(update, clip="number"), 1, 3, 8, 8),
    "update, percentile": (partial(update, clip="percentile"), 1, 3, 8, 8),
    "noise": (noise, 1, 3, 32, 32),
    "noise, one pixel": (noise, 2, 1, 1, 1),
    "regression": (regression, 1, 3, 32, 32),
    "regression, one pixel": (regression, 1, 1, 1, 1),
    "sid": (sid, 1, 3, 32, 32),
    "sid, one pixel": (sid, 1, 1, 1, 1),
    "norm": (norm, 1, 32, 8, 4),
    "norm, one group": (norm, 1, 32, 8, 1),
    "norm, one pixel": (norm, 1, 32, 1, 1),
    "norm, one channel": (norm, 1, 1, 1, 1),
    "attention, one token": (attention, 1, 1, 1, 64),
    "attention, one head": (attention, 1, 256, 1, 64),
}


@pytest.mark.parametrize(
    ("name", "multiprocessors"), [(name, 132) for name in CASES] + [(name, 1) for name in CASES if "norm" in name]
)
def test_sizes_of_one_compile(name, multiprocessors):
    """With few multiprocessors GroupNorm takes its other path."""
    seen = launched(*CASES[name], multiprocessors=multiprocessors)
    assert seen
    for one in seen:
        assert compile_launch(one, "sm_90").asm["cubin"]
