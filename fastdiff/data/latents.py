"""Latents: a safetensors file of what a VAE makes of images, with their labels and how they were scaled."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from fastdiff.data.dataset import Dataset, Latents, no_split, numbered
from fastdiff.errors import UserError

HOLDS = "latents (N, C, H, W), labels (N,) where there are classes, and scale in its metadata"


def load(path: Path, split: str, name: str) -> Dataset:
    """All of a file as the split train. Raises UserError for one that is damaged, or does not say its scale."""
    if split != "train":
        raise no_split(split, path, ["train"])
    try:
        with safe_open(path, "pt") as file:
            told, keys = file.metadata() or {}, {*file.keys()}
            tensors = {key: file.get_tensor(key) for key in keys & {"latents", "labels"}}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged, or no safetensors file ({error}): make it by fastdiff latents") from None
    if "latents" not in keys or keys - {"latents", "labels"}:
        raise UserError(f"{path} holds {', '.join(sorted(keys)) or 'nothing'}: a file of latents holds {HOLDS}")
    images = tensors["latents"]
    if not images.is_floating_point() or images.ndim != 4 or not torch.isfinite(images).all():
        raise UserError(f"{path}: latents are finite floating-point numbers (N, C, H, W), not {images.dtype}")
    labels = tensors.get("labels")
    names = _names(told, labels, path)
    labels = np.zeros(len(images), np.int64) if labels is None else labels.long().numpy()
    return Dataset(images.float().numpy(), labels, names, name, split, _latents(told, path))


def _latents(told: dict[str, str], path: Path) -> Latents:
    if "scale" not in told:
        raise UserError(
            f"{path} does not say how its latents were scaled, without which no VAE can decode them: write its "
            "scaling_factor as scale into the file's metadata"
        )
    try:
        return Latents(float(told["scale"]), float(told.get("shift", 0)), told.get("vae", ""))
    except ValueError as error:
        raise UserError(f"{path}: scale {told['scale']!r}, shift {told.get('shift')!r}: {error}") from None


def _names(told: dict[str, str], labels: torch.Tensor | None, path: Path) -> tuple[str, ...]:
    if labels is None:
        return ()
    try:
        names = tuple(map(str, json.loads(told["classes"]))) if "classes" in told else ()
    except (ValueError, TypeError):
        raise UserError(f"{path}: classes in its metadata is no list of names") from None
    return names or numbered(int(labels.max()) + 1 if len(labels) else 0)
