"""Counter-based noise in Triton: the stream that `reference.random_bits` defines, word for word.

Logarithm, sine and cosine are polynomials here: a GPU's approximate logarithm loses its digits near u = 1, and its
library's sine needs a stack. So interpreter and GPU compute one and the same thing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import tile_of_sample, tiling
from .launch import launch, operator


@triton.jit
def philox(c0, c1, c2, c3, key0, key1):
    """Philox 4×32-10 on uint32 blocks: four words -> four words."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = key0 + 0x9E3779B9, key1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def sample_words(block, sample_id, seed_low, seed_high, step):
    """The four words of each counter block of one sample; seed and step are int32 bit patterns, sample_id int64."""
    zero = (block * 0).to(tl.uint32)
    low = zero + (sample_id & 0xFFFFFFFF).to(tl.uint32)
    high = zero + (sample_id >> 32).to(tl.uint32)
    key0, key1 = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    return philox(block.to(tl.uint32), zero + step.to(tl.uint32, bitcast=True), low, high, key0, key1)


@triton.jit
def _log(u):
    """Natural logarithm of u in (0, 1], to 2e-7 of its value."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # of u = 2^exponent · m with m in [√½, √2)
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    s = (m - 1) / (m + 1)
    t = s * s
    series = s * t * (0.66666754 + t * (0.39980518 + t * 0.29787213))  # log m = 2·artanh s
    return exponent.to(tl.float32) * 0.6931471805599453 + (2 * s + series)


@triton.jit
def _cos_sin(u):
    """(cos 2πu, sin 2πu) for u in [0, 1]."""
    quarter = tl.floor(4 * u + 0.5)
    x = (u - 0.25 * quarter) * 6.283185307179586  # in [−π/4, π/4]; the difference is exact
    t = x * x
    cos = 1 + t * (-0.5 + t * (1 / 24 + t * (-1 / 720 + t * (1 / 40320))))
    sin = x + x * t * (-1 / 6 + t * (1 / 120 + t * (-1 / 5040 + t * (1 / 362880))))
    turn = quarter.to(tl.int32)
    odd = (turn & 1) == 1
    cos_sign = tl.where(((turn + 1) & 2) == 0, 1.0, -1.0)
    sin_sign = tl.where((turn & 2) == 0, 1.0, -1.0)
    return cos_sign * tl.where(odd, sin, cos), sin_sign * tl.where(odd, cos, sin)


@triton.jit
def _uniform(word):
    return ((word >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08  # 2^−24; never 0


@triton.jit
def normal_pair(word0, word1):
    """Box–Muller: two words -> two standard normals."""
    radius = tl.sqrt_rn(-2 * _log(_uniform(word0)))
    cos, sin = _cos_sin(_uniform(word1))
    return radius * cos, radius * sin


@triton.jit
def _normals(block, sample_id, seed_low, seed_high, step):
    """The four normals of each of N counter blocks, side by side: (4·N,)."""
    w0, w1, w2, w3 = sample_words(block, sample_id, seed_low, seed_high, step)
    n0, n1 = normal_pair(w0, w1)
    n2, n3 = normal_pair(w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (4 * block.shape[0],))


@triton.jit
def normals_in_order(first_block, sample_id, seed_low, seed_high, step, BLOCK: tl.constexpr):
    """BLOCK consecutive normals of a sample, from element 4·first_block on."""
    return _normals(first_block + tl.arange(0, BLOCK // 4), sample_id, seed_low, seed_high, step)


@triton.jit
def normals_by_pixel(
    first_four, pixels, sample_id, seed_low, seed_high, step, CHANNELS: tl.constexpr, BLOCK: tl.constexpr
):
    """The normals of a channels-last sample from pixel 4·first_four on, in the order of its memory.

    A counter block serves four pixels of one channel: it is computed once, and its normals go to where they belong.
    `pixels` divides by 4, and of the BLOCK elements only whole fours of pixels count.
    """
    item = tl.arange(0, BLOCK // 4)  # a channel of four pixels
    block = item % CHANNELS * (pixels // 4) + first_four + item // CHANNELS
    normals = _normals(block, sample_id, seed_low, seed_high, step)
    pixel, channel = tl.arange(0, BLOCK) // CHANNELS, tl.arange(0, BLOCK) % CHANNELS
    at = (pixel // 4 * CHANNELS + channel) * 4 + pixel % 4
    return tl.gather(normals, tl.minimum(at, BLOCK - 1), axis=0)  # the last pixels may not have all that they index


@triton.jit
def normals_at(element, sample_id, seed_low, seed_high, step):
    """The normals of a sample at any elements: one counter block for each."""
    w0, w1, w2, w3 = sample_words(element // 4, sample_id, seed_low, seed_high, step)
    upper = (element & 2) != 0
    even, odd = normal_pair(tl.where(upper, w2, w0), tl.where(upper, w3, w1))
    return tl.where((element & 1) != 0, odd, even)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step"])
def _fill_kernel(
    out,  # (B, n) float32
    sample_ids,  # (B,) int64
    seed_low,  # int32, like the next two: which stream of noise
    seed_high,
    step,
    n,
    NORMAL: tl.constexpr,  # whether normals or uniforms
    BLOCK: tl.constexpr,
):
    sample, tile, _, mask, at = tile_of_sample(n, BLOCK)
    sample_id = tl.load(sample_ids + sample)
    if NORMAL:
        values = normals_in_order(tile * (BLOCK // 4), sample_id, seed_low, seed_high, step, BLOCK)
    else:
        block = tile * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        w0, w1, w2, w3 = sample_words(block, sample_id, seed_low, seed_high, step)
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))
        values = (words >> 8).to(tl.float32) * 5.9604644775390625e-08
    tl.store(out + at, values, mask=mask)


def as_int32(word: int) -> int:
    """The low 32 bits of `word`, as the int32 with that bit pattern: a type that does not depend on the value."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def key(seed: int, step: int) -> dict[str, int]:
    """A kernel's arguments that select the stream."""
    return {"seed_low": as_int32(seed), "seed_high": as_int32(seed >> 32), "step": as_int32(step)}


@operator("noise")
def _noise(shape: list[int], sample_ids: Tensor, seed: int, step: int, normal: bool) -> Tensor:
    out = torch.empty(shape, dtype=torch.float32, device=sample_ids.device)
    stream = {"sample_ids": sample_ids.contiguous()} | key(seed, step)
    launch(_fill_kernel, **tiling(out), out=out, **stream, NORMAL=normal)
    return out


def as_int64(seed: int) -> int:
    """The low 64 bits of `seed` as the signed integer that an operator's schema takes."""
    return ((seed & (1 << 64) - 1) ^ 1 << 63) - (1 << 63)


def randn(shape, *, seed: int, sample_ids: Tensor, step: int) -> Tensor:
    return _noise(list(shape), sample_ids, as_int64(seed), step, True)


def rand(shape, *, seed: int, sample_ids: Tensor, step: int) -> Tensor:
    return _noise(list(shape), sample_ids, as_int64(seed), step, False)
