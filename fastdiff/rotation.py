"""The algebra of diffusion in one angle: z = cos(φ)·x + sin(φ)·ε, v = cos(φ)·ε − sin(φ)·x, and a step is a rotation.

Coefficients are computed in float64, whatever the angles' dtype, and applied in the tensors' own precision.
Angles are (B,), images (B, C, H, W).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import kernels

SIGMA_DATA = 0.5  # [EDM]'s standard deviation of the data
PARAMETERIZATIONS = ("v", "eps", "x", "edm")  # of networks with one output; those with two are "eps-x"
LOSS_WEIGHTS = ("v", "snr", "snr_trunc", "constant", "edm")


class Affine(NamedTuple):
    """A velocity as an affine function of images, such as networks return: [coef_z·z +] coef_a·a [+ coef_b·b]."""

    a: Tensor
    coef_z: Tensor | None
    coef_a: Tensor
    b: Tensor | None = None
    coef_b: Tensor | None = None

    def apply(self, z: Tensor) -> Tensor:
        """The velocity."""
        return kernels.affine_update(z, self.a, self.b, coef_z=self.coef_z, coef_a=self.coef_a, coef_b=self.coef_b)

    def combine(self, z: Tensor, coef_z: Tensor, coef_v: Tensor, clip: kernels.Clip | None = None) -> Tensor:
        """coef_z·z + coef_v·velocity, coefficients (B,) float64, in one pass; `clip` as for `kernels.affine_update`."""
        coef_b = None if self.coef_b is None else coef_v * self.coef_b
        coef_z = coef_z + coef_v * self.coef_z
        return kernels.affine_update(
            z, self.a, self.b, coef_z=coef_z, coef_a=coef_v * self.coef_a, coef_b=coef_b, clip=clip
        )

    def clipped(self, z: Tensor, angle: Tensor, limit: float) -> Tensor:
        """The velocity (cos φ·z − x)/sin φ that belongs to x = clip(x̂)."""
        angle = angle.double()
        sin, cos = torch.sin(angle), torch.cos(angle)
        return self.combine(z, cos, -sin, kernels.Clip(limit, cos / sin, -1 / sin))


def _combine(z: Tensor, v: Tensor, coef_z: Tensor, coef_v: Tensor) -> Tensor:
    return kernels.affine_update(z, v, coef_z=coef_z, coef_a=coef_v)


def rotate(z: Tensor, velocity: Tensor, delta: Tensor) -> Tensor:
    """DDIM step by delta = φ − φ': cos δ·z − sin δ·v ([GD] eq. 4). A negative delta encodes."""
    delta = delta.double()
    return _combine(z, velocity, torch.cos(delta), -torch.sin(delta))


def x_from_velocity(z: Tensor, v: Tensor, angle: Tensor) -> Tensor:
    """x = cos φ·z − sin φ·v."""
    return rotate(z, v, angle)


def eps_from_velocity(z: Tensor, v: Tensor, angle: Tensor) -> Tensor:
    """ε = sin φ·z + cos φ·v."""
    angle = angle.double()
    return _combine(z, v, torch.sin(angle), torch.cos(angle))


def velocity_from_x(z: Tensor, x: Tensor, angle: Tensor) -> Tensor:
    """v = (cos φ·z − x)/sin φ; φ > 0."""
    return _combine(z, x, *velocity_coefficients("x", angle))


def velocity_from_eps(z: Tensor, eps: Tensor, angle: Tensor) -> Tensor:
    """v = (ε − sin φ·z)/cos φ; φ < π/2."""
    return _combine(z, eps, *velocity_coefficients("eps", angle))


def velocity_coefficients(parameterization: str, angle: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B), float64 (B,), with v = A·z + B·F for a network output F ("v", "eps", "x" or "edm")."""
    angle = angle.double()
    sin, cos = torch.sin(angle), torch.cos(angle)
    match parameterization:
        case "v":
            return torch.zeros_like(angle), torch.ones_like(angle)
        case "eps":
            return -sin / cos, 1 / cos
        case "x":
            return cos / sin, -1 / sin
        case "edm":  # multiplied through by cos φ, so that it holds up to φ = π/2
            norm = _edm_variance(angle).sqrt()
            return (1 - SIGMA_DATA**2) * sin * cos / norm.square(), -SIGMA_DATA / norm
    raise ValueError(f"unknown parameterization {parameterization!r}; known: {', '.join(PARAMETERIZATIONS)}")


def affine(parameterization: str, output: Tensor, angle: Tensor) -> Affine:
    """The velocity that a network's raw output F says, (B, C, H, W); for "eps-x" (B, 2·C, H, W), ε̃ and then x̃.

    Two outputs make v = cos φ·ε̃ − sin φ·x̃ ([PD] section 4): where there is noise alone it is x̃ that counts, where there
    is hardly any it is ε̃, and neither is divided by anything small.
    """
    if parameterization == "eps-x":
        angle, (eps, x) = angle.double(), output.chunk(2, dim=1)
        return Affine(eps, torch.zeros_like(angle), torch.cos(angle), x, -torch.sin(angle))
    return Affine(output, *velocity_coefficients(parameterization, angle))


def edm_input_scale(angle: Tensor) -> Tensor:
    """c_in/cos φ = 1/√(sin²φ + σ_d²·cos²φ), float64: what z is multiplied with before an [EDM] network."""
    return _edm_variance(angle).rsqrt()


def _edm_variance(angle: Tensor) -> Tensor:
    """sin²φ + σ_d²·cos²φ: the variance of z, for data with [EDM]'s σ_d."""
    angle = angle.double()
    return torch.sin(angle).square() + (SIGMA_DATA * torch.cos(angle)).square()


