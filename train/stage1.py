"""Distil guidance into one network ([GD] section 3.1): `python -m train.stage1 --teacher … --out …`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from fastdiff import checkpoint, cli, data
from fastdiff.denoiser import MAX_GUIDANCE, Denoiser, Guided, is_guidance, require_fit
from fastdiff.errors import UserError
from fastdiff.losses import regression
from fastdiff.losses.batch import Batch
from train import loop


@dataclass(frozen=True, kw_only=True)
class Options(loop.LoopOptions):
    teacher: Path
    """A run of train.teacher, or one of its checkpoints."""
    guidance_range: tuple[float, float] = (0.0, 4.0)
    """Guidance strengths w to learn; twice the same number makes a student without a w input."""
    weight: Literal["v", "snr", "snr_trunc", "constant"] = "snr"
    clip: bool = True
    """Limit the guided teacher's x̂ to [−1, 1], as its sampler does."""
    lr: float = 1e-3
    ema: float = 0.999


PRESETS = {
    "digits": {"weight": "snr_trunc"},  # at w ≤ 1 better than snr, which asks for nothing where there is noise alone
    "fashion-mnist": {"data": "fashion-mnist", "updates": 10_000},
    "cifar10": {
        "batch_size": 128,
        "data": "cifar10", "flip": True, "updates": 100_000, "lr": 1e-4, "dropout": 0.0, "precision": "bf16",
        "save_every": 10_000,
    },
    "imagenet64": {
        "data": "data/imagenet64", "flip": True, "updates": 100_000, "batch_size": 256, "lr": 1e-4, "dropout": 0.0,
        "precision": "bf16", "save_every": 10_000,
    },
}  # fmt: skip


def main(options: Options) -> None:
    """Distil a guided teacher into one network that takes w as an input."""
    train(options)


def train(options: Options) -> Denoiser | None:
    """Run or continue the recipe; returns the student. Raises UserError."""
    options.check()
    low, high = options.guidance_range
    if not (is_guidance(low) and is_guidance(high) and low <= high):
        raise UserError(f"--guidance-range must be two numbers 0 ≤ low ≤ high ≤ {MAX_GUIDANCE:g}, got {low:g} {high:g}")
    teacher = checkpoint.load(options.teacher, device=options.device)
    if not teacher.num_classes:
        raise UserError(
            f"{options.teacher} is unconditional, so there is no guidance to distil: go on with train.stage2"
        )
    if teacher.config.kind != "teacher":
        raise UserError(
            f"{options.teacher} is a {teacher.config.kind} model, which has guidance inside already: "
            "go on with train.stage2"
        )
    dataset = data.load(options.data, "train")
    require_fit(teacher, dataset, options.teacher)
    loop.check_batch(options, dataset)
    if options.dry_run:
        student = student_of(teacher, options.guidance_range)
        loop.print_plan(
            student.config, options, [f"updates      {options.updates} of {options.batch_size} images"], teacher=teacher
        )
        return None
    loop.prepare(options, dataset)
    torch.manual_seed(options.seed)
    student = student_of(teacher, options.guidance_range)
    guided = Guided(loop.freeze(teacher, options))

    def loss(model: Denoiser, batch: Batch) -> torch.Tensor:
        return regression.stage1(
            model, guided, batch, guidance_range=options.guidance_range, weight=options.weight,
            clip=1.0 if options.clip else None,
        )  # fmt: skip

    return loop.fit(student, loss, dataset, options, name="stage1")


def student_of(teacher: Denoiser, guidance_range: tuple[float, float]) -> Denoiser:
    """A copy of the teacher with a guidance input that at first changes nothing ([GD] section 3.1)."""
    needs_input = guidance_range[0] < guidance_range[1]
    unet = replace(teacher.config.unet, guidance_input=needs_input)
    student = Denoiser(replace(teacher.config, unet=unet, kind="stage1", guidance_range=tuple(guidance_range)))
    _, unexpected = student.network.load_state_dict(teacher.network.state_dict(), strict=False)
    if unexpected:
        raise ValueError(f"a network with guidance input has no place for the teacher's {', '.join(unexpected)}")
    return student.to(next(teacher.parameters()).device)


if __name__ == "__main__":
    cli.run(main, Options, PRESETS)
