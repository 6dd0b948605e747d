"""How every recipe begins: which models it takes, what it checks, and in which order, before anything is trained."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

import fastdiff
from fastdiff import cast, checkpoint, checks, data, distributed, files, vae
from fastdiff.denoiser import OURS, Denoiser, DenoiserConfig, blank, fitted
from fastdiff.errors import UserError
from fastdiff.networks import enter
from fastdiff.precision import agreed, check
from fastdiff.run import Run
from train import students
from train.options import LoopOptions

MODELS = {  # what models are called, by kind; teachers by whether they know classes
    "teacher": "a class-conditional teacher",
    "unconditional": "an unconditional teacher",
    "stage1": "a stage-1 model",
    "stage2": "a stage-2 model",
    "encoder": "an encoder",
    "two_student": "a pair of students",
    "sid": "a one-step generator",
}
TAKES = {  # by recipe, the kinds of model that it takes; each makes the kind of its own name
    "teacher": (),
    "stage1": ("teacher", "unconditional"),
    "stage2": ("stage1", "stage2", "unconditional"),
    "sid": ("stage1", "teacher", "unconditional"),
    "encoder": ("stage1", "encoder", "unconditional"),
    "two_student": ("teacher", "two_student"),
}


def diagram() -> str:
    """Which recipe takes what and makes what, a line each."""
    lines = []
    for recipe, kinds in TAKES.items():
        takes = ", ".join(MODELS[kind].split(" ", 1)[1] for kind in kinds) or "images"
        makes = MODELS[recipe].split(" ", 1)[1]
        lines.append(f"{takes:<67} ─ train.{recipe:<11} ─► {makes}")
    return "\n".join(lines)


def training_data(options: LoopOptions) -> data.Dataset:
    return data.load(options.data, "train", background=options.background)


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says of itself. The teacher is None where it takes none, the dataset where it reads none."""

    name: str
    """In TAKES."""
    presets: Mapping[str, Mapping[str, Any]]
    config: Callable[[Any, Denoiser | None, data.Dataset | None], DenoiserConfig]
    """(options, teacher, dataset) -> that of the model that learns."""
    learn: Callable[[Any, Denoiser | None, data.Dataset | None], Denoiser]
    """(options, teacher, dataset) -> the model that was learned."""
    check: Callable[[Any, Denoiser], None] = lambda options, teacher: None
    """Raises UserError for a teacher that does not go with the options."""
    data: Callable[[Any], data.Dataset | None] = training_data
    reads_images: bool = True
    """Whether it trains on the data, or only scores with them."""
    rounds: Callable[[Any], dict[str, int]] | None = None
    """options -> the updates of each round, by its name; default: one round of the recipe's name."""
    learners: int = 1
    """Networks that train."""
    rows: int = 1
    """Network rows that an update keeps activations of, for each image of its batch."""

    def plan(self, options: LoopOptions) -> dict[str, int]:
        return {self.name: options.updates} if self.rounds is None else self.rounds(options)


def train(recipe: Recipe, options: LoopOptions) -> Denoiser | None:
    """Run or continue a recipe; returns what it learned, None for a dry run. Raises UserError."""
    options.check()
    enter(options.network_module)
    if not options.dry_run:
        distributed.first(lambda: check_out(options))
    if options.resume and (begun := Run(options.out).options()) is not None:
        options = options.going_on(begun)
    teacher = _teacher(recipe, options)
    dataset = recipe.data(options)
    if teacher is not None and dataset is not None:
        dataset = fitted(teacher, dataset, options.teacher)
    config = recipe.config(options, teacher, dataset)
    check_fit(recipe, config, teacher, dataset, options)
    if options.vae is not None:
        vae.check(options.vae, config)
    if options.dry_run:
        print_plan(recipe, config, options, teacher)
        return None
    with Run(options.out).held():
        distributed.first(lambda: begin_run(options, describe(recipe, options, dataset, teacher)))
        options = settle_precision(options, lambda: teacher or Denoiser(config).to(options.device))
        torch.manual_seed(options.seed)
        return recipe.learn(options, teacher, dataset)


