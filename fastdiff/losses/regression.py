"""The training losses of guided distillation: each is a function (models, batch) -> per-sample loss (B,).

Every one is a regression of the student's velocity on c_z·z + c_a·a + c_b·b (method, section 4). All randomness of a
batch is a function of (seed, sample id): see `batch.Batch`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import kernels
from fastdiff import rotation
from fastdiff.denoiser import Denoiser, Guided
from fastdiff.losses.batch import TIME, Batch
from fastdiff.rotation import Affine
from fastdiff.samplers import Model, velocity
from fastdiff.schedule import Schedule

NOISE_LEVELS = ("schedule", "lognormal")
P_MEAN, P_STD = -1.2, 1.2  # of ln σ in [EDM]'s training
HALF_STEPS = {"ddim": 0.5, "stochastic": 1.0}  # a student's half step, in units of 1/N


def teacher(
    denoiser: Denoiser,
    batch: Batch,
    *,
    label_drop: float = 0.1,
    weight: str = "snr",
    noise_levels: str = "schedule",
    guidance: Tensor | None = None,
) -> Tensor:
    """The denoising loss of a classifier-free-guidance model ([CFG]) on batch.x.

    noise_levels: see `noise_angle`. "lognormal" with the weight "edm" is [EDM]'s loss, whatever the denoiser's
    parameterization and schedule. guidance: w (B,) of a network that takes it as an input.
    """
    angle = noise_angle(denoiser.schedule, batch.uniform(TIME), noise_levels)
    z, eps = batch.noised(angle)
    label = batch.dropped_label(label_drop, denoiser.num_classes)
    target = Affine(eps, None, torch.cos(angle), batch.x, -torch.sin(angle))
    return _regression(denoiser, z, angle, label, guidance, target, weight)


def noise_angle(schedule: Schedule, uniform: Tensor, noise_levels: str) -> Tensor:
    """The angles of teachers' noise, float64 (B,), from U[0, 1) numbers.

    noise_levels: "schedule", φ(t) with t ~ U[0, 1], or "lognormal", [EDM]'s ln tan φ ~ N(−1.2, 1.2²).
    """
    match noise_levels:
        case "schedule":
            return schedule.angle(uniform)
        case "lognormal":
            normal = torch.special.ndtri(uniform.clamp(min=2**-32))  # Φ⁻¹(0) is −∞, this −6.2
            return torch.atan(torch.exp(P_MEAN + P_STD * normal))
    raise ValueError(f"unknown noise levels {noise_levels!r}; known: {', '.join(NOISE_LEVELS)}")


def stage1(
    student: Denoiser,
    teacher: nn.Module,
    batch: Batch,
    *,
    guidance_range: tuple[float, float] | None,
    weight: str = "snr",
    clip: float | None = None,
) -> Tensor:
    """The student's velocity against the guided teacher's at the same (z, t, w); t ~ U[0, 1] ([GD] algorithm 1).

    guidance_range: None without classes. clip: limit on the teacher's x̂, as in its sampler; strong guidance drives x̂
    far outside the data's range.
    """
    angle = student.schedule.angle(batch.uniform(TIME))
    z, _ = batch.noised(angle)
    w = batch.guidance(guidance_range)
    with torch.no_grad():
        target = teacher.affine(z, angle, batch.label, w)
        if clip is not None:
            target = Affine(target.clipped(z, angle, clip), None, torch.ones_like(angle))
    return _regression(student, z, angle, batch.label, w, target, weight)


def stage2(
    student: Denoiser,
    teacher: Model,
    batch: Batch,
    *,
    steps: int,
    guidance_range: tuple[float, float] | None,
    weight: str = "snr_trunc",
    sampler: str = "ddim",
    clip: float | None = None,
) -> Tensor:
    """One step of an N-step student against two DDIM steps of its teacher; t = i/N, i ~ U{1..N} ([GD] algorithm 2).

    sampler: "ddim", or "stochastic" for that sampler's steps, twice as long ([GD] alg. 3). clip: limit on the teacher's
    x̂, for one that predicts ε, whose error is multiplied in x̂. Others' is not clipped: errors around a limit of the
    range would all come to lie on one side, and each round would add to that bias. The x̂ that the student learns is a
    convex combination of its teacher's two.
    """
    index = torch.floor(batch.uniform(TIME) * steps) + 1  # (B,) in 1..N
    if sampler not in HALF_STEPS:
        raise ValueError(f"unknown sampler {sampler!r}; students are trained for {' or '.join(HALF_STEPS)}")
    half = HALF_STEPS[sampler]
    a, m, e = (student.schedule.angle((index - back).clamp(min=0) / steps) for back in (0, half, 2 * half))
    m, e = (torch.where(index <= back, 0.0, angle) for back, angle in ((half, m), (2 * half, e)))
    return _two_steps(student, teacher, batch, (a, m, e), batch.guidance(guidance_range), weight, clip)


def encoder(
    student: Denoiser,
    teacher: Model,
    batch: Batch,
    *,
    steps: int,
    guidance_range: tuple[float, float] | None,
    weight: str = "snr_trunc",
) -> Tensor:
    """One step up of an N-step encoder against two DDIM steps; t = i/N, i ~ U{0..N − 1} ([GD] algorithm 4)."""
    index = torch.floor(batch.uniform(TIME) * steps)  # (B,) in 0..N − 1
    angles = tuple(student.schedule.angle((index + up) / steps) for up in (0, 0.5, 1))
    return _two_steps(student, teacher, batch, angles, batch.guidance(guidance_range), weight)


def _two_steps(
    student: Denoiser,
    teacher: Model,
    batch: Batch,
    angles: tuple[Tensor, Tensor, Tensor],
    w: Tensor | None,
    weight: str,
    clip: float | None = None,
) -> Tensor:
    """The student at angle a against its teacher's two steps a -> m -> e in one; m = e = 0 makes them one."""

    def of_teacher(z: Tensor, angle: Tensor) -> Tensor:
        v = velocity(teacher, z, angle, batch.label, w)
        return v.apply(z) if clip is None else v.clipped(z, angle, clip)

    a, m, e = angles
    z, _ = batch.noised(a)
    with torch.no_grad():
        v1 = of_teacher(z, a)
        z1 = rotation.rotate(z, v1, a - m)
        v2 = of_teacher(z1, torch.where(m > 0, m, a))  # without effect where m = 0
    c_z, c_1, c_2 = rotation.two_step_target(a, m, e)
    return _regression(student, z, a, batch.label, w, Affine(v1, c_z, c_1, v2, c_2), weight)


