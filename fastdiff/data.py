"""Data sets as uint8 arrays in memory, and an exactly resumable stream of training batches.

`load` reads every format into the same `Dataset`; `Batches` shuffles one for ever; `to_float` and
`to_uint8` are the only two places where pixels change between bytes and [-1, 1].
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import os
import pickle
import tarfile
import uuid
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fastdiff.errors import UserError

__all__ = ["Batch", "Batches", "Dataset", "NoSplitError", "load", "to_float", "to_uint8"]

_ACCEPTED = (
    "'digits', 'mnist', 'fashion-mnist', 'cifar10', a folder of IDX files, a folder of CIFAR-10 batches or "
    "cifar-10-binary.tar.gz or cifar-10-python.tar.gz, a folder of images, or a zip of images"
)
_HOW_TO_GET = {
    "mnist": "put train-images-idx3-ubyte.gz and its three companions into one of these folders",
    "fashion-mnist": "on Debian or Ubuntu install it with 'apt install dataset-fashion-mnist', or put "
    "train-images-idx3-ubyte.gz and its three companions into one of these folders",
    "cifar10": "put cifar-10-binary.tar.gz into one of these folders",
}
_DEBIAN = {"fashion-mnist": Path("/usr/share/datasets/fashion-mnist")}  # of the package dataset-fashion-mnist
_FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_SPLITS = ("train", "test", "val")
_MAX_CLASSES = 1 << 16  # so that one wild label cannot ask for millions of classes
_SPLIT_SEED = 0


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images of one size, all in one array.

    images: uint8 (N, C, H, W), possibly memory-mapped and read-only; labels: int64 (N,), in
    [0, num_classes), or all 0 when the data are unlabelled (num_classes 0); name: such as "digits".
    Raises UserError when the arrays are empty, or do not have these types, shapes or ranges.
    """

    images: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    class_names: tuple[str, ...]
    name: str
    split: str

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.size == 0:
            raise UserError(
                f"the images of {self.name!r} are {self.images.dtype} {self.images.shape}: "
                f"give uint8 (N, C, H, W) with no axis empty"
            )
        if self.labels.dtype != np.int64 or self.labels.shape != self.images.shape[:1]:
            raise UserError(
                f"the labels of {self.name!r} are {self.labels.dtype} {self.labels.shape}: "
                f"give int64 ({len(self.images)},), one an image"
            )
        _check_labels(self.labels, max(1, self.num_classes), repr(self.name))

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
        return Dataset(self.images, np.zeros(len(self), np.int64), (), self.name, self.split)

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


def load(spec: str | Path, split: str = "train", *, cache: Path | None = None) -> Dataset:
    """Load a data set by name, folder or file.

    spec is one of

    - "digits": the 1797 handwritten 8x8 digits that come with scikit-learn, split 80/20;
    - a folder of IDX files (MNIST, Fashion-MNIST), zero-padded on both sides to multiples of 8;
    - CIFAR-10: its binary or its Python archive (.tar.gz), or a folder of the files inside one;
    - "mnist", "fashion-mnist", "cifar10": such a folder in $FASTDIFF_DATA or ./data;
    - a folder or zip of images, one subfolder a class (labels in the order of the sorted names). With
      train/ and test/ (or val/) above the classes, these are the splits; else it is split 90/10. Without
      subfolders, the images are unlabelled and all of them are split "train";
    - a folder or zip with the dataset.json of the EDM tools, which holds the labels; all of it is "train".

    Images are grey (C = 1) when every file is, else RGB. Alpha is dropped, an animation gives its first
    frame, EXIF rotation is not applied. Decoded images are kept as one memory-mapped file in `cache`
    (default: $FASTDIFF_CACHE, else ~/.cache/fastdiff/data) until a file's name, size or time changes.

    split is "train", "test" or "val"; a folder with val/ but no test/ gives val/ as "test".
    Raises UserError, naming the file, when the data are missing, damaged, of several sizes or mislabelled,
    or have no such split.
    """
    if split not in _SPLITS:
        raise UserError(f"unknown split {split!r} of {str(spec)!r}: use one of {', '.join(_SPLITS)}")
    if spec == "digits":
        return _load_digits(split)
    if spec in _HOW_TO_GET:
        path, name = _find(spec), spec
    else:
        path = Path(spec).expanduser()
        name = os.path.basename(os.path.abspath(path)).removesuffix(".zip").removesuffix(".tar.gz")
    if not path.exists():
        raise UserError(f"there is no data set {str(spec)!r}: give {_ACCEPTED}")
    if path.is_dir() and _is_idx(path):
        return _load_idx(path, split, name)
    if batches := _find_cifar(path):
        return _load_cifar(batches, split, name)
    if path.is_dir() or path.suffix.lower() == ".zip":
        return _load_images(path, split, name, cache)
    raise UserError(f"{path} is not a data set: give {_ACCEPTED}")


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


