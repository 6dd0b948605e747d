"""The operations that fastdiff is made of, each with one contract and interchangeable backends.

CUDA tensors run Triton kernels, others the PyTorch reference, or what is faster on a CPU.
`FASTDIFF_KERNELS=reference|triton` or `with kernels.use("reference"):` forces one. Coefficients and angles are (B,)
tensors; images are (B, C, H, W) in any floating dtype, read as they are and combined in float32 (float64 where an input
is float64). Autocast changes none of this, but for `attention`. The Triton kernels have no second derivative and no
forward-mode one: both raise. `torch.func.grad` takes them, `torch.func.vmap` gets the reference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .backend import BackendError, implementation, use

__all__ = [
    "BackendError",
    "Clip",
    "add_noise",
    "affine_regression_loss",
    "affine_update",
    "attention",
    "downsample",
    "group_norm",
    "guided_step",
    "rand",
    "randn",
    "residual_norm",
    "residual_sum",
    "sid_generator_loss",
    "stochastic_step",
    "upsample",
    "use",
]
__version__ = "0.0.0"  # other libraries look for a package called `kernels` and compare versions: this one is not it


class Clip(NamedTuple):
    """Clip the affine sum x̂ and step on from it: `coef_z·z + coef_x·clip(x̂)`; without coefficients just `clip(x̂)`.

    limit: a number (static: clamp to [−limit, limit]) or a (B,) tensor of percentiles s (Imagen's dynamic
    thresholding: clamp to [−max(s, 1), max(s, 1)], divide by max(s, 1)).
    """

    limit: float | Tensor
    coef_z: Tensor | None = None
    coef_x: Tensor | None = None


def affine_update(
    z: Tensor,
    a: Tensor,
    b: Tensor | None = None,
    *,
    coef_z: Tensor | None,
    coef_a: Tensor,
    coef_b: Tensor | None = None,
    clip: float | Tensor | Clip | None = None,
    coef_noise: Tensor | None = None,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
    step: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """coef_z·z + coef_a·a [+ coef_b·b], then clipped, then + coef_noise·randn: one sampler step in one pass.

    z, a, b: (B, ...) of one shape, any floating dtypes. coef_*: (B,); coef_z=None leaves z out of the sum. clip: see
    `Clip`; a bare number or (B,) tensor clips the sum itself. Noise is the stream of `randn(seed, sample_ids, step)`.
    Returns out_dtype (default float32, float64 where an input is). Raises ValueError on shapes that do not match.
    """
    checks.images("affine_update", z=z, a=a, b=b)
    checks.coefficients("affine_update", z, coef_z=coef_z, coef_a=coef_a, coef_b=coef_b, coef_noise=coef_noise)
    if (b is None) != (coef_b is None):
        raise ValueError("affine_update: b and coef_b go together; give both or neither")
    if coef_noise is not None:
        if seed is None or sample_ids is None:
            raise ValueError("affine_update: coef_noise needs seed and sample_ids")
        checks.ids("affine_update", len(z), sample_ids, z)
        seed, step = _key("affine_update", seed, step)
    if clip is not None:
        clip = _checked_clip(clip, z)
    if out_dtype is not None and out_dtype not in checks.FLOATING:
        raise TypeError(f"affine_update: out_dtype must be a floating dtype of 16, 32 or 64 bits, got {out_dtype!r}")
    noise = {"coef_noise": coef_noise, "seed": seed, "sample_ids": sample_ids, "step": step}
    return implementation("affine_update", z)(
        z, a, b, coef_z=coef_z, coef_a=coef_a, coef_b=coef_b, clip=clip, out_dtype=out_dtype, **noise
    )


def _checked_clip(clip: float | Tensor | Clip, z: Tensor) -> Clip:
    clip = clip if isinstance(clip, Clip) else Clip(clip)
    if (clip.coef_z is None) != (clip.coef_x is None):
        raise ValueError("affine_update: clip's coef_z and coef_x go together; give both or neither")
    limit = clip.limit
    if not isinstance(limit, Tensor):
        limit = checks.number("affine_update", "clip", limit)
        if not limit > 0:
            raise ValueError(f"affine_update: clip must be positive, got {limit}")
    given = {"clip.limit": limit if isinstance(limit, Tensor) else None}
    given |= {"clip.coef_z": clip.coef_z, "clip.coef_x": clip.coef_x}
    checks.coefficients("affine_update", z, **given)
    return Clip(limit, clip.coef_z, clip.coef_x)


def _key(name: str, seed: int, step: int) -> tuple[int, int]:
    """seed and step as what of them matters: their low 64 and 32 bits."""
    return checks.integer(name, "seed", seed) & (1 << 64) - 1, checks.integer(name, "step", step) & (1 << 32) - 1


def guided_step(z, v_cond, v_uncond, guidance, angle_from, angle_to, *, clip=None) -> Tensor:
    """Rotate z from angle_from to angle_to by v = (1+w)·v_cond − w·v_uncond ([GD] eq. 4); v_uncond=None means w = 0.

    Images (B, C, H, W), guidance and angles (B,). clip: limit on x̂, as in `Clip`. Returns float32.
    """
    checks.images("guided_step", z=z, v_cond=v_cond)
    checks.coefficients("guided_step", z, angle_from=angle_from, angle_to=angle_to)
    coef_z, coef_v = torch.cos(angle_from - angle_to), -torch.sin(angle_from - angle_to)
    return _guided(z, v_cond, v_uncond, guidance, angle_from, angle_to, coef_z, coef_v, clip)


def stochastic_step(
    z, v_cond, v_uncond, guidance, angle_from, angle_far, angle_to, *, seed, sample_ids, step, clip=None
) -> Tensor:
    """Rotate z from angle_from down to angle_far, then noise it back up to angle_to ([GD] section 3.3).

    Arguments as for `guided_step`; the noise is that of `randn(seed, sample_ids, step)`.
    """
    checks.images("stochastic_step", z=z, v_cond=v_cond)
    checks.coefficients("stochastic_step", z, angle_from=angle_from, angle_far=angle_far, angle_to=angle_to)
    keep = torch.cos(angle_to) / torch.cos(angle_far)
    std = (torch.sin(angle_to).square() - (torch.sin(angle_far) * keep).square()).clamp(min=0).sqrt()
    coef_z, coef_v = keep * torch.cos(angle_from - angle_far), -keep * torch.sin(angle_from - angle_far)
    noise = {"coef_noise": std, "seed": seed, "sample_ids": sample_ids, "step": step}
    return _guided(z, v_cond, v_uncond, guidance, angle_from, angle_far, coef_z, coef_v, clip, keep, **noise)


def _guided(z, v_cond, v_uncond, guidance, start, end, coef_z, coef_v, clip, keep=1.0, **noise) -> Tensor:
    if clip is not None:  # the sum is x̂ = cos φ·z − sin φ·v; from its clipped value the step goes on as a rotation
        clip = Clip(clip, keep * torch.sin(end) / torch.sin(start), keep * torch.sin(start - end) / torch.sin(start))
        coef_z, coef_v = torch.cos(start), -torch.sin(start)
    if v_uncond is None:
        return affine_update(z, v_cond, coef_z=coef_z, coef_a=coef_v, clip=clip, **noise)
    checks.coefficients("guided_step", z, guidance=guidance)
    w = guidance.to(coef_v.dtype)
    coef_a, coef_b = coef_v * (1 + w), -coef_v * w
    return affine_update(z, v_cond, v_uncond, coef_z=coef_z, coef_a=coef_a, coef_b=coef_b, clip=clip, **noise)


def add_noise(x: Tensor, angle: Tensor, *, seed: int, sample_ids: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """(z, ε) with z = cos(φ)·x + sin(φ)·ε and ε = randn(seed, sample_ids, step); x (B, C, H, W), angle (B,)."""
    checks.images("add_noise", x=x)
    checks.coefficients("add_noise", x, angle=angle)
    checks.ids("add_noise", len(x), sample_ids, x)
    seed, step = _key("add_noise", seed, step)
    return implementation("add_noise", x)(
        x, torch.cos(angle), torch.sin(angle), seed=seed, sample_ids=sample_ids, step=step
    )


def affine_regression_loss(
    prediction: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor | None,
    *,
    coef_z: Tensor | None,
    coef_a: Tensor,
    coef_b: Tensor | None,
    weight: Tensor,
) -> Tensor:
    """weight · mean((coef_z·z + coef_a·a + coef_b·b − prediction)²) per sample: (B,), differentiable in prediction.

    prediction, z, a, b: (B, ...) of one shape; coefficients and weight (B,). The target carries no gradient.
    Raises ValueError on shapes that do not match.
    """
    checks.images("affine_regression_loss", prediction=prediction, z=z, a=a, b=b)
    checks.not_empty("affine_regression_loss", "prediction", prediction)
    checks.coefficients("affine_regression_loss", z, coef_z=coef_z, coef_a=coef_a, coef_b=coef_b, weight=weight)
    if (b is None) != (coef_b is None):
        raise ValueError("affine_regression_loss: b and coef_b go together; give both or neither")
    z, a, b = (t if t is None else t.detach() for t in (z, a, b))
    return implementation("affine_regression_loss", prediction)(
        prediction, z, a, b, coef_z=coef_z, coef_a=coef_a, coef_b=coef_b, weight=weight
    )


def sid_generator_loss(teacher_x: Tensor, fake_x: Tensor, generated_x: Tensor, alpha: float) -> Tensor:
    """SiD's generator loss per sample, (B,), differentiable in all three images ([SiD] eq. 23; method section 8).

    (1/ω)·Σ d·[(f_φ − x_g) − α·d] with d = f_φ − f_ψ and ω = mean|x_g − f_φ| ≥ 1e-5, which carries no gradient.
    """
    checks.images("sid_generator_loss", teacher_x=teacher_x, fake_x=fake_x, generated_x=generated_x)
    checks.not_empty("sid_generator_loss", "teacher_x", teacher_x)
    alpha = checks.number("sid_generator_loss", "alpha", alpha)
    return implementation("sid_generator_loss", teacher_x)(teacher_x, fake_x, generated_x, alpha)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = False,
    x_bias: Tensor | None = None,
) -> Tensor:
    """GroupNorm, then ·(1 + scale) + shift per sample and channel, then SiLU; x (B, C, H, W), scale, shift (B, C).

    x_bias (C,) is added to x first: that of the convolution before. Returns x's dtype and memory layout.
    Raises ValueError if groups do not divide C or scale comes without shift.
    """
    channels, num_groups, eps = _checked_norm("group_norm", x, None, num_groups, weight, bias, eps)
    if (scale is None) != (shift is None):
        raise ValueError("group_norm: scale and shift go together; give both or neither")
    given, each = (), (x.shape[0], channels)
    if scale is not None:
        given = (("scale", scale, each), ("shift", shift, each))
    if x_bias is not None:
        given += (("x_bias", x_bias, (channels,)),)
    _check_parameters("group_norm", x, given)
    modulation = {"scale": scale, "shift": shift}
    return implementation("group_norm", x)(
        x, num_groups, weight, bias, eps, **modulation, silu=bool(silu), x_bias=x_bias
    )


def residual_norm(
    x: Tensor,
    h: Tensor | None,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    x_bias: Tensor | None = None,
    scale: float = 1.0,
    silu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum that ends a residual block and the GroupNorm that begins the next: (y, total, skip).

    total = (x + h + x_bias)·scale, as `residual_sum` has it, but h may be None. y is the GroupNorm, then SiLU, of total
    with the channels of skip (B, any, H, W) after its own; weight and bias are for all of them. Without skip total is
    returned once more in its place. What else is done with total and skip is to be done with those that are returned:
    its gradients are then added where that of the norm is computed. Raises ValueError on shapes that do not match.
    """
    _, num_groups, eps = _checked_norm("residual_norm", x, skip, num_groups, weight, bias, eps)
    given = () if h is None else (("h", h, x.shape),)
    if x_bias is not None:
        given += (("x_bias", x_bias, x.shape[1:2]),)
    _check_parameters("residual_norm", x, given)
    if type(scale) is not float:
        scale = checks.number("residual_norm", "scale", scale)
    return implementation("residual_norm", x)(
        x, h, skip, num_groups, weight, bias, eps, x_bias=x_bias, scale=scale, silu=bool(silu)
    )


