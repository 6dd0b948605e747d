"""Progressive distillation: rounds that halve the steps, each taught by the last ([PD] algorithm 2)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastdiff import checkpoint, data, distributed
from fastdiff.denoiser import Denoiser, require_fit
from fastdiff.errors import UserError
from fastdiff.losses.batch import Batch
from train import loop

RoundLoss = Callable[[Denoiser, Denoiser, Batch, int], Tensor]  # (student, teacher, batch, steps) -> (B,)


@dataclass(frozen=True, kw_only=True)
class Options(loop.LoopOptions):
    teacher: Path
    start_steps: int = 64
    """The teacher's sampling steps; the first student takes half as many."""
    end_steps: int = 1
    """The last student's steps."""
    weight: Literal["v", "snr", "snr_trunc", "constant"] = "snr_trunc"
    updates: int = 2000
    """Updates a round."""
    last_updates: int | None = None
    """Updates of the rounds with 2 steps and with 1; default: twice those of the others."""
    lr: float = 3e-4
    """A round's student starts as a copy that is nearly right: with 1e-3, the first updates spoil what it knows."""
    warmup: int = 20


PRESETS = {
    "digits": {},
    "fashion-mnist": {"data": "fashion-mnist", "start_steps": 256, "updates": 4000},
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


def run(
    options: Options, teacher: Denoiser, loss: RoundLoss, *, kind: str, sampler: str = "ddim", rows: int = 1
) -> Denoiser | None:  # fmt: skip
    """Run or continue the rounds that are not finished; returns the last student, None for a dry run.

    kind, sampler: what the students' checkpoints say of themselves. rows: as for `loop.print_plan`. Raises UserError.
    """
    rounds = check(options)
    dataset = data.load(options.data, "train")
    require_fit(teacher, dataset, options.teacher)
    loop.check_batch(options, dataset)
    if options.dry_run:
        plan = [f"round        {2 * n} -> {n} steps: {round_updates(options, n)} updates" for n in rounds]
        loop.print_plan(teacher.config, options, plan, teacher=teacher, rows=rows)
        return None
    loop.prepare(options, dataset)
    for steps in rounds:
        finished = options.out / f"steps-{steps}"
        if (finished / "model.json").is_file():
            teacher = checkpoint.load(finished, device=options.device)
            continue
        torch.manual_seed(options.seed)
        student = copy.deepcopy(teacher)
        student.config = replace(teacher.config, kind=kind, sampler=sampler, steps=steps)
        if updates := round_updates(options, steps):
            loop.freeze(teacher, options)
            student = loop.fit(
                student, lambda model, batch, teacher=teacher, steps=steps: loss(model, teacher, batch, steps), dataset,
                replace(options, updates=updates), name=f"steps-{steps}",
            )  # fmt: skip
        distributed.first(lambda folder=finished, student=student: finish(folder, student))
        teacher = student
    distributed.first(lambda: loop.remove_resumable(options.out))  # if a kill has left them
    return teacher


def finish(folder: Path, student: Denoiser) -> None:
    """Keep a round's student; its resumable checkpoints are of no more use."""
    checkpoint.save(folder, student)
    loop.remove_resumable(folder.parent)


def check(options: Options) -> list[int]:
    """The steps of each round's student. Raises UserError for options that make no sense."""
    options.check()
    if options.last_updates is not None and options.last_updates <= 0:
        raise UserError(f"--last-updates must be positive, got {options.last_updates}")
    return student_steps(options.start_steps, options.end_steps)


def check_steps(teacher: Denoiser, options: Options) -> None:
    """Raises UserError where a teacher was trained for another number of steps than the rounds start with."""
    trained = teacher.config.steps
    if trained is not None and trained != options.start_steps:
        raise UserError(
            f"{options.teacher} was trained for {trained} steps: use --start-steps {trained}, got {options.start_steps}"
        )


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
    """Updates of the round whose student takes `steps` steps; the last two rounds are longer ([GD] appendix).

    0 where there is nothing to learn: the last of the stochastic sampler's steps goes to the image at once, so that a
    student whose only step it is does what its teacher does, and starts as its copy.
    """
    if steps == 1 and getattr(options, "sampler", None) == "stochastic":
        return 0
    last = 2 * options.updates if options.last_updates is None else options.last_updates
    return last if steps <= 2 else options.updates
