"""How the C library's allocator treats memory that was freed."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # <malloc.h>
NEVER = 2**31 - 1  # bytes at the end of the heap that would be worth giving back
AHEAD = 64 * 2**20  # bytes by which the heap grows at least


def keep_freed() -> bool:
    """Let this process keep the memory that it frees, for its next tensors; whether the C library can (glibc).

    By default glibc gives large blocks back to the system, and on a CPU each update or step of a network asks for the
    same ones again, page by page: up to a tenth of its time. The process then holds on to the most that it has needed.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library, such as musl
        return False
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, NEVER), mallopt(M_TOP_PAD, AHEAD)])
