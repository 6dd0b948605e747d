"""Distil guidance into one network ([GD] section 3.1): `python -m train.stage1 --teacher … --out …`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from fastdiff import checks, cli, data
from fastdiff.denoiser import MAX_GUIDANCE, Denoiser, DenoiserConfig, is_guidance, with_guidance
from fastdiff.errors import UserError
from fastdiff.losses import regression
from fastdiff.losses.batch import Batch
from train import begin, loop, students
from train.options import LoopOptions


@dataclass(frozen=True, kw_only=True)
class Options(LoopOptions):
    teacher: Path
    """A run of train.teacher, or one of its checkpoints."""
    guidance_range: tuple[float, float] = (0.0, 4.0)
    """Guidance strengths w to learn, where there are classes; twice the same number: a student without a w input."""
    weight: Literal["v", "snr", "snr_trunc", "constant"] | None = None
    """Default: snr; but for images snr_trunc where there is x̃ to learn, of which snr asks nothing at strong noise."""
    spacing: students.Spacing = "angle"
    """How the student's sampling steps lie, where the teacher was trained on discrete steps: evenly in the noise's
    angle, or in the teacher's steps, of which the noisiest differ little."""
    clip: bool = True
    """Limit the guided teacher's x̂ to [−1, 1], as its sampler does; latents have no limit."""
    lr: float = 1e-3
    ema: float = 0.999

    def check(self) -> None:
        super().check()
        low, high = self.guidance_range
        if not (is_guidance(low) and is_guidance(high) and low <= high):
            raise UserError(
                f"--guidance-range must be two numbers 0 ≤ low ≤ high ≤ {MAX_GUIDANCE:g}, got {low:g} {high:g}"
            )

    def lasting(self, options: dict) -> dict:
        """Runs that began before the weight had two defaults say snr where nothing was asked for."""
        return super().lasting(options | {"weight": options.get("weight") or "snr"})


PRESETS = {
    "digits": {"weight": "snr_trunc"},  # at w ≤ 1 better than snr, which asks for nothing where there is noise alone
    "fashion-mnist": {"data": "fashion-mnist", "updates": 10_000, "lr": 3e-4, "weight": "snr_trunc"},
    "cifar10": {
        "batch_size": 128,
        "data": "cifar10",
        "flip": True,
        "updates": 100_000,
        "lr": 1e-4,
        "dropout": 0.0,
        "precision": "bf16",
        "save_every": 10_000,
    },
    "imagenet64": {
        "data": "data/imagenet64",
        "flip": True,
        "updates": 100_000,
        "batch_size": 256,
        "lr": 1e-4,
        "dropout": 0.0,
        "precision": "bf16",
        "save_every": 10_000,
    },
}


def train(options: Options) -> Denoiser | None:
    """Distil a guided teacher into one network that takes w as an input.

    Runs or continues the recipe; returns the student. Raises UserError.
    """
    return begin.train(RECIPE, options)


def learn(options: Options, teacher: Denoiser, dataset: data.Dataset) -> Denoiser:
    student = student_of(teacher, options.guidance_range, options.spacing)
    guided, limits = with_guidance(begin.freeze(teacher, options)), student.config.guidance_range
    clip = teacher.config.limit if options.clip else None
    weight = options.weight or ("snr" if student.config.unet.outputs == 1 or clip is None else "snr_trunc")

    def loss(model: Denoiser, batch: Batch) -> Tensor:
        return regression.stage1(model, guided, batch, guidance_range=limits, weight=weight, clip=clip)

    return loop.fit(student, loss, dataset, options, name="stage1")


def student_config(
    teacher: Denoiser, guidance_range: tuple[float, float], spacing: students.Spacing = "angle"
) -> DenoiserConfig:
    limits = guidance_range if teacher.num_classes else None
    config = students.settled(students.spaced(teacher.config, spacing))
    unet = replace(config.unet, guidance_input=limits is not None and limits[0] < limits[1])
    return replace(config, unet=unet, unconditional=None, kind="stage1", guidance_range=limits)


def student_of(teacher: Denoiser, guidance_range: tuple[float, float], spacing: students.Spacing = "angle") -> Denoiser:
    """A copy of the teacher with a guidance input that at first changes nothing ([GD] section 3.1).

    Of a teacher that predicts ε, one that predicts x, too, at first 0: see `students.settled`.
    """
    return students.student_of(teacher.conditional(), student_config(teacher, guidance_range, spacing))


def check_teacher(options: Options, teacher: Denoiser) -> None:
    """Raises UserError for a teacher that cannot guide, where there is guidance to learn, and where nothing is."""
    if not teacher.num_classes and students.settled(teacher.config) == teacher.config:
        raise UserError(
            f"{options.teacher} is unconditional and predicts {teacher.config.parameterization}, so that stage 1 has "
            "nothing to add: go on with train.stage2"
        )
    if options.guidance_range[1] > 0:
        checks.can_guide(teacher.config, options.teacher, "distil it as it is with --guidance-range 0 0")


RECIPE = begin.Recipe(
    "stage1",
    PRESETS,
    lambda options, teacher, _: student_config(teacher, options.guidance_range, options.spacing),
    learn,
    check=check_teacher,
)

if __name__ == "__main__":
    cli.run(train, Options, PRESETS)
