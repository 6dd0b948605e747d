"""Distil DDIM's way from image to noise ([GD] section 5): `python -m train.encoder --teacher … --out …`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastdiff import checkpoint, cli, distill
from fastdiff.denoiser import Denoiser
from fastdiff.errors import UserError
from train import rounds
from train.rounds import PRESETS


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
    limits = teacher.config.guidance_range

    def loss(student, teacher, batch, steps):
        return distill.encoder(student, teacher, batch, steps=steps, guidance_range=limits, weight=options.weight)

    return rounds.run(options, teacher, loss, kind="encoder", sampler="encode")


if __name__ == "__main__":
    cli.run(main, Options, PRESETS)
