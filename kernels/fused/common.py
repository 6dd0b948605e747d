"""What the kernels of several files share: tiles of samples and of rows, loads, stores, the table of coefficients."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements of a tile, 8 a thread: 128-bit loads of half-precision tensors
ROWS, CHANNELS = 64, 64  # of a tile of a channels-last image: its rows are 128 bytes in half precision


@triton.jit
def load(image, at, mask):
    return tl.load(image + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(image, at, value, mask):
    tl.store(image + at, value.to(image.dtype.element_ty), mask=mask)


@triton.jit
def tile_of_sample(n, BLOCK: tl.constexpr, TILE: tl.constexpr = None):
    """A program's (sample, tile, elements in the sample, which of them exist, offsets in the tensor): see `tiling`.

    TILE: how many of the BLOCK elements are its own, the first ones; None: all.
    """
    SIZE: tl.constexpr = BLOCK if TILE is None else TILE
    pid, tiles = tl.program_id(0), tl.cdiv(n, SIZE)
    sample, tile = pid // tiles, pid % tiles
    element = tile * SIZE + tl.arange(0, BLOCK)
    mask = element < n
    if SIZE < BLOCK:
        mask &= tl.arange(0, BLOCK) < SIZE
    return sample, tile, element, mask, sample.to(tl.int64) * n + element


@triton.jit
def part_and_channels(channels, blocks, CHANNELS: tl.constexpr):
    """A program's (part of the rows, channels, which of them exist); `blocks` of CHANNELS channels lie side by side."""
    pid = tl.program_id(0)
    channel = pid % blocks * CHANNELS + tl.arange(0, CHANNELS)
    return pid // blocks, channel, channel < channels


@triton.jit
def tile_of_rows(first, rows, pitch, channel, inside, ROWS: tl.constexpr):
    """ROWS rows from `first` on, `pitch` elements apart: (where the first lies, offsets from there, which exist)."""
    row = tl.arange(0, ROWS)
    at = row[:, None] * pitch + channel[None, :]
    return tl.cast(first, tl.int64) * pitch, at, (first + row < rows)[:, None] & inside[None, :]


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """x (B, C, H, W) with its channels side by side, copied if need be; elements from one pixel to the next.

    Some channels of a channels-last image are so as they are.
    """
    _, _, height, width = x.shape
    pitch = x.stride(3) if width > 1 else x.stride(2) if height > 1 else x.stride(0)
    if x.stride() == (height * width * pitch, 1, width * pitch, pitch) and pitch >= x.shape[1]:
        return x, pitch
    return x.contiguous(memory_format=torch.channels_last), x.shape[1]


def walking(x: Tensor, columns: int = CHANNELS) -> dict[str, int]:
    """What a kernel that walks x (B, C, H, W) in tiles of rows, of so many channels at most, has to know."""
    samples, channels, height, width = x.shape
    columns = min(columns, triton.next_power_of_2(channels))
    sizes = {"rows": samples * height * width, "channels": channels, "blocks": triton.cdiv(channels, columns)}
    return sizes | {"ROWS": ROWS * CHANNELS // columns, "CHANNELS": columns}


def tiling(x: Tensor, block: int | None = None, tile: int | None = None) -> dict[str, object]:
    """The grid and the arguments of a kernel that walks each sample of x in tiles: of BLOCK elements if not given."""
    n, block = math.prod(x.shape[1:]), block or BLOCK
    sizes = {"n": n, "BLOCK": block} | ({} if tile is None else {"TILE": tile})
    return {"grid": (x.shape[0] * triton.cdiv(n, tile or block),)} | sizes


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
