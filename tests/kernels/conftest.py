"""What the tests of the kernels share."""

import pytest


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch):
    """The tests choose the backend; on the CPU it is the reference unless someone forces another."""
    monkeypatch.delenv("FASTDIFF_KERNELS", raising=False)
