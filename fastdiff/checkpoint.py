"""Checkpoints: a folder with `model.safetensors` and `model.json`, and for resuming `state.safetensors`, `state.json`.

Weights are safetensors and everything else is JSON, so that loading a checkpoint never runs code. A checkpoint is
written beside its place, flushed to the drive and renamed into it: it is there whole or not at all. `manifest.json`
holds the size and SHA-256 of every file, and nothing is loaded that differs from it; checkpoints of before there were
manifests are still read. A file that the manifest does not list is never read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdiff import files
from fastdiff.denoiser import Denoiser, DenoiserConfig, UnknownNetwork, blank, filled, moved
from fastdiff.errors import UserError

FORMAT = 1
PREFIX = "checkpoint-"
ROUND_PREFIX = "steps-"
MANIFEST = "manifest.json"
FILES = ("model.safetensors", "model.json", "state.safetensors", "state.json", MANIFEST)
EXCHANGE_SECONDS = 0.2  # far more than the two renames of a replaced checkpoint take

T = TypeVar("T")
Contents = dict[str, str | dict[str, Tensor]]  # of each file, by name: its JSON as text, or its tensors


def save(
    folder: str | Path,
    denoiser: Denoiser,
    *,
    state: dict | None = None,
    state_tensors: dict[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint; an existing one in that place is replaced once the new one is complete.

    state, state_tensors: what is needed to resume training. Raises UserError where it cannot be written (a full drive,
    say); then nothing has changed.
    """
    folder = Path(folder)
    _write(folder, _contents(denoiser, state, state_tensors, copy=False))
    return folder


class Writer:
    """Writes checkpoints in the background, one after the other, while training goes on.

    A write that fails (the drive is full, say) ends no training: it is told in one line on stderr, what was there
    stays, and the next save tries anew. Use it as a context, which leaves no write behind: it ends with `finish`, or
    with `wait` where an exception ends it.
    """

    failure: str | None = None
    """Why the last finished write failed; None if it did not."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future | None = None

    def save(
        self,
        folder: str | Path,
        denoiser: Denoiser,
        *,
        state: dict | None = None,
        state_tensors: dict[str, Tensor] | None = None,
        keep: int | None = None,
    ) -> None:
        """`checkpoint.save` of everything as it is now; it may change once this returns.

        Waits for the write under way, so that there is never more than one copy of the tensors in memory. keep: how
        many of the run's numbered checkpoints, this one and those before it, are left when it is complete.
        """
        self.wait()
        contents = _contents(denoiser, state, state_tensors, copy=True)
        self._under_way = self._thread.submit(_write, Path(folder), contents, keep)

    def wait(self) -> bool:
        """Wait for the write under way; returns whether the last one succeeded, and warns if it just failed."""
        if self._has_failed():
            files.warn(f"{self.failure}; training goes on, and the next save tries again")
        return self.failure is None

    def finish(self) -> None:
        """Wait for the write under way. Raises UserError if the last one failed."""
        self._has_failed()
        if self.failure is not None:
            raise UserError(f"{self.failure}, and continue with --resume from the checkpoint before it")

    def _has_failed(self) -> bool:
        """Wait for the write under way; whether there was one, and it failed."""
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return False
        error = under_way.exception()
        if error is not None and not isinstance(error, UserError):
            raise error
        self.failure = None if error is None else str(error)  # the error itself would hold on to the tensors
        return error is not None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.finish() if kind is None else self.wait()
        finally:
            self._thread.shutdown()


def load(folder: str | Path, *, device: str | torch.device = "cpu") -> Denoiser:
    """The denoiser in a checkpoint's folder, or in a run's newest whole checkpoint, in eval mode.

    Raises UserError if there is none, or if it is damaged or does not fit together.
    """
    return moved(_read(Path(folder), _load)[1], device).eval()


def load_state(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """What `save` was given as state and state_tensors. Raises UserError if it is missing or damaged."""
    folder = Path(folder)
    _read_config(folder)
    return _read_json(folder / "state.json"), _read_tensors(folder / "state.safetensors")


def newest_state(run: str | Path) -> tuple[dict, dict[str, Tensor]] | None:
    """`load_state` of a run's newest checkpoint that is whole, or None if it has none. Warns as `newest` does."""
    found = _newest(Path(run), load_state)
    return None if found is None else found[1]


def find(folder: str | Path) -> Path:
    """The checkpoint that `folder` means: itself, or a run's newest whole one.

    Raises UserError if there is none or it is damaged. Reads every file; `load` reads only what it needs.
    """
    return _read(Path(folder), verify)[0]


