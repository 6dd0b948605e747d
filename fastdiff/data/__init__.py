"""Data sets as uint8 arrays in memory, and an exactly resumable stream of training batches.

`load` reads every format into the same `Dataset`; `Batches` shuffles one for ever; `to_float` and
`to_uint8` are the only two places where pixels change between bytes and [-1, 1].
"""

from fastdiff.data.batches import Batch, Batches
from fastdiff.data.dataset import Dataset, Latents, NoSplitError, are_finite, to_float, to_uint8
from fastdiff.data.load import load

__all__ = ["Batch", "Batches", "Dataset", "Latents", "NoSplitError", "are_finite", "load", "to_float", "to_uint8"]
