"""Times of a function on a device, and CSV rows of them."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path

import torch

try:
    import triton
except ImportError:
    triton = None

QUANTILES = (0.2, 0.5, 0.8)
FIELDS = (
    "gpu",
    "torch",
    "triton",
    "cuda",
    "kernel",
    "direction",
    "contender",
    "shape",
    "dtype",
    "p20_us",
    "p50_us",
    "p80_us",
    "gb_per_s",
    "tflop_per_s",
    "percent_of_floor",
)


def times_us(function: Callable[[], object], device: str, runs: int = 5) -> tuple[float, float, float]:
    """p20, p50 and p80. On a GPU by device events, with the L2 cache emptied before each run."""
    if device == "cuda":
        return tuple(1e3 * ms for ms in triton.testing.do_bench(function, warmup=25, rep=100, quantiles=QUANTILES))
    if runs > 1:  # the first is not like the others
        function()
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        taken.append(1e6 * (time.perf_counter() - start))
    return tuple(torch.tensor(taken).quantile(torch.tensor(QUANTILES)).tolist())


def gpu_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "none"


def row(
    device: str,
    kernel: str,
    direction: str,
    contender: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    times: tuple[float, float, float],
    *,
    moved: int = 0,
    operations: float = 0,
    floor_us: float | None = None,
) -> dict[str, object]:
    """One CSV row; moved and operations: bytes and floating-point operations that the task needs, whoever does it."""
    p20, p50, p80 = times
    return {
        "gpu": gpu_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else "",
        "cuda": torch.version.cuda or torch.version.hip or "",
        "kernel": kernel,
        "direction": direction,
        "contender": contender,
        "shape": "x".join(map(str, shape)),
        "dtype": str(dtype).removeprefix("torch."),
        "p20_us": f"{p20:.2f}",
        "p50_us": f"{p50:.2f}",
        "p80_us": f"{p80:.2f}",
        "gb_per_s": f"{moved / p50 * 1e-3:.1f}" if moved else "",
        "tflop_per_s": f"{operations / p50 * 1e-6:.3g}" if operations else "",
        "percent_of_floor": f"{100 * floor_us / p50:.1f}" if floor_us else "",
    }


def append(path: Path, rows: list[dict[str, object]]) -> None:
    """Add rows to a CSV file, with a header where it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerows(rows)
