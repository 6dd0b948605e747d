"""Self-attention in Triton, after FlashAttention-2 (Dao, 2023): scores live in registers, never in memory.

Reads q, k and v where they lie in the packed (B, N, 3, heads, width) projection and writes one packed gradient. Scores
are kept times log₂e, so that every exponential is a power of two. Below, P is the softmax, δ the row sums of dP ∘ P:
dV = Pᵀ·dO, dP = dO·Vᵀ, dS = P ∘ (dP − δ), dQ = dS·K/√d, dK = dSᵀ·Q/√d.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .launch import differentiable, launch, needs_reference, operator

LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _head(packed, item, tokens, heads, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Where one head of one sample begins in (B, N, PARTS, heads, WIDTH); `item` counts heads through the batch."""
    return packed + (item // heads).to(tl.int64) * tokens * (PARTS * heads * WIDTH) + (item % heads) * WIDTH


@triton.jit
def _load(base, rows, stride, tokens, WIDTH: tl.constexpr, TILE: tl.constexpr, EVEN: tl.constexpr):
    """A (rows, TILE) tile, zero past the last token and past the head's width."""
    columns = tl.arange(0, TILE)
    pointers = base + rows[:, None] * stride + columns[None, :]
    if EVEN and WIDTH == TILE:
        return tl.load(pointers)
    return tl.load(pointers, mask=(rows[:, None] < tokens) & (columns[None, :] < WIDTH), other=0.0)


@triton.jit
def _store(base, tile, rows, stride, tokens, WIDTH: tl.constexpr, TILE: tl.constexpr, EVEN: tl.constexpr):
    columns = tl.arange(0, TILE)
    pointers = base + rows[:, None] * stride + columns[None, :]
    tile = tile.to(base.dtype.element_ty)
    if EVEN and WIDTH == TILE:
        tl.store(pointers, tile)
    else:
        tl.store(pointers, tile, mask=(rows[:, None] < tokens) & (columns[None, :] < WIDTH))


@triton.jit
def _block(tokens, SIZE: tl.constexpr):
    """(item, block) of a program that has SIZE tokens of one head."""
    blocks = tl.cdiv(tokens, SIZE)
    return tl.program_id(0) // blocks, tl.program_id(0) % blocks


@triton.jit
def _dot(a, b):
    """a·b in float32; float32 inputs keep all their digits."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _forward_kernel(
    qkv,  # (B, N, 3, heads, WIDTH)
    out,  # (B, N, heads, WIDTH)
    lse,  # (B, heads, N) float32: log₂ Σ 2^score
    tokens,  # N
    heads,
    SCALE: tl.constexpr,  # log₂e/√WIDTH
    WIDTH: tl.constexpr,  # of a head
    TILE: tl.constexpr,  # the width of a tile: WIDTH or more
    ROWS: tl.constexpr,  # queries at a time
    KEYS: tl.constexpr,  # keys at a time
    EVEN: tl.constexpr,  # whether all tiles end with the tokens, at the latest
):
    """One program: ROWS queries of one head against all keys."""
    item, block = _block(tokens, ROWS)
    channels = heads * WIDTH
    stride = 3 * channels
    base = _head(qkv, item, tokens, heads, WIDTH, 3)
    rows = block * ROWS + tl.arange(0, ROWS)
    q = _load(base, rows, stride, tokens, WIDTH, TILE, EVEN)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, TILE), tl.float32)
    for start in range(0, tokens, KEYS):
        keys = start + tl.arange(0, KEYS)
        k = _load(base + channels, keys, stride, tokens, WIDTH, TILE, EVEN)
        v = _load(base + 2 * channels, keys, stride, tokens, WIDTH, TILE, EVEN)
        scores = _dot(q, tl.trans(k)) * SCALE
        if not EVEN:
            scores = tl.where(keys[None, :] < tokens, scores, float("-inf"))
        now_largest = tl.maximum(largest, tl.max(scores, 1))
        p = tl.math.exp2(scores - now_largest[:, None])
        shrink = tl.math.exp2(largest - now_largest)
        total = total * shrink + tl.sum(p, 1)
        sums = tl.dot(p.to(v.dtype), v, sums * shrink[:, None], input_precision="ieee")
        largest = now_largest
    _store(_head(out, item, tokens, heads, WIDTH, 1), sums / total[:, None], rows, channels, tokens, WIDTH, TILE, EVEN)
    tl.store(lse + item.to(tl.int64) * tokens + rows, largest + tl.math.log2(total), mask=rows < tokens)


@triton.jit
def _backward_one_block_kernel(
    grad,  # as out: its gradient
    qkv,
    lse,
    grad_qkv,  # as qkv: to be written
    tokens,
    heads,
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """One program: one head whole, its softmax in registers, so δ comes from P itself and each tensor is read once."""
    item = tl.program_id(0)
    channels = heads * WIDTH
    stride = 3 * channels
    base = _head(qkv, item, tokens, heads, WIDTH, 3)
    to = _head(grad_qkv, item, tokens, heads, WIDTH, 3)
    rows = tl.arange(0, ROWS)
    q = _load(base, rows, stride, tokens, WIDTH, TILE, EVEN)
    k = _load(base + channels, rows, stride, tokens, WIDTH, TILE, EVEN)
    log_sum = tl.load(lse + item.to(tl.int64) * tokens + rows, mask=rows < tokens, other=float("inf"))
    p = tl.math.exp2(_dot(q, tl.trans(k)) * SCALE - log_sum[:, None])
    if not EVEN:  # a key that is not there has score 0, which is nothing small
        p = tl.where(rows[None, :] < tokens, p, 0.0)
    do = _load(_head(grad, item, tokens, heads, WIDTH, 1), rows, channels, tokens, WIDTH, TILE, EVEN)
    dv = _dot(tl.trans(p.to(do.dtype)), do)
    _store(to + 2 * channels, dv, rows, stride, tokens, WIDTH, TILE, EVEN)
    v = _load(base + 2 * channels, rows, stride, tokens, WIDTH, TILE, EVEN)
    dp = _dot(do, tl.trans(v))
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(q.dtype)
    unscale: tl.constexpr = SCALE * LN_2  # 1/√d
    _store(to, _dot(ds, k) * unscale, rows, stride, tokens, WIDTH, TILE, EVEN)
    _store(to + channels, _dot(tl.trans(ds), q) * unscale, rows, stride, tokens, WIDTH, TILE, EVEN)


@triton.jit
def _backward_q_kernel(
    grad,
    qkv,
    out,
    lse,
    delta,  # (B, heads, N) float32: to be written
    grad_qkv,  # its third of dQ is to be written
    tokens,
    heads,
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """One program: dQ of ROWS queries, from all keys; leaves their δ = Σ O ∘ dO behind for the other kernel."""
    item, block = _block(tokens, ROWS)
    channels = heads * WIDTH
    stride = 3 * channels
    base = _head(qkv, item, tokens, heads, WIDTH, 3)
    rows = block * ROWS + tl.arange(0, ROWS)
    at = item.to(tl.int64) * tokens + rows
    do = _load(_head(grad, item, tokens, heads, WIDTH, 1), rows, channels, tokens, WIDTH, TILE, EVEN)
    o = _load(_head(out, item, tokens, heads, WIDTH, 1), rows, channels, tokens, WIDTH, TILE, EVEN)
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + at, row_delta, mask=rows < tokens)
    log_sum = tl.load(lse + at, mask=rows < tokens, other=float("inf"))
    q = _load(base, rows, stride, tokens, WIDTH, TILE, EVEN)
    dq = tl.zeros((ROWS, TILE), tl.float32)
    for start in range(0, tokens, KEYS):
        keys = start + tl.arange(0, KEYS)
        k = _load(base + channels, keys, stride, tokens, WIDTH, TILE, EVEN)
        v = _load(base + 2 * channels, keys, stride, tokens, WIDTH, TILE, EVEN)
        p = tl.math.exp2(_dot(q, tl.trans(k)) * SCALE - log_sum[:, None])
        if not EVEN:  # a key that is not there has score 0, which is nothing small
            p = tl.where(keys[None, :] < tokens, p, 0.0)
        ds = p * (_dot(do, tl.trans(v)) - row_delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    unscale: tl.constexpr = SCALE * LN_2  # 1/√d
    _store(_head(grad_qkv, item, tokens, heads, WIDTH, 3), dq * unscale, rows, stride, tokens, WIDTH, TILE, EVEN)


@triton.jit
def _backward_kv_kernel(
    grad,
    qkv,
    lse,
    delta,
    grad_qkv,  # its thirds of dK and dV are to be written
    tokens,
    heads,
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """One program: dK and dV of KEYS keys, from all queries; scores are transposed, (keys, rows)."""
    item, block = _block(tokens, KEYS)
    channels = heads * WIDTH
    stride = 3 * channels
    base = _head(qkv, item, tokens, heads, WIDTH, 3)
    grad_base = _head(grad, item, tokens, heads, WIDTH, 1)
    keys = block * KEYS + tl.arange(0, KEYS)
    k = _load(base + channels, keys, stride, tokens, WIDTH, TILE, EVEN)
    v = _load(base + 2 * channels, keys, stride, tokens, WIDTH, TILE, EVEN)
    dk = tl.zeros((KEYS, TILE), tl.float32)
    dv = tl.zeros((KEYS, TILE), tl.float32)
    for start in range(0, tokens, ROWS):
        rows = start + tl.arange(0, ROWS)
        at = item.to(tl.int64) * tokens + rows
        q = _load(base, rows, stride, tokens, WIDTH, TILE, EVEN)
        do = _load(grad_base, rows, channels, tokens, WIDTH, TILE, EVEN)
        log_sum = tl.load(lse + at, mask=rows < tokens, other=float("inf"))  # so a row that is not there has P = 0
        row_delta = tl.load(delta + at, mask=rows < tokens, other=0.0)
        p = tl.math.exp2(_dot(k, tl.trans(q)) * SCALE - log_sum[None, :])  # a missing key spoils its own row alone
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (_dot(v, tl.trans(do)) - row_delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    to = _head(grad_qkv, item, tokens, heads, WIDTH, 3)
    unscale: tl.constexpr = SCALE * LN_2  # 1/√d
    _store(to + channels, dk * unscale, keys, stride, tokens, WIDTH, TILE, EVEN)
    _store(to + 2 * channels, dv, keys, stride, tokens, WIDTH, TILE, EVEN)


class Tiles(NamedTuple):
    """Queries and keys of one tile, and how a program works through them."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


# By kernel, then by the widest head that they serve: tiles chosen to compile for every GPU of `inspect.TARGETS` within
# its shared memory and, as a rule, without spilling a register; masks take registers, and so does float32, which is
# multiplied without tensor cores. None is measured on a GPU.
HALF = {
    "forward": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 2), 256: Tiles(64, 32, 8, 2)},
    "backward_q": {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 2), 256: Tiles(32, 32, 4, 2)},
    "backward_kv": {64: Tiles(64, 64, 4, 3), 128: Tiles(32, 64, 4, 2), 256: Tiles(16, 32, 4, 2)},
}
HALF_MASKED = {
    "forward": {64: Tiles(128, 64, 8, 3), 128: Tiles(64, 64, 4, 2), 256: Tiles(64, 32, 8, 2)},
    "backward_q": {64: Tiles(64, 64, 4, 3), 128: Tiles(32, 32, 4, 2), 256: Tiles(32, 32, 4, 2)},
    "backward_kv": {64: Tiles(32, 64, 4, 3), 128: Tiles(16, 64, 4, 2), 256: Tiles(16, 32, 4, 2)},
}
SINGLE = {
    "forward": {64: Tiles(32, 32, 4, 2), 128: Tiles(32, 32, 8, 2), 256: Tiles(32, 16, 8, 2)},
    "backward_q": {
        32: Tiles(32, 16, 4, 2),
        64: Tiles(64, 32, 8, 2),
        128: Tiles(32, 16, 8, 2),
        256: Tiles(16, 16, 4, 2),
    },
    "backward_kv": {64: Tiles(16, 32, 4, 2), 128: Tiles(16, 32, 4, 2), 256: Tiles(16, 16, 4, 1)},
}
WIDTHS = (16, 32, 64, 128, 256)  # of tiles; other heads take the next wider, and mask the rest
ONE_BLOCK = 64  # tokens whose scores, all against all, fit in the registers of one program


