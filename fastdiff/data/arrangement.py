"""Which picture of a folder or a zip is of which class, and of which split."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from fastdiff.data.dataset import ACCEPTED, SPLITS, numbered, stratified
from fastdiff.errors import UserError

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
_MAX_CLASSES = 1 << 16  # so that one wild label cannot ask for millions of classes


class Tree(NamedTuple):
    """A folder or a zip, seen as a list of files."""

    root: Path
    names: list[str]  # relative, with "/", sorted, without hidden files
    open: Callable[[str], BinaryIO]
    stat: Callable[[str], os.stat_result]  # of the file, or of the zip that holds it


class Arrangement(NamedTuple):
    """Which images a data set has, in the order of its array: one split after another."""

    names: list[str]
    labels: np.ndarray  # int64 (N,)
    class_names: tuple[str, ...]
    splits: dict[str, slice]


def arrange(tree: Tree) -> Arrangement:
    images = [name for name in tree.names if name.lower().endswith(IMAGE_ENDINGS)]
    if not images:
        raise UserError(f"{tree.root} holds no images ({', '.join(IMAGE_ENDINGS)}): give {ACCEPTED}")
    if "dataset.json" in tree.names:
        return _arrange_edm(tree, images)
    tops = {name.split("/")[0] for name in images if "/" in name}
    split_folders = "train" in tops and not tops.isdisjoint({"test", "val"})
    if split_folders:
        images = [name for name in images if name.split("/")[0] in SPLITS and "/" in name]
        parts = np.array([SPLITS.index(name.split("/")[0]) for name in images])
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
        parts = stratified(labels, 0.1).astype(np.int64)
    return _by_split(images, labels, tuple(class_names), parts)


def _folder(name: str, depth: int) -> str:
    """The folder at this depth of the name, or "" if the file itself lies there."""
    folders = name.split("/")[:-1]
    return folders[depth] if len(folders) > depth else ""


def _check_classes(tree: Tree, names: list[str], classes: list[str], class_names: list[str]) -> None:
    labelled, known = any(classes), set(class_names)
    for name, class_name in zip(names, classes, strict=True):
        if labelled and not class_name:
            raise UserError(f"{tree.root / name} lies beside the folders of the classes: move it into one of them")
        if class_name not in known:
            raise UserError(
                f"{tree.root / name} is in the class {class_name!r}, which train/ does not have: use the "
                f"classes of train/ in every split"
            )


def _by_split(names: list[str], labels: np.ndarray, class_names: tuple[str, ...], parts: np.ndarray) -> Arrangement:
    """Bring the images of a split together; parts (N,) are indices into SPLITS."""
    order = np.argsort(parts, kind="stable")
    counts = np.bincount(parts, minlength=len(SPLITS)).tolist()
    ends = np.cumsum(counts).tolist()
    splits = {key: slice(end - count, end) for key, count, end in zip(SPLITS, counts, ends, strict=True) if count}
    return Arrangement([names[index] for index in order], labels[order], class_names, splits)


def _arrange_edm(tree: Tree, images: list[str]) -> Arrangement:
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
        return Arrangement(images, np.zeros(len(images), dtype=np.int64), (), splits)
    for name in images:
        if name not in known:
            raise UserError(f"{source} has no label for {name}: add it, or set its labels to null")
        if type(known[name]) is not int or not 0 <= known[name] < _MAX_CLASSES:
            raise UserError(
                f"{source} gives {name} the label {known[name]!r}: give an integer from 0 to {_MAX_CLASSES - 1}"
            )
    labels = np.array([known[name] for name in images], dtype=np.int64)
    return Arrangement(images, labels, numbered(int(labels.max()) + 1), splits)
