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
    """Write the page again every so many seconds until all runs are finished, and have it load itself again. More
    seldom where a page takes more than 1 % of that time."""


def main(options: Options) -> None:
    """Write one page of comparisons and runs, to open from disk: pictures under a slider, curves, tables."""
    if not options.runs:
        raise UserError("no run is named: fastdiff report runs/demo")
    checks.positive(options, "watch")
    shown = page.content(options.runs, options.out)  # before anything is made for it
    checks.output(options.out, options.overwrite, file=True)
    for note in shown["notes"]:
        files.warn(note)
    if options.watch is not None:
        watch(options)
    page.write(options.out, options.runs)
    size = options.out.stat().st_size
    counts = f"{len(shown['comparisons'])} comparisons and {len(shown['runs'])} runs"
    print(f"{options.out}: {counts}, {size / 1e6:.1f} MB")


def watch(options: Options) -> None:
    """Write the page again and again, until all runs are finished or Ctrl-C."""
    pause = options.watch
    try:
        while True:
            start = time.perf_counter()
            shown = page.write(options.out, options.runs, reload=pause)
            pause = max(options.watch, (time.perf_counter() - start) * (1 / SHARE - 1))
            if all(run["state"] == "finished" for run in shown["runs"]):
                return
            print(f"{options.out}: written {shown['written']}, again in {pause:.0f} s", flush=True)
            time.sleep(pause)
    except KeyboardInterrupt:
        page.write(options.out, options.runs)  # which no longer waits for another
        raise


if __name__ == "__main__":
    cli.run(main, Options)
