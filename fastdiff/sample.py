"""Draw images from a checkpoint: `python -m fastdiff.sample --checkpoint … --guidance 1 --num 64 --out grid.png`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import kernels
from fastdiff import checkpoint, checks, cli, data, distributed, figures, files, samplers, streams
from fastdiff.denoiser import Denoiser, Guided, with_guidance
from fastdiff.errors import UserError
from fastdiff.graph import Captured
from fastdiff.precision import Precision, autocast, choose
from fastdiff.schedule import CosineSchedule

SAMPLERS = {
    "ddim": samplers.ddim, "stochastic": samplers.stochastic, "ancestral": samplers.ancestral, "heun": samplers.heun,
    "one_step": samplers.one_step,
}  # fmt: skip
TEACHER_STEPS = 64  # where neither the user nor the checkpoint says how many


@torch.no_grad()
def generate(
    model: nn.Module, *, num: int, labels: Tensor | None = None, noise_ids: Tensor | None = None,
    guidance: float | Tensor | None = None, steps: int | None = None, sampler: str | None = None,
    variance: float = 0.3, seed: int = 0, batch_size: int = 256, clip: bool = True, precision: str = "fp32",
    graph: bool = False,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield `num` images in chunks (B, C, H, W), float32 on the model's device, so that memory does not grow with num.

    Several processes make a part of each chunk, and all get the whole of it.

    labels: (num,) int64, default 0, 1, …, num_classes − 1, 0, …; guidance: a number or (num,). noise_ids: (num,)
    int64, default 0, 1, …: image i is a function of (seed, noise_ids[i], label, guidance), whatever the chunk size.
    steps, sampler: default: what the model was trained for, 64 steps of ddim for teachers, which guidance takes two
    calls a step. Raises ValueError for an encoder.
    variance: the ancestral sampler's γ. clip: limit x̂ to [−1, 1] in every step. graph: replay the loop of all steps
    as one CUDA graph, from the second chunk on (`graph.Captured`); raises ValueError where the model is on no GPU.
    """
    if isinstance(model, Denoiser):
        model = with_guidance(model)
    sampler = sampler or model.config.sampler
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is none of {', '.join(SAMPLERS)}")
    steps = steps or model.config.steps or TEACHER_STEPS
    draw = SAMPLERS[sampler]
    if sampler == "ancestral":
        draw = partial(draw, variance=variance)
    elif sampler == "one_step":
        draw = partial(draw, sigma=model.config.sigma_init)
    device = next(model.parameters()).device
    ids = torch.arange(num) if noise_ids is None else noise_ids
    if labels is None and model.num_classes:
        labels = torch.arange(num) % model.num_classes

    def images_of(sample_ids: Tensor, label: Tensor | None, w: Tensor | None) -> Tensor:
        """A batch, from its noise on; nothing here may wait for the device or need the host's memory."""
        shape = (len(sample_ids), *model.image_shape)
        noise = kernels.randn(shape, seed=seed, sample_ids=sample_ids, step=streams.INITIAL_NOISE, device=device)
        with autocast(precision, device):
            return draw(
                model, noise.contiguous(memory_format=torch.channels_last), label, w, steps,
                schedule=model.schedule, clip=1.0 if clip else None, seed=seed, sample_ids=sample_ids,
            )  # fmt: skip

    if graph:
        images_of = Captured(images_of, model.denoiser if isinstance(model, Guided) else model, device)
    for start in range(0, num, batch_size):
        part = distributed.part(torch.arange(start, min(start + batch_size, num)))
        here = ids[part].to(device)
        w = samplers.as_guidance(guidance[part] if isinstance(guidance, Tensor) else guidance, here)
        images = images_of(here, None if labels is None else labels[part].to(device), w)
        yield distributed.gather(images, min(batch_size, num - start))


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """What sampling and evaluation share."""

    checkpoint: Path
    """A checkpoint's folder, or a run's (its newest checkpoint)."""
    steps: int | None = None
    """Sampling steps; default: what the checkpoint was trained for, 64 for teachers."""
    sampler: Literal["ddim", "stochastic", "ancestral", "heun", "one_step"] | None = None
    """Default: what the checkpoint was trained for, ddim for teachers. heun makes 2·steps − 1 calls; it is for teachers
    on the karras schedule."""
    variance: float = 0.3
    """γ of the ancestral sampler, in [0, 1]: its variance between the lower and the upper bound, in the logarithm."""
    force: bool = False
    """Use a sampler that the checkpoint was not trained for."""
    clip: bool = True
    """Limit the predicted image to [−1, 1] in every step."""
    seed: int = 0
    batch_size: int = 256
    """Images at a time; the images do not depend on it."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    precision: Precision = "fp32"
    """bf16: autocast of the network; auto: bf16 where it is found to be faster and within 2e-2 of fp32."""
    graph: bool = False
    """Record the whole loop of a batch as one CUDA graph and replay it for those that follow: for batches too small to
    keep a GPU busy. Not measured yet."""
    overwrite: bool = False
    """Replace the output if it is there already."""

    def model(self) -> tuple[Denoiser | nn.Module, int, str]:
        """The model to sample from, its number of steps and its sampler. Raises UserError."""
        for name in ("steps", "batch_size", "num"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"--{name.replace('_', '-')} must be positive, got {value}")
        if not 0 <= self.variance <= 1:
            raise UserError(f"--variance must be in [0, 1], got {self.variance}")
        checks.device(self.device)
        if self.graph and self.device == "cpu":
            raise UserError(f"--graph needs a CUDA device; --device is {self.device}: leave the option out")
        denoiser = checkpoint.load(self.checkpoint, device=self.device)
        trained, sampler = denoiser.config.steps, denoiser.config.sampler
        if denoiser.config.kind == "encoder":
            raise UserError(f"{self.checkpoint} is an encoder, which makes noise of images: use fastdiff.translate")
        if (self.sampler == "one_step") != (denoiser.config.sigma_init is not None) and self.sampler is not None:
            one = "one-step generators alone" if self.sampler == "one_step" else "several-step models"
            raise UserError(
                f"--sampler {self.sampler} is for {one}, and {self.checkpoint} is a {denoiser.config.kind} model: "
                "leave the option out"
            )
        if denoiser.config.sigma_init is not None and self.steps not in (None, 1):
            raise UserError(f"--steps {self.steps}: {self.checkpoint} is a one-step generator; leave the option out")
        if trained is not None and self.sampler not in (None, sampler) and not self.force:
            raise UserError(
                f"--sampler {self.sampler}: {self.checkpoint} was trained for the {sampler} sampler: "
                "leave the option out, or use another all the same with --force"
            )
        if self.steps is not None and trained is not None and self.steps != trained:
            files.warn(
                f"{self.checkpoint} was trained for {trained} steps; with {self.steps} its images will be worse"
            )
        if self.sampler == "heun" and isinstance(denoiser.schedule, CosineSchedule):
            files.warn(
                f"heun's first step is too long on the cosine schedule of {self.checkpoint}: ddim makes better images"
            )
        return with_guidance(denoiser), self.steps or trained or TEACHER_STEPS, self.sampler or sampler


@dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions):
    guidance: tuple[float, ...] = (0.0,)
    """Guidance strength w ≥ 0; 0 is the plain conditional model (other libraries' scale minus 1). Several: in turn."""
    guidance_range: tuple[float, float] | None = None
    """Spread w evenly from the first number to the second over the images, instead of --guidance."""
    sweep: bool = False
    """One row of the grid for each w of --guidance, with the same --num noises and classes in all."""
    num: int = 64
    labels: tuple[int, ...] = ()
    """Classes, repeated as needed; default: all in turn."""
    out: Path = Path("grid.png")
    """A picture file for a grid, or a folder for one PNG an image."""


def main(options: Options) -> None:
    """Draw images from a checkpoint."""
    model, steps, sampler = options.model()
    guidance = _guidance(options)
    for w in sorted(set(options.guidance_range or options.guidance)):
        checks.guidance(model, w)
    is_grid = options.out.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
    distributed.first(lambda: _prepare(options, is_grid))
    num, ids = len(guidance), torch.arange(len(guidance)) % options.num
    labels = _labels(options, model.num_classes)[ids] if model.num_classes or options.labels else None
    precision = choose(options.precision, model, batch_size=min(num, options.batch_size))
    rows_before, start = model.network_rows, time.perf_counter()
    chunks, written = [], 0
    bar = tqdm(
        total=num, unit="image", desc="sampling", disable=num <= options.batch_size or not distributed.is_first()
    )
    for images in generate(
        model, num=num, labels=labels, noise_ids=ids, guidance=guidance, steps=steps, sampler=sampler,
        variance=options.variance, seed=options.seed, batch_size=options.batch_size, clip=options.clip,
        precision=precision, graph=options.graph,
    ):  # fmt: skip
        if not distributed.is_first():
            continue
        if is_grid:
            chunks.append(data.to_uint8(images).cpu())
        else:
            for picture in images:
                save_image(picture, options.out / f"{written:06d}.png")
                written += 1
        bar.update(len(images))
    bar.close()
    seconds = time.perf_counter() - start
    calls = int(distributed.total(torch.tensor(model.network_rows - rows_before))) / num
    if not distributed.is_first():
        return
    if is_grid:
        figures.save_grid(data.to_float(torch.cat(chunks)), options.out, columns=_columns(options, model.num_classes))
    print(
        f"{num} images in {steps} {sampler} steps, {calls:g} network calls an image, "
        f"{num / seconds:.1f} images/s -> {options.out}"
    )


def _prepare(options: Options, is_grid: bool) -> None:
    checks.output(options.out, options.overwrite, file=is_grid)
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


def save_image(image: Tensor, path: Path) -> None:
    """One image (C, H, W) in [−1, 1] as a picture file."""
    pixels = data.to_uint8(image[None])[0].cpu().numpy().transpose(1, 2, 0)
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(path)


def _labels(options: Options, num_classes: int) -> Tensor:
    """The classes of --num images. Raises UserError for one that the model does not have."""
    wrong = [label for label in options.labels if not 0 <= label < num_classes]
    if wrong:
        has = f"{num_classes} classes, 0 to {num_classes - 1}" if num_classes else "no classes"
        raise UserError(f"--labels {wrong[0]}: {options.checkpoint} has {has}")
    return _repeated(torch.tensor(options.labels or range(num_classes)), options.num)


if __name__ == "__main__":
    cli.run(main, Options)
