"""What the tests of SiD's recipe share: tiny runs, and updates one by one."""

import json
from pathlib import Path

import torch

from fastdiff import checkpoint
from train import loop
from train import sid as recipe
from train.iteration import Iteration

REAL_PREVIEW = loop.preview
CPU, META = torch.device("cpu"), torch.device("meta")
LIMITS = (0.0, 4.0)


def make_options(of, out="unused", **changes):
    fields = {"updates": 6, "batch_size": 16, "save_every": 3, "score_num": 16, "log_every": 2, "device": "cpu"}
    return recipe.Options(teacher=Path(of), out=Path(out), **(fields | changes))


def train(of, out, **changes):
    return recipe.train(make_options(of, out, **changes))


def learning(of, **changes):
    """(teacher, fake score's updater, generator's updater, batches) as the recipe makes them."""
    teacher = checkpoint.load(of)
    torch.manual_seed(0)
    (fake, generator), batches = recipe.learning(teacher, make_options(of, **changes))
    return teacher, fake, generator, batches


def iterate(updaters, batches, count=1):
    step = Iteration(updaters, batches, updaters[-1].options)
    for _ in range(count):
        step()


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(model, state):
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def lines_of(path):
    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
