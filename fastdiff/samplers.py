"""Samplers: a model and noise in, images out.

`model` is any callable (z, angle, label, guidance) -> velocity; one with a method `affine` (Denoiser, Guided) has its
raw network outputs fused into the step. Every step is z' = c_z·z + c_x·clip(x̂) with coefficients from `rotation`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import kernels
from fastdiff import rotation
from fastdiff.rotation import Affine
from fastdiff.schedule import Schedule

Model = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
OnStep = Callable[[int, Tensor], None]


def ddim(
    model: Model, noise: Tensor, label: Tensor | None, guidance: Tensor | float | None, steps: int, *,
    schedule: Schedule, clip: float | None = None, seed: int = 0, on_step: OnStep | None = None,
) -> Tensor:  # fmt: skip
    """DDIM in `steps` steps from φ(1) to 0 ([GD] eq. 4): (B, C, H, W) noise -> images of the same shape, float32.

    guidance: w as a number or (B,); None is 0. clip: limit on x̂ in every step. seed is unused: the sampler is
    deterministic, and takes it so that samplers are interchangeable. on_step(i, z) is called after each step, i = steps
    down to 1. Raises ValueError for steps < 1.
    """
    guidance = as_guidance(guidance, noise)
    z = noise
    for i, angles in _grid(schedule, steps):
        start, end = (torch.full(z.shape[:1], angle, dtype=torch.float64, device=z.device) for angle in angles)
        z = _step(model, z, start, label, guidance, *rotation.ddim(start, end), clip)
        if on_step is not None:
            on_step(i, z)
    return z


def velocity(model: Model, z: Tensor, angle: Tensor, label: Tensor | None, guidance: Tensor | None) -> Affine:
    """A model's velocity in the form that the fused operations take."""
    if hasattr(model, "affine"):
        return model.affine(z, angle, label, guidance)
    angle = angle.double()
    return Affine(model(z, angle, label, guidance), torch.zeros_like(angle), torch.ones_like(angle))


def as_guidance(guidance: Tensor | float | None, like: Tensor) -> Tensor | None:
    """(B,) float32 on like's device, or None where all of it is 0: then a guided model makes one call, not two."""
    if guidance is None or (not isinstance(guidance, Tensor) and guidance == 0):
        return None
    if not isinstance(guidance, Tensor):
        return torch.full(like.shape[:1], float(guidance), device=like.device)
    if not guidance.is_meta and not guidance.any():
        return None
    return guidance.to(like.device, torch.float32)


def _grid(schedule: Schedule, steps: int):
    """(i, (φ(i/N), φ((i−1)/N))) for i = N..1; the last step goes to 0."""
    if steps < 1:
        raise ValueError(f"a sampler needs at least 1 step, got {steps}")
    angles = [0.0] + [schedule.angle(i / steps) for i in range(1, steps + 1)]
    return [(i, (angles[i], angles[i - 1])) for i in range(steps, 0, -1)]


def _step(model, z, angle, label, guidance, c_z: Tensor, c_x: Tensor, clip: float | None) -> Tensor:
    """c_z·z + c_x·clip(x̂), with x̂ = cos φ·z − sin φ·v, in one pass over the data."""
    v = velocity(model, z, angle, label, guidance)
    x_z, x_v = torch.cos(angle) - torch.sin(angle) * v.coef_z, -torch.sin(angle)
    if clip is not None:
        limit, outer_z, outer_x = kernels.Clip(clip, c_z, c_x), 0.0, 1.0
    else:
        limit, outer_z, outer_x = None, c_z, c_x
    return kernels.affine_update(
        z, v.a, v.b, clip=limit, coef_z=outer_z + outer_x * x_z, coef_a=outer_x * x_v * v.coef_a,
        coef_b=None if v.b is None else outer_x * x_v * v.coef_b,
    )  # fmt: skip
