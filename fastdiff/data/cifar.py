"""CIFAR-10's binary and Python archives, or folders of what is inside one."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.data.dataset import Dataset, check_labels, no_split
from fastdiff.errors import UserError

_CIFAR_BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
_CIFAR_MARKS = ("data_batch_1.bin", "data_batch_1", "test_batch.bin", "test_batch")
_CIFAR_INSIDE = (
    "cifar-10-binary.tar.gz",
    "cifar-10-python.tar.gz",
    "cifar-10-batches-bin",
    "cifar-10-batches-py",
)


def find(path: Path) -> Path | None:
    """The folder or archive of batches at, or directly inside, `path`; None if there is none."""
    for place in (path, *(path / inside for inside in _CIFAR_INSIDE)):
        if place.is_file() and place.name.endswith(".tar.gz"):
            return place
        if any((place / mark).is_file() for mark in _CIFAR_MARKS):
            return place
    return None


def load(path: Path, split: str, name: str) -> Dataset:
    stems = _CIFAR_BATCHES.get(split)
    if stems is None:
        raise no_split(split, path, _CIFAR_BATCHES)
    wanted = {stem + end for stem in stems for end in ("", ".bin")} | {"batches.meta", "batches.meta.txt"}
    files = _read_members(path, wanted)
    binary = any(file.endswith((".bin", ".txt")) for file in files)
    meta = "batches.meta.txt" if binary else "batches.meta"
    batches = [f"{stem}.bin" for stem in stems] if binary else stems
    if missing := [file for file in (meta, *batches) if file not in files]:
        raise UserError(
            f"{path} has no {', '.join(missing)}, so its split {split!r} is not complete: fetch CIFAR-10 again"
        )
    read_names, read_batch = (_binary_names, _binary_batch) if binary else (_python_names, _python_batch)
    class_names = read_names(files[meta], path / meta)
    images, labels = [], []
    for batch in batches:
        batch_images, batch_labels = read_batch(files[batch], path / batch)
        check_labels(batch_labels, len(class_names), path / batch)
        images.append(batch_images.reshape(-1, 3, 32, 32))
        labels.append(batch_labels)
    return Dataset(np.concatenate(images), np.concatenate(labels), class_names, name, split)


def _read_members(path: Path, wanted: set[str]) -> dict[str, bytes]:
    """Contents, by base name, of the wanted files of a folder or .tar.gz; nothing is unpacked to disk."""
    try:
        if path.is_dir():
            return {file: (path / file).read_bytes() for file in wanted if (path / file).is_file()}
        with tarfile.open(path, "r:gz") as archive:
            found = ((os.path.basename(member.name), member) for member in archive if member.isfile())
            return {file: archive.extractfile(member).read() for file, member in found if file in wanted}
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again") from error


def _binary_names(data: bytes, source: Path) -> tuple[str, ...]:
    lines = data.decode("utf-8", "replace").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def _binary_batch(data: bytes, source: Path) -> tuple[np.ndarray, np.ndarray]:
    record = 1 + 3 * 32 * 32  # the label, then the image
    if not data or len(data) % record:
        raise UserError(f"{source} has {len(data)} bytes, not a multiple of {record}: fetch CIFAR-10 again")
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    return records[:, 1:], records[:, 0].astype(np.int64)


def _python_names(data: bytes, source: Path) -> tuple[str, ...]:
    names = _unpickle(data, source).get(b"label_names")
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise UserError(f"{source} has no list of label_names: fetch CIFAR-10 again")
    return tuple(name.decode("utf-8", "replace") for name in names)


def _python_batch(data: bytes, source: Path) -> tuple[np.ndarray, np.ndarray]:
    batch = _unpickle(data, source)
    images, labels = batch.get(b"data"), batch.get(b"labels")
    if not (
        isinstance(images, np.ndarray)
        and images.dtype == np.uint8
        and isinstance(labels, list)
        and images.shape == (len(labels), 3 * 32 * 32)
        and all(type(label) is int for label in labels)
    ):
        raise UserError(f"{source} does not hold uint8 images (N, 3072) and N labels: fetch CIFAR-10 again")
    return images, np.array(labels, dtype=np.int64)


_RECONSTRUCT = np.empty(0).__reduce__()[0]  # wherever this NumPy keeps it
_HARMLESS = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, _: str.encode(text, "latin-1"),  # Python 3's bytes in protocol 2
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of plain values and NumPy arrays, and refuses everything else that could be called."""

    def __init__(self, data: bytes, source: Path):
        super().__init__(io.BytesIO(data), encoding="bytes")  # the original is a Python 2 pickle
        self._source = source

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise UserError(
                f"{self._source} asks to run {module}.{name}, which no CIFAR-10 batch needs: do not trust "
                f"this file, and fetch CIFAR-10 again"
            )
        return _HARMLESS[module, name]


def _unpickle(data: bytes, source: Path) -> dict:
    try:
        content = _ArrayUnpickler(data, source).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{source} cannot be read ({error}): fetch CIFAR-10 again") from error
    if not isinstance(content, dict):
        raise UserError(f"{source} does not hold a dictionary: fetch CIFAR-10 again")
    return content
