"""What a page shows of folders: a comparison's rows and pictures, and what runs logged, scored and drew, as JSON."""

from __future__ import annotations

import base64
import json
import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

from fastdiff import plot
from fastdiff.cli import number
from fastdiff.errors import UserError
from fastdiff.run import Run
from fastdiff.status import Status, describe, status
from train.report import pictures, tables

RESULTS = "results.json"
MOST_POINTS = 300  # of a curve
PICTURE = re.compile(r"samples-(.+)-(\d{7,})\.png")
CURVES = {  # by their key in the logs: title, and whether the axis is logarithmic
    "loss": ("loss", True),
    "fake_loss": ("loss of the fake score", True),
    "grad_norm": ("gradient norm", True),
    "lr": ("learning rate", False),
    "images_per_second": ("images a second", False),
    "fd": ("Fréchet distance", True),
    "spread": ("variety, relative to the teacher's", False),
}
NUMBERS = ("steps", "nfe", "guidance", "fd", "score", "images_per_second", "num", "seed")


# --- A comparison ---


def comparison(folder: Path) -> dict | None:
    """What results.json in a folder holds, with its pictures; None where there is none. Raises UserError."""
    path = folder / RESULTS
    if not path.is_file():
        return None
    try:
        results = plain(json.loads(path.read_bytes()))
        rows = [row for row in results["rows"] if _is_row(row)]
        left_out = len(results["rows"]) - len(rows)
        results = results | {"rows": rows, "reference": dict(results["reference"])}
        made_by = results.get("command") or ("options" in results and tables.command(results)) or None
        headline = [{"guidance": line["guidance"], "text": tables.sentence(line)} for line in tables.headline(results)]
        timing, drawn = dict(results.get("timing", {})), _pictures(folder, results.get("pictures") or {})
        labels = list(_labels(results, left_out, drawn))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged, or no result of fastdiff ({error!r}): move it away") from None
    return {
        "name": str(folder),
        "made_by": made_by,
        "headline": headline,
        "labels": labels,
        "rows": rows,
        "timing": {"batch": timing.get("batch"), "rows": timing.get("rows", [])},
        "reconstruction": results.get("reconstruction", []),
        "reference": results["reference"],
        "pictures": drawn,
    }


def _is_row(row: dict) -> bool:
    return isinstance(row["model"], str) and all(isinstance(row[key], int | float) for key in NUMBERS)


def _pictures(folder: Path, drawn: dict) -> dict | None:
    """With each picture that is there as base64."""
    grids = []
    for name, line in drawn.get("grids", {}).items():
        png = _picture(folder / pictures.FOLDER / Path(name).name)
        if png is not None:
            grids.append({key: line[key] for key in ("model", "steps", "guidance")} | {"png": png})
    if not grids:
        return None
    return {"noises": int(drawn["noises"]), "class_names": list(map(str, drawn["class_names"])), "grids": grids}


def _picture(path: Path) -> str | None:
    """A PNG as base64; None for what is none, or was removed since."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return base64.b64encode(content).decode() if content.startswith(b"\x89PNG") else None


def _labels(results: dict, left_out: int, drawn: dict | None) -> Iterator[str]:
    """What the numbers are, and what they are not, a sentence each."""
    rows, reference = results["rows"], results["reference"]
    if rows:
        nums = " or ".join(f"{num}" for num in sorted({row["num"] for row in rows}))
        seeds = " or ".join(f"{seed}" for seed in sorted({row["seed"] for row in rows}))
        yield (
            f"Distance: the Fréchet distance on features of {reference['extractor']}, a small classifier of the same "
            f"data (right on {reference['extractor_test_accuracy']:.1%} of the test images), of {nums} samples (seed "
            f"{seeds}) to the {reference['images']} images of {reference['data']}'s {reference['split']} split. It is "
            f"not FID, and can be compared within this table alone. One half of those images against the other has "
            f"{reference['half_against_half_fd']:.2f}."
        )
        yield (
            f"Score: exp of the mean KL of the predicted classes to their marginal; it is high for images that the "
            f"classifier is sure of, in all classes. Real images have {reference['score']:.2f}."
        )
        yield "Calls: network calls an image; a guided teacher makes two a step at w > 0."
        yield (
            "Not measured: FID with an Inception network, how the numbers vary from training to training and from "
            "seed to seed, and what people see."
        )
        scored = {row["guidance"] for row in rows}
        only_seen = sorted({grid["guidance"] for grid in drawn["grids"]} - scored) if drawn else []
        if only_seen:
            drawn_at = ", ".join(map(number, only_seen))
            yield f"Drawn, but not scored: w = {drawn_at}. The plots show the nearest scored w."
    else:
        yield "Nothing has been scored."
    if drawn is None:
        yield "No pictures were kept beside these results: run the command again to draw them."
    if left_out:
        yield f"{left_out} rows of {RESULTS} lack numbers and are left out."


# --- A run ---


def run(run: Run, film_bytes: int) -> dict:
    """What a run's folder tells, its pictures in at most so many bytes. Raises UserError where there is no run."""
    try:
        return _run(run, film_bytes)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{run.folder} has logs or options that are none of fastdiff's ({error!r}): leave it out"
        ) from None


