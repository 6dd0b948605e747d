"""What the tests of the Triton kernels share."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from operations import draw

import kernels
from kernels.fused.launch import INTERPRETED

# On a GPU each new form of a kernel takes a second to compile; there the interpreter has seen to variety already.
FEW = settings(max_examples=25 if INTERPRETED else 5, deadline=None, derandomize=True)
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
SEEDS = st.integers(0, 10_000)


def images(shape, dtypes, device, layouts=None, seed=0):
    """Leaves of one shape, each of its dtype, and channels-last where its layout is true."""
    return [
        draw(*shape, seed=seed + k, dtype=dtype, device=device, channels_last=layout).requires_grad_()
        for k, (dtype, layout) in enumerate(zip(dtypes, layouts or [False] * len(dtypes), strict=True))
    ]


def on_reference(function, *arguments, **options):
    with kernels.use("reference"):
        return function(*arguments, **options)


def with_reference(function, *arguments, **options):
    """What it gives, and what it gives on the reference."""
    return function(*arguments, **options), on_reference(function, *arguments, **options)


def doubled(*tensors):
    """Leaves in float64, on the CPU, with the same values, that want gradients where the originals do."""
    return [t if t is None else t.detach().double().cpu().requires_grad_(t.requires_grad) for t in tensors]
