"""Each operation against the same in eager PyTorch, in `torch.compile`, and for attention in SDPA: `make bench`.

Forward and backward apart. On a GPU these are the Triton kernels at the shapes of the published U-Nets; elsewhere, what
runs on a CPU at small batches.
"""

from __future__ import annotations

import pytest
import torch

import kernels
from benchmarks import eager
from kernels import cases

roofline = pytest.importorskip("benchmarks.roofline", reason="the floors need Triton", exc_type=ImportError)

CASES = {case.name: case for case in cases.CASES}
ON_GPU = [
    "update cifar10 bf16",
    "update+clip cifar10 bf16",
    "update+clip+noise cifar10 bf16",
    "update+clip+noise nchw cifar10 bf16",
    "update+clip train cifar10 bf16",
    "update student cifar10 bf16",
    "update+clip imagenet64 bf16",
    "loss teacher cifar10 bf16",
    "loss stage1 cifar10 bf16",
    "sid cifar10 bf16",
    "add_noise cifar10 bf16",
    "randn cifar10 bf16",
    "norm 256@32 cifar10 bf16",
    "norm 256@16 cifar10 bf16",
    "norm 256@8 cifar10 bf16",
    "residual norm+silu 256+256@32 cifar10 bf16",
    "norm 192@64 imagenet64 bf16",
    "norm 384@32 imagenet64 bf16",
    "norm 768@8 imagenet64 bf16",
    "residual norm+silu 576+384@32 imagenet64 bf16",
    "attention 64x4x64 cifar10 bf16",
    "attention 256x4x64 cifar10 bf16",
    "attention 1024x6x64 imagenet64 bf16",
]
COMPILED = [  # what Inductor is given time for
    "update+clip cifar10 bf16",
    "update+clip+noise cifar10 bf16",
    "loss stage1 cifar10 bf16",
    "sid cifar10 bf16",
    "norm 256@32 cifar10 bf16",
    "norm 768@8 imagenet64 bf16",
    "norm 192@64 imagenet64 bf16",
    "attention 256x4x64 cifar10 bf16",
]
ON_CPU = [
    "update+clip cifar10 fp32",
    "update+clip+noise cifar10 fp32",
    "update+clip train cifar10 fp32",
    "loss teacher cifar10 fp32",
    "sid cifar10 fp32",
    "norm 256@16 cifar10 fp32",
    "attention 256x4x64 cifar10 fp32",
]
TINY = [
    "update+clip+noise cifar10 bf16",
    "loss stage1 cifar10 bf16",
    "sid cifar10 bf16",
    "norm 256@8 cifar10 bf16",
    "attention 64x4x64 cifar10 bf16",
]


def pytest_generate_tests(metafunc):
    tiny, gpu = metafunc.config.getoption("--tiny"), torch.cuda.is_available()
    names = TINY if tiny else ON_GPU if gpu else ON_CPU
    chosen = [
        (name, direction, contender)
        for name in names
        for direction in ("forward", "backward")[: 2 if CASES[name].gradients else 1]
        for contender in ("fastdiff", "eager", "compile", "sdpa")
        if contender != "sdpa" or CASES[name].op == "attention"
        if contender != "compile" or (name in COMPILED and (gpu or tiny))
    ]
    # Compiling takes long: last, where a time limit hurts least
    metafunc.parametrize("name, direction, contender", sorted(chosen, key=lambda each: each[2] == "compile"))


@pytest.fixture(autouse=True)
def our_kernels(lab):
    """Ours run even where a table says that PyTorch's are faster."""
    with kernels.use("triton" if lab.tiny or lab.device == "cuda" else None):
        yield


def test_kernel(benchmark, lab, name, direction, contender):
    case = CASES[name]
    batch = 1 if lab.tiny else case.batch if lab.device == "cuda" else case.batch // 32
    benchmark.group = f"{name} {direction}"
    arguments = case.arguments(lab.device, batch)
    function = {"fastdiff": lambda: None, "sdpa": lambda: eager.sdpa}.get(contender, lambda: eager.FUNCTIONS[case.op])()
    if contender == "compile":
        function = lab.compile(function)
    if direction == "forward":

        def run():
            return case.forward(arguments, function)
    else:
        out = case.forward(arguments, function)
        gradient = torch.randn_like(out[0])

        def run():
            return case.backward(arguments, out, gradient)

    size = {"shape": (batch, *case.shape), "dtype": case.dtype}
    lab.run(benchmark, run, name, direction, contender, **size, **_floor(case, direction, batch, lab.device))


def _floor(case, direction: str, batch: int, device: str) -> dict[str, object]:
    """What the kernels move and compute, and the floor of this GPU, where its data sheet is known."""
    row = next((row for row in roofline.rows([case]) if row.direction == direction), None)
    if row is None:  # no kernel of ours takes this
        return {}
    share = batch / case.batch
    known = roofline.gpu_of(torch.cuda.get_device_name()) if device == "cuda" else None
    return {
        "moved": int(share * row.work.bytes),
        "operations": share * row.work.dots,
        "floor_us": known and share * row.work.floor_us(known, case.dtype),
    }
