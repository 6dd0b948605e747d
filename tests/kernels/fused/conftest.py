"""The Triton kernels, in the interpreter (`TRITON_INTERPRET=1 pytest tests/kernels/fused`) or on a GPU.

Triton decides at import whether it interprets: this folder needs a process of its own, and is otherwise not collected.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS_HERE = INTERPRETED or torch.cuda.is_available()
collect_ignore_glob = [] if RUNS_HERE else ["test_*.py"]


if INTERPRETED:
    import shim

    shim.install()


@pytest.fixture(autouse=True)
def on_triton():
    """Every test here runs the Triton kernels, and reaches the reference by its own name. All digits count on a GPU."""
    import kernels

    with kernels.use("triton"), torch.backends.cudnn.flags(allow_tf32=False, deterministic=True):
        yield


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


def pytest_collection_modifyitems(items):
    if not INTERPRETED:
        for item in items:
            if "interpreter" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="looks inside the interpreter: set TRITON_INTERPRET=1"))
