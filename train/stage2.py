"""Halve the steps again and again ([GD] section 3.2): `python -m train.stage2 --teacher … --out …`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastdiff import checkpoint, cli
from fastdiff.denoiser import Denoiser
from fastdiff.errors import UserError
from fastdiff.losses import regression
from train import rounds
from train.rounds import PRESETS


@dataclass(frozen=True, kw_only=True)
class Options(rounds.Options):
    teacher: Path
    """A run of train.stage1, or a checkpoint of this recipe."""
    sampler: Literal["ddim", "stochastic"] = "ddim"
    """What the students are trained for: the stochastic sampler's steps are twice as long, with noise in between."""


def main(options: Options) -> None:
    """Distil a sampler's steps: each round's student does in one step what its teacher does in two."""
    train(options)


def train(options: Options) -> Denoiser | None:
    """Run or continue the rounds that are not finished; returns the last student. Raises UserError."""
    rounds.check(options)
    teacher = checkpoint.load(options.teacher, device=options.device)
    _check_teacher(teacher, options)
    limits = teacher.config.guidance_range

    def loss(student, teacher, batch, steps):
        return regression.stage2(
            student, teacher, batch, steps=steps, guidance_range=limits, weight=options.weight, sampler=options.sampler
        )

    return rounds.run(options, teacher, loss, kind="stage2", sampler=options.sampler)


def _check_teacher(teacher: Denoiser, options: Options) -> None:
    config = teacher.config
    if config.kind == "teacher" and teacher.num_classes:
        raise UserError(
            f"{options.teacher} is a teacher without guidance inside: first run "
            f"python -m train.stage1 --teacher {options.teacher} --out {options.teacher.parent / 'stage1'}, "
            "and give its --out here"
        )
    if config.kind not in ("teacher", "stage1", "stage2"):
        raise UserError(f"{options.teacher} is a model of kind {config.kind}: give a stage-1 or stage-2 model")
    if config.steps is not None and config.sampler != options.sampler:
        raise UserError(
            f"{options.teacher} was trained for the {config.sampler} sampler: use --sampler {config.sampler}, "
            "or start from the stage-1 model"
        )
    rounds.check_steps(teacher, options)


if __name__ == "__main__":
    cli.run(main, Options, PRESETS)
