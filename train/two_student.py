"""The baseline that distils without w inside ([GD] section 3): `python -m train.two_student --teacher … --out …`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from fastdiff import checks, cli
from fastdiff.denoiser import MAX_GUIDANCE, Denoiser, is_guidance
from fastdiff.errors import UserError
from fastdiff.losses import regression
from fastdiff.losses.batch import Batch
from train import begin, rounds
from train.rounds import PRESETS


@dataclass(frozen=True, kw_only=True)
class Options(rounds.Options):
    teacher: Path
    """A run of train.teacher, or a checkpoint of this recipe."""
    guidance: float = 1.0
    """The guidance strength w whose trajectories are followed; sampling takes two calls a step at this w."""

    def check(self) -> None:
        super().check()
        if not is_guidance(self.guidance):
            raise UserError(f"--guidance must be a number ≥ 0 and at most {MAX_GUIDANCE:g}, got {self.guidance}")


def train(options: Options) -> Denoiser | None:
    """Distil the conditional and the unconditional model side by side, along the guided teacher's trajectories.

    Runs or continues the rounds that are not finished; returns the last student. Raises UserError.
    """
    return begin.train(RECIPE, options)


def loss(options: Options, teacher: Denoiser) -> rounds.RoundLoss:
    w = options.guidance
    teacher.config = replace(teacher.config, guidance_range=(w, w))  # as its students' checkpoints will say

    def of_round(student: Denoiser, batch: Batch, *, teacher: Denoiser, steps: int) -> Tensor:
        return regression.two_student(student, teacher, batch, steps=steps, guidance=w, weight=options.weight)

    return of_round


def check(options: Options, teacher: Denoiser) -> None:
    w, trained = options.guidance, teacher.config.guidance_range
    if trained not in (None, (w, w)):
        raise UserError(
            f"{options.teacher} was trained for w = {trained[0]:g}: use --guidance {trained[0]:g}, got {w:g}"
        )
    checks.can_guide(teacher.config, options.teacher, "distil it by train.stage1 --guidance-range 0 0")
    if teacher.config.unconditional is not None:
        raise UserError(
            f"{options.teacher} is two networks, and train.two_student takes one that knows both a class and none: "
            "distil it by train.stage1"
        )


RECIPE = rounds.recipe("two_student", loss, check=check, rows=2)

if __name__ == "__main__":
    cli.run(train, Options, PRESETS)