def one_block(dtype: torch.dtype, tokens: int, width: int) -> bool:
    """Whether one program does a whole head, reading each tensor once."""
    return tokens <= ONE_BLOCK and width <= 128 and dtype != torch.float32


def tiles(kernel: str, dtype: torch.dtype, tokens: int, width: int) -> Tiles:
    """The tiles that `kernel` ("forward", "backward_q" or "backward_kv") uses."""
    if one_block(dtype, tokens, width):
        return Tiles(ONE_BLOCK, ONE_BLOCK, 4, 1)
    masked = tokens % 128 != 0 or width not in WIDTHS
    table = SINGLE if dtype == torch.float32 else HALF_MASKED if masked else HALF
    return next(block for widest, block in table[kernel].items() if widest >= width)


def _tile_width(width: int) -> int:
    return next(wide for wide in WIDTHS if wide >= width)


def _sizes(qkv: Tensor, num_heads: int) -> tuple[int, int, int]:
    """(batch, tokens, head width)"""
    batch, tokens, packed = qkv.shape
    return batch, tokens, packed // (3 * num_heads)


def _launch(kernel, qkv: Tensor, num_heads: int, block: Tiles, programs: int, **given: object) -> None:
    """Launch a kernel, `programs` of them for each head, with the arguments that all share and those that are given."""
    batch, tokens, width = _sizes(qkv, num_heads)
    shape = {"tokens": tokens, "heads": num_heads, "WIDTH": width, "TILE": _tile_width(width), "ROWS": block.rows}
    even = tokens % max(block.rows, block.keys) == 0
    given |= shape | {"SCALE": math.log2(math.e) / math.sqrt(width), "EVEN": even}
    grid = (batch * num_heads * programs,)
    launch(kernel, grid, qkv=qkv, **given, num_warps=block.num_warps, num_stages=block.num_stages)


