"""A pickle read without running code: tensors, numbers, strings, lists and dicts; in place of all else an empty object.

Nothing that a pickle names is imported or called. A class or function of its own becomes a `Stub`, which remembers its
name, the arguments that it was to be called with, and its state.
"""

from __future__ import annotations

import collections
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import UserError


class Stub:
    """In place of an object of a class that was not loaded: `name`, `arguments` and `state`."""

    name = ""

    def __new__(cls, *arguments: Any, **_: Any):
        stub = super().__new__(cls)
        stub.__dict__.update(arguments=arguments, state=None, items={})
        return stub

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state

    def __setitem__(self, key: Any, value: Any) -> None:  # of a subclass of dict
        self.items[key] = value

    def append(self, value: Any) -> None:  # of a subclass of list
        self.items[len(self.items)] = value


def load(path: Path) -> Any:
    """What a pickle holds. Raises UserError for a file that is damaged or no pickle."""
    try:
        with open(path, "rb") as file:
            return _Unpickler(file).load()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name the file of a trained network") from None
    except Exception as error:  # a foreign file may raise anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{path} is damaged, or no pickle of a network ({reason}): use another copy") from None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module.replace("numpy._core", "numpy.core"), name))
        return type("Stub", (Stub,), {"name": f"{module}.{name}"}) if known is None else known


def _storage(content: bytes) -> torch.TypedStorage:
    """A tensor's memory, which is a file of its own within the pickle; nothing but tensors is read from it."""
    storage = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(storage, torch.TypedStorage):
        raise pickle.UnpicklingError(f"a tensor's memory is a {type(storage).__name__}")
    return storage


def _tensor(storage: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    if not isinstance(storage, torch.TypedStorage):
        raise pickle.UnpicklingError(f"a tensor's memory is a {type(storage).__name__}")
    return torch.tensor([], dtype=storage.dtype).set_(storage._untyped_storage, offset, size, stride)


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise pickle.UnpicklingError(f"a parameter is a {type(data).__name__}")
    return data


class _DType:
    """In place of NumPy's dtype, which can be told to hold objects."""

    def __init__(self, kind: str, *_: Any):
        if not isinstance(kind, str) or np.dtype(kind).hasobject:
            raise pickle.UnpicklingError(f"numbers of kind {kind!r}")
        self.dtype = np.dtype(kind)

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


def _scalar(kind: Any, content: bytes) -> int | float | bool:
    return np.frombuffer(content, kind.dtype)[0].item()


_KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "scalar"): _scalar,
}