def two_step_target(a: Tensor, m: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(c_z, c_1, c_2), float64 (B,): the velocity c_z·z + c_1·v1 + c_2·v2 that goes from a to e in one step.

    v1 is the teacher's velocity at (z, a), v2 the one at (rotate(z, v1, a − m), m). Needs a ≠ e. For e > a it is the
    encoder's target. [PD] algorithm 2, [GD] algorithm 2, without their cancellation.
    """
    a, m, e = a.double(), m.double(), e.double()
    first, second, whole = a - m, m - e, torch.sin(a - e)
    c_z = -torch.sin(first) * torch.sin(second) / whole
    return c_z, torch.cos(second) * torch.sin(first) / whole, torch.sin(second) / whole


def ddim(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """(c_z, c_x), float64 (B,): the rotation from start to end written as c_z·z + c_x·x̂, so that x̂ can be clipped."""
    start, end = start.double(), end.double()
    return torch.sin(end) / torch.sin(start), torch.sin(start - end) / torch.sin(start)


def heun_correction(start: Tensor, end: Tensor) -> Tensor:
    """κ, float64 (B,): z + κ·(x̂_end − x̂_start) makes the DDIM step to z, at end > 0, one of Heun's ([EDM] alg. 1).

    x̂_end is the image predicted from z. [EDM] takes the mean of both slopes ε̂ in σ = tan φ; ε̂_end − ε̂_start is
    cot(end)·(x̂_start − x̂_end), so that κ = ½·(σ_start/σ_end − 1)·cos(end).
    """
    start, end = start.double(), end.double()
    return torch.sin(start - end) / (2 * torch.cos(start) * torch.tan(end))


def noise_back(far: Tensor, to: Tensor) -> tuple[Tensor, Tensor]:
    """(keep, noise), float64 (B,): keep·z_far + noise·ε is z at the noisier angle `to` ([GD] section 3.3)."""
    far, to = far.double(), to.double()
    keep = torch.cos(to) / torch.cos(far)
    return keep, (torch.sin(to).square() - (torch.sin(far) * keep).square()).clamp(min=0).sqrt()


def ancestral(start: Tensor, end: Tensor, variance: float) -> tuple[Tensor, Tensor, Tensor]:
    """(c_z, c_x, std), float64 (B,), of q(z_end | z_start, x̂) ([GD] eq. 5, DDPM), end < start.

    variance: γ in [0, 1], between the lower and the upper bound of the log-variance. std = 0 at end = 0.
    """
    start, end = start.double(), end.double()
    ratio = (torch.tan(end) / torch.tan(start)).square()  # e^(λ_start − λ_end)
    small = (1 - ratio) * torch.sin(end).square()
    large = (1 - ratio) * torch.sin(start).square()
    c_z = ratio * torch.cos(end) / torch.cos(start)
    c_x = (1 - ratio) * torch.cos(end)
    return c_z, c_x, (large**variance * small ** (1 - variance)).sqrt() * (end > 0)


def loss_weight(name: str, angle: Tensor) -> Tensor:
    """The factor on mean((ṽ − v̂)²) that makes it the named loss, float64 (B,) (method, section 4)."""
    angle = angle.double()
    match name:
        case "v":
            return torch.ones_like(angle)
        case "snr":
            return torch.cos(angle).square()
        case "snr_trunc":
            return torch.maximum(torch.sin(angle).square(), torch.cos(angle).square())
        case "constant":
            return torch.sin(angle).square()
        case "edm":  # λ(σ) = 1/σ² + 1/σ_d² on the error of x, which is 1 on that of its F
            return _edm_variance(angle) / SIGMA_DATA**2
    raise ValueError(f"unknown loss weight {name!r}; known: {', '.join(LOSS_WEIGHTS)}")
