"""A generator for others to serve: `fastdiff export runs/stage2/steps-4 --format onnx --out exported`."""

from __future__ import annotations

import io
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Literal

import tyro

from fastdiff import checkpoint, checks, cli, files
from fastdiff.denoiser import Denoiser, with_guidance
from fastdiff.errors import UserError
from fastdiff.exports import card, compare, diffusers, onnx, pt2
from fastdiff.exports.generator import MAX_STEPS, Generator, takes_guidance
from fastdiff.generate import Sampling

FORMATS: dict[str, ModuleType] = {"onnx": onnx, "torch": pt2, "diffusers": diffusers}
PARTS = (card.FILE, onnx.FILE, f"{onnx.FILE}.data", pt2.FILE, "model_index.json", "unet", "scheduler")


@dataclass(frozen=True, kw_only=True)
class Options:
    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint's folder, or a run's (its newest checkpoint)."""
    format: str
    """onnx: model.onnx. torch: model.pt2, of torch.export. diffusers: the folder of a pipeline."""
    out: Path
    """The export's folder, which also holds its model card, README.md."""
    guidance: float | None = None
    """One strength w for all images; default: an input, where w matters. diffusers needs one."""
    steps: int | None = None
    """Sampling steps, at most 64; default: what the checkpoint was trained for, 64 for teachers."""
    sampler: Literal["ddim", "stochastic", "ancestral"] | None = None
    """Default: what the checkpoint was trained for, ddim for teachers."""
    variance: float = 0.3
    """γ of the ancestral sampler, in [0, 1]."""
    clip: bool = True
    """Limit the predicted image to [−1, 1] in every step."""
    uint8: bool = False
    """Images as uint8 in [0, 255], not as float32 in [−1, 1]."""
    scores: Path | None = None
    """What fastdiff.evaluate wrote, for the model card; default: results.json in the checkpoint's or run's folder."""
    licence: str | None = None
    """For the model card, as model hubs write it, such as apache-2.0."""
    overwrite: bool = False
    """Replace an export that is there already."""


def main(options: Options) -> None:
    """Put a whole generator into one file or folder, as others serve it."""
    exporter = _exporter(options)
    if options.out.suffix in (".onnx", ".pt2"):
        raise UserError(f"--out {options.out}: an export is a folder, for its card lies beside it: name one")
    is_ours = card.is_ours(options.out)
    checks.replaceable(
        options.out, options.overwrite, is_part=lambda path: is_ours and path.name in PARTS, what="an export"
    )
    place = checkpoint.find(options.checkpoint)
    denoiser = checkpoint.load(place)
    generator = _generator(options, denoiser)
    scores = _scores(options, place, generator)
    checks.folder(options.out.parent)
    beside = files.beside(options.out, "writing")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        _write(exporter, generator, beside, options.checkpoint)
        compared = _compare(exporter, denoiser, generator, beside)
        about = {"library": exporter.LIBRARY, "calling": exporter.calling(generator), "compared": compared}
        about |= {"scores": scores, "licence": options.licence}
        (beside / card.FILE).write_text(card.text(generator, place, **about))
        files.move_into_place(beside, options.out)
    except OSError as error:
        raise UserError(f"--out {options.out} was not written ({error}): make room there, or choose another") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    print(f"inputs       {', '.join(generator.inputs)}, for any number of images")
    print(f"compared     {compared}")
    print(f"-> {options.out}")


def _exporter(options: Options) -> ModuleType:
    """Raises UserError for a format that is unknown, or needs what is not installed."""
    if options.format not in FORMATS:
        raise UserError(f"--format {options.format} is unknown: choose {', '.join(FORMATS)}")
    exporter = FORMATS[options.format]
    missing = " and ".join(name for name in exporter.NEEDS if find_spec(name) is None)
    if missing:
        raise UserError(
            f"--format {options.format} needs {missing}, not installed here: pip install 'fastdiff[export]'"
        )
    return exporter


def _generator(options: Options, denoiser: Denoiser) -> Generator:
    """The whole sampler. Raises UserError for what the checkpoint cannot be sampled with, or a format cannot hold."""
    config, path = denoiser.config, options.checkpoint
    checks.positive(options, "steps")
    if not 0 <= options.variance <= 1:
        raise UserError(f"--variance must be in [0, 1], got {options.variance}")
    wanted = Sampling(steps=options.steps, sampler=options.sampler, variance=options.variance, clip=options.clip)
    checks.sampling(wanted, config, path)
    steps = wanted.settled(config).steps
    if steps > MAX_STEPS:
        raise UserError(
            f"--steps {steps}: an export holds its steps one after the other, and at most {MAX_STEPS}: give fewer, or "
            "distil the model first (train.stage1, train.stage2)"
        )
    if options.guidance is not None:
        checks.guidance(with_guidance(denoiser), options.guidance, path)
    if options.uint8 and config.latents is not None:
        raise UserError(f"--uint8 is for images, and {path} makes latents: leave it out")
    if options.format == "diffusers":
        if options.uint8:
            raise UserError("--uint8 is for onnx and torch: a pipeline of diffusers makes pictures itself")
        if options.guidance is None and takes_guidance(config):
            raise UserError("--format diffusers needs --guidance: its networks have no input for w")
        diffusers.check(config, wanted.settled(config).sampler, steps, options.guidance or 0.0)
    return Generator(denoiser, wanted, guidance=options.guidance, uint8=options.uint8)


def _scores(options: Options, place: Path, generator: Generator) -> str | None:
    """The table of scores for the card. Raises UserError where a file that was named has none."""
    if options.scores is not None:
        found = card.scores(options.scores, generator)
        if found is None:
            raise UserError(
                f"--scores {options.scores} has no row of {generator.steps} {generator.sampling.sampler} steps"
                " and this w: score the model as it is exported"
            )
        return found
    there = (folder / "results.json" for folder in (place, place.parent))
    return next((card.scores(path, generator) for path in there if path.is_file()), None)


def _write(exporter: ModuleType, generator: Generator, folder: Path, path: Path) -> None:
    """Raises UserError for a network of the user's own that cannot be made a graph."""
    network = generator.config.network
    try:
        with _quiet():
            exporter.write(generator, folder)
    except Exception as error:
        if network == "unet" or isinstance(error, (UserError, OSError)):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"the network {network!r} of {path} cannot be traced as one graph for any number of images ({reason}): "
            "write it without branches on values or numbers of images"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what other libraries tell of themselves, and of the graph in which they found an error."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _compare(exporter: ModuleType, denoiser: Denoiser, generator: Generator, folder: Path) -> str:
    """How far the images are from ours, in words. Raises UserError where they are too far; warns without a runtime."""
    with _quiet():
        run = exporter.read(generator, folder)
    if run is None:
        files.warn(f"the export was not compared with fastdiff's own images: install {exporter.RUNTIME}, and repeat it")
        return f"not with fastdiff's own images, as {exporter.RUNTIME} was not installed"
    found = compare.largest_difference(run, denoiser, generator, f"the export in {exporter.RUNTIME}")
    return f"with fastdiff's own images, in {exporter.RUNTIME}: at most {found:.1e} apart, in [−1, 1]"


if __name__ == "__main__":
    cli.run(main, Options)
