"""Counts what a kernel reads and writes, from inside Triton's interpreter, and refuses accesses out of range."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
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

    def count(self, what: str, addresses: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        counter = {"reads": self.read, "writes": self.written}[what]
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


ACCESSES = {  # the interpreter's methods: where the pointers and the mask are among their arguments, and what they do
    "create_masked_load": (0, 1, ["reads"]),
    "create_masked_store": (0, 2, ["writes"]),
    "create_atomic_rmw": (1, 3, ["reads", "writes"]),
    "create_atomic_cas": (0, None, ["reads", "writes"]),
}


def _watched(name: str, seen: Traffic) -> Callable:
    method, (pointer, mask, does) = getattr(InterpreterBuilder, name), ACCESSES[name]

    def access(self, *arguments):
        pointers = arguments[pointer]
        itemsize = pointers.get_element_ty().primitive_bitwidth // 8
        for what in does:
            seen.count(what, pointers.data, np.True_ if mask is None else arguments[mask].data, itemsize)
        return method(self, *arguments)

    return access


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Within the block every load, store and atomic of launched kernels is counted, and checked before it happens."""
    seen = Traffic()
    watched = {name: _watched(name, seen) for name in ACCESSES}
    with mock.patch.multiple(InterpreterBuilder, **watched), listen(seen.started):
        yield seen


def traffic_of(operation: Callable[[], Tensor], inputs: Sequence[Tensor] | Tensor) -> tuple[Traffic, Traffic]:
    """That of an operation, and of its gradients with respect to `inputs`."""
    with traffic() as forward:
        out = operation()
    with traffic() as backward:
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    return forward, backward