def newest(run: str | Path) -> Path | None:
    """A run's newest numbered checkpoint that is whole, or None if it has none. Warns of newer ones that are damaged.

    Raises UserError if all are, or if the newest is of another format.
    """
    found = _newest(Path(run), verify)
    return None if found is None else found[0]


def numbered(run: str | Path, prefix: str = PREFIX) -> list[Path]:
    """The checkpoints called prefix + number in a folder, by number, whole or not."""
    run = Path(run)
    for replaced in run.glob(f".{prefix}*.replaced"):
        _put_back(run / replaced.name.removeprefix(".").removesuffix(".replaced"))
    found = [path for path in run.glob(f"{prefix}*") if path.name.removeprefix(prefix).isdecimal()]
    return sorted(filter(_is_checkpoint, found), key=_number)


def verify(folder: str | Path) -> None:
    """Read every file of a checkpoint. Raises UserError that names the first that is missing, damaged or foreign."""
    folder = Path(folder)
    _read_config(folder)
    files = _read_manifest(folder)
    if files is None:
        files = ["model.safetensors", *(path.name for path in folder.glob("state.*"))]
    for name in files:
        (_read_json if name.endswith(".json") else _read_tensors)(folder / name)


def remove(run: Path, folders: Iterable[Path]) -> None:
    """Remove some of a run's numbered checkpoints, and what killed saves and removals left.

    They are hidden first, so that none of which a kill leaves a part is taken for a damaged one.
    """
    for folder in folders:
        with suppress(OSError):
            folder.rename(files.beside(folder, "removed"))
    for path in run.glob(f".{PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


# --- Reading ------------------------------------------------------------------------------------------------------


class _Damaged(UserError):
    """A file of a checkpoint is not what was saved; another checkpoint may serve."""

    def __init__(self, what: str):
        super().__init__(f"{what}: use another checkpoint")
        self.what = what


def _read(folder: Path, read: Callable[[Path], T]) -> tuple[Path, T]:
    """The checkpoint that `folder` means, and what `read` makes of it."""
    _put_back(folder)
    if _is_checkpoint(folder):
        return folder, read(folder)
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint at {folder}: that folder does not exist")
    rounds = numbered(folder, ROUND_PREFIX)
    if rounds:
        raise UserError(f"{folder} holds several models; name one: {', '.join(str(p) for p in rounds)}")
    found = _newest(folder, read)
    if found is None:
        raise UserError(f"there is no checkpoint at {folder}: it holds no model.json and no {PREFIX}* folder")
    return found


def _newest(run: Path, read: Callable[[Path], T]) -> tuple[Path, T] | None:
    """A run's newest checkpoint that `read` finds whole, and what it makes of it; None if the run has none at all."""
    damages = []
    for folder in reversed(numbered(run)):
        try:
            made = read(folder)
        except _Damaged as error:
            damages.append(error.what)
            continue
        for what in damages:
            files.warn(f"{what}: using {folder} instead")
        return folder, made
    if damages:
        raise UserError(
            f"no checkpoint in {run} is whole: {'; '.join(damages)}; put a copy of one there, or start the run again "
            "with --overwrite"
        )
    return None


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "model.json").is_file() or (folder / MANIFEST).is_file()


def _load(folder: Path) -> Denoiser:
    config = _read_config(folder)
    weights = _read_tensors(folder / "model.safetensors")
    try:
        denoiser = blank(config)
    except UserError:
        raise
    except UnknownNetwork as error:
        raise UserError(
            f"{folder / 'model.json'}: {error}: name your file that enters it by --network-module"
            f"{_network_module(folder)}"
        ) from None
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder / 'model.json'} does not describe a fastdiff model: {error}") from None
    expected = {key: value.shape for key, value in denoiser.network.state_dict().items()}
    found = {key: value.shape for key, value in weights.items()}
    if expected != found:
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        raise UserError(
            f"{folder / 'model.safetensors'} holds weights of another architecture than its model.json describes "
            f"({len(wrong)} tensors differ, the first is {wrong[0]}): use the two files that were saved together"
        )
    return filled(denoiser, weights)


