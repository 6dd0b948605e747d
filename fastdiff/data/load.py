"""`load`: a data set by its name, or from a folder or file of any of the formats."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fastdiff import distributed
from fastdiff.data import cifar, digits, idx, latents, pictures
from fastdiff.data.dataset import ACCEPTED, SPLITS, Dataset
from fastdiff.errors import UserError

_HOW_TO_GET = {
    "mnist": "put train-images-idx3-ubyte.gz and its three companions into one of these folders",
    "fashion-mnist": "on Debian or Ubuntu install it with 'apt install dataset-fashion-mnist', or put "
    "train-images-idx3-ubyte.gz and its three companions into one of these folders",
    "cifar10": "put cifar-10-binary.tar.gz into one of these folders",
}
FEW = 5  # classes that are told by name
_DEBIAN = {"fashion-mnist": Path("/usr/share/datasets/fashion-mnist")}  # of the package dataset-fashion-mnist


def load(spec: str | Path, split: str = "train", *, cache: Path | None = None, background: str = "white") -> Dataset:
    """Load a data set by name, folder or file.

    spec is one of

    - "digits": the 1797 handwritten 8x8 digits that come with scikit-learn, split 80/20;
    - a folder of IDX files (MNIST, Fashion-MNIST), zero-padded on both sides to multiples of 8;
    - CIFAR-10: its binary or its Python archive (.tar.gz), or a folder of the files inside one;
    - "mnist", "fashion-mnist", "cifar10": such a folder in $FASTDIFF_DATA or ./data;
    - a folder or zip of images, one subfolder a class (labels in the natural order of their names: 2 before 10).
      With train/, test/ or val/ above the classes, these are the splits, by their usual names in any case; else it
      is split 90/10. Without subfolders, the images are unlabelled and all of them are split "train";
    - a folder or zip with the dataset.json of the EDM tools, which holds the labels; all of it is "train";
    - a .safetensors file of latents, as `fastdiff latents` makes it; all of it is "train".

    Folders that hold nothing but one folder, above all of this, do not matter. What was found is printed, with the
    files that are no part of it. Images are grey (C = 1) when every file is, else RGB. Transparent ones are
    laid on `background` (a colour as Pillow knows it; "none" drops their alpha), which is told once; an
    animation gives its first frame, EXIF rotation is not applied. Decoded images are kept as one file in `cache`
    (default: $FASTDIFF_CACHE, else ~/.cache/fastdiff/data) until a file's name, size or time changes.

    split is "train", "test" or "val"; a folder with val/ but no test/ gives val/ as "test".
    Raises UserError, naming the file, when the data are missing, damaged, of several sizes or mislabelled,
    or have no such split.
    """
    dataset, left_out = _load(spec, split, cache, background)
    _tell(dataset, str(spec), left_out)
    return dataset


def _load(spec: str | Path, split: str, cache: Path | None, background: str) -> tuple[Dataset, str]:
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} of {str(spec)!r}: use one of {', '.join(SPLITS)}")
    if spec == "digits":
        return digits.load(split), ""
    if spec in _HOW_TO_GET:
        path, name = _find(spec), spec
    else:
        path = Path(spec).expanduser()
        name = (
            os.path.basename(os.path.abspath(path))
            .removesuffix(".zip")
            .removesuffix(".tar.gz")
            .removesuffix(".safetensors")
        )
    if not path.exists():
        raise UserError(f"there is no data set {str(spec)!r}: give {ACCEPTED}")
    if path.is_dir() and idx.is_idx(path):
        return idx.load(path, split, name), ""
    if batches := cifar.find(path):
        return cifar.load(batches, split, name), ""
    if path.is_file() and path.suffix == ".safetensors":
        return latents.load(path, split, name), ""
    if path.is_dir() or path.suffix.lower() == ".zip":
        return pictures.load(path, split, name, cache, background)
    raise UserError(f"{path} is not a data set: give {ACCEPTED}")


_told: set[str] = set()


def _tell(dataset: Dataset, spec: str, left_out: str) -> None:
    """Say once what was found."""
    counts = np.bincount(dataset.labels, minlength=dataset.num_classes).tolist()
    classes = [f"{name} ({count})" for name, count in zip(dataset.class_names, counts, strict=False)]
    few = ", ".join(classes[:FEW]) + (", …" if len(classes) > FEW else "")
    line = f"data {spec}, {dataset.split}: {len(dataset)} images of {'×'.join(map(str, dataset.shape))}, "
    line += f"{len(classes)} class{'es' * (len(classes) > 1)}: {few}" if classes else "no classes"
    line += f"; left out: {left_out}" if left_out else ""
    if distributed.is_first() and line not in _told:
        _told.add(line)
        print(line, flush=True)


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
