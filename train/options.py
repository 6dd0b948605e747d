"""What every recipe is told on its command line, and how a run that goes on is told the same again."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from fastdiff import checks, cli, distributed, graph
from fastdiff.errors import UserError
from fastdiff.networks import NetworkOptions
from fastdiff.precision import Precision
from fastdiff.unet import UNetConfig

MAY_CHANGE = {
    "preset",  # what it sets is compared instead
    "updates",
    "lr",
    "warmup",
    "clip_norm",
    "precision",
    "compile",
    "last_updates",
    "save_every",
    "log_every",
    "keep",
    "resume",
    "overwrite",
    "dry_run",
    "out",
    "device",
    "graph",
    "shard",
    "shard_teacher",
    "network_module",
    "vae",
}
BEGAN_WITH = {"spacing": "steps"}  # what runs did of before there was an option, where that is not its default
APART = ("out", "resume", "overwrite", "dry_run", "preset")  # the command that continues has them for itself


@dataclass(frozen=True, kw_only=True)
class LoopOptions(NetworkOptions):
    """What every recipe has."""

    out: Path
    """The run's folder."""
    preset: str | None = None
    """Published or tried settings, applied before all other options, which override it; default: none of them."""
    data: str = "digits"
    """digits, mnist, fashion-mnist, cifar10, or a folder, archive or EDM zip of images, or a file of latents."""
    background: str = "white"
    """What transparent pictures of the data are laid on: a colour (white, #rrggbb), or none to drop their alpha."""
    vae: Path | None = None
    """Where models make latents: the folder of the VAE that decodes the pictures of samples; default: no pictures."""
    flip: bool = False
    """Flip half of the images left to right."""
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    updates: int = 2000
    """Optimizer updates in all (in a round, for stage 2)."""
    batch_size: int = 64
    """Images an update, over all processes."""
    accumulate: int = 1
    """Split each batch into this many forward and backward passes."""
    lr: float = 2e-3
    warmup: int = 100
    """Updates over which the learning rate rises from 0."""
    anneal: Literal["none", "linear"] = "linear"
    """Whether the learning rate then falls to 0 at the last update."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the gradient's mean and of its mean square."""
    weight_decay: float = 0.0
    """Decoupled (AdamW); 0 is Adam."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0: no clipping."""
    ema: float = 0.0
    """Decay of the weights' moving average, which is then what is saved and sampled; 0: none."""
    dropout: float | None = None
    """Dropout of the trained network; None: as its architecture says."""
    precision: Precision = "fp32"
    """bf16: autocast of the networks; weights, losses and sampler states stay float32. auto: bf16 where it is found to
    be faster and within 2e-2 of fp32; a run that goes on keeps what it has."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    compile: bool = False
    """torch.compile the networks, but for a sharded teacher."""
    graph: graph.Choice = "auto"
    """Record an update as a CUDA graph and replay it, so that the GPU never waits for Python. auto: on CUDA, and
    without one where that fails."""
    shard: bool = False
    """Split weights, gradients, moments and average of the trained networks over the processes (FSDP2)."""
    shard_teacher: bool = False
    """Split frozen teachers too, instead of a copy in each process."""
    save_every: int = 1000
    """Updates between checkpoints (and sample pictures); the last update is always saved."""
    keep: int = 2
    """How many of a run's numbered checkpoints are kept."""
    log_every: int = 100
    resume: bool = False
    """Continue the run in `out`."""
    overwrite: bool = False
    """Delete the run in `out` and start again."""
    dry_run: bool = False
    """Print what would be done (model, updates, memory) and stop."""

    def __post_init__(self):
        """A path may be given as text in Python, too."""
        for item in fields(self):
            if "Path" in str(item.type) and isinstance(getattr(self, item.name), str):
                object.__setattr__(self, item.name, Path(getattr(self, item.name)))

    def check(self) -> None:
        """Raises UserError for options that make no sense."""
        for name in ("updates", "batch_size", "accumulate", "lr", "save_every", "log_every", "keep"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "clip_norm", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} must not be negative, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"--betas must be two numbers in [0, 1), got {self.betas[0]:g} {self.betas[1]:g}")
        if not 0 <= self.ema < 1:
            raise UserError(f"--ema must be in [0, 1), got {self.ema}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UserError(f"--dropout must be in [0, 1), got {self.dropout}")
        parts = self.accumulate * distributed.world_size()
        if self.batch_size % parts:
            raise UserError(
                f"--batch-size {self.batch_size} does not divide into {parts} equal parts (--accumulate "
                f"{self.accumulate}, {distributed.world_size()} processes)"
            )
        for name in ("shard", "shard_teacher"):
            if getattr(self, name) and distributed.world_size() == 1:
                raise UserError(
                    f"--{name.replace('_', '-')} splits networks over several processes, and this is one: start it by "
                    "torchrun --nproc_per_node N, or leave the option out"
                )
        if self.shard and self.compile:
            raise UserError("--shard does not go together with --compile: choose one")
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite contradict each other: choose one")
        if self.shard and self.graph == "on":
            raise UserError("--shard does not go together with --graph on: choose one")
        checks.device(self.device)
        checks.graph(self.graph, self.device)

    def plain(self) -> dict:
        """As config.json holds them."""
        return _plain(asdict(self))

    def lasting(self, options: dict) -> dict:
        """Of a run's options, as config.json holds them, those that stay the same when it goes on.

        Options that an earlier version did not have yet had what BEGAN_WITH says or, without it, what is now their
        default. The way to the teacher is told from the run's folder, as it stays the same when a folder of runs is
        moved.
        """
        defaults = _defaults(type(self))
        every = defaults | {key: value for key, value in BEGAN_WITH.items() if key in defaults} | options
        if isinstance(every.get("unet"), dict):
            every["unet"] = _plain(asdict(UNetConfig())) | every["unet"]
        if every.get("teacher"):
            every["teacher"] = os.path.relpath(every["teacher"], every["out"])
        return {key: value for key, value in every.items() if key not in MAY_CHANGE}

    def going_on(self, begun: dict) -> LoopOptions:
        """To go on with a run of the options `begun` (from config.json), which may lack some: see BEGAN_WITH."""
        given = {field.name for field in fields(self)} - begun.keys()
        return replace(self, **{key: value for key, value in BEGAN_WITH.items() if key in given})

    def recipe(self) -> str:
        """The module whose command line they are."""
        name = type(self).__module__
        return sys.modules[name].__spec__.name if name == "__main__" else name

    def command(self, presets: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """What continues the run: the options where they are not the defaults. presets: those of the recipe."""
        defaults, given = _defaults(type(self)), []
        if self.preset in presets:
            defaults |= _plain(presets[self.preset])
            given = ["--preset", self.preset]
        options = {key: value for key, value in self.plain().items() if key not in APART}
        count = distributed.world_size()
        start = ["torchrun", "--nproc_per_node", str(count)] if count > 1 else ["python"]
        return [*start, "-m", self.recipe(), *given, *cli.flags(options, defaults), "--out", str(self.out), "--resume"]


def _defaults(options: type) -> dict:
    values = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(options)
    }
    return _plain({key: value for key, value in values.items() if value is not MISSING})


def _plain(values: Mapping[str, Any]) -> dict:
    """As JSON gives it back."""
    plain = {key: asdict(value) if is_dataclass(value) else value for key, value in values.items()}
    return json.loads(json.dumps(plain, default=str))
