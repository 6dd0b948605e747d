"""An endless stream of shuffled batches that can be stopped and resumed anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from fastdiff.data.dataset import Dataset, random_words
from fastdiff.errors import UserError


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
            words = random_words(2 * len(self.dataset), self.seed, epoch)
            self._order = np.argsort(words[: len(self.dataset)], kind="stable")
            self._mirrored = words[len(self.dataset) :] >> np.uint64(63) == 1
            self._drawn_epoch = epoch
        return self._order[indices], self._mirrored[indices]
