"""Train a class-conditional teacher with label dropping: `python -m train.teacher --data digits --out runs/teacher`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from fastdiff import cli, data, schedule
from fastdiff.denoiser import Denoiser, DenoiserConfig
from fastdiff.errors import UserError
from fastdiff.losses import regression
from fastdiff.losses.batch import Batch
from fastdiff.precision import Choice
from fastdiff.unet import PRESETS as UNETS
from fastdiff.unet import UNetConfig
from train import begin, loop
from train.options import LoopOptions


@dataclass(frozen=True, kw_only=True)
class Options(LoopOptions):
    unet: UNetConfig = field(default_factory=lambda: UNETS["digits"])
    """Image size, channels and classes are taken from the data."""
    network: str = "unet"
    """Which of fastdiff.denoiser.NETWORKS is trained: ours, or one that --network-module enters."""
    schedule: Literal["cosine", "linear-beta", "karras"] = "cosine"
    """Noise levels of sampling, and of training with --noise-levels schedule."""
    parameterization: Literal["v", "eps", "x", "edm"] = "v"
    """What the network predicts. A teacher as EDM trains it: edm, with --schedule karras --weight edm --noise-levels
    lognormal; sample from it with --sampler heun."""
    labels: bool = True
    """Whether the classes of the data are used; without, the teacher is unconditional."""
    label_drop: float = 0.1
    """Probability of the null class, from which the unconditional model is learned."""
    weight: Literal["v", "snr", "snr_trunc", "constant", "edm"] = "snr"
    """What the velocity's squared error is weighed as (snr: the error of ε; edm: the error of EDM's F)."""
    noise_levels: Literal["schedule", "lognormal"] = "schedule"
    """Noise levels of training: the schedule's, evenly over its times, or EDM's ln σ ~ N(−1.2, 1.2²)."""
    ema: float = 0.999

    def check(self) -> None:
        super().check()
        if not 0 <= self.label_drop < 1:
            raise UserError(f"--label-drop must be in [0, 1), got {self.label_drop}")


DDPMPP = UNetConfig(
    (32, 32),
    3,
    10,
    channels=128,
    channel_mult=(2, 2, 2),
    blocks=4,
    attention_resolutions=(16,),
    head_width=None,
    dropout=0.13,
    input_mult=1,
    scale_shift=False,
    resample_skip_conv=True,
    residual_scale=0.5**0.5,
    eps=1e-6,
    decoder_attention="last",
    qkv_order="head-width-qkv",
    time_scale=1.0,
    time_endpoint=True,
    label_before_mlp=True,
)
PRESETS = {
    "digits": {},
    "fashion-mnist": {
        "batch_size": 128,
        "unet": UNETS["fashion-mnist"],
        "data": "fashion-mnist",
        "updates": 20_000,
        "lr": 1e-3,
    },
    "cifar10": {
        "batch_size": 128,
        "unet": UNETS["cifar10"],
        "data": "cifar10",
        "flip": True,
        "updates": 800_000,
        "lr": 2e-4,
        "warmup": 5000,
        "anneal": "none",
        "ema": 0.9999,
        "precision": "bf16",
        "save_every": 10_000,
    },
    "cifar10-edm": {  # 200 M images, 10 M of warmup, an average of half-life 0.5 M; [EDM] drops no labels
        "unet": DDPMPP,
        "data": "cifar10",
        "flip": True,
        "schedule": "karras",
        "parameterization": "edm",
        "weight": "edm",
        "noise_levels": "lognormal",
        "updates": 390_625,
        "batch_size": 512,
        "lr": 1e-3,
        "warmup": 19_531,
        "anneal": "none",
        "clip_norm": 0.0,
        "ema": 0.9993,
        "save_every": 10_000,
    },
    "imagenet64": {
        "unet": UNETS["imagenet64"],
        "data": "data/imagenet64",
        "flip": True,
        "updates": 540_000,
        "batch_size": 2048,
        "lr": 3e-4,
        "warmup": 5000,
        "anneal": "none",
        "ema": 0.9999,
        "precision": "bf16",
        "save_every": 10_000,
    },
}


def train(options: Options) -> Denoiser | None:
    """Train a class-conditional teacher with label dropping.

    Runs or continues the recipe; returns the teacher. Raises UserError.
    """
    return begin.train(RECIPE, options)


def dataset_of(options: Options) -> data.Dataset:
    dataset = begin.training_data(options)
    return dataset if options.labels else dataset.without_labels()


def learn(options: Options, _: None, dataset: data.Dataset) -> Denoiser:
    denoiser = Denoiser(denoiser_config(options, dataset)).to(options.device)

    def loss(model: Denoiser, batch: Batch) -> Tensor:
        return regression.teacher(
            model, batch, label_drop=options.label_drop, weight=options.weight, noise_levels=options.noise_levels
        )

    return loop.fit(denoiser, loss, dataset, options, name="teacher")


def settled_precision(options: Options) -> Choice:
    """The precision of a run of these options, which may not have begun: for those who go on with it in others."""
    config = denoiser_config(options, begin.training_data(options)) if options.precision == "auto" else None
    return begin.settle_precision(options, lambda: Denoiser(config).to(options.device)).precision


def denoiser_config(options: Options, dataset: data.Dataset) -> DenoiserConfig:
    channels, *size = dataset.shape
    unet = replace(
        options.unet,
        image_channels=channels,
        image_size=tuple(size),
        num_classes=dataset.num_classes,
        guidance_input=False,
        outputs=1,
    )
    config = DenoiserConfig(
        unet,
        schedule.SCHEDULES[options.schedule](),
        options.parameterization,
        class_names=dataset.class_names,
        network=options.network,
        latents=dataset.latents,
        data=dataset.fingerprint,
    )
    begin.check_buildable(config)
    if not options.resume:  # a run may have begun before this was looked at
        check_attention(unet)
    return config


def check_attention(unet: UNetConfig) -> None:
    """Raises UserError for resolutions of attention that no level has, where there would be none."""
    heights = [unet.height(level) for level in range(len(unet.channel_mult))]
    if missing := [str(height) for height in unet.attention_resolutions if height not in heights]:
        raise UserError(
            f"--unet.attention-resolutions {' '.join(missing)}: no level has that height; on these images "
            f"the levels have {', '.join(map(str, heights))}: choose among these"
        )


RECIPE = begin.Recipe(
    "teacher", PRESETS, lambda options, _, dataset: denoiser_config(options, dataset), learn, data=dataset_of
)

if __name__ == "__main__":
    cli.run(train, Options, PRESETS)
