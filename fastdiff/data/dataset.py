"""A data set in memory, its splits, and where pixels change between bytes and [-1, 1]."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from fastdiff.errors import UserError

ACCEPTED = (
    "'digits', 'mnist', 'fashion-mnist', 'cifar10', a folder of IDX files, a folder of CIFAR-10 batches or "
    "cifar-10-binary.tar.gz or cifar-10-python.tar.gz, a folder or zip of images, or a file of latents"
)
SPLITS = ("train", "test", "val")
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Latents:
    """What latents are: (a VAE's code − shift)·scale. Raises ValueError unless both are finite, and scale positive."""

    scale: float
    shift: float = 0.0
    vae: str = ""
    """The SHA-256 of the VAE's weights, where that is known."""

    def __post_init__(self):
        if not (0 < self.scale < math.inf and math.isfinite(self.shift)):
            raise ValueError("a scale is a positive number, and a shift a finite one")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images of one size, all in one array.

    images: uint8 (N, C, H, W), of latents float32, possibly memory-mapped and read-only; labels: int64 (N,), in
    [0, num_classes), or all 0 when the data are unlabelled (num_classes 0); name: such as "digits".
    Raises UserError when the arrays are empty, or do not have these types, shapes or ranges.
    """

    images: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    class_names: tuple[str, ...]
    name: str
    split: str
    latents: Latents | None = None
    """How its images were scaled, where they are a VAE's latents."""

    def __post_init__(self) -> None:
        kind = np.dtype(np.uint8 if self.latents is None else np.float32)
        if self.images.dtype != kind or self.images.ndim != 4 or self.images.size == 0:
            raise UserError(
                f"the images of {self.name!r} are {self.images.dtype} {self.images.shape}: "
                f"give {kind} (N, C, H, W) with no axis empty"
            )
        if self.labels.dtype != np.int64 or self.labels.shape != self.images.shape[:1]:
            raise UserError(
                f"the labels of {self.name!r} are {self.labels.dtype} {self.labels.shape}: "
                f"give int64 ({len(self.images)},), one an image"
            )
        check_labels(self.labels, max(1, self.num_classes), repr(self.name))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Image `index`, uint8 (C, H, W), and its label."""
        return self.images[index], int(self.labels[index])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return self.images.shape[1:]

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 when the data are unlabelled."""
        return len(self.class_names)

    def without_labels(self) -> Dataset:
        """The same images as unlabelled data."""
        return replace(self, labels=np.zeros(len(self), np.int64), class_names=())

    def in_order_of(self, class_names: tuple[str, ...]) -> Dataset:
        """The same images with the labels that their classes have in this order of the same names."""
        number = np.array([class_names.index(name) for name in self.class_names])
        return replace(self, labels=number[self.labels], class_names=class_names)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the shape, the labels or the pixels.

        Above 256 MiB only every k-th image is read, with the smallest k that reads no more than that.
        """
        stride = -(-self.images.nbytes // (1 << 28))
        digest = hashlib.blake2b(repr(self.images.shape).encode(), digest_size=8)
        digest.update(np.ascontiguousarray(self.labels))
        digest.update(np.ascontiguousarray(self.images[::stride]))
        return digest.hexdigest()


class NoSplitError(UserError):
    """The data set is there, but has no such split."""


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Map uint8 pixels to float32 in [-1, 1], on the same device. Raises UserError for another dtype."""
    if images.dtype != torch.uint8:
        raise UserError(f"to_float was given {images.dtype} images: give torch.uint8")
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Map float pixels in [-1, 1] to the nearest uint8, the exact inverse of `to_float`.

    Values outside are clamped, NaN becomes 0. Raises UserError when the images are not floats.
    """
    if not images.is_floating_point():
        raise UserError(f"to_uint8 was given {images.dtype} images: give floats in [-1, 1]")
    pixels = (images.to(torch.float32) + 1) * 127.5
    # nan_to_num, because casting NaN to an integer is undefined.
    return pixels.nan_to_num(nan=0.0).clamp(0, 255).round().to(torch.uint8)


def are_finite(images: torch.Tensor) -> torch.Tensor:
    """(N,) bool: which of N images have no pixel that is NaN or infinite."""
    return images.flatten(1).isfinite().all(1)


def check_labels(labels: np.ndarray, num_classes: int, source: str | Path) -> None:
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise UserError(
            f"{source} holds the label {wrong[0]}, but its classes go from 0 to {num_classes - 1}: correct the label"
        )


def numbered(num_classes: int) -> tuple[str, ...]:
    return tuple(str(label) for label in range(num_classes))


def no_split(split: str, source: str | Path, available: Iterable[str], reason: str = "") -> NoSplitError:
    choices = ", ".join(repr(name) for name in available) or "another data set"
    return NoSplitError(f"{source} has no split {split!r}{reason}: use {choices}")


def stratified(labels: np.ndarray, fraction: float) -> np.ndarray:
    """bool (N,): True for `fraction` of every class; at least one of a class, but never all of it."""
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        shuffled = members[np.argsort(random_words(len(members), _SPLIT_SEED, label), kind="stable")]
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        chosen[shuffled[:count]] = True
    return chosen


def random_words(count: int, *key: int) -> np.ndarray:
    """uint64 (count,). NumPy keeps this bit stream for ever, but not Generator.permutation."""
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
