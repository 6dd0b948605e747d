"""Outputs of an imported network against its own library's, which alone prove that it was read rightly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastdiff.denoiser import Denoiser
from fastdiff.errors import UserError
from fastdiff.imports.model import Imported, Peer
from fastdiff.schedule import TabulatedSchedule

LIMIT = 2e-5  # rounding in float32 stays below, and a wrong ε of a norm or factor does not
LEVELS = (0.1, 0.5, 0.9)  # of the steps, where the peer is installed
KEYS = "input (N, C, H, W), time (N,), output (N, C, H, W), and label (N,) for a network with classes"


class Outputs(NamedTuple):
    """What a peer was called with, and what it gave: images (N, C, H, W), time and label (N,)."""

    input: Tensor
    time: Tensor
    output: Tensor
    label: Tensor | None


@torch.no_grad()
def outputs_of(peer: Peer, imported: Imported) -> Outputs:
    """What an installed peer makes of noise at three noise levels."""
    config = imported.config
    count, steps = len(LEVELS), config.schedule.steps
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(count, config.unet.image_channels, *config.unet.image_size, generator=generator)
    step = torch.tensor([round(level * (steps - 1)) for level in LEVELS])
    classes = config.unet.num_classes
    label = torch.arange(count) * max(1, classes - 1) // (count - 1) if classes else None
    return Outputs(z, step, peer(z, step, label), label)


def read(path: Path) -> Outputs:
    """Outputs that a user made with the peer, from a safetensors or npz file. Raises UserError for anything else."""
    found = _arrays(path)
    unknown = {*found} - {*Outputs._fields}
    missing = {"input", "time", "output"} - {*found}
    if unknown or missing:
        wrong = f"lacks {', '.join(sorted(missing))}" if missing else f"has {', '.join(sorted(unknown))}"
        raise UserError(f"--check {path} {wrong}: it holds {KEYS}")
    images, time, output, label = (found.get(name) for name in Outputs._fields)
    shapes_fit = images.ndim == 4 and output.ndim == 4 and len(images) == len(output) == time.numel()
    if not shapes_fit or (label is not None and label.shape != time.shape) or time.ndim != 1:
        raise UserError(f"--check {path}: its shapes do not fit together; it holds {KEYS}")
    if len(time.unique()) < 3:
        raise UserError(f"--check {path} has {len(time.unique())} noise levels: make outputs at three or more")
    return Outputs(images.float(), time.double(), output.float(), None if label is None else label.long())


def _arrays(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: torch.from_numpy(np.ascontiguousarray(file[name])) for name in file.files}
        return load_file(path)
    except Exception as error:  # a foreign file may raise anything
        raise UserError(f"--check {path} is no safetensors or npz file of arrays ({error})") from None


@torch.no_grad()
def largest_error(imported: Imported, theirs: Outputs, place: str | Path) -> float:
    """The largest |ours − theirs| of an image, relative to the largest |theirs| of it. Raises UserError above LIMIT.

    Of a network that gives an image D, what is compared is the network's F in it, as D is nearly its input where there
    is little noise; what D's own rounding does to F is allowed for.
    """
    denoiser = imported.denoiser()
    _check_fit(denoiser, theirs, place)
    ours, expected, rounding = _outputs(imported, denoiser, theirs, place)
    scale = expected.abs().amax((1, 2, 3)).clamp(min=1e-30)
    errors = (ours - expected).abs().amax((1, 2, 3)) / scale
    if not torch.isfinite(errors).all():
        raise UserError(f"{place}: outputs are not finite, so nothing can be compared")
    allowed = LIMIT + rounding / scale
    worst = int((errors / allowed).argmax())
    if errors[worst] > allowed[worst]:
        raise UserError(
            f"{place}: at {imported.called_with} {theirs.time[worst]:g} the imported network's output is "
            f"{errors[worst]:.1e} off (at most {allowed[worst]:.1e}): its settings or weights are not what they seem, "
            "so that it is not imported"
        )
    return float(errors.max())


def _check_fit(denoiser: Denoiser, theirs: Outputs, place: str | Path) -> None:
    shape, classes = tuple(theirs.input.shape[1:]), denoiser.num_classes
    if shape != denoiser.image_shape or theirs.output.shape[2:] != theirs.input.shape[2:]:
        raise UserError(f"{place}: images are {shape}, and the network's are {denoiser.image_shape}")
    if (theirs.label is None) == (classes > 0):
        raise UserError(
            f"{place}: the network has {classes} classes, so label is {'needed' if classes else 'too much'}"
        )
    if theirs.label is not None and not ((theirs.label >= 0) & (theirs.label < classes)).all():
        raise UserError(f"{place}: labels go from 0 to {classes - 1}")


def _outputs(
    imported: Imported, denoiser: Denoiser, theirs: Outputs, place: str | Path
) -> tuple[Tensor, Tensor, Tensor]:
    """F of ours and of theirs, float64 (N, C, H, W), and how far rounding of their output moves theirs, (N,)."""
    angle = _angles(imported, theirs.time, place)
    sin, cos = (f(angle)[:, None, None, None] for f in (torch.sin, torch.cos))
    output = theirs.output.double()
    if imported.called_with == "step":
        ours = denoiser.network_output(theirs.input, angle, theirs.label, None)
        return ours.double(), output[:, : ours.shape[1]], torch.zeros(len(ours))
    z = theirs.input.double() * cos
    ours = denoiser.network_output(z.float(), angle, theirs.label, None)
    a, b = (coef[:, None, None, None] for coef in denoiser.velocity_coefficients(angle))
    expected = ((cos * z - output) / sin - a * z) / b
    rounding = 4 * torch.finfo(torch.float32).eps * output.abs().amax((1, 2, 3)) / (sin * b).abs().flatten()
    return ours.double(), expected, rounding


def _angles(imported: Imported, time: Tensor, place: str | Path) -> Tensor:
    schedule = imported.config.schedule
    if imported.called_with == "step":
        if not ((time >= 0) & (time < schedule.steps) & (time == time.round())).all():
            raise UserError(f"{place}: time is the network's step, a whole number from 0 to {schedule.steps - 1}")
        return schedule.angles()[time.long()]
    if not ((time > 0) & torch.isfinite(time)).all():
        raise UserError(f"{place}: time is EDM's σ, a positive number")
    angle = torch.atan(time.double())
    if isinstance(schedule, TabulatedSchedule):
        step = schedule.step(angle)
        if ((step - step.round()).abs() > 0.01).any():
            raise UserError(f"{place}: time is not one of the network's own noise levels: take them from round_sigma")
    return angle
