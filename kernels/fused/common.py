"""What the kernels of several files share: a tile of a sample, loads and stores, the table of coefficients."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements of a tile, 8 a thread: 128-bit loads of half-precision tensors


@triton.jit
def load(image, at, mask):
    return tl.load(image + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(image, at, value, mask):
    tl.store(image + at, value.to(image.dtype.element_ty), mask=mask)


@triton.jit
def tile_of_sample(n, BLOCK: tl.constexpr):
    """A program's (sample, tile, elements in the sample, which of them exist, offsets in the tensor): see `tiling`."""
    pid, tiles = tl.program_id(0), tl.cdiv(n, BLOCK)
    sample, tile = pid // tiles, pid % tiles
    element = tile * BLOCK + tl.arange(0, BLOCK)
    return sample, tile, element, element < n, sample.to(tl.int64) * n + element


def tiling(x: Tensor) -> dict[str, object]:
    """The grid and the arguments of a kernel that walks each sample of x in tiles."""
    n = math.prod(x.shape[1:])
    return {"grid": (x.shape[0] * triton.cdiv(n, BLOCK),), "n": n, "BLOCK": BLOCK}


@triton.jit
def coefficient(coefs, ROW: tl.constexpr, sample, samples):
    """One sample's coefficient from a (rows, samples) table."""
    return tl.load(coefs + ROW * tl.cast(samples, tl.int64) + sample)


def table(coefs: list[Tensor | None]) -> Tensor:
    """(rows, B) float32: one tensor for all coefficients, made by one copy; absent ones repeat one that is there."""
    some = next(coef for coef in coefs if coef is not None)
    return torch.stack([some if coef is None else coef for coef in coefs]).to(torch.float32)


def have_gradient(coefs: list[Tensor | None]) -> bool:
    return any(coef is not None and coef.requires_grad for coef in coefs)
