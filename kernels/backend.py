"""Which implementation of an operation runs: chosen by the tensor's device, or forced."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from . import cpu, reference

# A backend is a module with the functions of `reference`; it may lack some, and the next one then serves.
BACKENDS: dict[str, ModuleType] = {"reference": reference, "cpu": cpu}
try:
    from . import cuda, fused
    from .fused.launch import INTERPRETED
except Exception as error:  # whatever ails Triton, everything else runs on the reference
    INTERPRETED, MISSING = False, str(error)
else:
    BACKENDS |= {"triton": fused, "cuda": cuda}
    MISSING = ""
# `os.environ.get` takes as long as ten of our checks, because it raises an error and catches it.
ENVIRONMENT, KEY = os.environ._data, os.environ.encodekey("FASTDIFF_KERNELS")


class BackendError(RuntimeError):
    """A backend was asked for that does not run here."""


_forced: str | None = None


class use:
    """Force one backend, "reference" or "triton", from now on; None: choose by device again.

    As a context manager it is undone at the end of the block. Raises ValueError for an unknown name and BackendError
    for a backend that is not available here.
    """

    def __init__(self, name: str | None):
        global _forced
        if name is not None:
            _check(name, "kernels.use")
        self._before, _forced = _forced, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        global _forced
        _forced = self._before


def implementation(operation: str, tensor: Tensor) -> Callable:
    """The function that runs `operation` on tensors that live where `tensor` does. Raises BackendError if none can."""
    name = _forced or (KEY in ENVIRONMENT and os.environ["FASTDIFF_KERNELS"])
    if name:
        _check(name, "FASTDIFF_KERNELS")
        if name == "triton" and tensor.device.type == "cpu" and not INTERPRETED:
            raise BackendError(
                f"{operation}: the triton backend was asked for, but the tensors are on the CPU: move them to a GPU, "
                "choose reference, or start Python with TRITON_INTERPRET=1 to interpret the kernels (slow)"
            )
        if name == "triton" and reference.is_mapped(tensor):
            raise BackendError(
                f"{operation}: torch.func.vmap maps only the reference, and the triton one was asked for"
            )
        order = (name,)
    elif reference.is_mapped(tensor):
        order = ()
    elif tensor.is_cpu:  # asking for the name of the device takes many times as long
        order = ("cpu",)
    else:
        order = ("cuda", "triton") if tensor.is_cuda else ()
    if MISSING and tensor.is_cuda and name != "reference":
        _warn_of_missing_kernels()
    for candidate in order:
        found = getattr(BACKENDS.get(candidate), operation, None)
        if found is not None:
            return found
    return getattr(BACKENDS["reference"], operation)


@functools.cache
def _warn_of_missing_kernels() -> None:
    warnings.warn(f"the Triton kernels are not available ({MISSING}): running PyTorch's slower ones", stacklevel=4)


def _check(name: str, source: str) -> None:
    if name not in ("reference", "triton"):
        raise ValueError(f"{source}: unknown backend {name!r}; choose reference or triton")
    if name not in BACKENDS:
        raise BackendError(
            f"{source}: the triton backend is not available here ({MISSING}); install triton, or choose reference"
        )
