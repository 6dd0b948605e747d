"""What a student predicts, and what it starts from."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from fastdiff import files
from fastdiff.denoiser import Denoiser, DenoiserConfig, blank, moved


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
