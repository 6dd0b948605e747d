"""Which picture of a folder or a zip is of which class, and of which split."""

from __future__ import annotations

import functools
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from fastdiff.data.dataset import ACCEPTED, SPLITS, numbered, stratified
from fastdiff.errors import UserError

_MAX_CLASSES = 1 << 16  # so that one wild label cannot ask for millions of classes
_SPLIT_NAMES = {  # what folders of splits are called, in small letters
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
}
# What Pillow only announces, or has another program draw.
_NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}


class Tree(NamedTuple):
    """A folder or a zip, seen as a list of files."""

    root: Path
    names: list[str]  # relative, with "/", sorted, without hidden files
    folders: set[str]  # relative, also those without files
    open: Callable[[str], BinaryIO]
    stat: Callable[[str], os.stat_result]  # of the file, or of the zip that holds it


class Arrangement(NamedTuple):
    """Which images a data set has, in the order of its array: one split after another."""

    names: list[str]
    labels: np.ndarray  # int64 (N,)
    class_names: tuple[str, ...]
    splits: dict[str, slice]
    left_out: list[str]  # files that are no part of it


@functools.cache
def formats() -> tuple[str, ...]:
    """What Pillow draws by itself, by Pillow's names."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - _NO_PICTURES))


@functools.cache
def image_endings() -> tuple[str, ...]:
    """The endings of files that are read as pictures, in small letters."""
    known = Image.registered_extensions().items()
    return tuple(sorted(ending for ending, name in known if name in formats()))


def arrange(tree: Tree) -> Arrangement:
    images = [name for name in tree.names if name.lower().endswith(image_endings())]
    if not images:
        held = f" but {some(tree.names)}" if tree.names else ""
        raise UserError(f"{tree.root} holds no images{held}: give {ACCEPTED}")
    base = _descend(tree, images)
    if f"{base}dataset.json" in tree.names:
        found = _arrange_edm(tree, images, base)
    else:
        found = _arrange_folders(tree, images, base)
    used = {*found.names, f"{base}dataset.json"}
    return found._replace(left_out=[name for name in tree.names if name not in used])


def _descend(tree: Tree, images: list[str]) -> str:
    """The folder that holds the classes or the splits, as a prefix of names: below folders that hold nothing else."""
    base = ""
    while f"{base}dataset.json" not in tree.names:
        inside = [name.removeprefix(base) for name in images]
        tops = {_top(name) for name in inside}
        if len(tops) > 1 or "" in tops or _splits(tops):
            break
        (only,) = tops
        below = {_top(name.removeprefix(f"{only}/")) for name in inside}
        if below == {""}:  # a class by itself
            break
        base += f"{only}/"
    return base


def _top(name: str) -> str:
    """The folder in which a file lies at the top, or "" if it lies there itself."""
    return name.partition("/")[0] if "/" in name else ""


def _splits(tops: Iterable[str]) -> dict[str, str]:
    """The split of each folder that is called like one."""
    return {top: _SPLIT_NAMES[top.lower()] for top in tops if top.lower() in _SPLIT_NAMES}


def _arrange_folders(tree: Tree, images: list[str], base: str) -> Arrangement:
    tops = {_top(name.removeprefix(base)) for name in images}
    splits = _splits(tops)
    others = tops - splits.keys()
    if len(splits) == 1 and others:  # a class may be called "train", too
        splits = {}
    if splits:
        images = [name for name in images if _top(name.removeprefix(base)) in splits]
        parts = np.array([SPLITS.index(splits[_top(name.removeprefix(base))]) for name in images])
        for split in SPLITS:
            if len(twice := sorted(top for top in splits if splits[top] == split)) > 1:
                raise UserError(f"{tree.root / base} has {' and '.join(twice)}, both for {split!r}: keep one of them")
    else:
        parts = np.zeros(len(images), dtype=np.int64)
    tops_of = [f"{base}{top}/" for top in splits] if splits else [base]
    within = {name: name.removeprefix(next(top for top in tops_of if name.startswith(top))) for name in images}
    classes = [_top(within[name]) for name in images]
    first = min(parts.tolist())  # train, or a split that is there alone
    class_names = sorted({name for name, part in zip(classes, parts, strict=True) if part == first}, key=_natural)
    _check_classes(tree, images, classes, class_names, next((t for t in splits if splits[t] == SPLITS[first]), ""))
    if any(classes):
        for top in tops_of:
            _check_filled(tree, images, top)
    number = {name: label for label, name in enumerate(class_names)}
    labels = np.array([number[name] for name in classes], dtype=np.int64)
    if class_names == [""]:
        class_names = []
    elif not splits:
        parts = stratified(labels, 0.1).astype(np.int64)
    return _by_split(images, labels, tuple(class_names), parts)


def _natural(name: str) -> tuple:
    """A key by which 2 comes before 10."""
    return *((int(word), "") if word.isdecimal() else (-1, word) for word in re.split(r"(\d+)", name)), name


def _check_classes(tree: Tree, names: list[str], classes: list[str], class_names: list[str], train: str) -> None:
    labelled, known = any(classes), set(class_names)
    for name, class_name in zip(names, classes, strict=True):
        if labelled and not class_name:
            raise UserError(f"{tree.root / name} lies beside the folders of the classes: move it into one of them")
        if class_name not in known:
            raise UserError(
                f"{tree.root / name} is in the class {class_name!r}, which {train}/ does not have: use the "
                f"classes of {train}/ in every split"
            )


def _check_filled(tree: Tree, images: list[str], top: str) -> None:
    """Raises UserError for a folder among those of the classes that holds no image."""
    held = {_top(name.removeprefix(top)) for name in images if name.startswith(top)}
    there = {folder.removeprefix(top).partition("/")[0] for folder in tree.folders if folder.startswith(top)}
    for empty in sorted(there - held - {""}, key=_natural):
        files = [name for name in tree.names if name.startswith(f"{top}{empty}/")]
        holds = f"only {some(files)}" if files else "nothing"
        raise UserError(
            f"{tree.root / top / empty} lies among the folders of the classes and holds no image that can be read "
            f"({holds}): convert its files, or remove it"
        )


def some(names: list[str]) -> str:
    """How many files there are, and what a few of them are called."""
    few = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} file{'s' * (len(names) > 1)} ({few})"


def _by_split(names: list[str], labels: np.ndarray, class_names: tuple[str, ...], parts: np.ndarray) -> Arrangement:
    """Bring the images of a split together; parts (N,) are indices into SPLITS."""
    order = np.argsort(parts, kind="stable")
    counts = np.bincount(parts, minlength=len(SPLITS)).tolist()
    ends = np.cumsum(counts).tolist()
    splits = {key: slice(end - count, end) for key, count, end in zip(SPLITS, counts, ends, strict=True) if count}
    return Arrangement([names[index] for index in order], labels[order], class_names, splits, [])


def _arrange_edm(tree: Tree, images: list[str], base: str) -> Arrangement:
    """Labels as the EDM tools write them: {"labels": [["00000/img00000000.png", 3], ...]} or null."""
    source = tree.root / base / "dataset.json"
    try:
        with tree.open(f"{base}dataset.json") as file:
            pairs = json.load(file)["labels"]
        known = None if pairs is None else {base + name.replace("\\", "/"): label for name, label in pairs}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{source} has no list of labels ({error!r}): make it again with the EDM tools") from error
    images = [name for name in images if name.startswith(base)]
    splits = {"train": slice(0, len(images))}
    if known is None:
        return Arrangement(images, np.zeros(len(images), dtype=np.int64), (), splits, [])
    for name in images:
        if name not in known:
            raise UserError(f"{source} has no label for {name}: add it, or set its labels to null")
        if type(known[name]) is not int or not 0 <= known[name] < _MAX_CLASSES:
            raise UserError(
                f"{source} gives {name} the label {known[name]!r}: give an integer from 0 to {_MAX_CLASSES - 1}"
            )
    labels = np.array([known[name] for name in images], dtype=np.int64)
    return Arrangement(images, labels, numbered(int(labels.max()) + 1), splits, [])
