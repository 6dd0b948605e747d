"""Memory that is freed stays with a process that computes on a CPU."""

import ctypes
import platform
import subprocess
import sys

import pytest

from fastdiff import cli, memory
from fastdiff.sample import SamplingOptions

FAULTS = """
import resource, sys, torch
from fastdiff import memory
if sys.argv[1] == "keep":
    assert memory.keep_freed()
for trial in range(15):
    if trial == 5:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(size) for size in (40_000_000, 1_000_000, 2_000_000)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Pages that the system had to hand out in ten rounds of making and dropping 172 MB."""
    made = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return int(made.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_used_again():
    assert faults("keep") < 1000
    assert faults("default") > 10_000


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert memory.keep_freed() is False


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_another_system_is_left_alone(monkeypatch, system):
    monkeypatch.setattr(sys, "platform", system)
    assert memory.keep_freed() is False


@pytest.mark.parametrize(("device", "times"), [("cpu", 1), ("cuda", 0)])
def test_commands_keep_memory_where_they_compute_on_a_cpu(monkeypatch, device, times):
    called = []
    monkeypatch.setattr(memory, "keep_freed", lambda: called.append(1))
    monkeypatch.setattr(sys, "argv", ["sample", "--checkpoint", "x", "--device", device])
    cli.run(lambda options: None, SamplingOptions)
    assert len(called) == times
