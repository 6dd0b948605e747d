"""The 1,797 handwritten digits of 8×8 pixels that come with scikit-learn."""

from __future__ import annotations

import numpy as np

from fastdiff.data.dataset import Dataset, no_split, numbered, stratified


def load(split: str) -> Dataset:
    from sklearn.datasets import load_digits  # here, because importing scikit-learn takes a second

    if split == "val":
        raise no_split(split, "'digits'", ("train", "test"))
    digits = load_digits()
    images = np.round(digits.images[:, None] * (255 / 16)).astype(np.uint8)  # (1797, 1, 8, 8)
    labels = digits.target.astype(np.int64)
    part = stratified(labels, 0.2) == (split == "test")
    return Dataset(images[part], labels[part], numbered(10), "digits", split)
