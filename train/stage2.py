"""Halve the steps again and again ([GD] section 3.2): `python -m train.stage2 --teacher … --out …`."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from fastdiff import checkpoint, cli, data, distill
from fastdiff.denoiser import Denoiser, require_fit
from fastdiff.errors import UserError
from train import loop


@dataclass(frozen=True, kw_only=True)
class Options(loop.LoopOptions):
    teacher: Path
    """A run of train.stage1, or a checkpoint of this recipe."""
    start_steps: int = 64
    """The teacher's sampling steps; the first student takes half as many."""
    end_steps: int = 1
    """The last student's steps."""
    weight: Literal["v", "snr", "snr_trunc", "constant"] = "snr_trunc"
    updates: int = 2000
    """Updates a round."""
    last_updates: int | None = None
    """Updates of the rounds with 2 steps and with 1; default: twice those of the others."""
    lr: float = 1e-3
    warmup: int = 20


PRESETS = {
    "digits": {},
    "fashion-mnist": {"data": "fashion-mnist", "start_steps": 256, "updates": 4000, "lr": 5e-4},
    "cifar10": {
        "batch_size": 128,
        "data": "cifar10", "flip": True, "start_steps": 1024, "updates": 50_000, "last_updates": 100_000, "lr": 1e-4,
        "dropout": 0.0, "precision": "bf16", "save_every": 10_000,
    },
    "imagenet64": {
        "data": "data/imagenet64", "flip": True, "start_steps": 1024, "updates": 50_000, "last_updates": 100_000,
        "batch_size": 256, "lr": 1e-4, "dropout": 0.0, "precision": "bf16", "save_every": 10_000,
    },
}  # fmt: skip


def main(options: Options) -> None:
    """Distil a sampler's steps: each round's student does in one step what its teacher does in two."""
    train(options)


def train(options: Options) -> Denoiser | None:
    """Run or continue the rounds that are not finished; returns the last student. Raises UserError."""
    options.check()
    if options.last_updates is not None and options.last_updates <= 0:
        raise UserError(f"--last-updates must be positive, got {options.last_updates}")
    rounds = student_steps(options.start_steps, options.end_steps)
    teacher = checkpoint.load(options.teacher, device=options.device)
    _check_teacher(teacher, options)
    dataset = data.load(options.data, "train")
    require_fit(teacher, dataset, options.teacher)
    loop.check_batch(options, dataset)
    if options.dry_run:
        plan = [f"round        {2 * n} -> {n} steps: {round_updates(options, n)} updates" for n in rounds]
        loop.print_plan(teacher.config, options, plan, teacher=teacher)
        return None
    loop.prepare(options, dataset)
    for steps in rounds:
        finished = options.out / f"steps-{steps}"
        if (finished / "model.json").is_file():
            teacher = checkpoint.load(finished, device=options.device)
            continue
        torch.manual_seed(options.seed)
        student = _fit_round(teacher, steps, dataset, options)
        checkpoint.save(finished, student)
        for resumable in options.out.glob(f"{checkpoint.PREFIX}*"):
            shutil.rmtree(resumable)
        teacher = student
    return teacher


def student_steps(start: int, end: int) -> list[int]:
    """start/2, start/4, …, end. Raises UserError where halving does not connect them."""
    steps, rounds = start, []
    while steps > end > 0 and steps % 2 == 0:
        steps //= 2
        rounds.append(steps)
    if not rounds or rounds[-1] != end:
        raise UserError(
            f"--start-steps {start} --end-steps {end}: halving the first must reach the second, "
            "as 64 -> 1 or 24 -> 3 do"
        )
    return rounds


def round_updates(options: Options, steps: int) -> int:
    """Updates of the round whose student takes `steps` steps; the last two rounds are longer ([GD] appendix)."""
    last = 2 * options.updates if options.last_updates is None else options.last_updates
    return last if steps <= 2 else options.updates


def _fit_round(teacher: Denoiser, steps: int, dataset: data.Dataset, options: Options) -> Denoiser:
    teacher.requires_grad_(False)
    student = copy.deepcopy(teacher)
    student.config = replace(teacher.config, kind="stage2", sampler="ddim", steps=steps)

    def loss(model: Denoiser, batch: distill.Batch) -> torch.Tensor:
        return distill.stage2(
            model, teacher, batch, steps=steps, guidance_range=teacher.config.guidance_range, weight=options.weight
        )

    options = replace(options, updates=round_updates(options, steps))
    return loop.fit(student, loss, dataset, options, name=f"steps-{steps}")


def _check_teacher(teacher: Denoiser, options: Options) -> None:
    config = teacher.config
    if config.kind == "teacher" and teacher.num_classes:
        raise UserError(
            f"{options.teacher} is a teacher without guidance inside: first run "
            f"python -m train.stage1 --teacher {options.teacher} --out {options.teacher.parent / 'stage1'}, "
            "and give its --out here"
        )
    if config.steps is not None and config.steps != options.start_steps:
        raise UserError(
            f"{options.teacher} was trained for {config.steps} steps: use --start-steps {config.steps}, "
            f"got {options.start_steps}"
        )


if __name__ == "__main__":
    cli.run(main, Options, PRESETS)