def two_student(
    student: Denoiser, teacher: Denoiser, batch: Batch, *, steps: int, guidance: float, weight: str = "snr_trunc"
) -> Tensor:
    """Conditional and unconditional model distilled side by side, without w inside: the baseline of [GD] section 3.

    The guided teacher takes the first of two DDIM steps; from there each of its two models takes the second, and the
    student's own (label, and null class) learns what leads there at once. Guided, the student is then exact again.
    """
    index = torch.floor(batch.uniform(TIME) * steps) + 1
    a, m, e = (student.schedule.angle((index - back) / steps) for back in (0, 0.5, 1))
    e = torch.where(index == 1, 0.0, e)
    z, _ = batch.noised(a)
    labels = torch.cat([batch.label, torch.full_like(batch.label, student.num_classes)])
    with torch.no_grad():
        v1 = Guided(teacher)(z, a, batch.label, torch.full_like(a, guidance, dtype=torch.float32))
        z1 = rotation.rotate(z, v1, a - m)
        v2 = teacher(torch.cat([z1, z1]), m.repeat(2), labels)
    c_z, c_1, c_2 = (c.repeat(2) for c in rotation.two_step_target(a, m, e))
    target = Affine(torch.cat([v1, v1]), c_z, c_1, v2, c_2)
    return _regression(student, torch.cat([z, z]), a.repeat(2), labels, None, target, weight).view(2, -1).mean(0)


def _regression(
    student: Denoiser,
    z: Tensor,
    angle: Tensor,
    label: Tensor | None,
    guidance: Tensor | None,
    target: Affine,
    weight: str,
) -> Tensor:
    """weight·mean((target − v̂)²) with v̂ = A·z + B·F, rewritten for the raw output F: divide by B, weigh by B².

    Of two outputs v̂ is a sum, which is compared itself.
    """
    output = student.affine(z, angle, label, guidance)
    if output.b is not None:
        output = Affine(output.apply(z), torch.zeros_like(output.coef_a), torch.ones_like(output.coef_a))
    scale = 1 / output.coef_a
    coef_z = -output.coef_z if target.coef_z is None else target.coef_z - output.coef_z
    coef_b = None if target.coef_b is None else target.coef_b * scale
    factor = rotation.loss_weight(weight, angle) * output.coef_a.square()
    return kernels.affine_regression_loss(
        output.a,
        z,
        target.a,
        target.b,
        coef_z=coef_z * scale,
        coef_a=target.coef_a * scale,
        coef_b=coef_b,
        weight=factor,
    )
