"""A run's folder: what it holds, under which names, and how that is read, written and removed.

config.json     every option, the plan, the command that continues it, hashes of teacher and data, versions, device
metrics.jsonl   a line of JSON every --log-every updates
scores.jsonl    a line for each time that the model was scored
samples-*.png   pictures of the model, made whenever it is saved
checkpoint-N/   the last few checkpoints that can be resumed, by update
best/           the model with the lowest Fréchet distance, where it is scored
steps-N/        the models of finished rounds, by their sampling steps
tensorboard/    the same numbers, for those who have it installed
.lock           which process is at work here, while one is
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fastdiff import checkpoint, checks, distributed, files, lock
from fastdiff.denoiser import Denoiser
from fastdiff.errors import UserError

SIGNS_OF_LIFE = (
    "config.json",
    "metrics.jsonl",
    "scores.jsonl",
    "samples-*.png",
    f"{checkpoint.PREFIX}*",
    f"{checkpoint.ROUND_PREFIX}*",
    "best",
)
HOLDS = (*SIGNS_OF_LIFE, "tensorboard", ".*.writing", ".*.replaced", ".*.removed")


class Run:
    """The folder of a run; nothing is read or written until it is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.metrics, self.scores = Log(folder / "metrics.jsonl"), Log(folder / "scores.jsonl")
        self.best = folder / "best"

    @property
    def _config(self) -> Path:
        return self.folder / "config.json"

    def config(self) -> dict:
        """config.json. Raises UserError where there is no run."""
        try:
            config = json.loads(self._config.read_bytes())
            if isinstance(config["options"]["updates"], int):
                return config
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self.folder} holds no run of fastdiff (no config.json): name the --out of one") from None
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise UserError(f"{self._config} is damaged, or not of a run of fastdiff: name the --out of one")

    def write_config(self, config: dict) -> None:
        """Raises UserError where the drive refuses it."""
        files.replace(self._config, json.dumps(config, indent=1) + "\n")

    # --- To begin, or to go on ---

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder and keep other processes from training in it. Raises UserError, as `lock.held` does."""

        def make() -> None:
            self._before()
            checks.folder(self.folder)

        distributed.first(make)
        with lock.held(self.folder):
            yield

    def begin(self, config: dict, *, resume: bool, overwrite: bool, lasting: Callable[[dict], dict]) -> None:
        """Make the folder and its config.json.

        lasting: of a run's options, those that must be the same when it goes on. Raises UserError if the folder holds
        another run or something else.
        """
        out = self.folder
        before = self.check(resume=resume, overwrite=overwrite)
        if before is not None and overwrite:
            self._clear()
        elif before is not None:
            self._check_same(before, config, lasting)
            if config["precision"] == "auto":
                config = config | {"precision": precision_of(before, config["options"]["device"])}
        checks.folder(out)
        self.write_config(config)

    def check(self, *, resume: bool, overwrite: bool) -> dict | None:
        """config.json of the run that is here, None for a folder that is empty or can be made. Raises UserError."""
        before = self._before()
        if before is not None and not (resume or overwrite):
            raise UserError(
                f"{self.folder} already holds a run: continue it with --resume, replace it with --overwrite, "
                "or choose another --out"
            )
        checks.makeable(self.folder)
        return before

    def _before(self) -> dict | None:
        """config.json of the run that is here, None for an empty folder. Raises UserError for anything else."""
        ours = {self.folder / lock.NAME, files.beside(self._config, "writing")}  # which a kill may have left
        if not self.folder.exists() or (self.folder.is_dir() and not {*self.folder.iterdir()} - ours):
            return None
        try:
            return self.config()
        except UserError:
            raise UserError(f"{self.folder} is not empty and holds no run of fastdiff: choose another --out") from None

    def _clear(self) -> None:
        for pattern in HOLDS:
            for path in self.folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _check_same(self, before: dict, now: dict, lasting: Callable[[dict], dict]) -> None:
        old, new = lasting(before["options"]), lasting(now["options"])
        said, says = old | before["options"], new | now["options"]
        changed = [
            f"--{key.replace('_', '-')} was {said.get(key)}, is {says.get(key)}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and said.get(key) != says.get(key)
        ]
        if before.get("data_fingerprint") != now["data_fingerprint"]:
            changed.append("the data set is another one")
        known = before.get("teacher_sha256")  # runs of before it was kept go on
        if known is not None and known != now["teacher_sha256"]:
            changed.append(
                f"the teacher {now['options']['teacher']} has other weights than when the run began "
                "(name the checkpoint that it had then, or start again with --overwrite)"
            )
        if changed:
            raise UserError(f"cannot resume {self.folder} with other options: {'; '.join(changed)}")

    def options(self) -> dict | None:
        """Those that the run began with, None where there is none yet."""
        return self.config()["options"] if self._config.is_file() else None

    def settled_precision(self, device: str) -> str:
        """What the run computes with, as far as it is known; "auto" if not, and where there is no run yet."""
        return precision_of(self.config(), device) if self._config.is_file() else "auto"

    def keep_precision(self, precision: str) -> None:
        """For the run to go on with, if it has begun."""
        if self._config.is_file():
            self.write_config(self.config() | {"precision": precision})

    # --- Checkpoints ---

    def picture(self, name: str, update: int) -> Path:
        """Of samples that the model makes at an update of a round."""
        return self.folder / f"samples-{name}-{update:07d}.png"

    def checkpoint(self, update: int) -> Path:
        return self.folder / f"{checkpoint.PREFIX}{update:07d}"

    def newest_state(self, name: str) -> tuple[dict, dict[str, Tensor]]:
        """What the newest whole checkpoint has to resume the round of this name; ({"update": 0}, {}) if there is none.

        What belongs to another round, and what was logged of this one since, is removed.
        """
        state, tensors = checkpoint.newest_state(self.folder) or ({"run": name, "update": 0}, {})
        distributed.wait()  # until all have read it, which the first may now remove
        if state["run"] != name:
            distributed.first(self.remove_resumable)
            state, tensors = {"update": 0}, {}
        distributed.first(lambda: [log.forget_after(name, state["update"]) for log in (self.metrics, self.scores)])
        return state, tensors

    def remove_resumable(self) -> None:
        """The numbered checkpoints, which are of no use once their run or round is finished."""
        checkpoint.remove(self.folder, self.folder.glob(f"{checkpoint.PREFIX}*"))

    def round(self, steps: int) -> Path:
        """Where the model of a round is kept, once that is finished."""
        return self.folder / f"{checkpoint.ROUND_PREFIX}{steps}"

    def finish_round(self, steps: int, student: Denoiser) -> None:
        checkpoint.save(self.round(steps), student)
        self.remove_resumable()

    # --- What it tells to those who look ---

    def saved(self) -> Saved:
        """What is saved, read whole and checked."""
        rounds = checkpoint.numbered(self.folder, checkpoint.ROUND_PREFIX)  # from few steps, the last round, to many
        try:
            newest = checkpoint.newest(self.folder)
            if newest is not None:
                state = json.loads((newest / "state.json").read_bytes())
                return Saved(rounds, newest, None, state["run"], state["update"])
            if rounds:
                checkpoint.verify(rounds[0])
            return Saved(rounds, *rounds[:1])
        except (UserError, OSError, ValueError, KeyError, TypeError) as error:
            return Saved(rounds, damage=str(error))

    @functools.cached_property
    def tensorboard(self):
        """Where the logs' numbers go too, to be closed by `close`; None where TensorBoard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return SummaryWriter(self.folder / "tensorboard")

    def close(self) -> None:
        """Write what waits, and end what TensorBoard reads."""
        self.metrics.write()
        self.scores.write()
        writer = self.__dict__.pop("tensorboard", None)  # if there is one; a later run may replace the folder
        if writer is not None:
            writer.close()

    def last_sign_of_life(self) -> float:
        """When anything was last written, in seconds since 1970."""
        times = []
        for path in (path for pattern in (*SIGNS_OF_LIFE, ".*.writing/*") for path in self.folder.glob(pattern)):
            with suppress(OSError):  # it may have been removed since
                times.append(path.stat().st_mtime)
        return max(times)


