"""Samplers: a model and noise in, images out.

`model` is any callable (z, angle, label, guidance) -> velocity; one with a method `affine` (Denoiser, Guided) has its
raw network outputs fused into the step. Every step is z' = c_z·z + c_x·clip(x̂) [+ std·ε], with coefficients from
`rotation`. A sampler of one such step a call is a rule that says what they are: `sampler` makes the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import kernels
from fastdiff import rotation
from fastdiff.rotation import Affine
from fastdiff.schedule import Schedule

Model = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
OnStep = Callable[[int, Tensor], None]
Coefficients = tuple[Tensor, Tensor, Tensor | None]
Angles = Callable[[int], Tensor]  # i -> φ(i/steps), (B,) float64; 0 for i = 0
SIGMA_INIT = 2.5  # the noise level from which [SiD]'s generators start


def sampler(rule: Callable[..., Coefficients]) -> Callable[..., Tensor]:
    """A sampler from its rule (angle, i) -> (c_z, c_x, std) of the step from angle(i) to angle(i − 1), (B,) float64.

    std None: the sampler needs no noise. What else the rule takes, the sampler takes by name.
    """

    def draw(
        model: Model,
        noise: Tensor,
        label: Tensor | None,
        guidance: Tensor | float | None,
        steps: int,
        *,
        schedule: Schedule,
        clip: float | None = None,
        seed: int = 0,
        sample_ids: Tensor | None = None,
        on_step: OnStep | None = None,
        **settings: float,
    ) -> Tensor:
        _check_steps(steps)
        guidance = as_guidance(guidance, noise)
        z = noise

        def angle(i: int) -> Tensor:
            return _at(schedule, i / steps, z) if i else z.new_zeros(z.shape[:1], dtype=torch.float64)

        for i in range(steps, 0, -1):
            c_z, c_x, std = rule(angle, i, **settings)
            added = {} if std is None or i == 1 else _noise(std, z, seed, sample_ids, i)
            z = _step(model, z, angle(i), label, guidance, c_z, c_x, clip, **added)
            if on_step is not None:
                on_step(i, z)
        return z

    draw.rule = rule
    draw.__name__ = draw.__qualname__ = rule.__name__
    draw.__doc__ = rule.__doc__
    return draw


@sampler
def ddim(angle: Angles, i: int) -> Coefficients:
    """DDIM in `steps` steps from φ(1) to 0 ([GD] eq. 4): (B, C, H, W) noise -> images of the same shape, float32.

    guidance: w as a number or (B,); None is 0. clip: limit on x̂ in every step. seed, sample_ids ((B,) int64, default
    0, 1, …): the key of the noise of samplers that need some; unused here, so that samplers are interchangeable.
    on_step(i, z) is called after each step, i = steps down to 1. Raises ValueError for steps < 1.
    """
    return *rotation.ddim(angle(i), angle(i - 1)), None


@sampler
def stochastic(angle: Angles, i: int) -> Coefficients:
    """Steps twice as long as DDIM's, each followed by noising half of the way back up ([GD] section 3.3).

    Arguments as for `ddim`; `steps` network calls. The step from φ(i/N) goes to φ((i−2)/N), the noise back to
    φ((i−1)/N); the last goes to 0. It fits a student trained for it, or a teacher.
    """
    far = angle(max(i - 2, 0))
    c_z, c_x = rotation.ddim(angle(i), far)
    keep, std = rotation.noise_back(far, angle(i - 1))  # (1, 0) in the last step
    return keep * c_z, keep * c_x, std


@sampler
def ancestral(angle: Angles, i: int, *, variance: float = 0.3) -> Coefficients:
    """DDPM's sampler: each step draws from q(z_s | z_t, x̂) with a variance between its two bounds; the last returns x̂.

    Arguments as for `ddim`. variance: γ in [0, 1], between the lower and the upper bound in the logarithm; [GD] takes
    0.3 for guided models. Raises ValueError outside.
    """
    if not 0 <= variance <= 1:
        raise ValueError(f"ancestral: variance must be in [0, 1], got {variance}")
    return rotation.ancestral(angle(i), angle(i - 1), variance)


def heun(
    model: Model,
    noise: Tensor,
    label: Tensor | None,
    guidance: Tensor | float | None,
    steps: int,
    *,
    schedule: Schedule,
    clip: float | None = None,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Heun's second-order steps in σ = tan φ, 2·steps − 1 network calls ([EDM] algorithm 1 without churn).

    Arguments as for `ddim`; clip limits x̂ in both calls of a step. The angles are [EDM]'s: φ(t) at t = 1,
    (N−2)/(N−1), …, 0 and then the image, to which the last step is DDIM's. As everywhere, the noise is z at φ(1):
    [EDM]'s x = z/cos φ is then √(1 + σ_max²)·noise where it starts from σ_max·noise. It is made for the steps of
    `KarrasSchedule`: where σ falls by a large factor in a step, as the cosine schedule's does in its first, the
    correction multiplies errors by about half that factor.
    """
    _check_steps(steps)
    guidance = as_guidance(guidance, noise)
    times = [i / (steps - 1) for i in range(steps)] if steps > 1 else [1.0]
    angles = [noise.new_zeros(noise.shape[:1], dtype=torch.float64), *(_at(schedule, t, noise) for t in times)]
    z = noise
    for i in range(steps, 0, -1):
        start, end = angles[i], angles[i - 1]
        c_z, c_x = rotation.ddim(start, end)
        x = denoised(model, z, start, label, guidance, clip)
        z = kernels.affine_update(z, x, coef_z=c_z, coef_a=c_x)
        if i > 1:
            kappa = rotation.heun_correction(start, end)
            x_end = denoised(model, z, end, label, guidance, clip)
            z = kernels.affine_update(z, x_end, x, coef_z=torch.ones_like(end), coef_a=kappa, coef_b=-kappa)
        if on_step is not None:
            on_step(i, z)
    return z


