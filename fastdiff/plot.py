"""Draw the curves of runs: `python -m fastdiff.plot runs/teacher runs/sid --out curves.png`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from fastdiff import checks, cli, figures
from fastdiff.errors import UserError
from fastdiff.run import Run

CURVES = {
    "loss": "loss",
    "fake_loss": "loss of the fake score",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "fd": "Fréchet distance",
}
QUARTERS = ("lowest quarter", "second quarter", "third quarter", "highest quarter")

Points = list[tuple[float, float]]
Panels = dict[str, dict[str, Points]]  # title -> run -> (thousands of images, value)


@dataclass(frozen=True, kw_only=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """The folders of runs."""
    out: Path = Path("curves.png")
    overwrite: bool = False
    """Replace the picture if it is there already."""


def main(options: Options) -> None:
    """Draw losses, gradient norm, learning rate and Fréchet distance of runs over the images that they trained on."""
    if not options.runs:
        raise UserError("no run is named: fastdiff plot runs/teacher --out curves.png")
    figures.check_plot(options.out)
    rows = curves(options.runs)
    checks.output(options.out, options.overwrite, file=True)
    figures.plot_curves(rows, options.out)
    print(f"{options.out}: {sum(map(len, rows))} panels of {len(options.runs)} run{'s' * (len(options.runs) > 1)}")


def curves(runs: tuple[Path, ...]) -> list[Panels]:
    """What the runs logged, in one row of panels, and the loss by quarters of the noise range in another.

    The rounds of a run follow one another, with a gap between their lines. Raises UserError where there is nothing.
    """
    whole: Panels = {title: {} for title in CURVES.values()}
    quarters: Panels = {f"loss, {name} of the noise levels": {} for name in QUARTERS}
    for run in runs:
        folder = Run(run)
        folder.config()
        rows, scores = folder.metrics.rows(), folder.scores.rows()
        if not rows:
            raise UserError(f"{run} has logged nothing yet: leave it out, or wait for its first --log-every updates")
        start = round_starts(rows)
        for key, title in CURVES.items():
            whole[title][str(run)] = points_of(scores if key == "fd" else rows, start, lambda row, key=key: row[key])
        for n, title in enumerate(quarters):
            quarters[title][str(run)] = points_of(rows, start, lambda row, n=n: row["loss_quarters"][n])
    return [row for row in (_filled(whole), _filled(quarters)) if row]


def _filled(panels: Panels) -> Panels:
    """Without lines, and panels, of which there is nothing to be seen."""
    for lines in panels.values():
        for run in [run for run, points in lines.items() if not any(math.isfinite(value) for _, value in points)]:
            del lines[run]
    return {title: lines for title, lines in panels.items() if lines}


def round_starts(rows: list[dict]) -> dict[str, float]:
    """The images, in thousands, before each round."""
    starts, total = {}, 0.0
    for row, following in zip(rows, [*rows[1:], {"run": None}], strict=False):
        starts.setdefault(row["run"], total)
        if following["run"] != row["run"]:
            total += row["images"] / 1000
    return starts


def points_of(rows: list[dict], start: dict[str, float], value: Callable[[dict], float]) -> Points:
    """(thousands of images, value) of the rows that have one, and NaN between rounds."""
    points, run = [], None
    for row in rows:
        try:
            point = start.get(row["run"], 0.0) + row["images"] / 1000, float(value(row))
        except (KeyError, IndexError, TypeError):
            continue
        if run not in (None, row["run"]):
            points.append((start[row["run"]], math.nan))
        points.append(point)
        run = row["run"]
    return points


if __name__ == "__main__":
    cli.run(main, Options)
