"""What an export makes of noise, against our own images of the same: nothing is kept that differs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import kernels
from fastdiff import data, streams
from fastdiff.denoiser import Denoiser
from fastdiff.errors import UserError
from fastdiff.exports.generator import TIME, Generator
from fastdiff.generate import generate

Run = Callable[..., Tensor]  # the generator's inputs by name -> its images, in whatever runs them
IMAGES = 4
LIMIT = 1e-4  # of images in [−1, 1]
ROUNDINGS, MOST = 8.0, 1e-2  # networks round more than once; beyond, images would hang on roundings alone


def inputs(generator: Generator, count: int = IMAGES, *, seed: int = 0) -> dict[str, Tensor]:
    """What `generate` gives to its first images: their noises, with classes and strengths spread over all there are."""
    ids, config = torch.arange(count), generator.config

    def noise(step: int) -> Tensor:
        return kernels.randn((count, *generator.image_shape), seed=seed, sample_ids=ids, step=step, device="cpu")

    made = {
        "noise": lambda: noise(streams.INITIAL_NOISE),
        "label": lambda: ids * max(1, config.unet.num_classes - 1) // max(1, count - 1) % config.unet.num_classes,
        "guidance": lambda: torch.linspace(*(config.guidance_range or (0.0, 4.0)), count),
        "noises": lambda: torch.stack([noise(i) for i in range(generator.steps, 1, -1)], dim=1),
    }
    return {name: made[name]() for name in generator.inputs}


def ours(denoiser: Denoiser, generator: Generator, given: dict[str, Tensor]) -> Tensor:
    """The images that `generate` makes of the same, float32 in [−1, 1]."""
    strength = given.get("guidance", generator.guidance)
    labels = given.get("label", len(given["noise"]))
    sampling = replace(generator.sampling, guidance=strength, graph="off")
    return torch.cat(list(generate(denoiser, labels, sampling)))


@torch.no_grad()
def largest_difference(run: Run, denoiser: Denoiser, generator: Generator, place: object) -> float:
    """The largest |theirs − ours| of a pixel in [−1, 1], in a batch and in a single image.

    Raises UserError above LIMIT, or above what roundings do to our own images where that is more: an ε network at full
    noise multiplies them, and so do the sinusoids of a step.
    """
    given = inputs(generator)
    expected = ours(denoiser, generator, given)
    first = {name: value[:1] for name, value in given.items()}
    found = [run(**given), run(**first)]
    if generator.uint8:
        found = [data.to_float(images) for images in found]
        expected = data.to_float(data.to_uint8(expected))
    pairs = ((found[0], expected), (found[1], expected[:1]))
    worst = max(_difference(one, other) for one, other in pairs)
    level = 2 / 255 if generator.uint8 else 0.0  # a pixel between two may become either
    if not worst <= LIMIT + level and not worst <= min(MOST, ROUNDINGS * _rounding(generator, given)) + level:
        raise UserError(
            f"{place} makes other images than fastdiff (up to {worst:.1e} apart, in [−1, 1]), so nothing was written: "
            "export with the versions in constraints.txt, and tell us if that is what you did"
        )
    return worst


def _difference(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape or not one.isfinite().all():
        return float("inf")
    return (one - other).abs().max().item()


def _rounding(generator: Generator, given: dict[str, Tensor]) -> float:
    """How far our own images go where every number of the noise, and the time, is moved by one rounding."""
    given = dict.fromkeys(("noise", "label", "guidance", "noises")) | given
    moved = copy.deepcopy(generator)
    moved.numbers[:, TIME] *= 1 + 2**-23
    further = given | {"noise": given["noise"] * (1 + 2**-23)}
    return (generator.images(**given) - moved.images(**further)).abs().max().item()
