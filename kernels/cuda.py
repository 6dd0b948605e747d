"""What runs on CUDA tensors where it is not simply the Triton kernel."""

from __future__ import annotations

from torch import Tensor

from . import fused, reference
from .attention import prefers_sdpa


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Ours, or PyTorch's where that is the faster one."""
    backend = reference if prefers_sdpa(qkv, num_heads) else fused
    return backend.attention(qkv, num_heads)
