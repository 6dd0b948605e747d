"""The one training loop: batches, optimizer, EMA, checkpoints, resume, logs, pictures. It knows no loss."""

from __future__ import annotations

import copy
import functools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Literal, Protocol

import numpy
import torch
from torch import Tensor
from tqdm import tqdm

import fastdiff
from fastdiff import checkpoint, data, distributed, figures
from fastdiff.denoiser import Denoiser, DenoiserConfig, with_guidance
from fastdiff.distill import TIME, Batch
from fastdiff.errors import UserError
from fastdiff.sample import check_device, generate, make_folder
from fastdiff.unet import UNetConfig

MANY_SAMPLES = 10_000  # the fewest over which the share of losses that are not finite is judged
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
    "scores.jsonl",
    "tensorboard",
    "best",
    "samples-*.png",
    f"{checkpoint.PREFIX}*",
    "steps-*",
    ".*.writing",
    ".*.replaced",
)

QUARTERS = 4  # of the noise range, for each of which the loss is logged by itself

# The loss of each sample (B,), or that and more values a sample to be logged, by name.
Loss = Callable[[Denoiser, Batch], Tensor | tuple[Tensor, dict[str, Tensor]]]
Watch = Callable[[Denoiser, dict | None], dict]  # the model in eval mode, and its last scores -> its scores


class Batches(Protocol):
    """An endless stream of batches on the device, which can be stopped and resumed anywhere."""

    def __next__(self) -> Batch: ...

    def state(self) -> dict: ...

    def restore(self, state: dict) -> None: ...


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
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite contradict each other: choose one")
        check_device(self.device)


