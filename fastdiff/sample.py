"""Draw images from a checkpoint: `python -m fastdiff.sample --checkpoint … --guidance 1 --num 64 --out grid.png`."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastdiff import checkpoint, checks, cli, data, distributed, figures, vae
from fastdiff.denoiser import with_guidance
from fastdiff.errors import UserError
from fastdiff.generate import Sampling, generate
from fastdiff.networks import NetworkOptions, enter
from fastdiff.precision import choose
from fastdiff.vae import Vae


@dataclass(frozen=True, kw_only=True)
class _Checkpoint:
    checkpoint: Path
    """A checkpoint's folder, or a run's (its newest checkpoint)."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Sampling, NetworkOptions, _Checkpoint):
    """What sampling and evaluation share."""

    guidance: tuple[float, ...] = (0.0,)
    vae: Path | None = None
    """Of a model that makes latents: the folder of the VAE that decodes them."""
    force: bool = False
    """Use a sampler that the checkpoint was not trained for."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    overwrite: bool = False
    """Replace the output if it is there already."""

    def load(self) -> nn.Module:
        """The model to sample from, for which the options make sense. Raises UserError."""
        checks.positive(self, "steps", "batch_size", "num")
        if not 0 <= self.variance <= 1:
            raise UserError(f"--variance must be in [0, 1], got {self.variance}")
        checks.device(self.device)
        checks.graph(self.graph, self.device)
        enter(self.network_module)
        model = checkpoint.load(self.checkpoint, device=self.device)
        checks.sampling(self, model.config, self.checkpoint, force=self.force)
        return with_guidance(model)

    def decoder(self, model: nn.Module) -> Vae | None:
        """The VAE that makes images of what the model makes, where that is latents. Raises UserError."""
        return vae.of_model(self.vae, model.config, self.device)

    def sampling(self, model: nn.Module, num: int, guidance: float | Tensor) -> Sampling:
        """How `num` images of the model are drawn; precision auto is settled here."""
        given = {field.name: getattr(self, field.name) for field in fields(Sampling)}
        given["precision"] = choose(self.precision, model, batch_size=min(num, self.batch_size))
        return Sampling(**given | {"guidance": guidance}).settled(model.config)


@dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions):
    guidance: tuple[float, ...] = (0.0,)
    """Guidance strength w ≥ 0; 0 is the plain conditional model (other libraries' scale minus 1). Several: in turn."""
    guidance_range: tuple[float, float] | None = None
    """Spread w evenly from the first number to the second over the images, instead of --guidance."""
    sweep: bool = False
    """One row of the grid for each w of --guidance, with the same --num noises and classes in all."""
    num: int = 64
    labels: tuple[str, ...] = ()
    """Classes by name, or by number, repeated as needed; default: all in turn."""
    out: Path = Path("grid.png")
    """A picture file for a grid, by its ending (.png, .jpg, .webp, .gif, …), or a folder for one PNG an image."""


def main(options: Options) -> None:
    """Draw images from a checkpoint."""
    model = options.load()
    decode = vae.decoder(options.decoder(model))
    guidance = _guidance(options)
    for w in sorted(set(options.guidance_range or options.guidance)):
        checks.guidance(model, w)
    num, ids = len(guidance), torch.arange(len(guidance)) % options.num
    labels = _labels(options, model)[ids] if model.num_classes or options.labels else None
    is_grid, columns = figures.is_picture(options.out), _columns(options, model.num_classes)
    channels, *side = model.image_shape
    size = figures.grid_size(num, *side, columns=columns)
    if is_grid:
        figures.check_picture(options.out, *size)
    needed = (1, 3 * math.prod(size)) if is_grid else (num, channels * math.prod(side))
    distributed.first(lambda: _prepare(options, is_grid, *needed))
    sampling = options.sampling(model, num, guidance)
    rows_before, start = model.network_rows, time.perf_counter()
    chunks, written = [], 0
    hidden = num <= options.batch_size or not distributed.is_first()
    bar = tqdm(total=num, unit="image", desc="sampling", disable=hidden)
    for images in generate(model, num if labels is None else labels, sampling, noise_ids=ids):
        if not distributed.is_first():
            continue
        images = decode(images)
        if is_grid:
            chunks.append(data.to_uint8(images).cpu())
        else:
            for picture in images:
                figures.save_image(picture, options.out / f"{written:06d}.png")
                written += 1
        bar.update(len(images))
    bar.close()
    seconds = time.perf_counter() - start
    calls = int(distributed.total(torch.tensor(model.network_rows - rows_before))) / num
    if not distributed.is_first():
        return
    if is_grid:
        figures.save_grid(data.to_float(torch.cat(chunks)), options.out, columns=columns)
    print(
        f"{num} images in {sampling.steps} {sampling.sampler} steps, {calls:g} network calls an image, "
        f"{num / seconds:.1f} images/s -> {options.out}"
    )


def _prepare(options: Options, is_grid: bool, count: int, size: int) -> None:
    checks.output(options.out, options.overwrite, file=is_grid)
    checks.space(options.out.parent if is_grid else options.out, count, size)
    if not is_grid:
        for old in options.out.glob("[0-9]" * 6 + ".png"):
            old.unlink()


def _guidance(options: Options) -> Tensor:
    """w of each image, (images,) float32; a sweep has --num images for each w. Raises UserError."""
    if not options.guidance:
        raise UserError("--guidance needs at least one number")
    if options.guidance_range is not None:
        if options.guidance != (0.0,):
            raise UserError("--guidance and --guidance-range both say what w is: give one of them")
        if options.sweep:
            raise UserError("--sweep takes the strengths of --guidance, not a --guidance-range: list them")
        return torch.linspace(*options.guidance_range, options.num)
    guidance = torch.tensor(options.guidance)
    return guidance.repeat_interleave(options.num) if options.sweep else _repeated(guidance, options.num)


def _repeated(values: Tensor, num: int) -> Tensor:
    return values.repeat(-(-num // len(values)))[:num]


def _columns(options: Options, num_classes: int) -> int:
    if options.sweep:
        return options.num
    by_class = 1 < num_classes <= 20 and not options.labels
    return min(num_classes if by_class else math.ceil(math.sqrt(options.num)), options.num)


def _labels(options: Options, model: nn.Module) -> Tensor:
    """The classes of --num images. Raises UserError for one that the model does not have."""
    chosen = [checks.label(wanted, model, "--labels", options.checkpoint) for wanted in options.labels]
    if chosen and distributed.is_first():
        print(f"classes: {', '.join(checks.named(number, model) for number in dict.fromkeys(chosen))}")
    return _repeated(torch.tensor(chosen or range(model.num_classes)), options.num)


if __name__ == "__main__":
    cli.run(main, Options)
