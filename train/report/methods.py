"""The lines of a comparison: a model with a sampler, steps and strengths of guidance, scored and shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastdiff import checkpoint
from fastdiff.denoiser import with_guidance
from fastdiff.evaluate import Reference, evaluate
from fastdiff.generate import Sampling, generate
from fastdiff.metrics import Row

MethodName = Literal[
    "teacher", "ancestral", "stage1", "deterministic", "stochastic", "fixed", "two-student", "sid", "encoder"
]
NAMES = {  # of the tables' rows; those with a w of their own are scored at that w alone
    "teacher": "guided teacher, DDIM",
    "ancestral": "guided teacher, ancestral",
    "stage1": "stage 1 alone",
    "deterministic": "stage 1 and 2",
    "stochastic": "stage 1 and 2, stochastic",
    "fixed": "fixed w = {w}",
    "two-student": "two students, w = {w}",
    "sid": "SiD",
}


class Options(Protocol):
    """What all lines of a comparison have in common."""

    num: int
    device: str
    precision: str
    seed: int


class Method(NamedTuple):
    """One line of the tables: a model with a sampler and a number of steps, scored at some w."""

    key: MethodName
    name: str
    letter: str
    """D for a deterministic sampler, S for a stochastic one, as in the paper's tables."""
    checkpoint: Path
    sampler: str
    steps: int
    guidance: tuple[float, ...]

    def load(self, options: Options) -> nn.Module:
        return with_guidance(checkpoint.load(self.checkpoint, device=options.device))

    def sampling(self, w: float, options: Options) -> Sampling:
        how = {"seed": options.seed, "precision": options.precision}
        return Sampling(guidance=w, steps=self.steps, sampler=self.sampler, **how)

    def score(self, model: nn.Module, w: float, options: Options, reference: Reference) -> Row:
        return evaluate(model, reference, self.sampling(w, options), name=self.name, num=options.num)


def panels(
    methods: Iterable[Method], w: float, options: Options, classes: int, *, title: Callable[[Method], str], columns: int
) -> list[tuple[str, Tensor]]:
    """Images of each method under its title: one row a class, one column a noise, the same in every panel.

    Of many classes, the first ten: more would be a picture longer than can be drawn.
    """
    classes = min(classes, 10)
    labels, ids = torch.arange(classes).repeat_interleave(columns), torch.arange(columns).repeat(classes)
    drawn = []
    for method in methods:
        images = generate(method.load(options), labels, method.sampling(w, options), noise_ids=ids)
        drawn.append((title(method), torch.cat([part.cpu() for part in images])))
    return drawn


def find(rows: list[dict], name: str, steps: int, w: float) -> dict | None:
    """The row of a method at a number of steps and a strength."""
    return next((row for row in rows if (row["model"], row["steps"], row["guidance"]) == (name, steps, w)), None)