class Updater:
    """The state that an update of one network changes: weights, optimizer, EMA, and what is to be logged.

    Each process updates on its part of the batch; gradients are averaged, so that all have the same weights.

    name: before the names of its tensors and logs, where several networks learn. tolerance: the share of samples whose
    loss may be not finite. Those are left out and counted, and what is not finite in a gradient is replaced; with 0,
    the first ends the run. Nothing here waits for the device: it runs on the `meta` device, where a wait would raise.
    """

    def __init__(self, options: LoopOptions, denoiser: Denoiser, loss: Loss, *, name: str = "", tolerance: float = 0.0):
        self.options, self.denoiser, self.loss = options, denoiser, loss
        self.name, self.tolerance = name, tolerance
        self.parameters = [p for p in denoiser.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.averaged = copy.deepcopy(denoiser).requires_grad_(False).eval() if options.ema else denoiser
        optimizer = torch.optim.AdamW if options.weight_decay else torch.optim.Adam
        self.optimizer = optimizer(
            self.parameters, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay,
            fused=True if self.device.type in ("cpu", "cuda") else None,
        )  # fmt: skip
        self.update_count = 0
        self.grad_norm = torch.zeros((), device=self.device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=self.device)
        self.dropped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.watched_from = 0  # the update since which dropped samples are counted
        self.start_log()

    def start_log(self) -> None:
        """Forget the sums of what is logged."""
        self.logged_from = self.update_count
        self.loss_sum = torch.zeros((), device=self.device)
        self.samples = torch.zeros(QUARTERS, device=self.device)
        self.sums: dict[str, Tensor] = {}

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
                losses = self.loss(self.denoiser, part)
            losses, others = losses if isinstance(losses, tuple) else (losses, {})
            finite = torch.isfinite(losses.detach())
            self._log_sums(part, {"loss": losses, **others}, finite)
            if self.tolerance:
                self.dropped += (~finite).sum()
                losses = torch.where(finite, losses, 0)
            loss = losses.mean() / options.accumulate
            loss.backward()
            self.loss_sum += loss.detach() / distributed.world_size()
        distributed.average(parameter.grad for parameter in self.parameters)
        if self.tolerance:
            for parameter in self.parameters:
                torch.nan_to_num(parameter.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=parameter.grad)
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

    @torch.no_grad()
    def _log_sums(self, batch: Batch, values: dict[str, Tensor], finite: Tensor) -> None:
        """Add up values of the samples with a finite loss by the quarter of the noise range that each lies in."""
        quarter = (QUARTERS * batch.uniform(TIME)).long()
        self.samples.index_add_(0, quarter, finite.float())
        for name, value in values.items():
            into = self.sums.setdefault(name, torch.zeros_like(self.samples))
            into.index_add_(0, quarter, torch.where(finite, value.detach().float(), 0))

    def log(self) -> dict:
        """What is to be logged of the updates since the last time. Waits for the device."""
        updates, samples = max(1, self.update_count - self.logged_from), distributed.total(self.samples).clamp(min=1)
        row = {
            "loss": float(distributed.total(self.loss_sum)) / updates,
            "grad_norm": float(self.grad_norm),
            "lr": self.learning_rate(),
        }
        if self.tolerance:
            row["dropped"] = int(distributed.total(self.dropped))
        for name, values in sorted(self.sums.items()):  # in one order in all processes
            row[f"{name}_quarters"] = [round(v, 6) for v in (distributed.total(values) / samples).tolist()]
        self.start_log()
        return {self.name + key: value for key, value in row.items()}

    def check_finite(self) -> None:
        """Raises UserError once a loss was not finite, or too many were. Waits for the device."""
        bad, out = int(distributed.largest(self.first_bad)), self.options.out
        if bad >= 0:
            raise UserError(
                f"the loss was not finite at update {bad} of {out}: lower --lr, or use --precision fp32, "
                "and continue with --resume from the last checkpoint before it"
            )
        dropped, samples = (
            int(distributed.total(self.dropped)),
            (self.update_count - self.watched_from) * self.options.batch_size,
        )
        if dropped > self.tolerance * max(samples, MANY_SAMPLES):
            raise UserError(
                f"the losses of {dropped} of {samples} samples were not finite up to update {self.update_count} of "
                f"{out}: lower --lr, or use --precision fp32, and continue with --resume from the last checkpoint"
            )
        if samples >= MANY_SAMPLES:
            self.dropped.zero_()
            self.watched_from = self.update_count

    def tensors(self) -> dict[str, Tensor]:
        """What `restore` needs; all processes have to ask for it together."""
        tensors = {f"weights/{name}": p for name, p in self.denoiser.network.state_dict().items()}
        if self.options.ema:
            tensors |= {f"ema/{name}": p for name, p in self.averaged.network.state_dict().items()}
        for name, parameter in self.denoiser.network.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer/{name}/{key}"] = value
        sums = {"loss_sum": self.loss_sum, "samples": self.samples, "dropped": self.dropped}
        sums |= {f"sums/{name}": value for name, value in sorted(self.sums.items())}
        tensors |= {name: distributed.total(value) for name, value in sums.items()}
        return {self.name + name: tensor for name, tensor in tensors.items()}

    def counters(self) -> dict[str, int]:
        return {"update": self.update_count, "logged_at": self.logged_from, "watched_from": self.watched_from}

    def restore(self, tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
        tensors = _under(tensors, self.name)
        self.update_count = counters["update"]
        self.logged_from = counters.get("logged_at", self.update_count)
        self.watched_from = counters.get("watched_from", self.update_count)
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
        if distributed.is_first():  # they are added up over the processes
            self.loss_sum = tensors["loss_sum"].to(self.device)
            self.samples = tensors.get("samples", self.samples).to(self.device)
            self.dropped = tensors.get("dropped", self.dropped).to(self.device)
            self.sums = {name: value.to(self.device) for name, value in _under(tensors, "sums/").items()}


def fit(denoiser: Denoiser, loss: Loss, dataset: data.Dataset, options: LoopOptions, *, name: str) -> Denoiser:
    """Train `denoiser` on a data set, in place, and return the model to use: the moving average where there is one.

    name: of this run within its folder, for logs, pictures and resuming; a new name starts at update 0.
    Raises UserError when the loss is not finite.
    """
    updater = new_updater(options, denoiser, loss)
    return run([updater], ImageBatches(dataset, options, run_seed(options.seed, name), updater.device), options, name)


def new_updater(options: LoopOptions, denoiser: Denoiser, loss: Loss, **settings) -> Updater:
    """An updater with a network that is set up as the options say."""
    denoiser.network.gradient_checkpointing = options.gradient_checkpointing
    if options.dropout is not None:
        for module in denoiser.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = options.dropout
    return Updater(options, denoiser.requires_grad_(True), loss, **settings)


def run(
    updaters: list[Updater], batches: Batches, options: LoopOptions, name: str, *, watch: Watch | None = None
) -> Denoiser:
    """Update each network in turn, each on a batch of its own, and return the last one's model in eval mode.

    The last network is the one that is saved and sampled; the others serve it and hold no gradients while it learns.
    watch: scores the model whenever it is saved; what it returns is written to scores.jsonl, and the model with the
    lowest "fd" is kept as `best`. Resumes where a run of this name was interrupted. Raises UserError.
    """
    main = updaters[-1]
    if not distributed.is_first():  # dropout differs between processes; all else is drawn by sample
        torch.manual_seed(run_seed(options.seed, f"{name}/{distributed.rank()}") % 2**63)
    for updater in updaters:
        distributed.share(updater.denoiser.state_dict().values())
    best = _resume(updaters, batches, options, name)
    if options.compile:
        for updater in updaters:
            updater.denoiser.network.compile()
    bar = tqdm(
        total=options.updates, initial=main.update_count, desc=name, unit="update", dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 20, disable=not distributed.is_first(),
    )  # fmt: skip
    logged_at, logged_time = main.update_count, time.perf_counter()
    with Interruption() as interruption, checkpoint.Writer() as writer, bar:  # closed before an error is printed
        while main.update_count < options.updates:
            for updater in updaters:
                update_alone(updater, updaters, next(batches))
            bar.update()
            n = main.update_count
            last = n == options.updates
            saving = last or n % options.save_every == 0
            asked = interruption.asked(n)  # once: a signal may come while this update is logged
            stopping = asked and not saving
            if n % WATCH_EVERY == 0 or saving or stopping:
                for updater in updaters:
                    updater.check_finite()
            if n % options.log_every == 0 or last:
                speed = (n - logged_at) * options.batch_size / (time.perf_counter() - logged_time)
                _log(updaters, options, name, speed, bar)
                logged_at, logged_time = n, time.perf_counter()
            if saving:
                paused = time.perf_counter()
                if watch is not None:
                    best = _score(main, watch, best, options, name, writer)
                _save(updaters, batches, options, name, best, writer)
                preview(main.averaged, options.out / f"samples-{name}-{n:07d}.png", options.seed)
                logged_time += time.perf_counter() - paused
            if stopping:
                _save(updaters, batches, options, name, best, writer)
            if asked and not last:
                distributed.first(writer.finish)
                bar.close()
                if distributed.is_first():
                    print(f"stopped after update {n} of {options.updates}, which is saved: go on with --resume")
                sys.exit(0)
        distributed.first(writer.finish)
    for updater in updaters:
        updater.denoiser.eval()
    return main.averaged.eval()


class Interruption:
    """SIGINT and SIGTERM ask a run to save and to stop; a second one ends it at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> Interruption:
        self.came, self.agreed = False, False
        self.before: dict[int, object] = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there alone
            self.before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        if self.came:
            os._exit(128 + number)
        self.came = True
        print("\nstopping after this update; once more to stop at once", file=sys.stderr, flush=True)

    def asked(self, update: int) -> bool:
        """Whether to stop after this update; several processes agree on it every WATCH_EVERY updates."""
        if distributed.world_size() == 1:
            return self.came
        if update % WATCH_EVERY == 0 and not self.agreed:
            self.agreed = bool(distributed.largest(torch.tensor(int(self.came))))
        return self.agreed


def update_alone(updater: Updater, updaters: list[Updater], batch: Batch) -> None:
    """Update one of several networks; the others pass gradients on but collect none."""
    for other in updaters:
        other.denoiser.requires_grad_(other is updater)
        other.denoiser.train(other is updater)
    updater.update(batch)


class ImageBatches:
    """A data set's images and labels, shuffled, on the device, as the losses take them."""

    def __init__(self, dataset: data.Dataset, options: LoopOptions, seed: int, device: torch.device):
        self.batches = data.Batches(dataset, options.batch_size, seed=seed, flip=options.flip)
        self.state, self.restore = self.batches.state, self.batches.restore
        self.device = device

    def __next__(self) -> Batch:
        batch = data.Batch(*(distributed.part(tensor) for tensor in next(self.batches)))
        return to_device(batch, self.batches.dataset.num_classes, self.batches.seed, self.device)


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
    """A grid of samples, one row a class (up to ten, evenly chosen), one column a noise; w = 1 or the nearest known."""
    if denoiser.config.kind == "encoder":
        return  # it makes noise of images
    training = denoiser.training
    model = with_guidance(denoiser.eval())
    classes = denoiser.num_classes
    low, high = denoiser.config.guidance_range or (0.0, 1.0)
    rows = min(classes or 4, 10)
    labels = torch.arange(rows).repeat_interleave(columns) * max(1, classes // rows) if classes else None
    images = torch.cat(list(generate(
        model, num=rows * columns, labels=labels, noise_ids=torch.arange(columns).repeat(rows),
        guidance=min(max(1.0, low), high) if classes else None, steps=denoiser.config.steps or steps, seed=seed,
        sampler=denoiser.config.sampler, batch_size=columns * rows,
    )))  # fmt: skip
    if distributed.is_first():
        figures.save_grid(images, path, columns=columns)
    denoiser.train(training)


def prepare(options: LoopOptions, dataset: data.Dataset | None) -> None:
    """`make_run`, by one process for all."""
    distributed.first(lambda: make_run(options, dataset))


def make_run(options: LoopOptions, dataset: data.Dataset | None) -> None:
    """Make the run's folder and its config.json; dataset None, for a recipe that needs none.

    Raises UserError if it holds another run or something else.
    """
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
            _check_same(previous, description, options)
        else:
            raise UserError(
                f"{out} already holds a run: continue it with --resume, replace it with --overwrite, "
                "or choose another --out"
            )
    make_folder(out)
    _replace_text(out / "config.json", json.dumps(description, indent=1) + "\n")


def describe(options: LoopOptions, dataset: data.Dataset | None) -> dict:
    """What config.json says: every option, the data, versions, git revision, device."""
    return {
        "recipe": _recipe(options), "processes": distributed.world_size(),
        "options": _plain(asdict(options)),
        "data_fingerprint": None if dataset is None else dataset.fingerprint,
        "versions": {
            "fastdiff": fastdiff.__version__, "python": platform.python_version(), "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "git_revision": _git_revision(),
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor() or "cpu",
    }  # fmt: skip


def _plain(values: dict) -> dict:
    """As JSON gives it back."""
    return json.loads(json.dumps(values, default=str))


def _recipe(options: LoopOptions) -> str:
    """The module whose command line the options are."""
    name = type(options).__module__
    return sys.modules[name].__spec__.name if name == "__main__" else name


def print_plan(
    config: DenoiserConfig, options: LoopOptions, lines: list[str], *, teacher: Denoiser | None = None,
    learners: int = 1, rows: int = 1,
) -> None:  # fmt: skip
    """What `--dry-run` prints: model size, what will be run, memory estimate.

    learners: networks that train; rows: network rows that an update keeps activations of, for each image of its batch.
    """
    with torch.device("meta"):
        denoiser = Denoiser(config)
    weights = sum(p.numel() for p in denoiser.parameters())
    frozen = sum(p.numel() for p in teacher.parameters()) if teacher is not None else 0
    copies = 4 * learners + bool(options.ema)  # weights, gradients, two moments; average
    part = rows * options.batch_size // options.accumulate
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
    chunks = [[None] * parts if t is None else t.chunk(parts) for t in (batch.x, batch.label, batch.sample_ids)]
    yield from (Batch(*chunk, batch.seed) for chunk in zip(*chunks, strict=True))


def _autocast(precision: str, device: torch.device):
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def _forget_after(out: Path, name: str, update: int) -> None:
    """Drop what was logged of this run after an update that it now goes on from."""
    for path in (out / "metrics.jsonl", out / "scores.jsonl"):
        if path.is_file():
            every = path.read_text().splitlines()
            kept = [line for line in every if not _is_after(line, name, update)]
            if kept != every:
                _replace_text(path, "".join(line + "\n" for line in kept))


def _replace_text(path: Path, text: str) -> None:
    """Write a file that is whole at any time."""
    beside = path.with_name(f".{path.name}.writing")
    beside.write_text(text)
    beside.replace(path)


def _is_after(line: str, name: str, update: int) -> bool:
    try:
        row = json.loads(line)
        return row["run"] == name and row["update"] > update
    except (ValueError, KeyError, TypeError):
        return True  # cut off while it was written


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """Every process's generators; dropout alone draws from them."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    size = distributed.world_size()
    every = {name: distributed.gather(state[None], size) for name, state in states.items()}
    return {f"random/{name}/{rank}": state[rank] for name, state in every.items() for rank in range(size)}


def _set_random_states(tensors: dict[str, Tensor], device: torch.device) -> None:
    """This process's, if there was one of its number before."""
    rank = distributed.rank()
    if f"random/cpu/{rank}" in tensors:
        torch.set_rng_state(tensors[f"random/cpu/{rank}"])
    if device.type == "cuda" and f"random/cuda/{rank}" in tensors:
        torch.cuda.set_rng_state(tensors[f"random/cuda/{rank}"], device)


def remove_resumable(out: Path) -> None:
    """The numbered checkpoints, which are of no use once their run or round is finished."""
    for folder in out.glob(f"{checkpoint.PREFIX}*"):
        shutil.rmtree(folder)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _log(updaters: list[Updater], options: LoopOptions, name: str, speed: float, bar: tqdm) -> None:
    main = updaters[-1]
    images = main.update_count * options.batch_size
    row = {"run": name, "update": main.update_count, "images": images, "kimg": round(images / 1000, 3)}
    for updater in reversed(updaters):
        row |= updater.log()
    row |= {"images_per_second": round(speed, 1), "time": round(time.time(), 1)}
    if main.device.type == "cuda":
        row["memory_gb"] = round(torch.cuda.max_memory_allocated(main.device) / 1e9, 3)
    bar.set_postfix_str(f"loss {row['loss']:.4f}, {speed:.0f} images/s", refresh=False)
    _append(options.out / "metrics.jsonl", row)
    _to_tensorboard(options.out, name, row)


def _to_tensorboard(out: Path, name: str, row: dict) -> None:
    """The numbers of a line of the log, for those who have TensorBoard installed."""
    writer = _tensorboard(out) if distributed.is_first() else None
    if writer is not None:
        for key, value in row.items():
            if isinstance(value, float):
                writer.add_scalar(f"{name}/{key}", value, row["images"])
        writer.flush()


@functools.cache
def _tensorboard(out: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(out / "tensorboard")


def _score(
    main: Updater, watch: Watch, best: dict | None, options: LoopOptions, name: str, writer: checkpoint.Writer
) -> dict | None:
    """Log the model's scores; keep it if none was better. Returns the best scores so far."""
    update = main.update_count
    row = {"run": name, "update": update, "images": update * options.batch_size}
    row |= watch(main.averaged.eval(), _last_score(options.out, name))
    _append(options.out / "scores.jsonl", row)
    _to_tensorboard(options.out, name, row)
    if "fd" not in row or (best is not None and best["fd"] <= row["fd"]):
        return best
    distributed.first(lambda: writer.save(options.out / "best", main.averaged))
    return row


def _last_score(out: Path, name: str) -> dict | None:
    path = out / "scores.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return next((row for row in reversed(rows) if row["run"] == name), None)


def _append(path: Path, row: dict) -> None:
    if not distributed.is_first():
        return
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def _save(
    updaters: list[Updater], batches: Batches, options: LoopOptions, name: str, best: dict | None,
    writer: checkpoint.Writer,
) -> None:  # fmt: skip
    main = updaters[-1]
    state = {"run": name, **main.counters(), "data": batches.state(), "best": best}
    tensors = _random_states(main.device)
    for updater in updaters:
        tensors |= updater.tensors()
    folder = options.out / f"{checkpoint.PREFIX}{main.update_count:07d}"
    distributed.first(lambda: writer.save(folder, main.averaged, state=state, state_tensors=tensors, keep=options.keep))


def _resume(updaters: list[Updater], batches: Batches, options: LoopOptions, name: str) -> dict | None:
    """Go on from the newest checkpoint of the run of this name, if there is one; returns the best scores so far."""
    saved = checkpoint.newest_state(options.out)
    if saved is None:
        return None
    state, tensors = saved
    if state["run"] != name:
        distributed.first(lambda: remove_resumable(options.out))
        return None
    for updater in updaters:
        updater.restore(tensors, state)
    distributed.first(lambda: _forget_after(options.out, name, state["update"]))
    _set_random_states(tensors, updaters[-1].device)
    batches.restore(state["data"])
    return state.get("best")


def _previous_options(out: Path) -> dict:
    try:
        previous = json.loads((out / "config.json").read_text())
        if previous.keys() >= {"options", "data_fingerprint"}:
            return previous
    except (OSError, ValueError, AttributeError):
        pass
    raise UserError(f"{out} is not empty and holds no run of fastdiff: choose another --out")


def _check_same(previous: dict, now: dict, options: LoopOptions) -> None:
    old, new = _completed(previous.get("options", {}), options), now["options"]
    changed = [
        f"--{key.replace('_', '-')} was {old.get(key)}, is {new.get(key)}"
        for key in sorted(old.keys() | new.keys()) if key not in MAY_CHANGE and old.get(key) != new.get(key)
        if key != "teacher" or _seen_from_out(old) != _seen_from_out(new)
    ]  # fmt: skip
    if previous.get("data_fingerprint") != now["data_fingerprint"]:
        changed.append("the data set is another one")
    if changed:
        raise UserError(f"cannot resume {new['out']} with other options: {'; '.join(changed)}")


def _seen_from_out(options: dict) -> str | None:
    """The way to the teacher, which stays the same when a folder of runs is moved."""
    teacher = options.get("teacher")
    return teacher and os.path.relpath(teacher, options["out"])


def _completed(old: dict, options: LoopOptions) -> dict:
    """Options that an earlier version did not have yet had what is now their default."""
    defaults = {field.name: field.default for field in fields(options) if field.default is not MISSING}
    completed = _plain(defaults) | old
    if isinstance(completed.get("unet"), dict):
        completed["unet"] = _plain(asdict(UNetConfig())) | completed["unet"]
    return completed


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