class NoSplitError(UserError):
    """The data set is there, but has no such split."""


class Batch(NamedTuple):
    """One training batch."""

    images: torch.Tensor  # uint8 (B, C, H, W)
    labels: torch.Tensor  # int64 (B,)
    sample_ids: torch.Tensor  # int64 (B,): positions in the stream, unique over the run; they key the noise


class Batches(Iterator[Batch]):
    """An endless stream of shuffled batches that can be stopped and resumed anywhere.

    Every epoch shows each image once, in an order drawn from (seed, epoch); batches run over the ends of
    epochs. With `flip`, half of the samples are mirrored left to right, as drawn from (seed, position).
    The stream is therefore the same for every batch size.
    Raises UserError unless 0 < batch_size <= len(dataset) and seed >= 0.
    """

    def __init__(self, dataset: Dataset, batch_size: int, *, seed: int = 0, flip: bool = False):
        if not 0 < batch_size <= len(dataset):
            raise UserError(
                f"batch size {batch_size} does not fit {dataset.name!r} ({dataset.split}), which has "
                f"{len(dataset)} images: choose one from 1 to {len(dataset)}"
            )
        if seed < 0:
            raise UserError(f"seed {seed} of the batches is negative: choose 0 or more")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.flip = flip
        self._position = 0  # epoch * len(dataset) + index
        self._drawn_epoch = -1

    def __next__(self) -> Batch:
        positions = np.arange(self._position, self._position + self.batch_size, dtype=np.int64)
        epochs, indices = np.divmod(positions, len(self.dataset))
        parts = [self._draw(epoch, indices[epochs == epoch]) for epoch in np.unique(epochs).tolist()]
        chosen, mirrored = (np.concatenate(part) for part in zip(*parts, strict=True))
        images = self.dataset.images[chosen]  # a copy
        if self.flip:
            images[mirrored] = images[mirrored, :, :, ::-1]
        self._position += self.batch_size
        labels = self.dataset.labels[chosen]
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(positions))

    def state(self) -> dict[str, int]:
        """The place of the next sample, ready for JSON."""
        epoch, index = divmod(self._position, len(self.dataset))
        return {"epoch": epoch, "permutation_seed": self.seed, "index": index}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state()` was taken, with any batch size.

        Raises UserError when the state has another seed or points outside this data set.
        """
        epoch, seed, index = (state.get(key) for key in ("epoch", "permutation_seed", "index"))
        if seed != self.seed:
            raise UserError(
                f"the saved batches have permutation_seed {seed!r} but this run has {self.seed}: resume with "
                f"the same seed"
            )
        whole = type(epoch) is int and type(index) is int
        if not (whole and epoch >= 0 and 0 <= index < len(self.dataset)):
            raise UserError(
                f"the saved batches stand at epoch {epoch!r}, index {index!r}, which {self.dataset.name!r} "
                f"with {len(self.dataset)} images does not have: resume with the same data set"
            )
        self._position = epoch * len(self.dataset) + index

    def _draw(self, epoch: int, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The images (int64) at these indices of the epoch, and whether each is mirrored (bool)."""
        if epoch != self._drawn_epoch:
            words = _random_words(2 * len(self.dataset), self.seed, epoch)
            self._order = np.argsort(words[: len(self.dataset)], kind="stable")
            self._mirrored = words[len(self.dataset) :] >> np.uint64(63) == 1
            self._drawn_epoch = epoch
        return self._order[indices], self._mirrored[indices]


def _random_words(count: int, *key: int) -> np.ndarray:
    """uint64 (count,). NumPy keeps this bit stream for ever, but not Generator.permutation."""
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def _check_labels(labels: np.ndarray, num_classes: int, source: str | Path) -> None:
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise UserError(
            f"{source} holds the label {wrong[0]}, but its classes go from 0 to {num_classes - 1}: correct the label"
        )


def _numbered(num_classes: int) -> tuple[str, ...]:
    return tuple(str(label) for label in range(num_classes))


def _no_split(split: str, source: str | Path, available: Iterable[str], reason: str = "") -> NoSplitError:
    choices = ", ".join(repr(name) for name in available) or "another data set"
    return NoSplitError(f"{source} has no split {split!r}{reason}: use {choices}")


def _stratified(labels: np.ndarray, fraction: float) -> np.ndarray:
    """bool (N,): True for `fraction` of every class; at least one of a class, but never all of it."""
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        shuffled = members[np.argsort(_random_words(len(members), _SPLIT_SEED, label), kind="stable")]
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        chosen[shuffled[:count]] = True
    return chosen


def _find(name: str) -> Path:
    """The folder of a data set known by name."""
    roots = [Path(os.environ["FASTDIFF_DATA"]).expanduser()] if os.environ.get("FASTDIFF_DATA") else []
    places = [root / name for root in (*roots, Path("data"))]
    if name in _DEBIAN:
        places.append(_DEBIAN[name])
    for place in places:
        if place.is_dir():
            return place
    looked = ", ".join(str(place) for place in places)
    raise UserError(f"the data set {name!r} was not found in {looked}: {_HOW_TO_GET[name]}")


# --- digits ---


def _load_digits(split: str) -> Dataset:
    from sklearn.datasets import load_digits  # here, because importing scikit-learn takes a second

    if split == "val":
        raise _no_split(split, "'digits'", ("train", "test"))
    digits = load_digits()
    images = np.round(digits.images[:, None] * (255 / 16)).astype(np.uint8)  # (1797, 1, 8, 8)
    labels = digits.target.astype(np.int64)
    part = _stratified(labels, 0.2) == (split == "test")
    return Dataset(images[part], labels[part], _numbered(10), "digits", split)


# --- IDX: MNIST and Fashion-MNIST ---

_IDX_PREFIX = {"train": "train", "test": "t10k"}


def _idx_file(folder: Path, split: str, content: str) -> Path | None:
    kind = {"images": "idx3", "labels": "idx1"}[content]
    for end in ("", ".gz"):
        for separator in "-.":
            path = folder / f"{_IDX_PREFIX[split]}-{content}{separator}{kind}-ubyte{end}"
            if path.is_file():
                return path
    return None


def _is_idx(folder: Path) -> bool:
    return any(_idx_file(folder, split, content) for split in _IDX_PREFIX for content in ("images", "labels"))


def _load_idx(folder: Path, split: str, name: str) -> Dataset:
    label_files = {key: path for key in _IDX_PREFIX if (path := _idx_file(folder, key, "labels"))}
    image_files = {key: path for key in label_files if (path := _idx_file(folder, key, "images"))}
    if split not in image_files:
        wanted = f", which needs {_IDX_PREFIX[split]}-images and -labels" if split in _IDX_PREFIX else ""
        raise _no_split(split, folder, image_files, wanted)
    images = _read_idx(image_files[split], 3)
    all_labels = {key: _read_idx(path, 1).astype(np.int64) for key, path in label_files.items()}
    labels = all_labels[split]
    if len(images) != len(labels):
        raise UserError(
            f"{image_files[split]} has {len(images)} images but {label_files[split]} has {len(labels)} "
            f"labels: fetch both again"
        )
    if "fashion" in name.lower():
        class_names = _FASHION_CLASSES
    else:  # over all splits, so that they agree
        class_names = _numbered(1 + max(int(part.max(initial=0)) for part in all_labels.values()))
    _check_labels(labels, len(class_names), label_files[split])
    return Dataset(_pad_to_multiple(images[:, None]), labels, class_names, name, split)


def _read_idx(path: Path, num_axes: int) -> np.ndarray:
    """A uint8 array with num_axes axes from a plain or gzipped IDX file: magic, big-endian sizes, bytes."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again") from error
    start = 4 + 4 * num_axes
    if len(data) < start or data[:4] != bytes([0, 0, 8, num_axes]):  # 8: unsigned bytes
        raise UserError(f"{path} is not an IDX file of bytes with {num_axes} axes: fetch it again")
    shape = np.frombuffer(data, ">u4", num_axes, offset=4).tolist()
    values = np.frombuffer(data, np.uint8, offset=start)
    if len(values) != math.prod(shape):
        raise UserError(f"{path} announces {shape} values but holds {len(values)}: fetch it again")
    return values.reshape(shape)


def _pad_to_multiple(images: np.ndarray, multiple: int = 8) -> np.ndarray:
    """Surround (N, C, H, W) with black, so that a U-Net can halve both sides three times."""
    extra = [-side % multiple for side in images.shape[2:]]
    return np.pad(images, [(0, 0), (0, 0), *((total // 2, total - total // 2) for total in extra)])


# --- CIFAR-10 ---

_CIFAR_BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
_CIFAR_MARKS = ("data_batch_1.bin", "data_batch_1", "test_batch.bin", "test_batch")
_CIFAR_INSIDE = (
    "cifar-10-binary.tar.gz",
    "cifar-10-python.tar.gz",
    "cifar-10-batches-bin",
    "cifar-10-batches-py",
)


def _find_cifar(path: Path) -> Path | None:
    """The folder or archive of batches at, or directly inside, `path`; None if there is none."""
    for place in (path, *(path / inside for inside in _CIFAR_INSIDE)):
        if place.is_file() and place.name.endswith(".tar.gz"):
            return place
        if any((place / mark).is_file() for mark in _CIFAR_MARKS):
            return place
    return None


def _load_cifar(path: Path, split: str, name: str) -> Dataset:
    stems = _CIFAR_BATCHES.get(split)
    if stems is None:
        raise _no_split(split, path, _CIFAR_BATCHES)
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
        _check_labels(batch_labels, len(class_names), path / batch)
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


# --- Folders and zips of images ---

_IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
_GREY_MODES = ("1", "L", "LA", "La")
_CACHE_VERSION = 1  # raise it when decoding changes


class _Tree(NamedTuple):
    """A folder or a zip, seen as a list of files."""

    root: Path
    names: list[str]  # relative, with "/", sorted, without hidden files
    open: Callable[[str], BinaryIO]
    stat: Callable[[str], os.stat_result]  # of the file, or of the zip that holds it


class _Arrangement(NamedTuple):
    """Which images a data set has, in the order of its array: one split after another."""

    names: list[str]
    labels: np.ndarray  # int64 (N,)
    class_names: tuple[str, ...]
    splits: dict[str, slice]


def _load_images(path: Path, split: str, name: str, cache: Path | None) -> Dataset:
    with _open_tree(path) as tree:
        names, labels, class_names, splits = _arrange(tree)
        if split == "test" and "test" not in splits and "val" in splits:
            part = splits["val"]
        elif split in splits:
            part = splits[split]
        else:
            raise _no_split(split, path, splits)
        images = _decoded(tree, names, _cache_folder(cache))
    return Dataset(images[part], labels[part], class_names, name, split)


@contextmanager
def _open_tree(path: Path) -> Iterator[_Tree]:
    if path.is_dir():
        found = (Path(top, file) for top, _, files in os.walk(path, followlinks=True) for file in files)
        names = _visible(file.relative_to(path).as_posix() for file in found)
        yield _Tree(path, names, lambda name: (path / name).open("rb"), lambda name: (path / name).stat())
        return
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as a zip ({error}): make it again") from error
    with archive:
        stat = path.stat()
        yield _Tree(path, _visible(archive.namelist()), archive.open, lambda name: stat)


def _visible(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))


def _arrange(tree: _Tree) -> _Arrangement:
    images = [name for name in tree.names if name.lower().endswith(_IMAGE_ENDINGS)]
    if not images:
        raise UserError(f"{tree.root} holds no images ({', '.join(_IMAGE_ENDINGS)}): give {_ACCEPTED}")
    if "dataset.json" in tree.names:
        return _arrange_edm(tree, images)
    tops = {name.split("/")[0] for name in images if "/" in name}
    split_folders = "train" in tops and not tops.isdisjoint({"test", "val"})
    if split_folders:
        images = [name for name in images if name.split("/")[0] in _SPLITS and "/" in name]
        parts = np.array([_SPLITS.index(name.split("/")[0]) for name in images])
    else:
        parts = np.zeros(len(images), dtype=np.int64)
    classes = [_folder(name, depth=1 if split_folders else 0) for name in images]
    class_names = sorted({name for name, part in zip(classes, parts, strict=True) if part == 0})
    _check_classes(tree, images, classes, class_names)
    number = {name: label for label, name in enumerate(class_names)}
    labels = np.array([number[name] for name in classes], dtype=np.int64)
    if class_names == [""]:
        class_names = []
    elif not split_folders:
        parts = _stratified(labels, 0.1).astype(np.int64)
    return _by_split(images, labels, tuple(class_names), parts)


def _folder(name: str, depth: int) -> str:
    """The folder at this depth of the name, or "" if the file itself lies there."""
    folders = name.split("/")[:-1]
    return folders[depth] if len(folders) > depth else ""


def _check_classes(tree: _Tree, names: list[str], classes: list[str], class_names: list[str]) -> None:
    labelled, known = any(classes), set(class_names)
    for name, class_name in zip(names, classes, strict=True):
        if labelled and not class_name:
            raise UserError(f"{tree.root / name} lies beside the folders of the classes: move it into one of them")
        if class_name not in known:
            raise UserError(
                f"{tree.root / name} is in the class {class_name!r}, which train/ does not have: use the "
                f"classes of train/ in every split"
            )


def _by_split(names: list[str], labels: np.ndarray, class_names: tuple[str, ...], parts: np.ndarray) -> _Arrangement:
    """Bring the images of a split together; parts (N,) are indices into _SPLITS."""
    order = np.argsort(parts, kind="stable")
    counts = np.bincount(parts, minlength=len(_SPLITS)).tolist()
    ends = np.cumsum(counts).tolist()
    splits = {key: slice(end - count, end) for key, count, end in zip(_SPLITS, counts, ends, strict=True) if count}
    return _Arrangement([names[index] for index in order], labels[order], class_names, splits)


def _arrange_edm(tree: _Tree, images: list[str]) -> _Arrangement:
    """Labels as the EDM tools write them: {"labels": [["00000/img00000000.png", 3], ...]} or null."""
    source = tree.root / "dataset.json"
    try:
        with tree.open("dataset.json") as file:
            pairs = json.load(file)["labels"]
        known = None if pairs is None else dict(pairs)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{source} has no list of labels ({error!r}): make it again with the EDM tools") from error
    splits = {"train": slice(0, len(images))}
    if known is None:
        return _Arrangement(images, np.zeros(len(images), dtype=np.int64), (), splits)
    for name in images:
        if name not in known:
            raise UserError(f"{source} has no label for {name}: add it, or set its labels to null")
        if type(known[name]) is not int or not 0 <= known[name] < _MAX_CLASSES:
            raise UserError(
                f"{source} gives {name} the label {known[name]!r}: give an integer from 0 to {_MAX_CLASSES - 1}"
            )
    labels = np.array([known[name] for name in images], dtype=np.int64)
    return _Arrangement(images, labels, _numbered(int(labels.max()) + 1), splits)


def _cache_folder(cache: Path | None) -> Path:
    return Path(cache or os.environ.get("FASTDIFF_CACHE") or "~/.cache/fastdiff/data").expanduser()


def _decoded(tree: _Tree, names: list[str], cache: Path) -> np.ndarray:
    """uint8 (N, C, H, W) of the images in this order, decoded only if the cache does not have them."""
    path = cache / f"{_digest(tree, names)}.npy"
    try:
        if not path.is_file():
            _write_npy(path, *_decode_all(tree, names))
        return np.load(path, mmap_mode="r")
    except OSError as error:  # of the cache: those of the images have become UserErrors
        warnings.warn(f"cannot keep decoded images in {cache} ({error}); decoding to memory", stacklevel=4)
    shape, decoded = _decode_all(tree, names)
    images = np.empty(shape, dtype=np.uint8)
    for row, image in zip(images, decoded, strict=True):
        row[:] = image
    return images


def _digest(tree: _Tree, names: list[str]) -> str:
    digest = hashlib.blake2b(os.fsencode(f"{_CACHE_VERSION} {tree.root.resolve()}"), digest_size=16)
    for name in names:
        try:
            stat = tree.stat(name)
        except OSError as error:  # such as a link to nowhere
            raise UserError(f"{tree.root / name} cannot be read ({error}): replace or remove it") from error
        digest.update(os.fsencode(f"\0{name}\0{stat.st_size}\0{stat.st_mtime_ns}"))
    return digest.hexdigest()


@contextmanager
def _open_image(tree: _Tree, name: str) -> Iterator[Image.Image]:
    try:
        with tree.open(name) as file, Image.open(file) as image:
            yield image
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise many types
        raise UserError(f"{tree.root / name} cannot be decoded ({error}): replace or remove it") from error


def _common_format(tree: _Tree, names: list[str]) -> tuple[str, tuple[int, int]]:
    """The Pillow mode ("L" or "RGB") and the (width, height) for all; reads the headers only."""
    mode, common = "L", None
    for name in tqdm(names, desc=f"checking {tree.root.name}", disable=len(names) <= 1000):
        with _open_image(tree, name) as image:
            common = common or image.size
            if image.size != common:
                raise UserError(
                    f"{tree.root / name} has {image.width}x{image.height} pixels where "
                    f"{common[0]}x{common[1]} were expected, as in {names[0]}: bring all images to one size"
                )
            if image.mode[0] in "IF":  # converting these to 8 bits would clip them
                raise UserError(f"{tree.root / name} has more than 8 bits a channel: convert it to 8 bits")
            if image.mode not in _GREY_MODES:
                mode = "RGB"
    return mode, common


def _decode_all(tree: _Tree, names: list[str]) -> tuple[tuple[int, ...], Iterator[np.ndarray]]:
    """The shape (N, C, H, W) of all images together, and the images one by one, uint8 (C, H, W)."""
    mode, (width, height) = _common_format(tree, names)
    progress = tqdm(names, desc=f"decoding {tree.root.name}", disable=len(names) <= 1000)
    shape = (len(names), len(mode), height, width)  # one letter a channel
    return shape, (_decode(tree, name, mode) for name in progress)


def _decode(tree: _Tree, name: str, mode: str) -> np.ndarray:
    with _open_image(tree, name) as image:
        pixels = np.asarray(image.convert(mode))
    return np.atleast_3d(pixels).transpose(2, 0, 1)


def _write_npy(path: Path, shape: tuple[int, ...], images: Iterable[np.ndarray]) -> None:
    """Write the images as one .npy, which appears under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp")
    try:
        with unfinished.open("xb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_2_0(file, header)
            for image in images:
                file.write(image.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
