"""torch.export: model.pt2, which any process with PyTorch loads, as it holds nothing but PyTorch's own operators."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import kernels
from fastdiff.exports import compare
from fastdiff.exports.compare import Run
from fastdiff.exports.generator import Generator

LIBRARY, RUNTIME, NEEDS = "pytorch", "torch.export", ()
FILE = "model.pt2"


def write(generator: Generator, folder: Path) -> None:
    """model.pt2."""
    program = traced(generator, compare.inputs(generator, 2))
    torch.export.save(program, folder / FILE)


def read(generator: Generator, folder: Path) -> Run:
    return torch.export.load(folder / FILE).module()


def calling(generator: Generator) -> list[str]:
    example = generator.example("torch.randn({shape})", "torch.arange(8) % {classes}", "torch.full((8,), {w})")
    return [
        "import torch",
        "",
        f'generator = torch.export.load("{FILE}").module()',
        "images = generator(",
        *(f"    {name}={value}," for name, value in example.items()),
        f")  # {generator.made}",
    ]


def traced(module: nn.Module, given: dict[str, Tensor]) -> ExportedProgram:
    """A module as a graph of PyTorch's own operators, for any number of images: the first dimension of all but numbers.

    given: arguments by name, of two images or more.
    """
    batch = Dim("batch", min=1)
    shapes = {name: None if name == "numbers" else {0: batch} for name in given}
    with torch.no_grad(), kernels.use("reference"):
        return torch.export.export(module, (), given, dynamic_shapes=shapes, strict=False)
