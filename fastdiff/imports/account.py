"""Accounts of a source's settings and tensors: each is read by name, and what is left over is refused by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff.denoiser import Source
from fastdiff.errors import UserError


def source(path: Path, format: str) -> Source:
    """A file with its SHA-256. Raises UserError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return Source(format, path.name, hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): name the file or folder of a trained network"
        ) from None


class Settings:
    """Settings of a source by name. Each has to be taken, or is refused by `finish`.

    place: what messages call their place. defaults: the library's own, of the settings that it may leave out.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], place: str | Path):
        self.place, self._values, self._left = place, {**defaults, **values}, {*values}
        self.defaulted = [name for name in defaults if name not in values]

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __getitem__(self, name: str) -> Any:
        """Take a setting. Raises UserError where it is missing."""
        if name not in self._values:
            raise UserError(f"{self.place} has no setting {name}, which is needed: take the file as it was published")
        self._left.discard(name)
        return self._values[name]

    def refuse(self, name: str, known: str) -> UserError:
        """The error for a setting that fastdiff does not know to be right."""
        return UserError(f"{self.place}: {name} is {self._values.get(name)!r}, and fastdiff reads {known}")

    def expect(self, name: str, *known: Any) -> Any:
        """Take a setting. Raises UserError for a value that is none of these."""
        value = self[name]
        if not any((type(value) is type(one) and value == one) or (_number(value) and value == one) for one in known):
            raise self.refuse(name, " or ".join(map(repr, known)))
        return value

    def whole(self, name: str, *, least: int = 1) -> int:
        """Take a whole number. Raises UserError for anything else."""
        value = self[name]
        if type(value) is not int or value < least:
            raise self.refuse(name, f"whole numbers from {least}")
        return value

    def number(self, name: str) -> float:
        """Take a number. Raises UserError for anything else."""
        value = self[name]
        if not _number(value):
            raise self.refuse(name, "numbers")
        return float(value)

    def numbers(self, name: str) -> tuple[int | float, ...]:
        """Take a list of numbers. Raises UserError for anything else."""
        value = self[name]
        if not isinstance(value, (list, tuple)) or not all(map(_number, value)):
            raise self.refuse(name, "lists of numbers")
        return tuple(value)

    def ignore(self, *names: str) -> None:
        """Pass over settings that do not change what the network computes."""
        self._left.difference_update(names)

    def finish(self) -> None:
        """Raises UserError if a setting was not taken."""
        if self._left:
            names = ", ".join(f"{name} = {self._values[name]!r}"[:60] for name in sorted(self._left)[:5])
            raise UserError(f"{self.place} has settings that fastdiff does not know ({names}): it cannot be imported")


def _same(value: Any, known: Any) -> bool:
    """Equal, where 1 and 1.0 are but True is neither."""
    return value == known and (type(value) is type(known) or (_number(value) and _number(known)))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Tensors:
    """Tensors of a source by name. Each has to be taken, or dropped with a reason, or is refused by `finish`.

    place: what messages call their place. decided_by: (a part of a tensor's name, the settings that decide whether it
    is there and of which shape), first match first, for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], place: str | Path, decided_by: tuple[tuple[str, str], ...]):
        self.place, self._tensors, self._left, self._decided_by = place, tensors, {*tensors}, decided_by
        self.dropped: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def take(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """A tensor as float32. Raises UserError where it is missing, or has neither this shape nor this and 1s behind.

        The 1s are of 1×1 convolutions that are linear layers here.
        """
        if name not in self._tensors:
            raise UserError(f"{self.place} has no tensor {name}, which {self.decider(name)} would give it")
        tensor = self._tensors[name]
        self._left.discard(name)
        if not tensor.is_floating_point():
            raise UserError(f"{self.place}: the tensor {name} holds {tensor.dtype}, not floating-point numbers")
        if shape is not None and (*shape, *(1,) * (tensor.ndim - len(shape))) != tuple(tensor.shape):
            raise self.refuse(name, f"{self.decider(name)} would make it {_shape(shape)}")
        return (tensor if shape is None else tensor.reshape(shape)).detach().float()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that has to be there."""
        if name not in self._tensors:
            raise UserError(f"{self.place} has no tensor {name}: it is no network of this kind, or not whole")
        return tuple(self._tensors[name].shape)

    def refuse(self, name: str, why: str) -> UserError:
        """The error for a tensor that contradicts the settings."""
        return UserError(
            f"{self.place}: the tensor {name} is {_shape(self.shape(name))}, and {why}: give the settings that it was "
            "trained with"
        )

    def decider(self, name: str) -> str:
        return next((settings for part, settings in self._decided_by if part in name), "the configuration")

    def drop(self, name: str, why: str) -> None:
        """Leave a tensor out, and say so."""
        if name in self._left:
            self._left.discard(name)
            self.dropped[name] = why

    def ignore(self, name: str) -> None:
        """Leave out a tensor that says nothing that was not checked elsewhere."""
        self._left.discard(name)

    def note(self, what: str, why: str) -> None:
        """Say that a part of a tensor is left out."""
        self.dropped[what] = why

    def finish(self) -> None:
        """Raises UserError if a tensor was neither taken nor dropped."""
        if self._left:
            first, more = sorted(self._left)[0], len(self._left) - 1
            others = f" (and {more} more)" if more else ""
            raise UserError(
                f"{self.place} has a tensor {first}{others} that its settings have no place for, which "
                f"{self.decider(first)} would give it: give the settings that it was trained with"
            )


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a number"