def encode(
    model: Model,
    images: Tensor,
    label: Tensor | None,
    guidance: Tensor | float | None,
    steps: int,
    *,
    schedule: Schedule,
    on_step: OnStep | None = None,
) -> Tensor:
    """DDIM backwards in `steps` steps from an image, taken as z at φ(0), up to its noise at φ(1) ([GD] section 5).

    Arguments as for `ddim`; images (B, C, H, W) in [−1, 1]. on_step(i, z) is called with i = 1 to steps.
    """
    guidance = as_guidance(guidance, images)
    z = images
    _check_steps(steps)
    for i in range(steps):
        start, end = _at(schedule, i / steps, z), _at(schedule, (i + 1) / steps, z)
        turn = end - start
        z = velocity(model, z, start, label, guidance).combine(z, torch.cos(turn), torch.sin(turn))
        if on_step is not None:
            on_step(i + 1, z)
    return z


def one_step(
    model: Model,
    noise: Tensor,
    label: Tensor | None,
    guidance: Tensor | float | None,
    steps: int = 1,
    *,
    schedule: Schedule,
    clip: float | None = None,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    on_step: OnStep | None = None,
    sigma: float = SIGMA_INIT,
) -> Tensor:
    """x̂ of noise alone, by a generator that was distilled for it ([SiD]): G(sin φ·noise, φ) with tan φ = sigma.

    Arguments as for `ddim`. Raises ValueError for steps other than 1.
    """
    if steps != 1:
        raise ValueError(f"one_step takes 1 step, got {steps}")
    angle = torch.full(noise.shape[:1], math.atan(sigma), dtype=torch.float64, device=noise.device)
    x = denoised(model, math.sin(math.atan(sigma)) * noise, angle, label, as_guidance(guidance, noise), clip)
    if on_step is not None:
        on_step(1, x)
    return x


SAMPLERS = {draw.__name__: draw for draw in (ddim, stochastic, ancestral, heun, one_step)}


def denoised(
    model: Model, z: Tensor, angle: Tensor, label: Tensor | None, guidance: Tensor | None, clip: float | None = None
) -> Tensor:
    """The image that a model sees in z, x̂ = cos φ·z − sin φ·v, limited to [−clip, clip] if that is given."""
    return _step(model, z, angle, label, guidance, torch.zeros_like(angle), torch.ones_like(angle), clip)


def velocity(model: Model, z: Tensor, angle: Tensor, label: Tensor | None, guidance: Tensor | None) -> Affine:
    """A model's velocity in the form that the fused operations take."""
    if hasattr(model, "affine"):
        return model.affine(z, angle, label, guidance)
    angle = angle.double()
    return Affine(model(z, angle, label, guidance), torch.zeros_like(angle), torch.ones_like(angle))


def as_guidance(guidance: Tensor | float | None, like: Tensor) -> Tensor | None:
    """(B,) float32 on like's device, or None where all of it is 0: then a guided model makes one call, not two.

    Only numbers and tensors on the CPU are looked at; any other device would have to be waited for.
    """
    if guidance is None or (not isinstance(guidance, Tensor) and guidance == 0):
        return None
    if not isinstance(guidance, Tensor):
        return torch.full(like.shape[:1], float(guidance), device=like.device)
    if guidance.is_cpu and not guidance.any():
        return None
    return guidance.to(like.device, torch.float32)


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"a sampler needs at least 1 step, got {steps}")


def _at(schedule: Schedule, t: float, z: Tensor) -> Tensor:
    return torch.full(z.shape[:1], schedule.angle(t), dtype=torch.float64, device=z.device)


def _noise(std: Tensor, z: Tensor, seed: int, sample_ids: Tensor | None, step: int) -> dict:
    """The arguments of `kernels.affine_update` that add noise; each step has its own stream."""
    ids = torch.arange(len(z), device=z.device) if sample_ids is None else sample_ids
    return {"coef_noise": std, "seed": seed, "sample_ids": ids, "step": step}


def _step(model, z, angle, label, guidance, c_z: Tensor, c_x: Tensor, clip: float | None, **noise) -> Tensor:
    """c_z·z + c_x·clip(x̂) [+ noise], with x̂ = cos φ·z − sin φ·v, in one pass over the data."""
    v = velocity(model, z, angle, label, guidance)
    x_z, x_v, limit = torch.cos(angle) - torch.sin(angle) * v.coef_z, -torch.sin(angle), None
    if clip is None:
        x_z, x_v = c_z + c_x * x_z, c_x * x_v
    else:
        limit = kernels.Clip(clip, c_z, c_x)
    coef_b = None if v.b is None else x_v * v.coef_b
    return kernels.affine_update(z, v.a, v.b, clip=limit, coef_z=x_z, coef_a=x_v * v.coef_a, coef_b=coef_b, **noise)
