"""Make the page of comparisons and runs: `fastdiff report runs/demo --out report.html`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from fastdiff import checks, cli, files
from fastdiff.errors import UserError
from train.report import page

SHARE = 0.01  # of the time, at most, goes into pages: what they take is not there for training


@dataclass(frozen=True, kw_only=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """The folders of runs and comparisons, or folders of such folders."""
    out: Path = Path(page.NAME)
    overwrite: bool = False
    """Replace the page if it is there already."""
    watch: float | None = None
    """Write the page again every so many seconds, until Ctrl-C, and have it load itself again; more seldom where a page
    takes more than 1 % of that time."""


def main(options: Options) -> None:
    """Write one page of comparisons and runs, to open from disk: pictures under a slider, curves, tables."""
    if not options.runs:
        raise UserError("no run is named: fastdiff report runs/demo")
    checks.positive(options, "watch")
    shown = page.content(options.runs, options.out, reload=options.watch)
    checks.output(options.out, options.overwrite, file=True)
    for note in shown["notes"]:
        files.warn(note)
    files.replace(options.out, page.render(shown))
    counts = f"{len(shown['comparisons'])} comparisons and {len(shown['runs'])} runs"
    print(f"{options.out}: {counts}, {options.out.stat().st_size / 1e6:.1f} MB", flush=True)
    if options.watch is not None:
        watch(options)


def watch(options: Options) -> None:
    """Write the page again and again, until Ctrl-C."""
    pause = options.watch
    try:
        while True:
            time.sleep(pause)
            start = time.perf_counter()
            shown = page.content(options.runs, options.out, reload=pause)
            files.replace(options.out, page.render(shown))
            pause = max(options.watch, (1 / SHARE - 1) * (time.perf_counter() - start))
    finally:
        page.write(options.out, options.runs)  # which no longer waits for another


if __name__ == "__main__":
    cli.run(main, Options)