def _teacher(recipe: Recipe, options: LoopOptions) -> Denoiser | None:
    path = getattr(options, "teacher", None)
    if path is None:
        return None
    teacher = checkpoint.load(path, device=options.device)
    check_kind(recipe.name, teacher, path)
    checks.finite(teacher, path)
    if teacher.num_classes and teacher.config.network not in OURS and students.drops_labels(teacher):
        files.warn(
            f"the network {teacher.config.network!r} drops labels itself while it trains, so that its student learns "
            "another thing than it is asked: keep its own code from it, as labels are dropped here"
        )
    recipe.check(options, teacher)
    return teacher


def check_kind(recipe: str, teacher: Denoiser, path: Path) -> None:
    """Raises UserError for a model that a recipe does not take, and says what to run instead, by way of TAKES."""
    kind = teacher.config.kind
    kind = "unconditional" if kind == "teacher" and not teacher.num_classes else kind
    takes = TAKES[recipe]
    if kind in takes:
        return
    before = next((way for way in takes if kind in TAKES.get(way, ())), None)
    after = [f"train.{other}" for other, kinds in TAKES.items() if kind in kinds]
    if before is not None:
        out = path.parent / before
        instead = f"first run python -m train.{before} --teacher {path} --out {out}, and give its --out here"
    else:
        instead = f"give one of those, or go on with {_or(after)}" if after else "give one of those"
    raise UserError(f"{path} is {MODELS[kind]}, and train.{recipe} takes {_or([MODELS[k] for k in takes])}: {instead}")


