"""Halve the steps again and again ([GD] section 3.2): `python -m train.stage2 --teacher … --out …`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from fastdiff import cli
from fastdiff.denoiser import Denoiser
from fastdiff.errors import UserError
from fastdiff.losses import regression
from fastdiff.losses.batch import Batch
from train import begin, rounds
from train.rounds import PRESETS


@dataclass(frozen=True, kw_only=True)
class Options(rounds.Options):
    teacher: Path
    """A run of train.stage1, or a checkpoint of this recipe."""
    sampler: Literal["ddim", "stochastic"] = "ddim"
    """What the students are trained for: the stochastic sampler's steps are twice as long, with noise in between."""


def train(options: Options) -> Denoiser | None:
    """Distil a sampler's steps: each round's student does in one step what its teacher does in two.

    Runs or continues the rounds that are not finished; returns the last student. Raises UserError.
    """
    return begin.train(RECIPE, options)


def loss(options: Options, teacher: Denoiser) -> rounds.RoundLoss:
    limits = teacher.config.guidance_range

    def of_round(student: Denoiser, batch: Batch, *, teacher: Denoiser, steps: int) -> Tensor:
        how = {"guidance_range": limits, "weight": options.weight, "sampler": options.sampler}
        if teacher.config.parameterization == "eps":
            how["clip"] = teacher.config.limit
        return regression.stage2(student, teacher, batch, steps=steps, **how)

    return of_round


def check(options: Options, teacher: Denoiser) -> None:
    config = teacher.config
    if config.steps is not None and config.sampler != options.sampler:
        raise UserError(
            f"{options.teacher} was trained for the {config.sampler} sampler: use --sampler {config.sampler}, "
            "or start from the stage-1 model"
        )


RECIPE = rounds.recipe("stage2", loss, sampler=lambda options: options.sampler, check=check)

if __name__ == "__main__":
    cli.run(train, Options, PRESETS)
