"""Distil DDIM's way from image to noise ([GD] section 5): `python -m train.encoder --teacher … --out …`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fastdiff import checkpoint, cli
from fastdiff.denoiser import Denoiser
from fastdiff.errors import UserError
from fastdiff.losses import regression
from train import rounds
from train.rounds import PRESETS

MAX_GAIN = 100  # x̂ rounded to 8 bits is 0.002 off; that much more is a fifth of the noise's standard deviation


@dataclass(frozen=True, kw_only=True)
class Options(rounds.Options):
    teacher: Path
    """A run of train.stage1, or a checkpoint of this recipe."""


def main(options: Options) -> None:
    """Distil an encoder: each round's student does in one step up what its teacher does in two."""
    train(options)


def train(options: Options) -> Denoiser | None:
    """Run or continue the rounds that are not finished; returns the last encoder. Raises UserError."""
    rounds.check(options)
    teacher = checkpoint.load(options.teacher, device=options.device)
    if teacher.config.kind not in ("stage1", "encoder") and (teacher.num_classes or teacher.config.kind != "teacher"):
        raise UserError(
            f"{options.teacher} is a model of kind {teacher.config.kind}: an encoder is distilled from a run of "
            "train.stage1, or from an encoder with more steps"
        )
    rounds.check_steps(teacher, options)
    gain = error_gain(teacher, options.end_steps)
    if gain > MAX_GAIN:
        raise UserError(
            f"{options.teacher} predicts {teacher.config.parameterization}, and on its schedule one of "
            f"{options.end_steps} steps from image to noise multiplies the network's error by {gain:.0f}: "
            "distil a model that predicts v (train.teacher --parameterization v)"
        )
    limits = teacher.config.guidance_range

    def loss(student, teacher, batch, steps):
        return regression.encoder(student, teacher, batch, steps=steps, guidance_range=limits, weight=options.weight)

    return rounds.run(options, teacher, loss, kind="encoder", sampler="encode")


def error_gain(denoiser: Denoiser, steps: int) -> float:
    """The most that an error of the network's output is multiplied by in any of `steps` equal steps up."""
    angle = denoiser.schedule.angle(torch.arange(steps + 1, dtype=torch.float64) / steps)
    _, coef_f = denoiser.velocity_coefficients(angle[:-1])
    return float((torch.sin(angle.diff()) * coef_f).abs().max())


if __name__ == "__main__":
    cli.run(main, Options, PRESETS)
