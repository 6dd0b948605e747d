"""A one-step generator from a teacher alone ([SiD]): `python -m train.sid --teacher runs/stage1 --out runs/sid`."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import kernels
from fastdiff import cli, data, distributed, files, metrics, streams
from fastdiff.denoiser import Denoiser, DenoiserConfig, with_guidance
from fastdiff.errors import UserError
from fastdiff.evaluate import Reference, evaluate
from fastdiff.generate import Sampling, generate
from fastdiff.losses import sid
from fastdiff.losses.batch import Batch
from fastdiff.samplers import SIGMA_INIT
from fastdiff.schedule import KarrasSchedule
from train import begin, loop
from train.batches import Batches, run_seed
from train.options import LoopOptions
from train.updater import Updater, new_updater

DROPPED = 0.01  # the share of samples whose loss may be not finite
COLLAPSED = 0.5  # an alarm: a class's variety relative to the teacher's
REPEATED = 0.1  # an alarm: the share of near-duplicates beyond the teacher's


@dataclass(frozen=True, kw_only=True)
class Options(LoopOptions):
    teacher: Path
    """A run of train.teacher, or of train.stage1 for a generator that takes w."""
    data: str | None = None
    """Only to score the generator with; no image is read for training, and None takes none at all."""
    guidance_range: tuple[float, float] | None = None
    """Guidance strengths w to learn, of a stage-1 teacher; default: all of its own."""
    class_frequencies: tuple[float, ...] = ()
    """How often each class is drawn, in any unit, in the order of the teacher's class_names; default: all equally
    often."""
    alpha: float = 1.2
    """Weight of the fake score's correction in the generator's loss, in (0, 2]; [SiD] takes 1.2, or 1. Above 1, a
    generator that is far too wide is driven further away."""
    t_max: float = 800
    """The generator's loss draws t from 0 to this, of 1000; 800 is σ = 24, 450 is σ = 1.7."""
    guidance_t_max: float = 1000
    """Up to this t a stage-1 teacher gets w, beyond it 0 (which it has to know); below --t-max, it keeps images from
    being driven out of the data's range."""
    sigma_init: float = SIGMA_INIT
    """The noise level from which the generator starts."""
    sigma_min: float = 0.002
    """Noise level at t = 0; the default, and that of --sigma-max, is cut to what the teacher knows."""
    sigma_max: float = 80.0
    """Noise level at t = 1000."""
    fake_lr: float | None = None
    """Learning rate of the fake score network; default: --lr."""
    score_num: int = 1024
    """Images a score, made at every --save-every."""
    score_guidance: tuple[float, ...] = (0.0, 1.0, 4.0)
    """Guidance strengths w to score, as far as they are learned."""
    batch_size: int = 128
    lr: float = 2e-4
    betas: tuple[float, float] = (0.0, 0.999)
    """Adam's decay rates for the generator; the fake score's first is always 0."""
    warmup: int = 0
    anneal: Literal["none", "linear"] = "none"
    clip_norm: float = 0.0
    ema: float = 0.999
    dropout: float | None = 0.0

    def check(self) -> None:
        super().check()
        if not 0 < self.alpha <= 2:
            raise UserError(f"--alpha must be in (0, 2], got {self.alpha:g}; 1.2 and 1 are the published ones")
        if not 0 < self.t_max <= 1000:
            raise UserError(f"--t-max must be in (0, 1000], got {self.t_max:g}")
        if not 0 <= self.guidance_t_max <= 1000:
            raise UserError(f"--guidance-t-max must be in [0, 1000], got {self.guidance_t_max:g}")
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise UserError(
                f"--sigma-min {self.sigma_min:g} --sigma-max {self.sigma_max:g}: need 0 < the first < the second"
            )
        if not 0 < self.sigma_init < math.inf:
            raise UserError(f"--sigma-init must be a positive number, got {self.sigma_init:g}")
        if self.fake_lr is not None and not 0 < self.fake_lr < math.inf:
            raise UserError(f"--fake-lr must be positive, got {self.fake_lr:g}")
        if self.flip:
            raise UserError("--flip: SiD reads no image that could be flipped; leave it out")
        if self.score_num < 2:
            raise UserError(f"--score-num {self.score_num}: a score needs at least 2 images")
        frequencies = self.class_frequencies
        if frequencies and not (all(0 <= f < math.inf for f in frequencies) and sum(frequencies) > 0):
            raise UserError("--class-frequencies must be numbers ≥ 0, and not all 0")