@operator("attention")
def attention_forward(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """(B, N, 3·C) -> attention (B, N, C), and log₂ Σ 2^score of each query: (B, heads, N) float32."""
    batch, tokens, width = _sizes(qkv, num_heads)
    out = qkv.new_empty(batch, tokens, num_heads * width)
    lse = qkv.new_empty(batch, num_heads, tokens, dtype=torch.float32)
    block = tiles("forward", qkv.dtype, tokens, width)
    programs = triton.cdiv(tokens, block.rows)
    _launch(_forward_kernel, qkv.contiguous(), num_heads, block, programs, out=out, lse=lse, KEYS=block.keys)
    return out, lse


@operator("attention_backward")
def attention_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int) -> Tensor:
    """The gradient of qkv, (B, N, 3·C), from that of the output and what `attention_forward` returned."""
    _, tokens, width = _sizes(qkv, num_heads)
    grad, qkv, out, lse = (t.contiguous() for t in (grad, qkv, out, lse))
    grad_qkv = torch.empty_like(qkv)
    given = {"grad": grad, "lse": lse, "grad_qkv": grad_qkv}
    if one_block(qkv.dtype, tokens, width):
        block = Tiles(ONE_BLOCK, ONE_BLOCK, 8 if width > 64 else 4, 1)
        _launch(_backward_one_block_kernel, qkv, num_heads, block, 1, **given)
        return grad_qkv
    given["delta"] = torch.empty_like(lse)
    block = tiles("backward_q", qkv.dtype, tokens, width)
    programs = triton.cdiv(tokens, block.rows)
    _launch(_backward_q_kernel, qkv, num_heads, block, programs, **given, out=out, KEYS=block.keys)
    block = tiles("backward_kv", qkv.dtype, tokens, width)
    programs = triton.cdiv(tokens, block.keys)
    _launch(_backward_kv_kernel, qkv, num_heads, block, programs, **given, KEYS=block.keys)
    return grad_qkv


