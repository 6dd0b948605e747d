"""The one training loop: batches, optimizer, EMA, checkpoints, resume, logs, pictures. It knows no loss."""

from __future__ import annotations

import copy
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy
import torch
from torch import Tensor
from tqdm import tqdm

import fastdiff
from fastdiff import checkpoint, data, figures
from fastdiff.denoiser import Denoiser, DenoiserConfig, with_guidance
from fastdiff.distill import Batch
from fastdiff.errors import UserError
from fastdiff.sample import check_device, generate, make_folder

WATCH_EVERY = 10  # updates between looks at whether the loss is still finite; each look waits for the device
MAY_CHANGE = {
    "updates",
    "lr",
    "warmup",
    "clip_norm",
    "precision",
    "last_updates",
    "save_every",
    "log_every",
    "keep",
    "resume",
    "overwrite",
    "dry_run",
    "out",
    "device",
}
RUN_FILES = (
    "config.json",
    "metrics.jsonl",
    "samples-*.png",
    f"{checkpoint.PREFIX}*",
    "steps-*",
    ".*.writing",
    ".*.replaced",
)

Loss = Callable[[Denoiser, Batch], Tensor]


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """What every recipe has."""

    out: Path
    """The run's folder."""
    preset: str = "digits"
    """Published or tried settings; applied before all other options, which override it."""
    data: str = "digits"
    """digits, mnist, fashion-mnist, cifar10, or a folder, archive or EDM zip of images."""
    flip: bool = False
    """Flip half of the images left to right."""
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    updates: int = 2000
    """Optimizer updates in all (in a round, for stage 2)."""
    batch_size: int = 64
    """Images an update."""
    accumulate: int = 1
    """Split each batch into this many forward and backward passes."""
    lr: float = 2e-3
    warmup: int = 100
    """Updates over which the learning rate rises from 0."""
    anneal: Literal["none", "linear"] = "linear"
    """Whether the learning rate then falls to 0 at the last update."""
    weight_decay: float = 0.0
    """Decoupled (AdamW); 0 is Adam."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0: no clipping."""
    ema: float = 0.0
    """Decay of the weights' moving average, which is then what is saved and sampled; 0: none."""
    dropout: float | None = None
    """Dropout of the trained network; None: as its architecture says."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of the networks; weights, losses and sampler states stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    compile: bool = False
    """torch.compile the trained network."""
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

    def check(self) -> None:
        """Raises UserError for options that make no sense."""
        for name in ("updates", "batch_size", "accumulate", "lr", "save_every", "log_every", "keep"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "clip_norm", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise UserError(f"--ema must be in [0, 1), got {self.ema}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UserError(f"--dropout must be in [0, 1), got {self.dropout}")
        if self.batch_size % self.accumulate:
            raise UserError(f"--batch-size {self.batch_size} does not divide into --accumulate {self.accumulate} parts")
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite contradict each other: choose one")
        check_device(self.device)


class Updater:
    """The state that an update changes: weights, optimizer, EMA, and what is to be logged.

    Nothing here waits for the device: it runs on the `meta` device, where a wait would raise.
    """

    def __init__(self, options: LoopOptions, denoiser: Denoiser, loss: Loss):
        self.options, self.denoiser, self.loss = options, denoiser, loss
        self.parameters = [p for p in denoiser.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.averaged = copy.deepcopy(denoiser).requires_grad_(False).eval() if options.ema else denoiser
        optimizer = torch.optim.AdamW if options.weight_decay else torch.optim.Adam
        self.optimizer = optimizer(
            self.parameters, lr=options.lr, weight_decay=options.weight_decay,
            fused=True if self.device.type in ("cpu", "cuda") else None,
        )  # fmt: skip
        self.update_count = self.logged_at = 0
        self.loss_sum = torch.zeros((), device=self.device)
        self.grad_norm = torch.zeros((), device=self.device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=self.device)

    def learning_rate(self) -> float:
        options, n = self.options, self.update_count
        rise = min(1.0, (n + 1) / options.warmup) if options.warmup else 1.0
        return options.lr * rise * (1 - n / options.updates if options.anneal == "linear" else 1.0)

    def update(self, batch: Batch) -> None:
        options = self.options
        self.denoiser.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        for part in _split(batch, options.accumulate):
            with _autocast(options.precision, self.device):
                loss = self.loss(self.denoiser, part).mean() / options.accumulate
            loss.backward()
            self.loss_sum += loss.detach()
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, options.clip_norm or float("inf"))
        is_new = ~torch.isfinite(self.loss_sum + self.grad_norm) & (self.first_bad < 0)
        self.first_bad = torch.where(is_new, self.update_count + 1, self.first_bad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if options.ema:
            decay = min(options.ema, (1 + self.update_count) / (10 + self.update_count))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.averaged.parameters()), list(self.denoiser.parameters()), 1 - decay)
        self.update_count += 1

    def check_finite(self) -> None:
        """Raises UserError, with the update, once a loss was not finite. Waits for the device."""
        bad = int(self.first_bad)
        if bad >= 0:
            raise UserError(
                f"the loss was not finite at update {bad} of {self.options.out}: lower --lr, or use --precision fp32, "
                "and continue with --resume from the last checkpoint before it"
            )

    def tensors(self) -> dict[str, Tensor]:
        names = [name for name, p in self.denoiser.network.named_parameters() if p.requires_grad]
        tensors = {f"weights/{name}": p for name, p in self.denoiser.network.state_dict().items()}
        if self.options.ema:
            tensors |= {f"ema/{name}": p for name, p in self.averaged.network.state_dict().items()}
        for name, parameter in zip(names, self.parameters, strict=True):
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer/{name}/{key}"] = value
        if self.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors | {"random/cpu": torch.get_rng_state(), "loss_sum": self.loss_sum}

    def restore(self, tensors: dict[str, Tensor], update_count: int) -> None:
        self.update_count = update_count
        self.denoiser.network.load_state_dict(_under(tensors, "weights/"))
        if self.options.ema:
            self.averaged.network.load_state_dict(_under(tensors, "ema/"))
        for name, parameter in self.denoiser.network.named_parameters():
            state = _under(tensors, f"optimizer/{name}/")
            self.optimizer.state[parameter] = {
                key: value.to(self.device if self.device.type == "cuda" else "cpu")
                if key == "step"
                else torch.empty_like(parameter).copy_(value)  # in the parameter's own memory layout
                for key, value in state.items()
            }
        torch.set_rng_state(tensors["random/cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random/cuda"], self.device)
        self.loss_sum = tensors["loss_sum"].to(self.device)


def fit(denoiser: Denoiser, loss: Loss, dataset: data.Dataset, options: LoopOptions, *, name: str) -> Denoiser:
    """Train `denoiser` in place and return the model to use: the moving average where there is one.

    name: of this run within its folder, for logs, pictures and resuming; a new name starts at update 0.
    Raises UserError when the loss is not finite.
    """
    denoiser.network.gradient_checkpointing = options.gradient_checkpointing
    if options.dropout is not None:
        for module in denoiser.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = options.dropout
    seed = run_seed(options.seed, name)
    updater = Updater(options, denoiser.requires_grad_(True), loss)
    batches = data.Batches(dataset, options.batch_size, seed=seed, flip=options.flip)
    _resume(updater, batches, options, name)
    if options.compile:
        denoiser.network.compile()
    bar = tqdm(
        total=options.updates, initial=updater.update_count, desc=name, unit="update", dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 20,
    )  # fmt: skip
    logged_at, logged_time = updater.update_count, time.perf_counter()
    with bar:  # closed before an error is printed
        while updater.update_count < options.updates:
            updater.update(to_device(next(batches), dataset.num_classes, seed, updater.device))
            bar.update()
            n = updater.update_count
            last = n == options.updates
            if n % WATCH_EVERY == 0 or last:
                updater.check_finite()
            if n % options.log_every == 0 or last:
                seconds = time.perf_counter() - logged_time
                speed = (n - logged_at) * options.batch_size / seconds
                _log(updater, options, name, n - updater.logged_at, speed, bar)
                updater.logged_at = logged_at = n
                logged_time = time.perf_counter()
            if n % options.save_every == 0 or last:
                updater.check_finite()
                _save(updater, batches, options, name)
                preview(updater.averaged, options.out / f"samples-{name}-{n:07d}.png", options.seed)
    denoiser.eval()
    return updater.averaged.eval()


def to_device(batch: data.Batch, num_classes: int, seed: int, device: torch.device) -> Batch:
    """A batch of bytes as the losses take it."""
    if device.type == "cuda":
        batch = data.Batch(*(tensor.pin_memory() for tensor in batch))
    images, labels, ids = (tensor.to(device, non_blocking=True) for tensor in batch)
    x = data.to_float(images).contiguous(memory_format=torch.channels_last)
    return Batch(x, labels if num_classes else None, ids, seed)


def run_seed(seed: int, name: str) -> int:
    """A 64-bit key for one named run, so that two rounds with one seed see different noise."""
    digits = numpy.random.SeedSequence([seed, *name.encode()]).generate_state(1, numpy.uint64)
    return int(digits[0])


def preview(denoiser: Denoiser, path: Path, seed: int, *, columns: int = 10, steps: int = 32) -> None:
    """A grid of samples, one row a class (up to ten, evenly chosen), one column a noise; guidance 1."""
    if denoiser.config.kind == "encoder":
        return  # it makes noise of images
    training = denoiser.training
    model = with_guidance(denoiser.eval())
    classes = denoiser.num_classes
    rows = min(classes or 4, 10)
    labels = torch.arange(rows).repeat_interleave(columns) * max(1, classes // rows) if classes else None
    images = torch.cat(list(generate(
        model, num=rows * columns, labels=labels, noise_ids=torch.arange(columns).repeat(rows),
        guidance=1.0 if classes else None, steps=denoiser.config.steps or steps, seed=seed,
        sampler=denoiser.config.sampler, batch_size=columns * rows,
    )))  # fmt: skip
    figures.save_grid(images, path, columns=columns)
    denoiser.train(training)


def prepare(options: LoopOptions, dataset: data.Dataset) -> None:
    """Make the run's folder and its config.json. Raises UserError if it holds another run or something else."""
    out = options.out
    teacher = getattr(options, "teacher", None)
    if teacher is not None and out.resolve() in (teacher.resolve(), *teacher.resolve().parents):
        raise UserError(f"--out {out} holds the teacher {teacher}: choose another --out")
    description = describe(options, dataset)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        previous = _previous_options(out)
        if options.overwrite:
            for pattern in RUN_FILES:
                for path in out.glob(pattern):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif options.resume:
            _check_same(previous, description)
        else:
            raise UserError(
                f"{out} already holds a run: continue it with --resume, replace it with --overwrite, "
                "or choose another --out"
            )
    make_folder(out)
    (out / "config.json").write_text(json.dumps(description, indent=1) + "\n")


