"""What a source is read into, and how a peer's names of tensors become those of our U-Net."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastdiff.blocks import Stage
from fastdiff.denoiser import Denoiser, DenoiserConfig, blank, filled
from fastdiff.errors import UserError
from fastdiff.imports.account import Tensors
from fastdiff.unet import UNet, UNetConfig

Peer = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (z, step, label) -> the network's output


@dataclass(frozen=True)
class Imported:
    """A network of another library as a denoiser's configuration and weights."""

    config: DenoiserConfig
    weights: dict[str, Tensor]
    told: tuple[str, ...]
    """What the user should know: what was dropped and why, and what was taken for granted."""
    called_with: Literal["step", "sigma"]
    """What the peer is called with: z and its step, for the network's output; or [EDM]'s x and σ, for the image D."""
    peer: Peer | None = None
    """The peer's own code, where it is installed."""

    def denoiser(self) -> Denoiser:
        denoiser = filled(blank(self.config), self.weights)
        return denoiser.requires_grad_(False).to(memory_format=torch.channels_last).eval()


class Place(NamedTuple):
    """Where a stage of the U-Net stands."""

    part: Literal["encoder", "middle", "decoder"]
    level: int
    """0 being the finest."""
    index: int
    """In its level, or in the middle."""
    position: int
    """In its part."""
    resample: str | None


@dataclass(frozen=True)
class Layout:
    """A peer's names. residual, attention, ends: by ours, of layers in a block and of those outside all stages."""

    ends: dict[str, str]
    residual: dict[str, str]
    attention: dict[str, str]
    block: Callable[[Place], str]
    """The residual block or the resampling convolution of a stage."""
    attends: Callable[[Place], str]
    """The attention of a stage."""
    conv: Callable[[Place], str] = lambda place: "conv"
    """The convolution in a resampling one."""


def weights(
    config: UNetConfig, layout: Layout, tensors: Tensors, special: Callable[[str, str, tuple[int, ...]], Tensor | None]
) -> dict[str, Tensor]:
    """Every weight of our U-Net, from the tensor that the layout names. Raises UserError where one does not fit.

    special: (our name, the peer's, our shape) -> a tensor, for those that are more than renamed; None for the others.
    """
    with torch.device("meta"):
        net = UNet(config)
    theirs_of, found = names(net, layout), {}
    for name, parameter in net.named_parameters():
        theirs, shape = theirs_of[name], tuple(parameter.shape)
        tensor = special(name, theirs, shape)
        found[name] = (tensors.take(theirs, shape) if tensor is None else tensor).contiguous()
        if found[name].shape != parameter.shape:
            raise tensors.refuse(theirs, f"{tensors.decider(theirs)} would make it another one")
    return found


def names(net: UNet, layout: Layout) -> dict[str, str]:
    """The peer's name of every parameter, by ours."""
    stages = {f"{place.part}.{place.position}": place for place in places(net)}
    return {name: _theirs(name, stages, layout) for name, _ in net.named_parameters()}


def places(net: UNet) -> Iterator[Place]:
    """The places of all stages, in the order of the network."""
    last = len(net.config.channel_mult) - 1
    for part, level in (("encoder", 0), ("middle", last), ("decoder", last)):
        index = 0
        for position, stage in enumerate(getattr(net, part)):
            assert isinstance(stage, Stage)
            yield Place(part, level, index, position, stage.resample)
            index += 1
            if stage.resample is not None:
                level, index = level + (1 if stage.resample == "down" else -1), 0


def _theirs(name: str, stages: dict[str, Place], layout: Layout) -> str:
    *path, kind = name.split(".")
    place = stages.get(".".join(path[:2]))
    if place is None:
        return f"{layout.ends['.'.join(path)]}.{kind}"
    within, layer = path[2], path[3]
    if within == "attention":
        return f"{layout.attends(place)}.{layout.attention[layer]}.{kind}"
    own = layout.conv(place) if layer == "conv" else layout.residual[layer]
    return f"{layout.block(place)}.{own}.{kind}"


def sine_first(weight: Tensor) -> Tensor:
    """The columns (or entries) of a layer on sines and cosines, for one on cosines and sines."""
    sines, cosines = weight.chunk(2, dim=-1)
    return torch.cat([cosines, sines], dim=-1)


def image_outputs(tensors: Tensors, name: str, shape: tuple[int, ...], *, learned: bool, setting: str) -> Tensor:
    """The last convolution's weight or bias, without the half that predicts the variance.

    Raises UserError where its channels are not those that the setting says.
    """
    found, double = tensors.shape(name), (2 * shape[0], *shape[1:])
    if learned and found == double:
        tensors.note(f"half of {name}", "it predicts the variance of DDPM's steps, which fastdiff does not use")
        return tensors.take(name, double)[: shape[0]]
    if not learned and found == double:
        raise tensors.refuse(name, f"that is twice the image's channels, which {setting} denies")
    if learned and found == shape:
        raise tensors.refuse(name, f"that is once the image's channels, and {setting} says twice")
    return tensors.take(name, shape)


def buildable(config: UNetConfig, place: str | Path) -> UNetConfig:
    """The config. Raises UserError where our U-Net cannot be it."""
    try:
        with torch.device("meta"):
            UNet(config)
    except ValueError as error:
        raise UserError(f"{place} describes a network that fastdiff's U-Net cannot be: {error}") from None
    return config
