"""Every operation in plain PyTorch, written to be read: the definition that each fast backend is tested against.

Shapes: images are (B, C, H, W), coefficients (B,). Arithmetic is done in float32, or in float64 where an image is
float64; half-precision inputs are widened first. See the public functions in `kernels/__init__.py` for the contracts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch.compiler import is_compiling

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


def _working_dtype(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def _per_sample(coef: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    return coef.to(dtype).reshape(-1, *(1,) * (like.ndim - 1))


def _affine(z, a, b, coef_z, coef_a, coef_b, dtype: torch.dtype) -> Tensor:
    """coef_z·z + coef_a·a + coef_b·b; z and b may be absent."""
    out = _per_sample(coef_a, a, dtype) * a.to(dtype)
    if z is not None and coef_z is not None:
        out = out + _per_sample(coef_z, z, dtype) * z.to(dtype)
    if b is not None:
        out = out + _per_sample(coef_b, b, dtype) * b.to(dtype)
    return out


def affine_update(z, a, b, *, coef_z, coef_a, coef_b, clip, coef_noise, seed, sample_ids, step, out_dtype) -> Tensor:
    dtype = _working_dtype(z, a, b)
    out = _affine(z, a, b, coef_z, coef_a, coef_b, dtype)
    if clip is not None:
        out = _clamp(out, clip.limit, dtype)
        if clip.coef_z is not None:
            out = _per_sample(clip.coef_z, z, dtype) * z.to(dtype) + _per_sample(clip.coef_x, z, dtype) * out
    if coef_noise is not None:
        noise = randn(tuple(z.shape), seed=seed, sample_ids=sample_ids, step=step)
        out = out + _per_sample(coef_noise, z, dtype) * noise.to(dtype)
    return out.to(out_dtype or dtype)


def _clamp(x: Tensor, limit: float | Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(limit, Tensor):
        return x.clamp(-limit, limit)
    threshold = _per_sample(limit, x, dtype).clamp(min=1)  # Imagen's dynamic thresholding, per sample
    return x.clamp(-threshold, threshold) / threshold


def add_noise(x, coef_x, coef_noise, *, seed, sample_ids, step) -> tuple[Tensor, Tensor]:
    dtype = _working_dtype(x)
    noise = randn(tuple(x.shape), seed=seed, sample_ids=sample_ids, step=step)
    return _affine(None, x, noise, None, coef_x, coef_noise, dtype), noise


def affine_regression_loss(prediction, z, a, b, *, coef_z, coef_a, coef_b, weight) -> Tensor:
    dtype = _working_dtype(prediction, z, a, b)
    target = _affine(z, a, b, coef_z, coef_a, coef_b, dtype)
    squared = (target - prediction.to(dtype)).square()
    return weight.to(dtype) * squared.flatten(1).mean(1)


def sid_generator_loss(teacher_x, fake_x, generated_x, alpha: float) -> Tensor:
    dtype = _working_dtype(teacher_x, fake_x, generated_x)
    teacher, fake, generated = (x.to(dtype) for x in (teacher_x, fake_x, generated_x))
    difference = teacher - fake
    residual = teacher - generated - alpha * difference
    norm = (generated - teacher).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return (difference * residual).flatten(1).sum(1) / norm


def is_mapped(x: Tensor) -> bool:
    """Whether `torch.func.vmap` hides a dimension of it, be it below another transform."""
    while torch._C._are_functorch_transforms_active() and is_functorch_wrapped_tensor(x):
        if is_batchedtensor(x):
            return True
        x = get_unwrapped(x)
    return False


def group_norm(x, num_groups, weight, bias, eps, *, scale, shift, silu, x_bias=None) -> Tensor:
    dtype = _working_dtype(x)
    image = _biased(x, x_bias, dtype).contiguous()  # a CPU's statistics of channels-last float32 images lose digits
    y = F.group_norm(image, num_groups, weight.to(dtype), bias.to(dtype), eps)
    if scale is not None:
        y = torch.addcmul(shift.to(dtype)[:, :, None, None], y, 1 + scale.to(dtype)[:, :, None, None])
    y = (F.silu(y) if silu else y).to(x.dtype)
    if is_mapped(x) or not x.is_contiguous(memory_format=torch.channels_last):  # which vmap cannot ask
        return y.contiguous()
    return y.contiguous(memory_format=torch.channels_last)


def residual_sum(x, h, *, x_bias, scale) -> Tensor:
    if h is None and x_bias is None and scale == 1:
        return x
    dtype = _working_dtype(x, h)
    total = _biased(x if h is None else x.to(dtype) + h.to(dtype), x_bias, dtype)
    return (total if scale == 1 else total * scale).to(x.dtype if h is None else torch.promote_types(x.dtype, h.dtype))


def _biased(x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)[:, None, None]


def residual_norm(
    x, h, skip, num_groups, weight, bias, eps, *, x_bias, scale, silu, residual_sum=residual_sum, group_norm=group_norm
) -> tuple[Tensor, Tensor, Tensor]:
    total = residual_sum(x, h, x_bias=x_bias, scale=scale)
    image = total if skip is None else torch.cat([total, skip], dim=1)
    y = group_norm(image, num_groups, weight, bias, eps, scale=None, shift=None, silu=silu)
    return y, total, total if skip is None else skip


def downsample(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def upsample(x: Tensor) -> Tensor:
    if is_compiling():  # whose `interpolate` had no gradient on a CPU in bf16, in a U-Net that convolves what it makes
        x = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)
        return x.flatten(4, 5).flatten(2, 3)
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    batch, tokens, packed = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, num_heads, packed // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, d)
    return out.transpose(1, 2).reshape(batch, tokens, packed // 3)


def philox(counter: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    """Philox 4×32-10 (Salmon et al., 2011): four int64 tensors holding 32-bit words -> four such tensors."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(PHILOX_ROUNDS):
        high0, low0 = _multiply(c0, PHILOX_MULTIPLIERS[0])
        high1, low1 = _multiply(c2, PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + PHILOX_KEY_STEPS[0]) & MASK, (key1 + PHILOX_KEY_STEPS[1]) & MASK
    return c0, c1, c2, c3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    product = word * multiplier  # wraps modulo 2^64, which keeps all 64 bits of the product
    return (product >> 32) & MASK, product & MASK