def _network_module(folder: Path) -> str:
    """What a checkpoint's run was told, to be said again; nothing is run because a file says so."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        module = json.loads((folder.parent / "config.json").read_bytes())["options"]["network_module"]
        return f", which was {module!r} there" if isinstance(module, str) else ""
    return ""


def _read_config(folder: Path) -> DenoiserConfig:
    path = folder / "model.json"
    values = _read_json(path)
    number = values.pop("format", None)
    if type(number) is int and number > FORMAT:
        raise UserError(
            f"{path} is of format {number}, and this version of fastdiff reads format {FORMAT}: update fastdiff, or "
            "use a checkpoint of this version"
        )
    if type(number) is not int or number != FORMAT:
        raise UserError(f"{path} names no format that there is, such as format {FORMAT}: use another checkpoint")
    try:
        return DenoiserConfig.from_dict(values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not describe a fastdiff model: {error}") from None


def _read_json(path: Path) -> dict:
    _check(path)
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _Damaged(f"{path} is damaged ({error})") from None
    except OSError as error:
        raise _Damaged(f"{path} cannot be read ({error.strerror})") from None
    if not isinstance(values, dict):
        raise _Damaged(f"{path} is damaged (not a JSON object)")
    return values


def _read_tensors(path: Path) -> dict[str, Tensor]:
    _check(path)
    try:
        return load_file(path)  # mapped: what _check has just read is not read from the drive again
    except (SafetensorError, ValueError, OSError) as error:
        raise _Damaged(f"{path} is damaged or truncated ({error})") from None


def _check(path: Path) -> None:
    """Raises UserError unless a file is there and, where there is a manifest, as that says."""
    files = _read_manifest(path.parent)
    if not path.exists():
        raise _Damaged(f"{path} is missing: the checkpoint is incomplete")
    if files is None:
        return
    if path.name not in files:
        raise _Damaged(f"{path} is foreign: it was not saved with this checkpoint, whose {MANIFEST} does not list it")
    if path.stat().st_size != files[path.name]["size"]:  # before reading what may be gigabytes
        raise _Damaged(f"{path} is damaged: it has {path.stat().st_size} bytes, not {files[path.name]['size']}")
    try:
        found = _fingerprint(path)
    except OSError as error:
        raise _Damaged(f"{path} cannot be read ({error.strerror})") from None
    if found != files[path.name]:
        raise _Damaged(f"{path} is damaged, or of another checkpoint: its SHA-256 is not the one in {MANIFEST}")


def _read_manifest(folder: Path) -> dict[str, dict] | None:
    """The size and SHA-256 of every file, by name; None for a checkpoint of before there were manifests."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _Damaged(f"{path} cannot be read ({error.strerror})") from None
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        files = json.loads(text)["files"]
        if text == _manifest(files):
            return files
    raise _Damaged(f"{path} is damaged")


# --- Writing ------------------------------------------------------------------------------------------------------


def _contents(denoiser: Denoiser, state: dict | None, state_tensors: dict | None, *, copy: bool) -> Contents:
    """What goes into each file; with copy, tensors share no memory with those given."""

    def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        plain, found, known = torch.contiguous_format, {}, set()
        for key, value in tensors.items():
            found[key] = value.detach().to("cpu", copy=copy, memory_format=plain).contiguous()
            place = found[key].untyped_storage().data_ptr()
            if place in known and found[key].numel():  # tied weights: the file holds each by its name
                found[key] = found[key].clone()
            known.add(place)
        return found

    contents = {
        "model.safetensors": on_cpu(denoiser.network.state_dict()),
        "model.json": json.dumps({"format": FORMAT, **denoiser.config.to_dict()}, indent=1),
    }
    if state is not None:
        contents |= {"state.safetensors": on_cpu(state_tensors or {}), "state.json": json.dumps(state, indent=1)}
    return contents


def _write(folder: Path, contents: Contents, keep: int | None = None) -> None:
    beside = files.beside(folder, "writing")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        for name, content in contents.items():
            if isinstance(content, str):
                (beside / name).write_text(content)
            else:
                save_file(content, beside / name)
        (beside / MANIFEST).write_bytes(_manifest({path.name: _fingerprint(path) for path in beside.iterdir()}))
        files.move_into_place(beside, folder)
    except (OSError, SafetensorError) as error:  # which is how safetensors tells of a full drive
        shutil.rmtree(beside, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"the checkpoint {folder} was not written ({reason}): make room there, or make the folder writable"
        ) from error
    if keep is not None:
        _remove_old(folder, keep)


def _put_back(folder: Path) -> None:
    """Undo half of an exchange, where a kill came between its two renames; one that is under way is left alone."""
    if folder.exists() or not files.beside(folder, "replaced").is_dir():
        return
    time.sleep(EXCHANGE_SECONDS)
    if not folder.exists():
        with suppress(FileNotFoundError):  # another process was faster
            files.beside(folder, "replaced").rename(folder)


def _remove_old(folder: Path, keep: int) -> None:
    """Leave `keep` numbered checkpoints up to this one."""
    until = [path for path in numbered(folder.parent) if _number(path) <= _number(folder)]
    remove(folder.parent, until[:-keep])


def _number(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _manifest(files: dict[str, dict]) -> bytes:
    """The text of manifest.json, with a checksum of itself. Its layout stays; FORMAT is of the other files."""
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": digest}, indent=1, sort_keys=True).encode() + b"\n"


def _fingerprint(path: Path) -> dict:
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
