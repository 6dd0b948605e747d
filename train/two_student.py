"""The baseline that distils without w inside ([GD] section 3): `python -m train.two_student --teacher … --out …`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fastdiff import checkpoint, cli
from fastdiff.denoiser import MAX_GUIDANCE, Denoiser, is_guidance
from fastdiff.errors import UserError
from fastdiff.losses import regression
from train import rounds
from train.rounds import PRESETS


@dataclass(frozen=True, kw_only=True)
class Options(rounds.Options):
    teacher: Path
    """A run of train.teacher, or a checkpoint of this recipe."""
    guidance: float = 1.0
    """The guidance strength w whose trajectories are followed; sampling takes two calls a step at this w."""


def main(options: Options) -> None:
    """Distil the conditional and the unconditional model side by side, along the guided teacher's trajectories."""
    train(options)


def train(options: Options) -> Denoiser | None:
    """Run or continue the rounds that are not finished; returns the last student. Raises UserError."""
    rounds.check(options)
    w = options.guidance
    if not is_guidance(w):
        raise UserError(f"--guidance must be a number ≥ 0 and at most {MAX_GUIDANCE:g}, got {w}")
    teacher = checkpoint.load(options.teacher, device=options.device)
    if teacher.config.kind not in ("teacher", "two_student") or not teacher.num_classes:
        what = f"a model of kind {teacher.config.kind}" if teacher.num_classes else "unconditional"
        raise UserError(
            f"{options.teacher} is {what}: two students are distilled from a class-conditional run of train.teacher"
        )
    rounds.check_steps(teacher, options)
    if teacher.config.guidance_range not in (None, (w, w)):
        trained = teacher.config.guidance_range[0]
        raise UserError(f"{options.teacher} was trained for w = {trained:g}: use --guidance {trained:g}, got {w:g}")
    teacher.config = replace(teacher.config, guidance_range=(w, w))  # as its students' checkpoints will say

    def loss(student, teacher, batch, steps):
        return regression.two_student(student, teacher, batch, steps=steps, guidance=w, weight=options.weight)

    return rounds.run(options, teacher, loss, kind="two_student", rows=2)


if __name__ == "__main__":
    cli.run(main, Options, PRESETS)