def _checked_norm(name, x, skip, num_groups, weight, bias, eps) -> tuple[int, int, float]:
    """(the channels of x and skip, num_groups, eps), all checked.

    What is right is found so without a call: ten calls are 1 % of the time that small images take on a CPU.
    """
    if not isinstance(x, Tensor) or x.dtype not in checks.FLOATING:
        checks.floating(name, "x", x)
    if type(num_groups) is not int or type(eps) is not float:
        num_groups, eps = checks.integer(name, "num_groups", num_groups), checks.number(name, "eps", eps)
    if x.ndim != 4:
        raise ValueError(f"{name}: x must be (B, C, H, W), got {tuple(x.shape)}")
    batch, channels, height, width = x.shape
    if skip is not None:
        checks.floating(name, "skip", skip)
        if skip.ndim != 4 or skip.shape != (batch, skip.shape[1], height, width):
            raise ValueError(f"{name}: skip must be ({batch}, C, {height}, {width}), got {tuple(skip.shape)}")
        checks.device(name, "skip", skip, "x is", x)
        channels += skip.shape[1]
    if num_groups <= 0 or channels == 0 or channels % num_groups:
        raise ValueError(f"{name}: {num_groups} groups do not divide {channels} channels")
    if not eps >= 0:
        raise ValueError(f"{name}: eps must not be negative, got {eps}")
    _check_parameters(name, x, (("weight", weight, (channels,)), ("bias", bias, (channels,))))
    return channels, num_groups, eps


