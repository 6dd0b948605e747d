"""Files that are whole at any time: written beside their place, flushed to the drive, and renamed into it."""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from fastdiff.errors import UserError


def replace(path: Path, content: str | bytes) -> None:
    """Write a file, or put this in its place. Raises UserError where the drive refuses it; then nothing has changed."""
    with saving(path) as place:
        place.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def saving(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """`writing`, but raises UserError where the drive refuses it; then nothing has changed."""
    try:
        with writing(path, flush=flush) as place:
            yield place
    except OSError as error:
        raise UserError(
            f"{path} was not written ({error.strerror or error}): make room there, or make the folder writable"
        ) from error


@contextmanager
def writing(path: Path, *, shared: bool = False, flush: bool = True) -> Iterator[Path]:
    """The place beside `path` to write a file into, which takes its place when the block ends, unless by an exception.

    shared: whether several processes may write the same file at once; the last one stays. flush: have it on the drive
    before; of many files that each can be made again, the waiting would take longer than all else.
    """
    place = beside(path, f"{uuid.uuid4().hex[:12]}.writing" if shared else "writing")
    try:
        yield place
        if flush:
            sync(place)
        place.replace(path)
    except BaseException:
        with suppress(OSError):
            place.unlink(missing_ok=True)
        raise
    if flush:
        sync(path.parent)


def move_into_place(written: Path, folder: Path) -> None:
    """Flush a folder that was written beside its place, and have it take that of what is there. Raises OSError."""
    for path in (*written.rglob("*"), written):
        sync(path)
    replaced = beside(folder, "replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    try:
        written.rename(folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def beside(path: Path, purpose: str) -> Path:
    """A hidden name for what is, for a while, in the way of `path`."""
    return path.with_name(f".{path.name}.{purpose}")


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the drive."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def warn(message: str) -> None:
    """Tell something on stderr in one line."""
    tqdm.write(f"warning: {message}", file=sys.stderr)  # above a progress bar