PUBLISHED = {"precision": "bf16", "save_every": 2000, "keep": 3}
PRESETS = {
    "digits": {"data": "digits", "alpha": 1.0, "t_max": 450, "guidance_t_max": 380},
    # Without annealing its distance swings between 1.5 and 2.9 and a class loses its variety.
    "fashion-mnist": {"data": "fashion-mnist", "alpha": 1.0, "t_max": 600, "anneal": "linear"},
    # Half of the moving average is younger than 0.5 million images (2 million for ImageNet).
    "cifar10": PUBLISHED
    | {
        "data": "cifar10",
        "batch_size": 256,
        "lr": 1e-5,
        "ema": 0.99965,
        "updates": 390_625,
        "dropout": 0.13,
    },
    "imagenet64": PUBLISHED
    | {
        "data": "data/imagenet64",
        "batch_size": 8192,
        "accumulate": 64,
        "lr": 4e-6,
        "ema": 0.99717,
        "updates": 12_208,
        "dropout": 0.1,
    },
    "ffhq64": PUBLISHED
    | {
        "data": "data/ffhq64",
        "batch_size": 512,
        "lr": 1e-5,
        "betas": (0.9, 0.999),
        "ema": 0.99929,
        "updates": 195_313,
        "dropout": 0.05,
    },
    "afhqv2-64": PUBLISHED
    | {
        "data": "data/afhqv2-64",
        "batch_size": 512,
        "lr": 5e-6,
        "alpha": 1.0,
        "ema": 0.99929,
        "updates": 195_313,
        "dropout": 0.05,
    },
}


def train(options: Options) -> Denoiser | None:
    """Distil a teacher into a one-step generator, without data.

    Runs or continues the recipe; returns the generator. Raises UserError.
    """
    return begin.train(RECIPE, options)


def learn(options: Options, teacher: Denoiser, dataset: data.Dataset | None) -> Denoiser:
    updaters, batches = learning(teacher, options)
    return loop.run(updaters, batches, options, "sid", watch=scorer(teacher, dataset, options))


def scoring_data(options: Options) -> data.Dataset | None:
    try:
        dataset = begin.training_data(options) if options.data else None
        if dataset is not None and dataset.latents is not None:
            raise UserError(f"--data {options.data} holds latents, which no score compares")
        if dataset is not None and dataset.num_classes:
            metrics.check_scorable(dataset)
        return dataset
    except UserError as error:
        raise UserError(f"{error}; it would only score the generator, and --data None does without") from None


def check_teacher(options: Options, teacher: Denoiser) -> None:
    """Raises UserError for a teacher that does not know the classes, strengths or noise levels that are asked for."""
    source = options.teacher
    if options.class_frequencies and len(options.class_frequencies) != teacher.num_classes:
        raise UserError(
            f"--class-frequencies has {len(options.class_frequencies)} numbers, but {source} has "
            f"{teacher.num_classes} classes"
        )
    known, asked = teacher.config.guidance_range, options.guidance_range
    if asked is not None:
        if known is None:
            raise UserError(
                f"--guidance-range: {source} takes no guidance strength; distil it by train.stage1 first, and give "
                "--teacher that run"
            )
        if not known[0] <= asked[0] <= asked[1] <= known[1]:
            raise UserError(
                f"--guidance-range {asked[0]:g} {asked[1]:g}: {source} was trained for w in "
                f"[{known[0]:g}, {known[1]:g}]"
            )
    if options.guidance_t_max < options.t_max and known is not None and known[0] > 0:
        raise UserError(
            f"--guidance-t-max {options.guidance_t_max:g} is below --t-max {options.t_max:g} and needs a teacher that "
            f"knows w = 0, but {source} was trained for w in [{known[0]:g}, {known[1]:g}]: leave the option out"
        )
    lowest, highest = known_levels(teacher)
    levels = noise_levels(options, teacher)
    cut = [
        f"--{name.replace('_', '-')} is {getattr(levels, name):.3g} instead of {getattr(options, name):g}"
        for name in ("sigma_min", "sigma_max")
        if getattr(levels, name) != getattr(options, name)
    ]
    if cut:
        files.warn(f"{source} knows noise levels σ from {lowest:.3g} to {highest:.3g}: {' and '.join(cut)}")
    needed = (
        min(levels.sigma_min, options.sigma_init),
        max(math.tan(levels.angle(options.t_max / 1000)), options.sigma_init),
    )
    lacks = []
    if needed[0] < lowest * (1 - 1e-6):
        lacks.append(f"{needed[0]:.3g} to {lowest:.3g} (raise --sigma-min or --sigma-init)")
    if needed[1] > highest * (1 + 1e-6):
        lacks.append(f"{highest:.3g} to {needed[1]:.3g} (lower --sigma-max, --t-max or --sigma-init)")
    if lacks:
        raise UserError(
            f"{source} knows noise levels σ from {lowest:.3g} to {highest:.3g}, and SiD would draw from "
            f"{needed[0]:.3g} to {needed[1]:.3g}: it lacks {' and '.join(lacks)}"
        )


