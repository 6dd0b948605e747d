"""What can be known before long work begins: devices, guidance, what a model can do, and places for output."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from fastdiff import files
from fastdiff.denoiser import MAX_GUIDANCE, DenoiserConfig, is_guidance
from fastdiff.errors import UserError
from fastdiff.generate import Sampling
from fastdiff.schedule import CosineSchedule

BLOCK = 4096  # bytes that a file may take beyond its content


def device(name: str) -> None:
    """Raises UserError for a device that is not supported or that PyTorch does not see."""
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise UserError(f"--device {name}: unknown; use cuda, cuda:1, … or cpu")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: this PyTorch sees {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )


def graph(choice: str, device: str) -> None:
    """Raises UserError where a CUDA graph is insisted on without CUDA."""
    if choice == "on" and not device.startswith("cuda"):
        raise UserError(f"--graph on needs a CUDA device; --device is {device}: leave the option out")


def guidance(model: nn.Module, w: float, name: str | Path = "this model") -> None:
    """Raises UserError for a w that makes no sense here, and warns of one outside the trained range."""
    trained = model.config.guidance_range
    if not is_guidance(w):
        raise UserError(f"--guidance must be a number ≥ 0 and at most {MAX_GUIDANCE:g}, got {w}")
    if w and not model.num_classes:
        raise UserError(f"--guidance {w:g}: {name} is unconditional, so there is nothing to guide; use 0")
    if w and not model.config.guides_itself:
        can_guide(model.config, name, "use --guidance 0")
    if trained is not None and not trained[0] <= w <= trained[1]:
        files.warn(f"guidance {w:g} is outside [{trained[0]:g}, {trained[1]:g}], where {name} was trained")


def label(wanted: str | int, model: nn.Module, option: str, source: str | Path) -> int:
    """The number of a class that is given by its name, or by its number where no class has that name.

    Raises UserError for one that the model does not have.
    """
    names, count = model.config.class_names, model.num_classes
    if str(wanted) in names:
        return names.index(str(wanted))
    if str(wanted).isdecimal() and int(wanted) < count:
        return int(wanted)
    has = f"{count} classes, 0 to {count - 1}" if count else "no classes"
    has += f", called {', '.join(names[:5])}{', …' if len(names) > 5 else ''}" if names else ""
    raise UserError(f"{option} {wanted}: {source} has {has}")


def named(number: int, model: nn.Module) -> str:
    """A class as the commands print it."""
    names = model.config.class_names
    return f"{number} ({names[number]})" if names else str(number)


def can_guide(config: DenoiserConfig, name: str | Path, instead: str) -> None:
    """Raises UserError for a class-conditional model without an unconditional one, which would have to guide it."""
    if config.unet.num_classes and not config.can_guide:
        raise UserError(
            f"{name} never saw a null class, so there is no unconditional model to guide it with: import it together "
            f"with one (fastdiff import … --unconditional SOURCE), or {instead}"
        )


def finite(model: nn.Module, name: str | Path) -> None:
    """Raises UserError for a model with weights that are NaN or infinite, and names the first."""
    for key, tensor in getattr(model, "denoiser", model).network.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} has weights that are not finite (first in {key}): use another checkpoint")


def positive(options: object, *names: str) -> None:
    """Raises UserError for an option that is there, and neither positive nor None."""
    for name in names:
        value = getattr(options, name, None)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, got {value}")


def sampling(wanted: Sampling, config: DenoiserConfig, path: Path, *, force: bool = False) -> None:
    """Raises UserError for steps or a sampler that the model at `path` cannot take, and warns of those that harm.

    force: take a sampler that it was not trained for.
    """
    steps, sampler = wanted.steps, wanted.sampler
    in_one = config.sigma_init is not None
    if config.kind == "encoder":
        raise UserError(f"{path} is an encoder, which makes noise of images: use fastdiff.translate")
    if sampler is not None and (sampler == "one_step") != in_one:
        made_for = "one-step generators alone" if sampler == "one_step" else "several-step models"
        raise UserError(
            f"--sampler {sampler} is for {made_for}, and {path} is a {config.kind} model: leave the option out"
        )
    if in_one and steps not in (None, 1):
        raise UserError(f"--steps {steps}: {path} is a one-step generator; leave the option out")
    if config.steps is not None and sampler not in (None, config.sampler) and not force:
        raise UserError(
            f"--sampler {sampler}: {path} was trained for the {config.sampler} sampler: "
            "leave the option out, or use another all the same with --force"
        )
    if config.steps is not None and steps not in (None, config.steps):
        files.warn(f"{path} was trained for {config.steps} steps; with {steps} its images will be worse")
    if sampler == "heun" and isinstance(config.schedule, CosineSchedule):
        files.warn(f"heun's first step is too long on the cosine schedule of {path}: ddim makes better images")


def output(path: Path, overwrite: bool, *, file: bool) -> None:
    """Make the folder for an output. Raises UserError if that fails, or would replace something without being asked."""
    if path.exists() and file != path.is_file():
        raise UserError(f"--out {path} is a {'folder' if file else 'file'}: name a {'file' if file else 'folder'}")
    if not overwrite and (path.exists() if file else path.is_dir() and any(path.iterdir())):
        raise UserError(f"--out {path} already exists: replace it with --overwrite, or choose another name")
    folder(path.parent if file else path)


def replaceable(out: Path, overwrite: bool, *, is_part: Callable[[Path], bool], what: str) -> None:
    """Raises UserError where a folder holds anything but an earlier output that may be replaced.

    is_part: whether a file in it belongs to one. what: what messages call such an output.
    """
    if out.is_file():
        raise UserError(f"--out {out} is a file: name a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    foreign = [path.name for path in out.iterdir() if not is_part(path)]
    if foreign or not overwrite:
        holds = f"holds {foreign[0]}, which is no part of {what}" if foreign else "already exists"
        instead = "choose another name" if foreign else "replace it with --overwrite, or choose another name"
        raise UserError(f"--out {out} {holds}: {instead}")


def space(path: Path, count: int, size: int) -> None:
    """Raises UserError where the drive of a folder has no room for `count` pictures of `size` bytes at most."""
    needed = count * (size + BLOCK)
    free = shutil.disk_usage(path).free
    if free < needed:
        raise UserError(
            f"--out: pictures may take {needed / 2**20:.0f} MiB, and the drive of {path} has {free / 2**20:.0f} MiB "
            "left: make room there, or choose another one"
        )


def makeable(path: Path) -> None:
    """Raises UserError for a folder that is not there and could not be made, without making it."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"--out: the folder {path} cannot be made ({there} is a file): choose another one")
    if not os.access(there, os.W_OK):
        raise UserError(f"--out: the folder {there} is not writable: choose another one")


def folder(path: Path) -> None:
    """Raises UserError where a folder cannot be made or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: the folder {path} cannot be made ({error.strerror}): choose another one") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"--out: the folder {path} is not writable: choose another one")