def describe(options: LoopOptions, dataset: data.Dataset) -> dict:
    """What config.json says: every option, the data, versions, git revision, device."""
    written = json.loads(json.dumps(asdict(options), default=str))
    return {
        "options": written,
        "data_fingerprint": dataset.fingerprint,
        "versions": {
            "fastdiff": fastdiff.__version__, "python": platform.python_version(), "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "git_revision": _git_revision(),
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor() or "cpu",
    }  # fmt: skip


def print_plan(
    config: DenoiserConfig, options: LoopOptions, lines: list[str], *, teacher: Denoiser | None = None
) -> None:
    """What `--dry-run` prints: model size, what will be run, memory estimate."""
    with torch.device("meta"):
        denoiser = Denoiser(config)
    weights = sum(p.numel() for p in denoiser.parameters())
    frozen = sum(p.numel() for p in teacher.parameters()) if teacher is not None else 0
    copies = 4 + bool(options.ema)  # weights, gradients, two moments, average
    part = options.batch_size // options.accumulate
    activations = activation_bytes(config, part, options)
    total = 4 * (copies * weights + frozen) + activations
    print(f"model        {weights / 1e6:.2f} M parameters, images {'×'.join(map(str, denoiser.image_shape))}")
    for line in lines:
        print(line)
    parts = f"in {options.accumulate} parts, " if options.accumulate > 1 else ""
    print(f"batch        {options.batch_size} images, {parts}{options.precision}, {options.device}")
    print(
        f"memory       about {total / 2**30:.3g} GiB: weights, gradients, moments and average "
        f"{4 * copies * weights / 2**30:.3g}, frozen teacher {4 * frozen / 2**30:.3g}, "
        f"activations {activations / 2**30:.3g}"
    )
    print(f"output       {options.out}")


def activation_bytes(config: DenoiserConfig, batch_size: int, options: LoopOptions) -> int:
    """Bytes that one forward pass saves for its backward pass, counted on the meta device (autocast ignored)."""
    with torch.device("meta"):
        denoiser = Denoiser(config)
        z = torch.empty(batch_size, *denoiser.image_shape)
        angle = torch.empty(batch_size)
    denoiser.network.gradient_checkpointing = options.gradient_checkpointing
    owned = {id(p) for p in denoiser.parameters()}
    sizes: dict[int, int] = {}
    kept = []  # held so that ids stay unique

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in owned:
            kept.append(tensor)
            sizes[id(tensor)] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        denoiser(z, angle).sum()
    return sum(sizes.values())


def check_batch(options: LoopOptions, dataset: data.Dataset) -> None:
    """Raises UserError for a batch that the data cannot fill."""
    if options.batch_size > len(dataset):
        raise UserError(
            f"--batch-size {options.batch_size} is larger than the data set {dataset.name} ({len(dataset)} images)"
        )


def check_buildable(config: DenoiserConfig) -> None:
    """Raises UserError for an architecture that does not fit the images."""
    try:
        with torch.device("meta"):
            Denoiser(config)
    except ValueError as error:
        raise UserError(f"--unet: {error}") from None


def _split(batch: Batch, parts: int) -> Iterator[Batch]:
    if parts == 1:
        yield batch
        return
    labels = [None] * parts if batch.label is None else batch.label.chunk(parts)
    for x, label, ids in zip(batch.x.chunk(parts), labels, batch.sample_ids.chunk(parts), strict=True):
        yield Batch(x, label, ids, batch.seed)


def _autocast(precision: str, device: torch.device):
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _log(updater: Updater, options: LoopOptions, name: str, updates: int, speed: float, bar: tqdm) -> None:
    row = {
        "run": name, "update": updater.update_count, "images": updater.update_count * options.batch_size,
        "loss": float(updater.loss_sum) / updates, "grad_norm": float(updater.grad_norm),
        "lr": updater.learning_rate(), "images_per_second": round(speed, 1), "time": round(time.time(), 1),
    }  # fmt: skip
    updater.loss_sum.zero_()
    bar.set_postfix_str(f"loss {row['loss']:.4f}, {speed:.0f} images/s", refresh=False)
    with open(options.out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def _save(updater: Updater, batches: data.Batches, options: LoopOptions, name: str) -> None:
    state = {"run": name, "update": updater.update_count, "logged_at": updater.logged_at, "data": batches.state()}
    checkpoint.save(
        options.out / f"{checkpoint.PREFIX}{updater.update_count:07d}", updater.averaged, state=state,
        state_tensors=updater.tensors(),
    )  # fmt: skip
    for old in sorted(options.out.glob(f"{checkpoint.PREFIX}*"))[: -options.keep]:
        shutil.rmtree(old)


def _resume(updater: Updater, batches: data.Batches, options: LoopOptions, name: str) -> None:
    newest = checkpoint.newest(options.out)
    if newest is None:
        return
    state, tensors = checkpoint.load_state(newest)
    if state["run"] != name:
        for old in options.out.glob(f"{checkpoint.PREFIX}*"):
            shutil.rmtree(old)
    else:
        updater.restore(tensors, state["update"])
        updater.logged_at = state.get("logged_at", state["update"])
        batches.restore(state["data"])


def _previous_options(out: Path) -> dict:
    try:
        previous = json.loads((out / "config.json").read_text())
        if previous.keys() >= {"options", "data_fingerprint"}:
            return previous
    except (OSError, ValueError, AttributeError):
        pass
    raise UserError(f"{out} is not empty and holds no run of fastdiff: choose another --out")


def _check_same(previous: dict, now: dict) -> None:
    old, new = previous.get("options", {}), now["options"]
    changed = [
        f"--{key.replace('_', '-')} was {old.get(key)}, is {new.get(key)}"
        for key in sorted(old.keys() | new.keys()) if key not in MAY_CHANGE and old.get(key) != new.get(key)
    ]  # fmt: skip
    if previous.get("data_fingerprint") != now["data_fingerprint"]:
        changed.append("the data set is another one")
    if changed:
        raise UserError(f"cannot resume {new['out']} with other options: {'; '.join(changed)}")


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
