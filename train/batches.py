"""Streams of batches, as the losses take them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy
import torch

from fastdiff import data, distributed
from fastdiff.losses.batch import Batch
from train.options import LoopOptions


class Batches(Protocol):
    """An endless stream of batches on the device, which can be stopped and resumed anywhere."""

    def __next__(self) -> Batch: ...

    def state(self) -> dict: ...

    def restore(self, state: dict) -> None: ...


class ImageBatches:
    """A data set's images and labels, shuffled, on the device, as the losses take them.

    A thread makes the next batch, and on CUDA copies it by a stream of its own, while the device computes on this one.
    """

    def __init__(self, dataset: data.Dataset, options: LoopOptions, seed: int, device: torch.device):
        self.batches = data.Batches(dataset, options.batch_size, seed=seed, flip=options.flip)
        self.device, self.thread = device, ThreadPoolExecutor(1)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.restore(self.batches.state())

    def __next__(self) -> Batch:
        batch, copied, self.position = self.coming.result()
        self.coming = self.thread.submit(self._draw)
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            for tensor in batch:  # its memory may not be used again before the current stream has read it
                tensor.record_stream(current)
        return to_device(batch, self.batches.dataset.num_classes, self.batches.seed, self.device)

    def _draw(self) -> tuple[data.Batch, torch.cuda.Event | None, dict]:
        """This process's part of the next batch, what says that it has been copied, and the state after it."""
        batch = data.Batch(*(distributed.part(tensor) for tensor in next(self.batches)))
        if self.stream is None:
            return batch, None, self.batches.state()
        with torch.cuda.stream(self.stream):
            batch = data.Batch(*(part.pin_memory().to(self.device, non_blocking=True) for part in batch))
            return batch, self.stream.record_event(), self.batches.state()

    def state(self) -> dict:
        return self.position

    def restore(self, state: dict) -> None:
        self.thread.submit(self.batches.restore, state).result()  # after what the thread is drawing now
        self.position, self.coming = state, self.thread.submit(self._draw)


def to_device(batch: data.Batch, num_classes: int, seed: int, device: torch.device) -> Batch:
    """A batch of bytes, or of latents, as the losses take it."""
    images, labels, ids = (tensor.to(device, non_blocking=True) for tensor in batch)
    x = images if images.is_floating_point() else data.to_float(images)
    x = x.contiguous(memory_format=torch.channels_last)
    return Batch(x, labels if num_classes else None, ids, seed)


def run_seed(seed: int, name: str) -> int:
    """A 64-bit key for one named run, so that two rounds with one seed see different noise."""
    digits = numpy.random.SeedSequence([seed, *name.encode()]).generate_state(1, numpy.uint64)
    return int(digits[0])
