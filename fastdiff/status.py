"""Where runs are, and how to continue them: `python -m fastdiff.status runs/teacher runs/stage2`."""

from __future__ import annotations

import importlib
import json
import shlex
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tyro

from fastdiff import checkpoint, cli
from fastdiff.errors import UserError

SIGNS_OF_LIFE = (
    "config.json", "metrics.jsonl", "scores.jsonl", "samples-*.png", f"{checkpoint.PREFIX}*",
    f"{checkpoint.ROUND_PREFIX}*", "best", ".*.writing/*",
)  # fmt: skip
RECENT = 10  # rows of the log that speed and losses are told from
QUIET_SECONDS = 300  # a run may at least be quiet for that long, before it counts as stopped,
QUIET_ROWS = 5  # or for the time that so many rows of the log take,
QUIET_START = 1800  # or for that long before the first row: data are read and networks compiled
APART = ("out", "resume", "overwrite", "dry_run", "preset")  # options that the command gets for themselves


@dataclass(frozen=True, kw_only=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """The folders of runs, or folders of such folders, as the demo and fastdiff.compare make."""
    json: bool = False
    """Print a list of JSON objects, one a run."""


def main(options: Options) -> None:
    """Tell where runs are, whether they are alive, when they will be done, and how to continue them."""
    if not options.runs:
        raise UserError("no run is named: fastdiff status runs/teacher")
    found, wrong = [], []
    for run in (run for folder in options.runs for run in _runs(folder)):
        try:
            found.append(status(run))
        except UserError as error:
            wrong.append(str(error))
    if not found:
        raise UserError(wrong[0])
    for error in wrong:
        checkpoint.warn(error)
    print(json.dumps(found, indent=1) if options.json else "\n\n".join(map(describe, found)))


def status(run: Path, *, now: float | None = None) -> dict:
    """What a run's folder tells of it. Raises UserError if it holds no run.

    state: "finished", or "running" or "stopped", as it is not or is long since anything was written. name, update,
    updates, kimg: of the present round, as far as it was logged; share, seconds_left: of all rounds. checkpoint: the
    newest that is whole; command: what goes on from it. now: seconds since 1970.
    """
    now = time.time() if now is None else now
    config = read_config(run)
    options = config["options"]
    rows, scores, saved = read_log(run / "metrics.jsonl"), read_log(run / "scores.jsonl"), _saved(run)
    recipe = config.get("recipe") or _guess_recipe(saved, rows)

    plan = _plan(options, rows[-1]["run"] if rows else saved.name or (recipe or "run").rpartition(".")[2])
    whole = {folder.name for folder in saved.rounds}
    if "start_steps" not in options and saved.update >= options["updates"]:
        whole = set(plan)
    kept = {name: n if name in whole else saved.update * (name == saved.name) for name, n in plan.items()}
    logged = {row["run"]: row["update"] for row in rows}
    at = {name: max(kept[name], min(n, logged.get(name, 0))) for name, n in plan.items()}
    name = next((name for name in plan if name not in whole), list(plan)[-1])

    batch_size, speed = options["batch_size"], _speed(rows)
    sign = max(_times(run))
    quiet = QUIET_START if speed is None else QUIET_ROWS * options["log_every"] * batch_size / speed
    state = "running" if now - sign <= max(QUIET_SECONDS, quiet) else "stopped"
    state = "finished" if whole >= plan.keys() else state
    total, done = sum(plan.values()), sum((kept if state == "stopped" else at).values())
    return {
        "run": str(run), "recipe": recipe, "state": state,
        "last_sign_of_life": round(sign, 1), "seconds_since": round(now - sign, 1),
        "name": name, "round": list(plan).index(name) + 1, "rounds": len(plan),
        "update": at[name], "updates": plan[name], "kimg": round(at[name] * batch_size / 1000, 3),
        "share": round(sum(at.values()) / total, 4), "images_per_second": speed,
        "seconds_left": None if speed is None else round((total - done) * batch_size / speed),
        "losses": [row["loss"] for row in rows[-RECENT:] if row["run"] == name],
        "last_row": rows[-1] if rows else None, "last_scores": scores[-1] if scores else None,
        "best_fd": min((row["fd"] for row in scores if "fd" in row), default=None),
        "checkpoint": None if saved.folder is None else str(saved.folder), "damage": saved.damage,
        "command": _command(run, config, recipe),
    }  # fmt: skip


def describe(found: dict) -> str:
    """A status in words."""
    lines = [f"{found['run']}: {found['state']}, last sign of life {duration(found['seconds_since'])} ago"]

    def line(title: str, *parts: str | None) -> None:
        if any(parts):
            lines.append(f"  {title:12} " + ", ".join(filter(None, parts)))

    of = f" (round {found['round']} of {found['rounds']})" if found["rounds"] > 1 else ""
    line("recipe", found["recipe"] or "unknown")
    line("at", f"{found['name']}{of}", f"update {found['update']} of {found['updates']}", f"{found['kimg']:g} kimg",
         f"{found['share']:.1%} of the run done")  # fmt: skip
    if found["state"] != "finished" and found["seconds_left"] is not None:
        line("left", f"{duration(found['seconds_left'])} at {found['images_per_second']:g} images/s")
    losses = [f"{loss:.4g}" for loss in found["losses"]]
    if losses:
        before = f" after {' '.join(losses[-4:-1])}" if losses[1:] else ""
        line("loss", losses[-1] + before, f"gradient norm {found['last_row']['grad_norm']:.3g}")
    scores = found["last_scores"]
    if scores is not None:
        line("scores", f"FD {scores['fd']:.4g} (best {found['best_fd']:.4g})" if "fd" in scores else None,
             f"variety {scores['spread']:.2f} of the teacher's" if "spread" in scores else None,
             f"at update {scores['update']}")  # fmt: skip
        for alarm in scores.get("alarms", []):
            line("alarm", alarm)
    line("checkpoint", found["checkpoint"] or "none", found["damage"])
    if found["state"] != "finished":
        line("continue" if found["state"] == "stopped" else "if it stops", found["command"])
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """In the two largest units: 2 d 5 h, 3 h 12 min, 4 min, 42 s."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{max(0, seconds):.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def _runs(folder: Path) -> list[Path]:
    """The folder, or the runs in it where it is none itself but holds some."""
    inside = [] if (folder / "config.json").exists() else sorted(path.parent for path in folder.glob("*/config.json"))
    return inside or [folder]


def read_config(run: Path) -> dict:
    """A run's config.json. Raises UserError where there is no run."""
    path = run / "config.json"
    try:
        config = json.loads(path.read_bytes())
        if isinstance(config["options"]["updates"], int):
            return config
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{run} holds no run of fastdiff (no config.json): name the --out of one") from None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is damaged, or not of a run of fastdiff: name the --out of one")


