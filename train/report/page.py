"""report.html: one file to look at comparisons and runs with, which opens from disk and asks for nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shlex
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import fastdiff
from fastdiff import files
from fastdiff.errors import UserError
from fastdiff.run import runs_in
from train.report import gather

NAME = "report.html"
SCRIPTS = ("widgets.js", "comparison.js", "page.js")
FILM_BYTES = 2_000_000  # of all pictures made while training, together


def write(path: Path, folders: Sequence[Path]) -> None:
    """Write the page of these folders. Raises UserError where none holds anything, and where the drive refuses it."""
    files.replace(path, render(content(folders, path)))


def content(folders: Sequence[Path], path: Path, *, reload: float | None = None) -> dict:
    """All that the page at `path` shows, as JSON; what is damaged is told among `notes`.

    reload: seconds after which the page loads itself again. Raises UserError where no folder holds anything.
    """
    comparisons, runs, notes = [], [], []
    for folder in folders:
        try:
            found = gather.comparison(folder)
        except UserError as error:
            found, notes = None, [*notes, str(error)]
        comparisons += [found] if found else []
        inside = runs_in(folder)
        runs += inside if not found or (inside[0].folder / "config.json").exists() else []
    told = []
    for run in runs:
        try:
            told.append(gather.run(run, FILM_BYTES // len(runs)))
        except UserError as error:
            notes.append(str(error))
    if not comparisons and not told:
        raise UserError(notes[0])
    names = [one["name"] for one in comparisons or told]
    return {
        "title": ", ".join(names[:3]) + (f" and {len(names) - 3} others" if names[3:] else ""),
        "command": shlex.join(["fastdiff", "report", *map(str, folders), "--out", str(path), "--overwrite"]),
        "written": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "version": fastdiff.__version__,
        "reload": reload,
        "notes": notes,
        "comparisons": comparisons,
        "runs": told,
    }


def render(shown: dict) -> str:
    """The page's HTML: script, style and data inside; nothing but its own script may run, and nothing be fetched."""
    here = resources.files(__package__).joinpath("web")
    script = "\n".join(here.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "title": html.escape(shown["title"]),
        "policy": f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        "style": here.joinpath("page.css").read_text(encoding="utf-8"),
        "data": json.dumps(shown, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c"),
        "script": script,
    }
    template = here.joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
