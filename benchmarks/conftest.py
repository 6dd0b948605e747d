"""Where the benchmarks run, and where their rows go: `--results DIR`, and `--tiny` for a trial without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import kernels
from benchmarks import measuring


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, help="folder to append CSV rows in")
    parser.addoption("--tiny", action="store_true", help="Triton kernels on the smallest shapes, a single time")


def pytest_report_header(config) -> str:
    if torch.cuda.is_available():
        return f"benchmarks: Triton kernels on {torch.cuda.get_device_name()}"
    if config.getoption("--tiny"):
        return "benchmarks: a trial in Triton's interpreter; its times say nothing about any GPU"
    return "benchmarks: no GPU here: what runs on a CPU against eager PyTorch, on small batches; no kernel is timed"


@dataclass(frozen=True)
class Lab:
    device: str
    tiny: bool
    results: Path | None

    def run(self, benchmark, function: Callable[[], object], kernel: str, direction: str, contender: str, **row):
        """Time a function, for pytest-benchmark's table (with launching) and as a CSV row (on the device)."""
        if self.device == "cuda":
            benchmark.pedantic(_finished(function), rounds=10, warmup_rounds=2)
        else:
            benchmark.pedantic(function, rounds=1 if self.tiny else 3, warmup_rounds=0 if self.tiny else 1)
        if self.results is not None:
            times = measuring.times_us(function, self.device, 1 if self.tiny else 5)
            made = measuring.row(self.device, kernel, direction, contender, times=times, **row)
            measuring.append(self.results / "benchmarks.csv", [made])

    def compile(self, function: Callable) -> Callable:
        """torch.compile, each function afresh."""
        torch.compiler.reset()
        return torch.compile(function, dynamic=False, backend="eager" if self.tiny else "inductor")


def _finished(function: Callable[[], object]) -> Callable[[], None]:
    def run():
        function()
        torch.cuda.synchronize()

    return run


@pytest.fixture(scope="session")
def lab(request) -> Iterator[Lab]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tiny = request.config.getoption("--tiny")
    with kernels.use("triton" if tiny else None):
        yield Lab(device, tiny, request.config.getoption("--results"))
