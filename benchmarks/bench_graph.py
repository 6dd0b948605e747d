"""A distilled student's batches, launched kernel by kernel and as one CUDA graph: `make bench` on a GPU.

The cifar10 preset in bfloat16, 16 images a batch, from their numbers to themselves. Each group's table has the ratio.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kernels
from fastdiff import graph
from fastdiff.denoiser import Denoiser, DenoiserConfig
from fastdiff.generate import Sampling, generate
from fastdiff.unet import PRESETS

BATCHES = 10_000  # more than are timed


class Again:
    """In place of `graph.Recorder`, to try this file out without CUDA: runs again what would be recorded."""

    def __init__(self, device: torch.device):
        pass

    def run(self, function):
        return function()

    def record(self, function):
        output = function()
        return lambda: output.copy_(function()), output


@pytest.fixture(autouse=True)
def without_cuda(lab, monkeypatch):
    """A trial is of this file, not of the kernels, which would take a second a call in the interpreter."""
    if lab.device != "cuda":
        monkeypatch.setattr(graph, "Recorder", Again)
    with kernels.use("reference" if lab.tiny else None):
        yield


@pytest.fixture(scope="module")
def student(lab) -> Denoiser:
    if lab.device != "cuda" and not lab.tiny:
        pytest.skip("a CUDA graph needs a CUDA device")
    torch.manual_seed(0)
    config = replace(PRESETS["cifar10"], guidance_input=True)
    if lab.tiny:
        config = replace(PRESETS["digits"], channels=8, channel_mult=(1,), guidance_input=True)
    return Denoiser(DenoiserConfig(config, kind="stage2", guidance_range=(0.0, 4.0))).to(lab.device).eval()


@pytest.mark.parametrize("contender", ["fastdiff", "graph"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_sampling(benchmark, lab, student, steps, contender):
    batch = 1 if lab.tiny else 16
    sampling = Sampling(guidance=1.0, steps=steps, batch_size=batch, precision="bf16", graph=contender == "graph")
    chunks = generate(student, BATCHES * batch, sampling)
    for _ in range(2):  # the second one is recorded
        next(chunks)
    benchmark.group = f"student sampling in {steps} steps"
    lab.run(
        benchmark,
        lambda: next(chunks),
        f"student {steps} steps",
        "forward",
        contender,
        shape=(batch, *student.image_shape),
        dtype=torch.bfloat16,
    )
