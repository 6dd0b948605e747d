"""What a student predicts, and what it starts from."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fastdiff import files
from fastdiff.denoiser import Denoiser, DenoiserConfig, blank, moved
from fastdiff.schedule import EvenSchedule, StepSchedule

Spacing = Literal["angle", "steps"]


@functools.cache
def settled(config: DenoiserConfig) -> DenoiserConfig:
    """That of a teacher's students: they predict what it does, but ε and x side by side where it predicts ε.

    At full noise an ε network cannot say what the image is, which a student with few steps has to ([PD] section 4).
    Warns of a network that has no second output: its students go on predicting ε.
    """
    if config.parameterization != "eps":
        return config
    both = replace(config, parameterization="eps-x", unet=replace(config.unet, outputs=2))
    if not any(new.shape != old.shape for new, old in zip(_weights(both), _weights(config), strict=True)):
        files.warn(
            f"the network {config.network!r} knows one output alone (outputs = 2 changes none of its weights), so that "
            "its students predict ε, too: with few steps they will be poor"
        )
        return config
    return both


def spaced(config: DenoiserConfig, spacing: Spacing) -> DenoiserConfig:
    """That of a teacher whose sampling steps lie as its students' do; a student's lie as they were distilled."""
    if spacing == "steps" or config.kind != "teacher" or not isinstance(config.schedule, StepSchedule):
        return config
    return replace(config, schedule=EvenSchedule(config.schedule))


def _weights(config: DenoiserConfig) -> list[Tensor]:
    return list(blank(replace(config, unconditional=None)).network.state_dict().values())


def student_of(teacher: Denoiser, config: DenoiserConfig) -> Denoiser:
    """A denoiser of this config with the teacher's weights; what it has besides is as it was built.

    Where it has a second output, x̃ beside ε̃, the weights of that are 0. Raises ValueError where there is no place for a
    weight of the teacher's.
    """
    student = Denoiser(config)
    own, known = student.network.state_dict(), teacher.network.state_dict()
    weights = {name: _with_second(weight, own.get(name, weight)) for name, weight in known.items()}
    _, unexpected = student.network.load_state_dict(weights, strict=False)
    if unexpected:
        raise ValueError(f"a network with guidance input has no place for the teacher's {', '.join(unexpected)}")
    return moved(student, next(teacher.parameters()).device)


def _with_second(weight: Tensor, like: Tensor) -> Tensor:
    """The first output's rows, and zeros for the second's where there is one."""
    return weight if weight.shape == like.shape else torch.cat([weight, torch.zeros_like(weight)])


@torch.no_grad()
def drops_labels(teacher: Denoiser) -> bool:
    """Whether a network forgets labels of its own accord while it trains, as its student then would, too.

    By the same random numbers, images of two classes come out alike where the labels were dropped, and nowhere else. Of
    64 images, one in ten dropped, none would be in 0.1 % of the cases.
    """
    network, device = copy.deepcopy(teacher), next(teacher.parameters()).device
    z = torch.randn(64, *teacher.image_shape, generator=torch.Generator().manual_seed(0)).to(device)

    def alike(training: bool) -> Tensor:
        network.train(training)
        with torch.random.fork_rng():
            outputs = []
            for label in (0, teacher.num_classes - 1):
                torch.manual_seed(0)
                outputs.append(network(z, z.new_ones(len(z)), torch.full((len(z),), label, device=device)))
        return (outputs[0] == outputs[1]).flatten(1).all(1)

    return bool((alike(training=True) & ~alike(training=False)).any())