def _or(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def check_fit(
    recipe: Recipe,
    config: DenoiserConfig,
    teacher: Denoiser | None,
    dataset: data.Dataset | None,
    options: LoopOptions,
) -> None:
    """Raises UserError for an architecture that does not fit the images, or too few of these."""
    if teacher is None:
        check_buildable(config)
    if dataset is not None and dataset.latents is not None and options.flip:
        raise UserError("--flip: the latents of a mirrored image are not its latents mirrored; leave it out")
    if recipe.reads_images and options.batch_size > len(dataset):
        raise UserError(
            f"--batch-size {options.batch_size} is larger than the data set {dataset.name} ({len(dataset)} images)"
        )


def check_buildable(config: DenoiserConfig) -> None:
    """Raises UserError for an architecture that does not fit the images."""
    try:
        blank(config)
    except ValueError as error:
        raise UserError(f"--{'unet' if config.network == 'unet' else 'network'}: {error}") from None


def freeze(teacher: Denoiser, options: LoopOptions) -> Denoiser:
    """A teacher that does not learn, sharded or compiled if that is asked for: copies are to be made before.

    In bf16 it keeps the weights that autocast would make of its own at each call, and those alone.
    """
    teacher.requires_grad_(False)
    if options.shard_teacher:
        distributed.shard(teacher.network)
        return teacher
    if keeps_half(teacher.config, options):
        cast.cast_for_good(teacher.network, torch.bfloat16)
    if options.compile:
        teacher.network.compile()
    return teacher


def keeps_half(config: DenoiserConfig, options: LoopOptions) -> bool:
    """Whether a frozen teacher has its weights in bf16; networks of one's own may do more with them than autocast."""
    return options.precision == "bf16" and not options.shard_teacher and config.network in OURS


# --- The run's folder ---


def check_out(options: LoopOptions) -> None:
    """Raises UserError where a run cannot begin or go on in its folder, as far as is known before data are read."""
    out, teacher = options.out, getattr(options, "teacher", None)
    if teacher is not None and out.resolve() in (teacher.resolve(), *teacher.resolve().parents):
        raise UserError(f"--out {out} holds the teacher {teacher}: choose another --out")
    Run(out).check(resume=options.resume, overwrite=options.overwrite)


def begin_run(options: LoopOptions, description: dict) -> None:
    """Make the run's folder and its config.json. Raises UserError if it holds another run or something else."""
    Run(options.out).begin(description, resume=options.resume, overwrite=options.overwrite, lasting=options.lasting)


def describe(
    recipe: Recipe, options: LoopOptions, dataset: data.Dataset | None, teacher: Denoiser | None = None
) -> dict:
    """What config.json says: every option, the plan, the teacher, the data, versions, git revision, device."""
    on_gpu = options.device.startswith("cuda")
    return {
        "recipe": options.recipe(),
        "processes": distributed.world_size(),
        "precision": options.precision,
        "plan": recipe.plan(options),
        "command": options.command(recipe.presets),
        "options": options.plain(),
        "teacher_sha256": None if teacher is None else teacher.weights_sha256(),
        "data_fingerprint": None if dataset is None else dataset.fingerprint,
        "versions": {
            "fastdiff": fastdiff.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "git_revision": _git_revision(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "cpu",
    }


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def settle_precision(options: LoopOptions, denoiser: Callable[[], Denoiser]) -> LoopOptions:
    """Options without `auto`: with the precision of the run in `out`, else one chosen now, which config.json keeps.

    denoiser: makes what is to learn, or a network of about the same architecture; a whole one, not yet sharded.
    """
    if options.precision != "auto":
        return options
    run = Run(options.out)

    def decide() -> str:
        known = run.settled_precision(options.device)
        if known == "auto":
            images = options.batch_size // options.accumulate // distributed.world_size()
            with torch.random.fork_rng(devices=[]):
                known = check(denoiser(), images, backward=True)
            run.keep_precision(known)
        return known

    return replace(options, precision=agreed(decide))


# --- Dry runs ---


def print_plan(recipe: Recipe, config: DenoiserConfig, options: LoopOptions, teacher: Denoiser | None) -> None:
    """What `--dry-run` prints: model size, what will be run, memory estimate."""
    if not distributed.is_first():
        return
    denoiser = blank(config)
    world = distributed.world_size()
    size = sum(p.numel() for p in denoiser.parameters())
    weights = size / (world if options.shard else 1)
    frozen = sum(p.numel() for p in teacher.parameters()) if teacher is not None else 0
    frozen *= 2 if teacher is not None and keeps_half(teacher.config, options) else 4
    frozen /= world if options.shard_teacher else 1
    copies = 4 * recipe.learners + bool(options.ema)  # weights, gradients, two moments; average
    part = recipe.rows * options.batch_size // (options.accumulate * world)
    activations = activation_bytes(config, part, options)
    total = 4 * copies * weights + frozen + activations
    print(f"model        {size / 1e6:.2f} M parameters, images {'×'.join(map(str, denoiser.image_shape))}")
    for name, updates in recipe.plan(options).items():
        if recipe.rounds is not None:
            steps = int(name.rpartition("-")[2])
            print(f"round        {2 * steps} -> {steps} steps: {updates} updates")
        elif recipe.learners == 1:
            print(f"updates      {updates} of {options.batch_size} images")
        else:
            print(f"updates      {updates} of each network, {options.batch_size} images each")
    parts = f"in {options.accumulate} parts, " if options.accumulate > 1 else ""
    print(f"batch        {options.batch_size} images, {parts}{options.precision}, {options.device}")
    print(
        f"memory       about {total / 2**30:.3g} GiB{' a process' * (world > 1)}: "
        f"weights, gradients, moments and average {4 * copies * weights / 2**30:.3g}, "
        f"frozen teacher {frozen / 2**30:.3g}, activations {activations / 2**30:.3g}"
    )
    print(f"output       {options.out}")


def activation_bytes(config: DenoiserConfig, batch_size: int, options: LoopOptions) -> int:
    """Bytes that one forward pass saves for its backward pass, counted on the meta device (autocast ignored).

    Networks of one's own make real passes of one image and of two, on the CPU, from which those of more follow.
    """
    denoiser = blank(config)
    denoiser.network.gradient_checkpointing = options.gradient_checkpointing
    if next(denoiser.parameters()).is_meta:
        return _saved_bytes(denoiser, batch_size)
    one, two = (_saved_bytes(denoiser, images) for images in (1, 2))
    return one + (batch_size - 1) * (two - one)


def _saved_bytes(denoiser: Denoiser, batch_size: int) -> int:
    with next(denoiser.parameters()).device:
        z = torch.zeros(batch_size, *denoiser.image_shape)
        angle = torch.ones(batch_size)
        label = torch.zeros(batch_size, dtype=torch.int64) if denoiser.num_classes else None
    owned = {id(p) for p in denoiser.parameters()}
    sizes: dict[int, int] = {}
    kept = []  # held so that ids stay unique

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in owned:
            kept.append(tensor)
            sizes[id(tensor)] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        denoiser(z, angle, label).sum()
    return sum(sizes.values())