def _check_parameters(name: str, x: Tensor, given: tuple[tuple[str, Tensor, tuple[int, ...]], ...]) -> None:
    device, floating = x.device, checks.FLOATING
    for key, t, wanted in given:
        if not (isinstance(t, Tensor) and t.shape == wanted and t.dtype in floating and t.device == device):
            checks.parameter(name, key, t, wanted, x)


def residual_sum(x: Tensor, h: Tensor, *, x_bias: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """(x + h + x_bias)·scale: the end of a residual block; images (B, C, H, W).

    x_bias (C,): that of the convolutions before. Returns the wider of the images' dtypes, in the memory layout of x.
    Raises ValueError on shapes that do not match.
    """
    alike = isinstance(x, Tensor) and isinstance(h, Tensor) and x.shape == h.shape and x.device == h.device
    if not (alike and len(x.shape) == 4 and x.dtype in checks.FLOATING and h.dtype in checks.FLOATING):
        checks.images("residual_sum", x=x, h=h)
        _four_dimensional("residual_sum", x)
    if x_bias is not None:
        checks.parameter("residual_sum", "x_bias", x_bias, x.shape[1:2], x)
    if type(scale) is not float:
        scale = checks.number("residual_sum", "scale", scale)
    return implementation("residual_sum", x)(x, h, x_bias=x_bias, scale=scale)


def downsample(x: Tensor) -> Tensor:
    """The mean of each 2×2 pixels: (B, C, H, W), both sides even, -> (B, C, H/2, W/2), in x's dtype and memory layout.

    Raises ValueError for an odd side.
    """
    _four_dimensional("downsample", x)
    if x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"downsample: the sides of x must be even, got {tuple(x.shape)}")
    return implementation("downsample", x)(x)


