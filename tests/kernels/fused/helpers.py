"""What the tests of the kernels share."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

import kernels
from kernels.fused.launch import INTERPRETED

# On a GPU each new form of a kernel takes a second to compile; there the interpreter has seen to variety already.
FEW = settings(max_examples=25 if INTERPRETED else 5, deadline=None, derandomize=True)
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
SEEDS = st.integers(0, 10_000)


def draw(*shape, seed=0, dtype=torch.float32, device="cpu", channels_last=False):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = values.to(device, dtype)
    return values.contiguous(memory_format=torch.channels_last) if channels_last else values


def images(shape, dtypes, layouts, device, seed=0):
    """Leaves of one shape, each of its dtype, and channels-last where its layout is true."""
    return [
        draw(*shape, seed=seed + k, dtype=dtype, device=device, channels_last=layout).requires_grad_()
        for k, (dtype, layout) in enumerate(zip(dtypes, layouts, strict=True))
    ]


def error(value, exact):
    """‖value − exact‖/‖exact‖, in float64."""
    exact = exact.double()
    scale = exact.norm().item()
    return (value.double() - exact).norm().item() / scale if scale else value.double().norm().item()


def on_reference(function, *arguments, **options):
    with kernels.use("reference"):
        return function(*arguments, **options)


def doubled(*tensors):
    """Leaves in float64, on the CPU, with the same values, that want gradients where the originals do."""
    return [t if t is None else t.detach().double().cpu().requires_grad_(t.requires_grad) for t in tensors]
