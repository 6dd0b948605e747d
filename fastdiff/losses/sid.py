"""The two losses of score identity distillation [SiD]: a one-step generator, learned without data.

Three networks, all of which start as the teacher: the teacher's image prediction f_φ, which is frozen, the fake score's
f_ψ, which learns to denoise what the generator makes, and the generator. An image x_t = x + σ·n at noise level
σ = tan φ is z = cos φ·x_t here, so that teachers of every schedule and parameterization serve.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

import kernels
from fastdiff import samplers, streams
from fastdiff.denoiser import Denoiser
from fastdiff.losses import regression
from fastdiff.losses.batch import TIME, Batch
from fastdiff.schedule import KarrasSchedule, Schedule

SCALE = 100.0  # [SiD] multiplies the generator's loss by it
LEVELS = KarrasSchedule()  # of the generator's loss: σ from 0.002 at t = 0 to 80 at t = 1


def generator_loss(teacher_x: Tensor, fake_x: Tensor, generated_x: Tensor, alpha: float) -> Tensor:
    """(1/ω)·Σ d·[(f_φ − x) − α·d] with d = f_φ − f_ψ, (B,), differentiable in all three images ([SiD] eq. 23).

    With an exact fake score and without 1/ω its expected gradient is ½∇E|d|² − (α − ½)·∇E|d|² with ψ held, so that for
    α = ½ it is that of explicit score matching.

    (B, C, H, W) each: what teacher and fake score predict of a noisy x, and the generated x itself. ω is the mean over
    the image of |x − f_φ|, at least 1e-5, and carries no gradient. Raises ValueError for images that do not match.
    """
    return kernels.sid_generator_loss(teacher_x, fake_x, generated_x, alpha)


def generator(
    generator: Denoiser,
    teacher: nn.Module,
    fake: nn.Module,
    batch: Batch,
    *,
    alpha: float = 1.2,
    t_max: float = 800,
    levels: Schedule = LEVELS,
    sigma: float = samplers.SIGMA_INIT,
    guidance_range: tuple[float, float] | None = None,
    guidance_t_max: float = 1000,
) -> tuple[Tensor, dict[str, Tensor]]:
    """100·`generator_loss` of images that are made here, (B,), and {"score_gap": |f_φ − f_ψ| (B,)}, to watch.

    Noise levels: t ~ U[0, t_max/1000] on `levels`; beyond guidance_t_max/1000 the teacher gets w = 0, because guidance
    of strong noise drives images out of the data's range (as in arXiv 2404.07724). batch.x is not read. The gradient
    goes through both score networks, whose weights should not require any. A sample whose loss is not finite sends
    no gradient to the generator.
    """
    w = batch.guidance(guidance_range)
    x = _images(generator, batch, w, sigma)
    t = batch.uniform(TIME) * (t_max / 1000)
    angle = levels.angle(t)
    teacher_w = None if w is None else torch.where(t <= guidance_t_max / 1000, w, 0)
    z, _ = kernels.add_noise(x, angle, seed=batch.seed, sample_ids=batch.sample_ids, step=streams.NOISE)
    teacher_x = samplers.denoised(teacher, z, angle, batch.label, teacher_w)
    fake_x = samplers.denoised(fake, z, angle, batch.label, w)
    loss = SCALE * generator_loss(teacher_x, fake_x, x, alpha)
    if x.requires_grad:
        bad = ~torch.isfinite(loss.detach())[:, None, None, None]
        x.register_hook(lambda gradient: gradient.masked_fill(bad, 0))
    gap = (teacher_x - fake_x).detach().float().square().mean((1, 2, 3)).sqrt()
    return loss, {"score_gap": gap}


def fake_score(
    fake: Denoiser,
    generator: nn.Module,
    batch: Batch,
    *,
    sigma: float = samplers.SIGMA_INIT,
    guidance_range: tuple[float, float] | None = None,
) -> Tensor:
    """[EDM]'s denoising loss (B,) on images that the generator makes here, under no_grad; batch.x is not read."""
    w = batch.guidance(guidance_range)
    with torch.no_grad():
        x = _images(generator, batch, w, sigma)
        finite = torch.isfinite(x).flatten(1).all(1)
        x = torch.where(finite[:, None, None, None], x, 0)
    loss = regression.teacher(
        fake, replace(batch, x=x), label_drop=0.0, weight="edm", noise_levels="lognormal", guidance=w
    )
    return torch.where(finite, loss, torch.nan)


def _images(generator: Denoiser, batch: Batch, w: Tensor | None, sigma: float) -> Tensor:
    ids, shape = batch.sample_ids, (len(batch.sample_ids), *generator.image_shape)
    noise = kernels.randn(shape, seed=batch.seed, sample_ids=ids, step=streams.GENERATOR_NOISE, device=ids.device)
    noise = noise.contiguous(memory_format=torch.channels_last)
    return samplers.one_step(generator, noise, batch.label, w, schedule=generator.schedule, sigma=sigma)
