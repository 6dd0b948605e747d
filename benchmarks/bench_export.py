"""Images a second of an export in its runtime beside our own, on a CPU: `python -m benchmarks.bench_export`.

A student of a preset's network with random weights. Both draw the same images from the same noise, in alternation in
one run; prints medians and their ratio. Fails where the images differ.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.bench_unet_peer import timed
from fastdiff.denoiser import Denoiser, DenoiserConfig
from fastdiff.exports import compare
from fastdiff.exports.command import FORMATS
from fastdiff.exports.generator import Generator
from fastdiff.generate import Sampling
from fastdiff.unet import PRESETS


def student(preset: str, steps: int) -> Denoiser:
    """None of its branches is zero, as they are in a new network."""
    unet = replace(PRESETS[preset], guidance_input=True)
    model = Denoiser(DenoiserConfig(unet, kind="stage2", guidance_range=(0.0, 4.0), steps=steps)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="digits")
    parser.add_argument("--format", choices=("onnx", "torch"), default="onnx")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = student(options.preset, options.steps)
    generator, exporter = Generator(model, Sampling()), FORMATS[options.format]
    given = compare.inputs(generator, options.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        exporter.write(generator, Path(folder))
        run = exporter.read(generator, Path(folder))
        difference = compare.largest_difference(run, model, generator, options.format)
        works = {exporter.RUNTIME: lambda: run(**given), "ours": lambda: compare.ours(model, generator, given)}
        times = {name: statistics.median(taken) for name, taken in timed(works, options.rounds).items()}
    speeds = {name: f"{1e3 * options.batch_size / ms:.1f}" for name, ms in times.items()}
    print(f"| network | steps | batch | {exporter.RUNTIME}, images/s | ours, images/s | ratio | difference |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    row = [options.preset, options.steps, options.batch_size, *speeds.values()]
    print(f"| {' | '.join(map(str, row))} | {times['ours'] / times[exporter.RUNTIME]:.2f} | {difference:.0e} |")


if __name__ == "__main__":
    main()