def known_levels(teacher: Denoiser) -> tuple[float, float]:
    """The lowest and the highest noise level σ that a teacher was trained on."""
    return tuple(math.tan(teacher.schedule.angle(t)) for t in (0.0, 1.0))


def noise_levels(options: Options, teacher: Denoiser) -> KarrasSchedule:
    """Those of the generator's loss: as asked for; by default, as far as the teacher knows them."""
    lowest, highest = known_levels(teacher)
    low, high = options.sigma_min, options.sigma_max
    if low == Options.sigma_min and low < lowest * (1 - 1e-6):
        low = lowest
    drawn = math.tan(KarrasSchedule(low, high).angle(options.t_max / 1000))
    if high == Options.sigma_max and drawn > highest * (1 + 1e-6):
        high = highest
    return KarrasSchedule(low, high)


def generator_config(options: Options, teacher: Denoiser) -> DenoiserConfig:
    """What the generator's checkpoint will say of itself."""
    plain = (0.0, 0.0) if teacher.num_classes else None  # w = 0 alone, and no guidance by two calls
    limits = options.guidance_range or teacher.config.guidance_range or plain
    one_step = {"sampler": "one_step", "steps": 1, "sigma_init": options.sigma_init}
    return replace(teacher.config, unconditional=None, kind="sid", guidance_range=limits, **one_step)


