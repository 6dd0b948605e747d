"""Checkpoints: a folder with `model.safetensors` and `model.json`, and for resuming `state.safetensors`, `state.json`.

Weights are safetensors and everything else is JSON, so that loading a checkpoint never runs code. A checkpoint is
written beside its place and renamed into it: it is there whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdiff.denoiser import Denoiser, DenoiserConfig
from fastdiff.errors import UserError

FORMAT = 1
PREFIX = "checkpoint-"


def save(
    folder: str | Path, denoiser: Denoiser, *, weights: dict[str, Tensor] | None = None,
    state: dict | None = None, state_tensors: dict[str, Tensor] | None = None,
) -> Path:  # fmt: skip
    """Write a checkpoint; an existing one in that place is replaced once the new one is complete.

    weights: what goes into the model's file instead of the denoiser's own (say, an average of them). state,
    state_tensors: what is needed to resume training. Raises OSError.
    """
    folder = Path(folder)
    beside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    weights = denoiser.network.state_dict() if weights is None else weights
    _write_tensors(beside / "model.safetensors", weights)
    _write_json(beside / "model.json", {"format": FORMAT, **denoiser.config.to_dict()})
    if state is not None:
        _write_tensors(beside / "state.safetensors", state_tensors or {})
        _write_json(beside / "state.json", state)
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    try:
        beside.rename(folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    return folder


def load(folder: str | Path, *, device: str | torch.device = "cpu") -> Denoiser:
    """The denoiser in a checkpoint's folder, or in the newest checkpoint of a run's folder, in eval mode.

    Raises UserError if there is none, or if it is damaged or does not fit together.
    """
    folder = find(folder)
    config = _read_config(folder)
    weights = _read_tensors(folder / "model.safetensors")
    try:
        with torch.device("meta"):
            denoiser = Denoiser(config)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder / 'model.json'} does not describe a fastdiff model: {error}") from None
    expected = {key: value.shape for key, value in denoiser.network.state_dict().items()}
    found = {key: value.shape for key, value in weights.items()}
    if expected != found:
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        raise UserError(
            f"{folder / 'model.safetensors'} holds weights of another architecture than its model.json describes "
            f"({len(wrong)} tensors differ, the first is {wrong[0]}): use the two files that were saved together"
        )
    denoiser.network.load_state_dict(weights, assign=True)
    denoiser = denoiser.requires_grad_(True).to(device, memory_format=torch.channels_last)
    return denoiser.eval()


def load_state(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """What `save` was given as state and state_tensors. Raises UserError if it is missing or damaged."""
    folder = Path(folder)
    return _read_json(folder / "state.json"), _read_tensors(folder / "state.safetensors")


def find(folder: str | Path) -> Path:
    """The checkpoint that `folder` means: itself, or a run's newest. Raises UserError if there is none."""
    folder = Path(folder)
    if (folder / "model.json").is_file():
        return folder
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint at {folder}: that folder does not exist")
    rounds = _numbered(folder, "steps-")
    if rounds:
        raise UserError(f"{folder} holds several models; name one: {', '.join(str(p) for p in rounds)}")
    numbered = newest(folder)
    if numbered is not None:
        return numbered
    raise UserError(f"there is no checkpoint at {folder}: it holds no model.json and no {PREFIX}* folder")


def newest(folder: Path) -> Path | None:
    """A run's newest numbered checkpoint, or None."""
    return next(reversed(_numbered(folder, PREFIX)), None)


def _numbered(folder: Path, prefix: str) -> list[Path]:
    """The checkpoints called prefix + number, by number."""
    found = [p.parent for p in folder.glob(f"{prefix}*/model.json") if p.parent.name.removeprefix(prefix).isdecimal()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(prefix)))


def _read_config(folder: Path) -> DenoiserConfig:
    values = _read_json(folder / "model.json")
    if values.pop("format", None) != FORMAT:
        raise UserError(
            f"{folder / 'model.json'} is not of format {FORMAT}, the one that this version of fastdiff reads"
        )
    try:
        return DenoiserConfig.from_dict(values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'model.json'} does not describe a fastdiff model: {error}") from None


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the checkpoint is incomplete; use another one") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): use another checkpoint") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged (not a JSON object): use another checkpoint")
    return values


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the checkpoint is incomplete; use another one") from None
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is damaged or truncated ({error}): use another checkpoint") from None


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _write_json(path: Path, values: dict) -> None:
    with open(path, "w") as file:
        json.dump(values, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