def random_bits(elements: int, *, seed: int, sample_ids: Tensor, step: int) -> Tensor:
    """(B, elements) int64 holding 32-bit words; word e of sample i is a function of (seed, i, step, e) alone."""
    blocks = torch.arange(-(-elements // 4), device=sample_ids.device)[None, :]
    ids = sample_ids[:, None]
    zero = torch.zeros_like(ids * blocks)
    counter = (blocks + zero, zero + (step & MASK), (ids & MASK) + zero, ((ids >> 32) & MASK) + zero)
    return torch.stack(philox(counter, seed), dim=-1).flatten(1)[:, :elements]


def rand(shape, *, seed: int, sample_ids: Tensor, step: int) -> Tensor:
    bits = random_bits(math.prod(shape[1:]), seed=seed, sample_ids=sample_ids, step=step)
    return ((bits >> 8).float() * 2.0**-24).view(shape)


def randn(shape, *, seed: int, sample_ids: Tensor, step: int) -> Tensor:
    elements = math.prod(shape[1:])
    bits = random_bits(-(-elements // 2) * 2, seed=seed, sample_ids=sample_ids, step=step)
    uniform = ((bits >> 8).float() + 0.5) * 2.0**-24  # never 0, so its logarithm is finite
    radius = torch.sqrt(-2 * torch.log(uniform[:, 0::2].double()))  # Box–Muller
    turn = 2 * math.pi * uniform[:, 1::2].double()  # in float32 the angle alone would be off by 4e-7
    normal = torch.stack((radius * torch.cos(turn), radius * torch.sin(turn)), dim=-1)
    return normal.flatten(1)[:, :elements].reshape(shape).float().contiguous()