def read_log(path: Path) -> list[dict]:
    """The rows of metrics.jsonl or scores.jsonl; none if there is no such file.

    A row that a kill cut off is left out, and where a run went on from an earlier update, its later rows count.
    """
    rows: list[dict] = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            run, update = row["run"], row["update"]
        except (ValueError, KeyError, TypeError):
            continue
        while rows and rows[-1]["run"] == run and rows[-1]["update"] >= update:
            rows.pop()
        rows.append(row)
    return rows


@dataclass(frozen=True)
class _Saved:
    """What a run has saved."""

    rounds: list[Path]  # the models of finished rounds
    folder: Path | None = None  # the newest checkpoint that is whole, of a round under way or of a finished one
    damage: str | None = None  # why there is none
    name: str | None = None  # of the run or round that it resumes,
    update: int = 0  # at which update


def _saved(run: Path) -> _Saved:
    rounds = checkpoint.numbered(run, checkpoint.ROUND_PREFIX)  # from few steps, the last round, to many
    try:
        newest = checkpoint.newest(run)
        if newest is not None:
            state = json.loads((newest / "state.json").read_bytes())
            return _Saved(rounds, newest, None, state["run"], state["update"])
        if rounds:
            checkpoint.verify(rounds[0])
        return _Saved(rounds, *rounds[:1])
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        return _Saved(rounds, damage=str(error))


