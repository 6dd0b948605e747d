"""Where runs are, and how to continue them: `python -m fastdiff.status runs/teacher runs/stage2`."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from fastdiff import checkpoint, checks, cli, files
from fastdiff.errors import UserError
from fastdiff.run import Run, Saved, runs_in

RECENT = 10  # rows of the log that speed and losses are told from
QUIET_SECONDS = 300  # a run may at least be quiet for that long, before it counts as stopped,
QUIET_ROWS = 5  # or for the time that so many rows of the log take,
RECIPES = tuple(f"train.{name}" for name in ("teacher", "stage1", "stage2", "encoder", "two_student", "sid"))
QUIET_START = 1800  # or for that long before the first row: data are read and networks compiled


@dataclass(frozen=True, kw_only=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """The folders of runs, or folders of such folders, as the demo and train.compare make."""
    json: bool = False
    """Print a list of JSON objects, one a run."""
    watch: float | None = None
    """Tell it again every so many seconds, as long as a run is under way, or until Ctrl-C."""


def main(options: Options) -> None:
    """Tell where runs are, whether they are alive, when they will be done, and how to continue them."""
    if not options.runs:
        raise UserError("no run is named: fastdiff status runs/teacher")
    checks.positive(options, "watch")
    while tell(options) and options.watch is not None:
        time.sleep(options.watch)
        clear = "\x1b[H\x1b[2J" if sys.stdout.isatty() else "\n"
        print("" if options.json else clear, end="")


def tell(options: Options) -> bool:
    """Print where all of them are; returns whether one is under way. Raises UserError where none is a run."""
    found, wrong = [], []
    for run in (run for folder in options.runs for run in runs_in(folder)):
        try:
            found.append(status(run))
        except UserError as error:
            wrong.append(str(error))
    if not found:
        raise UserError(wrong[0])
    for error in wrong:
        files.warn(error)
    if options.json:
        print(json.dumps([asdict(one) for one in found], indent=1), flush=True)
    else:
        print("\n\n".join(map(describe, found)), flush=True)
    return any(one.state == "running" for one in found)


@dataclass(frozen=True, kw_only=True)
class Status:
    """Where a run is."""

    run: str
    recipe: str | None
    state: str
    """"finished", or "running" or "stopped", as it is not or is long since anything was written."""
    last_sign_of_life: float
    """In seconds since 1970."""
    seconds_since: float
    name: str
    """Of the present round,"""
    round: int
    """its number, from 1,"""
    rounds: int
    """of so many."""
    update: int
    """Of the present round, as far as it was logged,"""
    updates: int
    """of so many."""
    kimg: float
    share: float
    """Of all rounds."""
    images_per_second: float | None
    """Of late; None if that is not known."""
    seconds_left: int | None
    """Of all rounds."""
    losses: list[float]
    last_row: dict | None
    last_scores: dict | None
    best_fd: float | None
    checkpoint: str | None
    """The newest that is whole."""
    damage: str | None
    """Why there is none."""
    command: str | None
    """What goes on from it."""


def status(run: Run, *, now: float | None = None) -> Status:
    """What a run's folder tells of it. Raises UserError if it holds no run. now: seconds since 1970."""
    now = time.time() if now is None else now
    config = run.config()
    options = config["options"]
    rows, scores, saved = run.metrics.rows(), run.scores.rows(), run.saved()
    recipe = config.get("recipe") or _guess_recipe(saved, rows)

    plan = config.get("plan") or _old_plan(options, rows, saved, recipe)
    whole = {folder.name for folder in saved.rounds}
    if "start_steps" not in options and saved.update >= options["updates"]:
        whole = set(plan)
    kept = {name: n if name in whole else saved.update * (name == saved.name) for name, n in plan.items()}
    logged = {row["run"]: row["update"] for row in rows}
    at = {name: max(kept[name], min(n, logged.get(name, 0))) for name, n in plan.items()}
    name = next((name for name in plan if name not in whole), list(plan)[-1])

    batch_size, speed = options["batch_size"], _speed(rows)
    sign = run.last_sign_of_life()
    quiet = QUIET_START if speed is None else QUIET_ROWS * options["log_every"] * batch_size / speed
    state = "running" if now - sign <= max(QUIET_SECONDS, quiet) else "stopped"
    state = "finished" if whole >= plan.keys() else state
    total, done = sum(plan.values()), sum((kept if state == "stopped" else at).values())
    return Status(
        run=str(run.folder),
        recipe=recipe,
        state=state,
        last_sign_of_life=round(sign, 1),
        seconds_since=round(now - sign, 1),
        name=name,
        round=list(plan).index(name) + 1,
        rounds=len(plan),
        update=at[name],
        updates=plan[name],
        kimg=round(at[name] * batch_size / 1000, 3),
        share=round(sum(at.values()) / total, 4),
        images_per_second=speed,
        seconds_left=None if speed is None else round((total - done) * batch_size / speed),
        losses=[row["loss"] for row in rows[-RECENT:] if row["run"] == name],
        last_row=rows[-1] if rows else None,
        last_scores=scores[-1] if scores else None,
        best_fd=min((row["fd"] for row in scores if "fd" in row), default=None),
        checkpoint=None if saved.folder is None else str(saved.folder),
        damage=saved.damage,
        command=_command(run, config, recipe),
    )