def learning(teacher: Denoiser, options: Options) -> tuple[list[Updater], Batches]:
    """What learns, on what: the fake score, and the generator against it ([SiD] alg. 1). Both start as the teacher."""
    config, teacher = generator_config(options, teacher), teacher.conditional()
    fake, generator = copy.deepcopy(teacher), copy.deepcopy(teacher)
    begin.freeze(teacher, options).network.gradient_checkpointing = options.gradient_checkpointing
    generator.config = config
    w = None if teacher.config.guidance_range is None else config.guidance_range
    levels = noise_levels(options, teacher)

    def fake_loss(model: Denoiser, batch: Batch) -> Tensor:
        return sid.fake_score(model, generator, batch, sigma=options.sigma_init, guidance_range=w)

    def generator_loss(model: Denoiser, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        how = {"alpha": options.alpha, "t_max": options.t_max, "guidance_t_max": options.guidance_t_max}
        return sid.generator(
            model, teacher, fake, batch, levels=levels, sigma=options.sigma_init, guidance_range=w, **how
        )

    fake_options = replace(options, ema=0.0, lr=options.fake_lr or options.lr, betas=(0.0, options.betas[1]))
    updaters = [
        new_updater(fake_options, fake, fake_loss, name="fake_", tolerance=DROPPED),
        new_updater(options, generator, generator_loss, tolerance=DROPPED),
    ]
    return updaters, DrawnBatches(teacher.num_classes, options, updaters[-1].device)


class DrawnBatches(Iterator[Batch]):
    """Classes drawn by sample id, without images: the stream of a data-free recipe."""

    def __init__(self, num_classes: int, options: Options, device: torch.device):
        self.batch_size, self.device, self.position = options.batch_size, device, 0
        self.seed = run_seed(options.seed, "sid")
        frequencies = torch.tensor(options.class_frequencies or [1.0] * num_classes, dtype=torch.float64)
        self.limits = (frequencies.cumsum(0) / frequencies.sum()).to(device) if num_classes else None

    def __next__(self) -> Batch:
        ids = distributed.part(torch.arange(self.position, self.position + self.batch_size, device=self.device))
        self.position += self.batch_size
        return Batch(None, self._labels(ids), ids, self.seed)

    def _labels(self, ids: Tensor) -> Tensor | None:
        if self.limits is None:
            return None
        draw = kernels.rand(ids.shape, seed=self.seed, sample_ids=ids, step=streams.LABELS, device=self.device)
        return torch.searchsorted(self.limits, draw.double(), right=True)

    def state(self) -> dict[str, int]:
        return {"position": self.position, "seed": self.seed}

    def restore(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def scorer(teacher: Denoiser, dataset: data.Dataset | None, options: Options) -> loop.Watch:
    """The scores at every save: the Fréchet distance where there are data, and the variety of the images.

    A collapse is told by comparing with the teacher's own images, so that it needs no data.
    """
    low, high = generator_config(options, teacher).guidance_range or (0.0, 0.0)
    strengths = [w for w in options.score_guidance if low <= w <= high] or [low]
    labelled = dataset is not None and dataset.num_classes > 0
    reference = Reference.load(options.data, device=options.device, background=options.background) if labelled else None
    labels = torch.arange(options.score_num) % max(1, teacher.num_classes)

    def draw(model, steps: int, sampler: str) -> Tensor:
        how = {"seed": options.seed, "precision": options.precision}
        sampling = Sampling(guidance=strengths[0], steps=steps, sampler=sampler, **how)
        return torch.cat([part.cpu() for part in generate(model, options.score_num, sampling)])

    usual: list[metrics.Variety] = []  # the teacher's, once it is needed

    def watch(model: Denoiser, last: dict | None) -> dict:
        if not usual:
            usual.append(metrics.variety(draw(with_guidance(teacher), 32, "ddim"), labels))
        images = draw(model, 1, "one_step")
        if bad := 1 - float(data.are_finite(images).float().mean()):
            return {"alarms": [f"{bad:.1%} of the images are not finite, and have no scores"]}  # `generate` has warned
        found, expected = metrics.variety(images, labels), usual[0]
        ratios = found.spread / expected.spread.clamp(min=1e-12)
        spread, worst = float(ratios.min()), int(ratios.argmin())
        row = {"spread": round(spread, 4), "near_duplicates": round(found.near_duplicates, 4), "alarms": []}
        # A generator starts with little variety, and gains it.
        if last is not None and "spread" in last and spread < COLLAPSED and round(spread, 4) <= last["spread"]:
            row["alarms"].append(f"class {worst} varies {spread:.2f} times as much as the teacher's images of it")
        if found.near_duplicates > expected.near_duplicates + REPEATED:
            row["alarms"].append(
                f"{found.near_duplicates:.0%} of the images have a near-duplicate, "
                f"{expected.near_duplicates:.0%} of the teacher's"
            )
        if reference is not None:
            how = Sampling(steps=1, sampler="one_step", seed=options.seed, precision=options.precision)
            try:
                scores = [
                    evaluate(model, reference, replace(how, guidance=w), name="sid", num=options.score_num)
                    for w in strengths
                ]
            except UserError as error:  # of images that are not finite; training may get over it
                row["alarms"].append(str(error))
            else:
                row["scores"] = [{"guidance": one.guidance, "fd": one.fd, "score": one.score} for one in scores]
                row["fd"] = round(sum(one.fd for one in scores) / len(scores), 4)
        for alarm in row["alarms"]:
            if distributed.is_first():
                print(f"warning: collapse? {alarm}", flush=True)
        return row

    return watch


RECIPE = begin.Recipe(
    "sid",
    PRESETS,
    lambda options, teacher, _: generator_config(options, teacher),
    learn,
    check=check_teacher,
    data=scoring_data,
    reads_images=False,
    learners=2,
    rows=3,
)

if __name__ == "__main__":
    cli.run(train, Options, PRESETS)
