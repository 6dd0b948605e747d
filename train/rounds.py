"""Progressive distillation: rounds that halve the steps, each taught by the last ([PD] algorithm 2)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastdiff import checkpoint, data, distributed
from fastdiff.denoiser import Denoiser, DenoiserConfig
from fastdiff.errors import UserError
from fastdiff.run import Run
from train import begin, loop, students
from train.options import LoopOptions

RoundLoss = Callable[..., Tensor]  # (student, batch, *, teacher, steps) -> (B,)


@dataclass(frozen=True, kw_only=True)
class Options(LoopOptions):
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
    spacing: students.Spacing = "angle"
    """How the steps lie, of a teacher that was trained on discrete steps and had no stage 1: see `train.stage1`."""

    def check(self) -> None:
        super().check()
        if self.last_updates is not None and self.last_updates <= 0:
            raise UserError(f"--last-updates must be positive, got {self.last_updates}")
        student_steps(self.start_steps, self.end_steps)


PRESETS = {
    "digits": {},
    "fashion-mnist": {"data": "fashion-mnist", "start_steps": 256, "updates": 4000},
    "cifar10": {
        "batch_size": 128,
        "data": "cifar10",
        "flip": True,
        "start_steps": 1024,
        "updates": 50_000,
        "last_updates": 100_000,
        "lr": 1e-4,
        "dropout": 0.0,
        "precision": "bf16",
        "save_every": 10_000,
    },
    "imagenet64": {
        "data": "data/imagenet64",
        "flip": True,
        "start_steps": 1024,
        "updates": 50_000,
        "last_updates": 100_000,
        "batch_size": 256,
        "lr": 1e-4,
        "dropout": 0.0,
        "precision": "bf16",
        "save_every": 10_000,
    },
}


def recipe(
    name: str,
    loss: Callable[[Options, Denoiser], RoundLoss],
    *,
    sampler: Callable[[Options], str] = lambda options: "ddim",
    check: Callable[[Options, Denoiser], None] = lambda options, teacher: None,
    rows: int = 1,
) -> begin.Recipe:
    """A recipe whose students halve the steps of their teacher, round by round.

    loss: (options, the first teacher) -> that of every round. sampler: what the students are trained for. check: what
    the recipe asks of its teacher beyond its kind and its steps. rows: see `begin.Recipe`.
    """

    def check_teacher(options: Options, teacher: Denoiser) -> None:
        check_steps(teacher, options)
        check_outputs(teacher, options)
        check(options, teacher)

    def config(options: Options, teacher: Denoiser) -> DenoiserConfig:
        return students.spaced(teacher.config, options.spacing)

    def learn(options: Options, teacher: Denoiser, dataset: data.Dataset) -> Denoiser:
        teacher.config = config(options, teacher)
        of_round = loss(options, teacher)
        return _run(options, teacher, of_round, dataset, kind=name, sampler=sampler(options))

    return begin.Recipe(
        name,
        PRESETS,
        lambda options, teacher, dataset: config(options, teacher),
        learn,
        check=check_teacher,
        rounds=plan,
        rows=rows,
    )


def _run(
    options: Options, teacher: Denoiser, loss: RoundLoss, dataset: data.Dataset, *, kind: str, sampler: str
) -> Denoiser:
    """Run the rounds that are not finished; returns the last student."""
    folder = Run(options.out)
    for steps in student_steps(options.start_steps, options.end_steps):
        if (folder.round(steps) / "model.json").is_file():
            teacher = checkpoint.load(folder.round(steps), device=options.device)
            continue
        torch.manual_seed(options.seed)
        student = copy.deepcopy(teacher)
        student.config = replace(teacher.config, kind=kind, sampler=sampler, steps=steps)
        if updates := round_updates(options, steps):
            begin.freeze(teacher, options)
            of_steps = partial(loss, teacher=teacher, steps=steps)
            of_round = replace(options, updates=updates)
            student = loop.fit(student, of_steps, dataset, of_round, name=round_name(steps))
        distributed.first(partial(folder.finish_round, steps, student))
        teacher = student
    distributed.first(folder.remove_resumable)  # if a kill has left them
    return teacher


def plan(options: Options) -> dict[str, int]:
    """The updates of each round, by its name."""
    rounds = student_steps(options.start_steps, options.end_steps)
    return {round_name(steps): round_updates(options, steps) for steps in rounds}


def round_name(steps: int) -> str:
    return f"{checkpoint.ROUND_PREFIX}{steps}"


def check_steps(teacher: Denoiser, options: Options) -> None:
    """Raises UserError where a teacher was trained for another number of steps than the rounds start with."""
    trained = teacher.config.steps
    if trained is not None and trained != options.start_steps:
        raise UserError(
            f"{options.teacher} was trained for {trained} steps: use --start-steps {trained}, got {options.start_steps}"
        )


def check_outputs(teacher: Denoiser, options: Options) -> None:
    """Raises UserError for a teacher without classes whose students have a second output: stage 1 teaches it."""
    is_teacher = teacher.config.kind == "teacher" and not teacher.num_classes
    if is_teacher and students.settled(teacher.config) != teacher.config:
        raise UserError(
            f"{options.teacher} predicts ε alone, and with few steps a student has to know x, too: first run python -m "
            f"train.stage1 --teacher {options.teacher} --out {options.teacher.parent / 'stage1'}, and give its --out "
            "here"
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