def _saved(arguments, results):
    qkv, num_heads = arguments
    return (qkv, *results), (num_heads,)


_attention = differentiable(attention_forward, attention_backward, _saved)


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    if needs_reference(qkv) or qkv.numel() == 0 or _sizes(qkv, num_heads)[2] > WIDTHS[-1]:
        return reference.attention(qkv, num_heads)
    return _attention(qkv, num_heads)[0]


# Where nothing has been measured, these kernels are taken for faster than PyTorch's own up to so many tokens, and where
# a gradient is wanted for more, too: their backward pass was far ahead on an H100, and PyTorch's forward pass a little.
SDPA_ABOVE = 256
TABLE_FILE = os.environ.get("FASTDIFF_ATTENTION_TABLE") or Path(__file__).with_name("attention_table.json")


def read_table(path: str | Path) -> dict[tuple[str, str, int, int, bool], str]:
    """(gpu, dtype, head width, tokens, whether a gradient is wanted) -> "triton" or "sdpa"; {} without a file.

    The file is JSON, the rows that a benchmark wrote: a list of {"gpu", "dtype", "head_width", "tokens", "inference",
    "training"}. Raises ValueError for another name in the last two.
    """
    table = {}
    for row in json.loads(Path(path).read_text()) if Path(path).exists() else []:
        for use in ("inference", "training"):
            if row.get(use) not in ("triton", "sdpa"):
                raise ValueError(f"{path}: {use} is {row.get(use)!r}; it must be triton or sdpa")
            table[row["gpu"], row["dtype"], row["head_width"], row["tokens"], use == "training"] = row[use]
    return table


TABLE = read_table(TABLE_FILE)


def faster(gpu: str, dtype: torch.dtype, width: int, tokens: int, training: bool) -> str:
    """ "triton" or "sdpa", as measured on that GPU, else by SDPA_ABOVE."""
    ours = (width <= WIDTHS[-1] and tokens <= SDPA_ABOVE) or (training and width <= 128 and dtype != torch.float32)
    key = gpu, str(dtype).removeprefix("torch."), width, tokens, training
    return TABLE.get(key, "triton" if ours else "sdpa")


@torch.compiler.assume_constant_result
def _gpu(index: int) -> str:
    return torch.cuda.get_device_name(index)


def prefers_sdpa(qkv: Tensor, num_heads: int) -> bool:
    """Whether PyTorch's attention is the faster one for a qkv on its GPU, the backward pass included if there is one.

    Where the choice is free, take that.
    """
    if not qkv.is_cuda:
        return False
    _, tokens, width = _sizes(qkv, num_heads)
    gpu = _gpu(qkv.device.index) if TABLE else ""  # an empty table has no need to know
    return faster(gpu, qkv.dtype, width, tokens, qkv.requires_grad and torch.is_grad_enabled()) == "sdpa"
