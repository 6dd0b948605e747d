"""Counts what a kernel reads and writes, from inside Triton's interpreter, and refuses accesses out of range."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from kernels.fused.launch import Launch, listen


class OutOfRange(AssertionError):
    """A kernel touched memory outside its tensors."""


@dataclass
class Traffic:
    """Bytes by argument name, over all launches; `kernels` are the names of those that ran."""

    read: Counter = field(default_factory=Counter)
    written: Counter = field(default_factory=Counter)
    kernels: list[str] = field(default_factory=list)
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)  # of the launch under way

    def total(self) -> int:
        return self.read.total() + self.written.total()

    def started(self, launch: Launch) -> None:
        self.kernels.append(launch.kernel.__name__)
        tensors = {name: value for name, value in launch.arguments.items() if isinstance(value, Tensor)}
        self.ranges = {name: _range(tensor) for name, tensor in tensors.items() if tensor.numel()}

    def count(self, counter: Counter, what: str, addresses: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        addresses, mask = np.broadcast_arrays(addresses, mask)
        left = addresses[mask.astype(bool)].astype(np.int64)
        for name, (start, end) in self.ranges.items():
            inside = (left >= start) & (left + itemsize <= end)
            counter[name] += int(inside.sum()) * itemsize
            left = left[~inside]
        if left.size:
            near = {name: f"[{start:#x}, {end:#x})" for name, (start, end) in self.ranges.items()}
            raise OutOfRange(f"{self.kernels[-1]} {what} {left.size} addresses, first {left[0]:#x}, outside of {near}")


def _range(tensor: Tensor) -> tuple[int, int]:
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Within the block every load, store and atomic of launched kernels is counted, and checked before it happens."""
    seen = Traffic()
    originals = {
        name: getattr(InterpreterBuilder, name)
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
    }

    def itemsize(pointer) -> int:
        return pointer.get_element_ty().primitive_bitwidth // 8

    def load(self, ptrs, mask, *rest):
        seen.count(seen.read, "reads", ptrs.data, mask.data, itemsize(ptrs))
        return originals["create_masked_load"](self, ptrs, mask, *rest)

    def store(self, ptrs, value, mask, *rest):
        seen.count(seen.written, "writes", ptrs.data, mask.data, itemsize(ptrs))
        return originals["create_masked_store"](self, ptrs, value, mask, *rest)

    def atomic_rmw(self, operation, ptr, val, mask, *rest):
        for counter in (seen.read, seen.written):
            seen.count(counter, "updates", ptr.data, mask.data, itemsize(ptr))
        return originals["create_atomic_rmw"](self, operation, ptr, val, mask, *rest)

    def atomic_cas(self, ptr, *rest):
        for counter in (seen.read, seen.written):
            seen.count(counter, "updates", ptr.data, np.ones_like(ptr.data, dtype=bool), itemsize(ptr))
        return originals["create_atomic_cas"](self, ptr, *rest)

    wrappers = dict(zip(originals, (load, store, atomic_rmw, atomic_cas), strict=True))
    try:
        for name, wrapper in wrappers.items():
            setattr(InterpreterBuilder, name, wrapper)
        with listen(seen.started):
            yield seen
    finally:
        for name, original in originals.items():
            setattr(InterpreterBuilder, name, original)
