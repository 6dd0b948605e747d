"""Distil DDIM's way from image to noise ([GD] section 5): `python -m train.encoder --teacher … --out …`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastdiff import cli, rotation
from fastdiff.denoiser import Denoiser, DenoiserConfig
from fastdiff.errors import UserError
from fastdiff.losses import regression
from fastdiff.losses.batch import Batch
from train import begin, rounds, students
from train.rounds import PRESETS

MAX_GAIN = 100  # x̂ rounded to 8 bits is 0.002 off; that much more is a fifth of the noise's standard deviation


@dataclass(frozen=True, kw_only=True)
class Options(rounds.Options):
    teacher: Path
    """A run of train.stage1, or a checkpoint of this recipe."""


def train(options: Options) -> Denoiser | None:
    """Distil an encoder: each round's student does in one step up what its teacher does in two.

    Runs or continues the rounds that are not finished; returns the last encoder. Raises UserError.
    """
    return begin.train(RECIPE, options)


def loss(options: Options, teacher: Denoiser) -> rounds.RoundLoss:
    limits = teacher.config.guidance_range

    def of_round(student: Denoiser, batch: Batch, *, teacher: Denoiser, steps: int) -> Tensor:
        return regression.encoder(student, teacher, batch, steps=steps, guidance_range=limits, weight=options.weight)

    return of_round


def check(options: Options, teacher: Denoiser) -> None:
    """Raises UserError for a network whose errors one step up would multiply by more than MAX_GAIN."""
    gain = error_gain(students.spaced(teacher.config, options.spacing), options.end_steps)
    if gain > MAX_GAIN:
        raise UserError(
            f"{options.teacher} predicts {teacher.config.parameterization}, and on its schedule one of "
            f"{options.end_steps} steps from image to noise multiplies the network's error by {gain:.0f}: "
            "distil a model that predicts v (train.teacher --parameterization v)"
        )


def error_gain(config: DenoiserConfig, steps: int) -> float:
    """The most that an error of the network's output is multiplied by in any of `steps` equal steps up."""
    angle = config.schedule.angle(torch.arange(steps + 1, dtype=torch.float64) / steps)
    v = rotation.affine(config.parameterization, torch.empty(steps, 2, 0, 0), angle[:-1])
    coefs = [coef for coef in (v.coef_a, v.coef_b) if coef is not None]
    return float((torch.sin(angle.diff()) * torch.stack(coefs)).abs().max())


RECIPE = rounds.recipe("encoder", loss, sampler=lambda options: "encode", check=check)

if __name__ == "__main__":
    cli.run(train, Options, PRESETS)