def _run(run: Run, film_bytes: int) -> dict:
    config, found = run.config(), status(run)
    rows, scores = run.metrics.rows(), run.scores.rows()
    start = plot.round_starts(rows)
    curves = []
    for key, (title, logarithmic) in CURVES.items():
        of = scores if key in ("fd", "spread") else rows
        line = {"name": title, "points": thinned(plot.points_of(of, start, lambda row, key=key: row[key]))}
        curves.append({"title": title, "log": logarithmic, "lines": [line]})
    quarters = [
        {"name": name, "points": thinned(plot.points_of(rows, start, lambda row, n=n: row["loss_quarters"][n]))}
        for n, name in enumerate(plot.QUARTERS)
    ]
    curves.insert(1, {"title": "loss by quarter of the noise range", "log": True, "lines": quarters})
    names = list(config.get("plan") or {row["run"]: None for row in rows})
    film, count = _film(run.folder, names, film_bytes)
    return {
        "name": str(run.folder),
        "state": found.state,
        "share": found.share,
        "status": describe(found),
        "about": _about(config, found),
        "curves": [
            panel for panel in curves if any(y is not None for line in panel["lines"] for _, y in line["points"])
        ],
        "merged": max(1, -(-len(rows) // MOST_POINTS)),
        "scores": plain([{"update": row["update"], "run": row["run"], **_flat(row)} for row in scores]),
        "alarms": [
            f"{row['run']}, update {row['update']}: {alarm}" for row in scores for alarm in row.get("alarms", [])
        ],
        "film": film,
        "film_count": count,
    }


def _about(config: dict, found: Status) -> dict[str, str]:
    """What a run was made with and on."""
    about = {"command": found.command, "device": config.get("device"), "precision": config.get("precision")}
    about |= {"seed": config["options"].get("seed"), "data": config["options"].get("data")}
    about |= {"revision": config.get("git_revision")}
    about |= {f"version of {name}": version for name, version in (config.get("versions") or {}).items()}
    return {name: str(value) for name, value in about.items() if value is not None}


def _flat(row: dict) -> dict[str, float]:
    """The numbers of a row of scores."""
    flat = {key: row[key] for key in ("fd", "spread", "near_duplicates") if key in row}
    for one in row.get("scores", []):
        flat |= {f"{key}, w = {number(one['guidance'])}": one[key] for key in ("fd", "score")}
    return flat


def thinned(points: plot.Points) -> list[list[float | None]]:
    """Points (x, y) for a page, as means of so many neighbours that they are few; [x, null] between rounds."""
    size, kept, waiting = -(-len(points) // MOST_POINTS) or 1, [], []
    for x, y in [*points, (math.nan, math.nan)]:
        if math.isfinite(y):
            waiting.append((x, y))
        if waiting and (len(waiting) == size or not math.isfinite(y)):
            kept.append([float(f"{statistics.fmean(values):.6g}") for values in zip(*waiting, strict=True)])
            waiting = []
        if not math.isfinite(y) and math.isfinite(x):
            kept.append([x, None])
    return kept


def _film(folder: Path, names: list[str], most_bytes: int) -> tuple[list[dict], int]:
    """The pictures made while training, in order, and how many there are: evenly chosen where all are too large."""
    found = []
    for path in folder.glob("samples-*.png"):
        match = PICTURE.fullmatch(path.name)
        if match:
            name, update = match[1], int(match[2])
            found.append((names.index(name) if name in names else len(names), name, update, path))
    found.sort()
    size = max((path.stat().st_size for *_, path in found), default=1)
    fit = max(1, most_bytes // size)
    chosen = found
    if fit < len(found):
        chosen = [found[round((i + 1) * len(found) / fit) - 1] for i in range(fit)]  # the last one among them
    film = [{"run": name, "update": update, "png": _picture(path)} for _, name, update, path in chosen]
    return [frame for frame in film if frame["png"]], len(found)


def plain(value):
    """Without numbers that JSON does not have: None for them."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
