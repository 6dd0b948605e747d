"""One U-Net call, and one with its backward pass: our operations in it against PyTorch's own: `make bench`.

On a GPU the cifar10 preset in bfloat16 autocast; elsewhere a small one in float32.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch

import kernels
from benchmarks import eager
from fastdiff.unet import PRESETS, UNet

DIRECTIONS = ("forward", "forward+backward")


@contextmanager
def _operations(contender: str):
    """The U-Net with eager PyTorch's operations instead of ours, but for "fastdiff"."""
    with pytest.MonkeyPatch.context() as patch:
        if contender != "fastdiff":
            patch.setattr(kernels, "group_norm", eager.group_norm)
            patch.setattr(kernels, "residual_norm", eager.residual_norm)
            patch.setattr(kernels, "attention", eager.sdpa)
        yield


@pytest.fixture(scope="module")
def unet(lab) -> UNet:
    torch.manual_seed(0)
    config = PRESETS["cifar10" if lab.device == "cuda" else "fashion-mnist"]
    if lab.tiny:
        config = replace(PRESETS["digits"], channels=8, channel_mult=(1,), attention_resolutions=(8,), head_width=8)
    return UNet(config).to(lab.device).eval()


def pytest_generate_tests(metafunc):
    chosen = [(contender, direction) for contender in ("fastdiff", "eager") for direction in DIRECTIONS]
    if torch.cuda.is_available():  # last, and only forward: compiling takes a minute
        chosen.append(("compile", DIRECTIONS[0]))
    metafunc.parametrize("contender, direction", chosen)


def test_unet(benchmark, lab, unet, contender, direction):
    config = unet.config
    batch = 1 if lab.tiny else 64 if lab.device == "cuda" else 8
    gpu = lab.device == "cuda"
    z = torch.randn(batch, config.image_channels, *config.image_size, device=lab.device)
    time = torch.rand(batch, device=lab.device)
    label = torch.zeros(batch, dtype=torch.int64, device=lab.device)
    network = lab.compile(unet) if contender == "compile" else unet
    parameters = list(unet.parameters())

    def run():
        train = direction != "forward"
        with torch.set_grad_enabled(train):
            with torch.autocast("cuda", torch.bfloat16) if gpu else nullcontext():
                out = network(z, time, label)
            return torch.autograd.grad(out.sum(), parameters) if train else out

    benchmark.group = f"U-Net {direction}"
    with _operations(contender):
        size = {"shape": tuple(z.shape), "dtype": torch.bfloat16 if gpu else torch.float32}
        lab.run(benchmark, run, f"U-Net {config.channels} channels", direction, contender, **size)