@dataclass(frozen=True)
class Saved:
    """What a run has saved."""

    rounds: list[Path]
    """The models of finished rounds."""
    folder: Path | None = None
    """The newest checkpoint that is whole, of a round under way or of a finished one."""
    damage: str | None = None
    """Why there is none."""
    name: str | None = None
    """Of the round that it resumes,"""
    update: int = 0
    """at which update."""


def runs_in(folder: Path) -> list[Run]:
    """The run in a folder, or those in its subfolders where it is none itself but holds some."""
    here = (folder / "config.json").exists()
    inside = [] if here else sorted(path.parent for path in folder.glob("*/config.json"))
    return [Run(path) for path in inside or [folder]]


def precision_of(config: dict, device: str) -> str:
    """What the run with this config.json computes with; auto if that is not yet known, or was on another device."""
    if config["options"].get("device") != device:
        return "auto"
    return config.get("precision") or config["options"].get("precision", "fp32")


class Log:
    """A file with a line of JSON a row. What a full drive does not take waits, and is written with a later row."""

    def __init__(self, path: Path):
        self.path, self.waiting, self.refused = path, b"", False

    def append(self, row: dict) -> None:
        if distributed.is_first():
            self.waiting += json.dumps(row).encode() + b"\n"
            self.write()

    def write(self) -> None:
        """Try to write what waits; warns once."""
        if not self.waiting:
            return
        try:
            with open(self.path, "ab", buffering=0) as file:
                while self.waiting:
                    self.waiting = self.waiting[file.write(self.waiting) :]
            self.refused = False
        except OSError as error:
            if not self.refused:
                files.warn(f"{self.path} cannot be written ({error.strerror}): its lines wait; training goes on")
            self.refused = True

    def rows(self) -> list[dict]:
        """All rows; none if there is no such file.

        A row that a kill cut off is left out, and where a run went on from an earlier update, its later rows count.
        """
        rows: list[dict] = []
        for line in (self._written() + self.waiting).splitlines():
            row = _row(line)
            if row is None:
                continue
            while rows and rows[-1]["run"] == row["run"] and rows[-1]["update"] >= row["update"]:
                rows.pop()
            rows.append(row)
        return rows

    def last(self, name: str) -> dict | None:
        """The last row of a round."""
        return next((row for row in reversed(self.rows()) if row["run"] == name), None)

    def forget_after(self, name: str, update: int) -> None:
        """Drop the rows of a round after an update that it now goes on from, and what is damaged."""
        kept = []
        for line in (every := self._written()).splitlines():
            row = _row(line)
            if row is not None and not (row["run"] == name and row["update"] > update):
                kept.append(line + b"\n")
        if b"".join(kept) != every:
            files.replace(self.path, b"".join(kept))

    def _written(self) -> bytes:
        return self.path.read_bytes() if self.path.is_file() else b""


def _row(line: bytes) -> dict | None:
    """None for a row that is damaged, or was cut off while it was written."""
    try:
        row = json.loads(line)
        return row if isinstance(row["run"], str) and row["update"] >= 0 else None
    except (ValueError, KeyError, TypeError):
        return None