def _speed(rows: list[dict]) -> float | None:
    """Images a second of late; None if that is not known."""
    return (statistics.median(row["images_per_second"] for row in rows[-RECENT:]) if rows else None) or None


def _times(run: Path) -> Iterator[float]:
    for pattern in SIGNS_OF_LIFE:
        for path in run.glob(pattern):
            with suppress(OSError):  # it may have been removed since
                yield path.stat().st_mtime


def _plan(options: dict, name: str) -> dict[str, int]:
    """The updates of each round by its name; of the one round of other recipes, which has that name."""
    if "start_steps" not in options:
        return {name or "run": options["updates"]}
    rounds = importlib.import_module("train.rounds")  # by its name, as commands are: train imports fastdiff
    steps = rounds.student_steps(options["start_steps"], options["end_steps"])
    return {f"{checkpoint.ROUND_PREFIX}{n}": rounds.round_updates(SimpleNamespace(**options), n) for n in steps}


# --- The command --------------------------------------------------------------------------------------------------


def _guess_recipe(saved: _Saved, rows: list[dict]) -> str | None:
    """Of a run whose config.json does not name it: models and logs are called as their recipes are."""
    names = [row["run"] for row in rows[-1:]]
    with suppress(OSError, ValueError, KeyError, TypeError):
        names.append(json.loads((saved.folder / "model.json").read_bytes())["kind"])
    return next((f"train.{name}" for name in names if f"train.{name}" in _recipes()), None)


def _recipes() -> set[str]:
    return {module for module, _ in cli.COMMANDS.values() if module.startswith("train.")}


def _command(run: Path, config: dict, recipe: str | None) -> str | None:
    """What continues the run: its options where they are not the defaults. None if the recipe is not known."""
    if recipe not in _recipes():  # nothing else that config.json may name is imported
        return None
    module = importlib.import_module(recipe)
    options = config["options"]
    defaults, given = _defaults(module.Options), []
    preset = options.get("preset")
    if preset != defaults["preset"] and preset in module.PRESETS:
        defaults |= _plain(module.PRESETS[preset])
        given = ["--preset", preset]
    known = {field.name for field in fields(module.Options)} - set(APART)
    given += _flags({key: value for key, value in options.items() if key in known}, defaults)
    out = options.get("out", "")
    out = out if Path(out).resolve() == run.resolve() else str(run)  # it may have been moved
    processes = config.get("processes", 1)
    start = ["torchrun", "--nproc_per_node", str(processes)] if processes > 1 else ["python"]
    return shlex.join([*start, "-m", recipe, *given, "--out", out, "--resume"])


def _defaults(options: type) -> dict:
    values = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(options)
    }
    return _plain({key: value for key, value in values.items() if value is not MISSING})


def _plain(values: dict) -> dict:
    """Options as config.json holds them."""
    plain = {key: asdict(value) if is_dataclass(value) else value for key, value in values.items()}
    return json.loads(json.dumps(plain, default=str))


def _flags(options: dict, defaults: dict, prefix: str = "") -> Iterator[str]:
    for key, value in options.items():
        name = key.replace("_", "-")
        if isinstance(value, dict):
            yield from _flags(value, defaults.get(key) or {}, f"{prefix}{name}.")
        elif key not in defaults or value != defaults[key]:
            yield from _flag(prefix, name, value)


def _flag(prefix: str, name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{prefix}{'' if value else 'no-'}{name}"]
    return [f"--{prefix}{name}", *map(str, value if isinstance(value, list) else [value])]


if __name__ == "__main__":
    cli.run(main, Options)
