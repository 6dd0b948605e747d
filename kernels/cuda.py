"""What runs on CUDA tensors where it is not simply the Triton kernel."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import fused, reference
from .fused.attention import prefers_sdpa


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Ours, or PyTorch's where that is the faster one or the GPU too old."""
    theirs = prefers_sdpa(qkv, num_heads) or _before_ampere(qkv.device.index)
    return (reference if theirs else fused).attention(qkv, num_heads)


@torch.compiler.assume_constant_result
@functools.cache
def _before_ampere(device: int) -> bool:
    """Whether shared memory is too small for our tiles (64 KB on Turing)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)
