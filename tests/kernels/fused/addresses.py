"""What one program of a launch would touch, for tensors too large to be allocated."""

import mmap
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from kernels.fused.launch import Launch, launch, listen

NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
APART = 1 << 40  # bytes between the arguments' addresses, so that every offset tells whose it is


def launches(operation) -> list[Launch]:
    """What `operation` would launch; it is given meta tensors to work on."""
    seen: list[Launch] = []
    with listen(seen.append):
        operation()
    return seen


def touched(recorded: Launch, program: int) -> dict[str, np.ndarray]:
    """The byte offsets that a program loads from and stores to, by argument; loads give 0, and nothing is stored."""
    tensors = [name for name, value in recorded.arguments.items() if isinstance(value, Tensor)]
    space = mmap.mmap(-1, APART * (len(tensors) + 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    standins = {
        name: torch.frombuffer(space, dtype=recorded.arguments[name].dtype, count=1, offset=index * APART)
        for index, name in enumerate(tensors)
    }
    starts = {name: tensor.data_ptr() for name, tensor in standins.items()}
    seen: dict[str, list[np.ndarray]] = {name: [] for name in tensors}

    def note(pointers, mask):
        addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        addresses = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)].astype(np.int64)
        for name, start in starts.items():
            seen[name].append((addresses - start)[(addresses >= start) & (addresses < start + APART)])
        assert all(address >= min(starts.values()) for address in addresses)

    def load(self, pointers, mask, other, *rest):
        note(pointers, mask)
        element = pointers.get_element_ty()
        return TensorHandle(np.zeros_like(pointers.data, dtype=interpreter._get_np_dtype(element)), element)

    def store(self, pointers, value, mask, *rest):
        note(pointers, mask)

    def program_id(self, axis):
        return TensorHandle(np.array([program], dtype=np.int32), interpreter.tl.int32)

    methods = {"create_masked_load": load, "create_masked_store": store, "create_get_program_id": program_id}
    with mock.patch.multiple(InterpreterBuilder, **methods):
        launch(recorded.kernel, (1,), num_warps=recorded.num_warps, **recorded.arguments | standins)
    return {name: np.concatenate(offsets) for name, offsets in seen.items()}


def assert_last_program_ends_with_its_tensors(recorded: Launch, *, most: int = 1 << 31, last: int = 1) -> None:
    """The last program touches the last element of each tensor of more than `most` elements, and none beyond any.

    last: so many programs do, one for each of the images that lie side by side.
    """
    programs = [touched(recorded, recorded.grid[0] - 1 - before) for before in range(last)]
    large = 0
    for name in programs[0]:
        where = np.concatenate([offsets[name] for offsets in programs])
        tensor = recorded.arguments[name]
        end = tensor.numel() * tensor.element_size()
        if where.size:
            assert where.min() >= 0, name
            assert where.max() < end, name
        if tensor.numel() > most:
            large += 1
            assert where.max() == end - tensor.element_size(), name
    assert large, f"{recorded.kernel.__name__}: no argument is large"
