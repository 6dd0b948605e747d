"""Triton's interpreter, repaired for bfloat16: it truncates where a GPU rounds, and multiplies raw bits in `tl.dot`.

Arithmetic directly on bfloat16 values stays wrong (it works on bit patterns): kernels widen what they load.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_convert_float = interpreter._convert_float
_create_dot = interpreter.InterpreterBuilder.create_dot


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def widen(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def convert_float(data, source, target, rounding_mode):
    if source == tl.float32 and target == tl.bfloat16:
        return narrow(data)
    if source == tl.bfloat16 and target == tl.float32:
        return widen(data).view(np.uint32)
    if {source, target} == {tl.float16, tl.float32}:
        to = np.dtype(interpreter._get_np_dtype(target))
        with np.errstate(over="ignore"):
            return data.astype(to).view(f"uint{8 * to.itemsize}")
    return _convert_float(data, source, target, rounding_mode)


def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    a, b = (interpreter.TensorHandle(widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc)


def install() -> None:
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


def uninstall() -> None:
    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.create_dot = _create_dot
