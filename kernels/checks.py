"""What the public operations require of their arguments: one sentence names the argument, what it is and must be."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OPTIONAL = {"b", "coef_z", "coef_b", "coef_noise", "clip.limit", "clip.coef_z", "clip.coef_x"}


def images(name: str, **given: Tensor | None) -> None:
    """Floating, all of one shape (B, ...) and on one device; optional ones may be None."""
    (key, first), *_ = given.items()
    for other, value in given.items():
        if value is None and other in OPTIONAL:
            continue
        floating(name, other, value)
        if value.ndim < 2:
            raise ValueError(f"{name}: {other} must be (B, ...) with at least two dimensions, got {tuple(value.shape)}")
        if value.shape != first.shape:
            raise ValueError(f"{name}: {other} has shape {tuple(value.shape)}, but {key} has {tuple(first.shape)}")
        device(name, other, value, f"{key} is", first)


def not_empty(name: str, key: str, image: Tensor) -> None:
    """A mean over a sample needs some elements; an empty batch is no problem."""
    if 0 in image.shape[1:]:
        raise ValueError(f"{name}: {key} has samples without elements, {tuple(image.shape)}")


def coefficients(name: str, image: Tensor, **given: Tensor | None) -> None:
    """Floating, (B,), and on the images' device; optional ones may be None."""
    for key, value in given.items():
        if value is None and key in OPTIONAL:
            continue
        floating(name, key, value)
        if value.shape != image.shape[:1]:
            raise ValueError(f"{name}: {key} must have shape ({image.shape[0]},), got {tuple(value.shape)}")
        device(name, key, value, "the images are", image)


def parameter(name: str, key: str, value: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """Floating, of one shape, and on x's device."""
    floating(name, key, value)
    if value.shape != shape:
        raise ValueError(f"{name}: {key} must have shape {shape}, got {tuple(value.shape)}")
    device(name, key, value, "x is", x)


def shape(name: str, value: Sequence[int]) -> tuple[int, ...]:
    """A shape (B, ...) as a tuple."""
    try:
        sizes = tuple(operator.index(size) for size in value)
    except TypeError:
        raise TypeError(f"{name}: shape must be a sequence of integers, got {value!r}") from None
    if not sizes or any(size < 0 for size in sizes):
        raise ValueError(f"{name}: shape must be (B, ...) without negative sizes, got {sizes}")
    return sizes


def ids(name: str, batch: int, sample_ids: Tensor, like: Tensor | None = None) -> None:
    """int64 (B,), on the device of `like` if given."""
    tensor(name, "sample_ids", sample_ids)
    if sample_ids.shape != (batch,) or sample_ids.dtype != torch.int64:
        raise ValueError(
            f"{name}: sample_ids must be int64 of shape ({batch},), "
            f"got {sample_ids.dtype} of shape {tuple(sample_ids.shape)}"
        )
    if like is not None:
        device(name, "sample_ids", sample_ids, "the images are", like)


def integer(name: str, key: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: {key} must be an integer, got {value!r}") from None


def number(name: str, key: str, value: float) -> float:
    if isinstance(value, float):  # compilers' symbolic ones too
        return value
    if isinstance(value, (str, bytes, Tensor)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: {key} must be a number, got {value!r}")
    return float(value)


def tensor(name: str, key: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {key} must be a tensor, got {value if value is None else type(value).__name__}")


def floating(name: str, key: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        tensor(name, key, value)
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: {key} must be float16, bfloat16, float32 or float64, got {value.dtype}")


def device(name: str, key: str, value: Tensor, others: str, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name}: {key} is on {value.device}, but {others} on {like.device}; move it there")
