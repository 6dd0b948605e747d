"""The operations as plain PyTorch code would do them: what the kernels are compared with.

Written as one writes them in a network that computes in bfloat16 with a float32 state: in the dtypes that the tensors
have, one PyTorch operation after another. Noise is PyTorch's own. Same arguments as the functions of `kernels`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(coefficient: Tensor) -> Tensor:
    return coefficient[:, None, None, None]


def affine_update(
    z, a, b=None, *, coef_z, coef_a, coef_b=None, clip=None, coef_noise=None, seed=None, sample_ids=None, step=0
) -> Tensor:
    out = _wide(coef_z) * z + _wide(coef_a) * a
    if b is not None:
        out = out + _wide(coef_b) * b
    if clip is not None:
        if isinstance(clip.limit, Tensor):
            limit = _wide(clip.limit.clamp(min=1))
            out = out.clamp(-limit, limit) / limit
        else:
            out = out.clamp(-clip.limit, clip.limit)
        out = _wide(clip.coef_z) * z + _wide(clip.coef_x) * out
    if coef_noise is not None:
        out = out + _wide(coef_noise) * torch.randn_like(z)
    return out


def guided_step(z, v_cond, v_uncond, guidance, angle_from, angle_to) -> Tensor:
    v = (1 + _wide(guidance)) * v_cond - _wide(guidance) * v_uncond
    delta = _wide(angle_from - angle_to)
    return torch.cos(delta) * z - torch.sin(delta) * v


def add_noise(x, angle, *, seed, sample_ids, step) -> tuple[Tensor, Tensor]:
    noise = torch.randn_like(x)
    return _wide(torch.cos(angle)) * x + _wide(torch.sin(angle)) * noise, noise


def affine_regression_loss(prediction, z, a, b, *, coef_z, coef_a, coef_b, weight) -> Tensor:
    target = _wide(coef_z) * z + _wide(coef_a) * a
    if b is not None:
        target = target + _wide(coef_b) * b
    return weight * (target - prediction).square().mean((1, 2, 3))


def sid_generator_loss(teacher_x, fake_x, generated_x, alpha) -> Tensor:
    difference = teacher_x - fake_x
    norm = (generated_x - teacher_x).detach().abs().float().mean((1, 2, 3)).clamp(min=1e-5)
    return (difference * (teacher_x - generated_x - alpha * difference)).float().sum((1, 2, 3)) / norm


def group_norm(x, num_groups, weight, bias, eps=1e-5, *, scale=None, shift=None, silu=False, x_bias=None) -> Tensor:
    image = x if x_bias is None else _biased(x, x_bias)
    # NCHW on a GPU: it knows no other order
    y = F.group_norm(image, num_groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    if scale is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    y = F.silu(y) if silu else y
    return y.contiguous(memory_format=torch.channels_last)  # as the convolution after it wants it


def residual_norm(
    x, h, skip, num_groups, weight, bias, eps=1e-5, *, x_bias=None, scale=1.0, silu=False
) -> tuple[Tensor, Tensor, Tensor]:
    total = residual_sum(x, h, x_bias=x_bias, scale=scale)
    image = total if skip is None else torch.cat([total, skip], dim=1)
    y = group_norm(image, num_groups, weight, bias, eps, silu=silu)
    return y, total, total if skip is None else skip


def residual_sum(x, h, *, x_bias=None, scale=1.0) -> Tensor:
    x = x if x_bias is None else _biased(x, x_bias)
    total = x if h is None else x + h
    return total if scale == 1 else total * scale


def _biased(x, bias) -> Tensor:
    return x + bias.to(x.dtype)[:, None, None]  # as the convolution before would


def downsample(x) -> Tensor:
    return F.avg_pool2d(x, 2)


def upsample(x) -> Tensor:
    return F.interpolate(x, scale_factor=2.0)


def attention(qkv, num_heads) -> Tensor:
    q, k, v = _heads(qkv, num_heads)
    probabilities = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)
    return (probabilities @ v).transpose(1, 2).flatten(2)


def sdpa(qkv, num_heads) -> Tensor:
    """Attention by PyTorch's own fused kernels."""
    return F.scaled_dot_product_attention(*_heads(qkv, num_heads)).transpose(1, 2).flatten(2)


def _heads(qkv, num_heads) -> tuple[Tensor, ...]:
    return qkv.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def randn(shape, *, seed, sample_ids, step, device) -> Tensor:
    return torch.randn(shape, device=device)


FUNCTIONS = {
    function.__name__: function
    for function in (
        affine_update,
        guided_step,
        add_noise,
        affine_regression_loss,
        sid_generator_loss,
        group_norm,
        residual_norm,
        residual_sum,
        downsample,
        upsample,
        attention,
        randn,
    )
}
