"""IDX files, as MNIST and Fashion-MNIST are distributed."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from fastdiff.data.dataset import Dataset, check_labels, no_split, numbered
from fastdiff.errors import UserError

_FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

_IDX_PREFIX = {"train": "train", "test": "t10k"}


def _idx_file(folder: Path, split: str, content: str) -> Path | None:
    kind = {"images": "idx3", "labels": "idx1"}[content]
    for end in ("", ".gz"):
        for separator in "-.":
            path = folder / f"{_IDX_PREFIX[split]}-{content}{separator}{kind}-ubyte{end}"
            if path.is_file():
                return path
    return None


def is_idx(folder: Path) -> bool:
    return any(_idx_file(folder, split, content) for split in _IDX_PREFIX for content in ("images", "labels"))


def load(folder: Path, split: str, name: str) -> Dataset:
    label_files = {key: path for key in _IDX_PREFIX if (path := _idx_file(folder, key, "labels"))}
    image_files = {key: path for key in label_files if (path := _idx_file(folder, key, "images"))}
    if split not in image_files:
        wanted = f", which needs {_IDX_PREFIX[split]}-images and -labels" if split in _IDX_PREFIX else ""
        raise no_split(split, folder, image_files, wanted)
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
        class_names = numbered(1 + max(int(part.max(initial=0)) for part in all_labels.values()))
    check_labels(labels, len(class_names), label_files[split])
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