def upsample(x: Tensor) -> Tensor:
    """Each pixel 2×2 times: (B, C, H, W) -> (B, C, 2·H, 2·W), in x's dtype and memory layout."""
    _four_dimensional("upsample", x)
    return implementation("upsample", x)(x)


def _four_dimensional(name: str, x: Tensor) -> None:
    checks.floating(name, "x", x)
    if x.ndim != 4:
        raise ValueError(f"{name}: x must be (B, C, H, W), got {tuple(x.shape)}")


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """softmax(q·kᵀ/√d)·v over all tokens: (B, N, 3·C), packed as q, k, v with heads inside each -> (B, N, C).

    Returns qkv's dtype; under autocast qkv is cast to that dtype first, as for PyTorch's attention. Raises ValueError
    on a shape that heads do not divide.
    """
    checks.floating("attention", "qkv", qkv)
    num_heads = checks.integer("attention", "num_heads", num_heads)
    if qkv.ndim != 3 or num_heads <= 0 or qkv.shape[-1] == 0 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"attention: qkv must be (B, N, 3·C) with C divisible by {num_heads} heads, got {tuple(qkv.shape)}"
        )
    device = qkv.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and qkv.dtype != torch.float64:
        qkv = qkv.to(torch.get_autocast_dtype(device))
    return implementation("attention", qkv)(qkv, num_heads)


def randn(shape, *, seed: int, sample_ids: Tensor, step: int, device) -> Tensor:
    """Standard normals, float32: row i depends on (seed, sample_ids[i], step) alone, not on batch or device.

    shape: (B, ...); sample_ids: (B,) int64; seed: 64-bit. The stream is Philox 4×32-10 with Box–Muller.
    """
    shape = checks.shape("randn", shape)
    checks.ids("randn", shape[0], sample_ids)
    seed, step = _key("randn", seed, step)
    sample_ids = sample_ids.to(device)
    return implementation("randn", sample_ids)(shape, seed=seed, sample_ids=sample_ids, step=step)


def rand(shape, *, seed: int, sample_ids: Tensor, step: int, device) -> Tensor:
    """Uniforms in [0, 1), float32, keyed like `randn`. The two share words: give them different seeds or steps."""
    shape = checks.shape("rand", shape)
    checks.ids("rand", shape[0], sample_ids)
    seed, step = _key("rand", seed, step)
    sample_ids = sample_ids.to(device)
    return implementation("rand", sample_ids)(shape, seed=seed, sample_ids=sample_ids, step=step)