def describe(found: Status) -> str:
    """A status in words."""
    lines = [f"{found.run}: {found.state}, last sign of life {duration(found.seconds_since)} ago"]

    def line(title: str, *parts: str | None) -> None:
        if any(parts):
            lines.append(f"  {title:12} " + ", ".join(filter(None, parts)))

    of = f" (round {found.round} of {found.rounds})" if found.rounds > 1 else ""
    line("recipe", found.recipe or "unknown")
    share = f"{found.share:.1%} of the run done"
    line("at", f"{found.name}{of}", f"update {found.update} of {found.updates}", f"{found.kimg:g} kimg", share)
    if found.state != "finished" and found.seconds_left is not None:
        line("left", f"{duration(found.seconds_left)} at {found.images_per_second:g} images/s")
    losses = [f"{loss:.4g}" for loss in found.losses]
    if losses:
        before = f" after {' '.join(losses[-4:-1])}" if losses[1:] else ""
        line("loss", losses[-1] + before, f"gradient norm {found.last_row['grad_norm']:.3g}")
    scores = found.last_scores
    if scores is not None:
        distance = f"FD {scores['fd']:.4g} (best {found.best_fd:.4g})" if "fd" in scores else None
        variety = f"variety {scores['spread']:.2f} of the teacher's" if "spread" in scores else None
        line("scores", distance, variety, f"at update {scores['update']}")
        for alarm in scores.get("alarms", []):
            line("alarm", alarm)
    line("checkpoint", found.checkpoint or "none", found.damage)
    if found.state != "finished":
        line("continue" if found.state == "stopped" else "if it stops", found.command)
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


def _speed(rows: list[dict]) -> float | None:
    """Images a second of late; None if that is not known."""
    return (statistics.median(row["images_per_second"] for row in rows[-RECENT:]) if rows else None) or None


def _command(run: Run, config: dict, recipe: str | None) -> str | None:
    """What continues the run, which may have been moved since it wrote that down."""
    if recipe not in RECIPES:  # a stranger's config.json is not to suggest what one types
        return None
    command = config.get("command") or _old_command(config, recipe)
    out = command.index("--out") + 1
    here = Path(command[out]).resolve() == run.folder.resolve()
    return shlex.join([*command[:out], command[out] if here else str(run.folder), *command[out + 1 :]])


# --- Runs that wrote down neither plan nor command ----------------------------------------------------------------


def _guess_recipe(saved: Saved, rows: list[dict]) -> str | None:
    """Models and logs are called as their recipes are."""
    names = [row["run"] for row in rows[-1:]]
    with suppress(OSError, ValueError, KeyError, TypeError):
        names.append(json.loads((saved.folder / "model.json").read_bytes())["kind"])
    return next((f"train.{name}" for name in names if f"train.{name}" in RECIPES), None)


def _old_plan(options: dict, rows: list[dict], saved: Saved, recipe: str | None) -> dict[str, int]:
    """The updates of each round, as recipes planned them before they wrote it down."""
    if "start_steps" not in options:
        name = rows[-1]["run"] if rows else saved.name or (recipe or "run").rpartition(".")[2]
        return {name: options["updates"]}
    plan, steps = {}, options["start_steps"]
    while steps > options["end_steps"]:
        steps //= 2
        updates = options["updates"] if steps > 2 else options.get("last_updates") or 2 * options["updates"]
        nothing = steps == 1 and options.get("sampler") == "stochastic"
        plan[f"{checkpoint.ROUND_PREFIX}{steps}"] = 0 if nothing else updates
    return plan


def _old_command(config: dict, recipe: str) -> list[str]:
    """With every option that the run had and that says something."""
    apart = ("out", "resume", "overwrite", "dry_run", "preset")
    options = {key: value for key, value in config["options"].items() if key not in apart and value not in (None, [])}
    processes, out = config.get("processes", 1), config["options"].get("out", "")
    start = ["torchrun", "--nproc_per_node", str(processes)] if processes > 1 else ["python"]
    return [*start, "-m", recipe, *cli.flags(options), "--out", out, "--resume"]


if __name__ == "__main__":
    cli.run(main, Options)
