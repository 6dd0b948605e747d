"""One job at a time in a folder that it writes to for long: a lock that ends with its process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastdiff import distributed, files
from fastdiff.errors import UserError

NAME = ".lock"
_TAKEN = (errno.EAGAIN, errno.EACCES)
_warned: set[Path] = set()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other jobs out of a folder until the block ends; the processes of one torchrun are one job.

    The system itself drops the lock of a process that died. Raises UserError that names the process which holds it.
    Warns once where the file system has no locks.
    """
    lock = distributed.first(lambda: _take(folder))
    try:
        yield
    finally:
        if lock is not None:
            with suppress(OSError):
                (folder / NAME).unlink()  # while it is held: who waits for this file finds that it is gone
            os.close(lock)


def _take(folder: Path) -> int | None:
    """A descriptor that holds the lock while it is open; None where there are no locks."""
    path = folder / NAME
    while True:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): make the folder writable") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if error.errno in _TAKEN:
                raise UserError(
                    f"{folder} is in use by {_holder(path)}: wait until that has ended, or choose another --out"
                ) from None
            if folder not in _warned:
                _warned.add(folder)
                files.warn(
                    f"the file system of {folder} has no locks ({error.strerror}): see to it yourself that no second "
                    "process runs in this folder"
                )
            return None
        if _is_there(lock, path):
            with suppress(OSError):  # a full drive: it is held all the same
                os.ftruncate(lock, 0)
                os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return lock
        os.close(lock)  # its last holder has removed it in between


def _holder(path: Path) -> str:
    try:
        return path.read_text().strip() or "another process"
    except OSError:
        return "another process"


def _is_there(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False
