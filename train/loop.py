"""The one training loop: batches, optimizer, EMA, checkpoints, resume, logs, pictures. It knows no loss."""

from __future__ import annotations

import copy
import functools
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy
import torch
from torch import Tensor
from tqdm import tqdm

import fastdiff
from fastdiff import checkpoint, checks, data, distributed, figures
from fastdiff.denoiser import Denoiser, DenoiserConfig, with_guidance
from fastdiff.errors import UserError
from fastdiff.generate import Sampling, generate
from fastdiff.losses.batch import TIME, Batch
from fastdiff.precision import Choice, Precision, agreed, autocast, check
from fastdiff.unet import UNetConfig

MANY_SAMPLES = 10_000  # the fewest over which the share of losses that are not finite is judged
AGREE_EVERY = 10  # updates after which several processes ask each other whether one was told to stop
MAY_CHANGE = {
    "preset",  # what it sets is compared instead
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
    "shard",
    "shard_teacher",
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
    ".*.removed",
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
    preset: str | None = None
    """Published or tried settings, applied before all other options, which override it; default: none of them."""
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
    precision: Precision = "fp32"
    """bf16: autocast of the networks; weights, losses and sampler states stay float32. auto: bf16 where it is found to
    be faster and within 2e-2 of fp32; a run that goes on keeps what it has."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    compile: bool = False
    """torch.compile the trained network."""
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
        checks.device(self.device)


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
        distributed.share(denoiser.state_dict().values())
        self.averaged = copy.deepcopy(denoiser).requires_grad_(False).eval() if options.ema else denoiser
        if options.shard:
            self.empty = copy.deepcopy(denoiser).to("meta")
            for model in {denoiser, self.averaged}:
                distributed.shard(model.network)
        self.parameters = [p for p in denoiser.parameters() if p.requires_grad]
        self.of_average, self.averaged_over = list(self.averaged.parameters()), list(denoiser.parameters())
        self.device = self.parameters[0].device
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
        if not self.denoiser.training:
            self.denoiser.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        for i, part in enumerate(_split(batch, options.accumulate), 1):
            distributed.average_next_gradients(self.denoiser.network, i == options.accumulate)
            with autocast(options.precision, self.device):
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
        if not options.shard:
            distributed.average(parameter.grad for parameter in self.parameters)
        if self.tolerance:
            for gradient in (distributed.local(parameter.grad) for parameter in self.parameters):
                torch.nan_to_num(gradient, nan=0.0, posinf=1e5, neginf=-1e5, out=gradient)
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in self.parameters])
        if options.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, options.clip_norm, norm)
        self.grad_norm = distributed.whole(norm)
        is_new = ~torch.isfinite(self.loss_sum + self.grad_norm) & (self.first_bad < 0)
        self.first_bad = torch.where(is_new, self.update_count + 1, self.first_bad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if options.ema:
            decay = min(options.ema, (1 + self.update_count) / (10 + self.update_count))
            average, weights = (
                [distributed.local(p) for p in parameters] if options.shard else parameters
                for parameters in (self.of_average, self.averaged_over)
            )
            with torch.no_grad():
                torch._foreach_lerp_(average, weights, 1 - decay)
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

    def model(self) -> Denoiser:
        """The model to save and to use, whole in every process; all have to ask for it together."""
        if not self.options.shard:
            return self.averaged
        model = copy.deepcopy(self.empty)
        weights = {name: distributed.whole(p) for name, p in self.averaged.network.state_dict().items()}
        model.network.load_state_dict(weights, assign=True)
        return model.to(memory_format=torch.channels_last)

    def tensors(self) -> dict[str, Tensor]:
        """What `restore` needs, in the first process; all have to ask for it together."""
        tensors = {f"weights/{name}": p for name, p in self.denoiser.network.state_dict().items()}
        if self.options.ema:
            tensors |= {f"ema/{name}": p for name, p in self.averaged.network.state_dict().items()}
        for name, parameter in self.denoiser.network.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer/{name}/{key}"] = value
        sums = {"loss_sum": self.loss_sum, "samples": self.samples, "dropped": self.dropped}
        sums |= {f"sums/{name}": value for name, value in sorted(self.sums.items())}
        tensors |= {name: distributed.total(value) for name, value in sums.items()}
        return {self.name + name: _for_the_first(tensor) for name, tensor in tensors.items()}

    def counters(self) -> dict[str, int]:
        return {"update": self.update_count, "logged_at": self.logged_from, "watched_from": self.watched_from}

    def restore(self, tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
        tensors = _under(tensors, self.name)
        self.update_count = counters["update"]
        self.logged_from = counters.get("logged_at", self.update_count)
        self.watched_from = counters.get("watched_from", self.update_count)
        _load(self.denoiser.network, _under(tensors, "weights/"))
        if self.options.ema:
            _load(self.averaged.network, _under(tensors, "ema/"))
        for name, parameter in self.denoiser.network.named_parameters():
            state = _under(tensors, f"optimizer/{name}/")
            self.optimizer.state[parameter] = {
                key: value.to(self.device if self.device.type == "cuda" else "cpu")
                if key == "step"
                else _filled(torch.empty_like(parameter), value)  # in the parameter's own memory layout
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
    options = settle_precision(options, denoiser)
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
    seed = run_seed(options.seed, f"{name}/{distributed.rank()}")
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    if not distributed.is_first():  # dropout differs between processes; all else is drawn by sample
        torch.manual_seed(seed % 2**63)
    best = _resume(updaters, batches, options, name)
    metrics, scores = Log(options.out / "metrics.jsonl"), Log(options.out / "scores.jsonl")
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
            logging = n % options.log_every == 0 or last
            if logging or saving or stopping:  # these wait for the device; nothing else does
                for updater in updaters:
                    updater.check_finite()
            if logging:
                speed = (n - logged_at) * options.batch_size / (time.perf_counter() - logged_time)
                _log(updaters, options, name, speed, bar, metrics)
                logged_at, logged_time = n, time.perf_counter()
            if saving:
                paused = time.perf_counter()
                if watch is not None:
                    best = _score(main, watch, best, options, name, writer, scores)
                save(updaters, batches, options, name, best, writer)
                preview(main.averaged, options.out / f"samples-{name}-{n:07d}.png", options.seed)
                logged_time += time.perf_counter() - paused
            if stopping:
                save(updaters, batches, options, name, best, writer)
            if asked:
                break
        metrics.write()
        scores.write()
        distributed.first(writer.finish)
        if interruption.asked(0):  # also by a signal that came after the last update: a round may follow
            bar.close()
            if distributed.is_first():
                n = main.update_count
                print(f"stopped after update {n} of {options.updates}, which is saved: go on with --resume")
            sys.exit(0)
    for updater in updaters:
        updater.denoiser.eval()
    return main.model().eval()


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
        """Whether to stop after this update; several processes agree on it every AGREE_EVERY updates, and at 0."""
        if distributed.world_size() == 1:
            return self.came
        if update % AGREE_EVERY == 0 and not self.agreed:
            self.agreed = bool(distributed.largest(torch.tensor(int(self.came))))
        return self.agreed


def update_alone(updater: Updater, updaters: list[Updater], batch: Batch) -> None:
    """Update one of several networks; the others pass gradients on but collect none."""
    for other in updaters if len(updaters) > 1 else ():
        other.denoiser.requires_grad_(other is updater)
        other.denoiser.train(other is updater)
    updater.update(batch)


class ImageBatches:
    """A data set's images and labels, shuffled, on the device, as the losses take them.

    A thread makes the next batch while the device computes on this one.
    """

    def __init__(self, dataset: data.Dataset, options: LoopOptions, seed: int, device: torch.device):
        self.batches = data.Batches(dataset, options.batch_size, seed=seed, flip=options.flip)
        self.device, self.thread = device, ThreadPoolExecutor(1)
        self.restore(self.batches.state())

    def __next__(self) -> Batch:
        batch, self.position = self.coming.result()
        self.coming = self.thread.submit(self._draw)
        return to_device(batch, self.batches.dataset.num_classes, self.batches.seed, self.device)

    def _draw(self) -> tuple[data.Batch, dict]:
        """This process's part of the next batch, and the state after it."""
        parts = (distributed.part(tensor) for tensor in next(self.batches))
        batch = data.Batch(*(part.pin_memory() if self.device.type == "cuda" else part for part in parts))
        return batch, self.batches.state()

    def state(self) -> dict:
        return self.position

    def restore(self, state: dict) -> None:
        self.thread.submit(self.batches.restore, state).result()  # after what the thread is drawing now
        self.position, self.coming = state, self.thread.submit(self._draw)


def to_device(batch: data.Batch, num_classes: int, seed: int, device: torch.device) -> Batch:
    """A batch of bytes as the losses take it."""
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
    guidance = min(max(1.0, low), high) if classes else None
    sampling = Sampling(guidance=guidance, steps=denoiser.config.steps or steps, seed=seed, batch_size=columns * rows)
    drawn = rows * columns if labels is None else labels
    images = torch.cat(list(generate(model, drawn, sampling, noise_ids=torch.arange(columns).repeat(rows))))
    if distributed.is_first():
        try:
            figures.save_grid(images, path, columns=columns)
        except OSError as error:
            checkpoint.warn(f"{path} was not written ({error.strerror}); training goes on")
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
    unfinished = [_beside(out / "config.json")]  # a kill may have left it
    if out.exists() and (not out.is_dir() or [*out.iterdir()] not in ([], unfinished)):
        previous = _previous_options(out)
        if options.overwrite:
            for pattern in RUN_FILES:
                for path in out.glob(pattern):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif options.resume:
            _check_same(previous, description, options)
            if options.precision == "auto":
                description["precision"] = _precision_of(previous, options.device)
        else:
            raise UserError(
                f"{out} already holds a run: continue it with --resume, replace it with --overwrite, "
                "or choose another --out"
            )
    checks.folder(out)
    _replace_text(out / "config.json", json.dumps(description, indent=1) + "\n")


def settle_precision(options: LoopOptions, denoiser: Denoiser) -> LoopOptions:
    """Options without `auto`: with the precision of the run in `out`, else one chosen now, which config.json keeps.

    denoiser: what is to learn, or a network of the same architecture; a whole one, not yet sharded.
    """
    if options.precision != "auto":
        return options

    def decide() -> Choice:
        path = options.out / "config.json"
        config = _previous_options(options.out) if path.is_file() else None
        known = _precision_of(config, options.device) if config else "auto"
        if known != "auto":
            return known
        images = options.batch_size // options.accumulate // distributed.world_size()
        chosen = check(denoiser, images, backward=True)
        if config:
            _replace_text(path, json.dumps(config | {"precision": chosen}, indent=1) + "\n")
        return chosen

    return replace(options, precision=agreed(decide))


def _precision_of(config: dict, device: str) -> Precision:
    """What the run with this config.json computes with; auto if that is not yet known, or was on another device."""
    if config["options"].get("device") != device:
        return "auto"
    return config.get("precision") or config["options"].get("precision", "fp32")


def describe(options: LoopOptions, dataset: data.Dataset | None) -> dict:
    """What config.json says: every option, the data, versions, git revision, device."""
    return {
        "recipe": _recipe(options), "processes": distributed.world_size(), "precision": options.precision,
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
    if not distributed.is_first():
        return
    with torch.device("meta"):
        denoiser = Denoiser(config)
    world = distributed.world_size()
    size = sum(p.numel() for p in denoiser.parameters())
    weights = size / (world if options.shard else 1)
    frozen = sum(p.numel() for p in teacher.parameters()) if teacher is not None else 0
    frozen /= world if options.shard_teacher else 1
    copies = 4 * learners + bool(options.ema)  # weights, gradients, two moments; average
    part = rows * options.batch_size // (options.accumulate * world)
    activations = activation_bytes(config, part, options)
    total = 4 * (copies * weights + frozen) + activations
    print(f"model        {size / 1e6:.2f} M parameters, images {'×'.join(map(str, denoiser.image_shape))}")
    for line in lines:
        print(line)
    parts = f"in {options.accumulate} parts, " if options.accumulate > 1 else ""
    print(f"batch        {options.batch_size} images, {parts}{options.precision}, {options.device}")
    print(
        f"memory       about {total / 2**30:.3g} GiB{' a process' * (world > 1)}: "
        f"weights, gradients, moments and average {4 * copies * weights / 2**30:.3g}, "
        f"frozen teacher {4 * frozen / 2**30:.3g}, activations {activations / 2**30:.3g}"
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


def _forget_after(out: Path, name: str, update: int) -> None:
    """Drop what was logged of this run after an update that it now goes on from."""
    for path in (out / "metrics.jsonl", out / "scores.jsonl"):
        if path.is_file():
            every = path.read_bytes()
            kept = b"".join(line + b"\n" for line in every.splitlines() if not _is_after(line, name, update))
            if kept != every:
                _replace_text(path, kept.decode())


def _replace_text(path: Path, text: str) -> None:
    """Write a file that is whole at any time. Raises UserError where the drive refuses it."""
    beside = _beside(path)
    try:
        beside.write_text(text)
        beside.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} was not written ({error.strerror}): make room there, or make the folder writable"
        ) from error


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.writing")


def _is_after(line: bytes, name: str, update: int) -> bool:
    try:
        row = json.loads(line)
        return row["run"] == name and row["update"] > update
    except (ValueError, KeyError, TypeError):
        return True  # damaged, or cut off while it was written


def _python_state() -> Tensor:
    _, words, normal = random.getstate()
    return torch.tensor([*words, normal is not None, normal or 0.0], dtype=torch.float64)


def _set_python_state(state: Tensor) -> None:
    *words, has_normal, normal = state.tolist()
    random.setstate((3, tuple(map(int, words)), normal if has_normal else None))


def _numpy_state() -> Tensor:
    _, words, *rest = numpy.random.get_state()
    return torch.tensor([*words.tolist(), *rest], dtype=torch.float64)


def _set_numpy_state(state: Tensor) -> None:
    *words, position, has_normal, normal = state.tolist()
    numpy.random.set_state(("MT19937", [*map(int, words)], int(position), int(has_normal), normal))


def _generators(device: torch.device) -> dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], None]]]:
    """How to get and set the state of each. Of ours dropout alone draws from them; a user's loss may."""
    generators = {
        "cpu": (torch.get_rng_state, torch.set_rng_state),
        "python": (_python_state, _set_python_state),
        "numpy": (_numpy_state, _set_numpy_state),
    }
    if device.type == "cuda":
        get, put = torch.cuda.get_rng_state, torch.cuda.set_rng_state
        generators["cuda"] = (functools.partial(get, device), functools.partial(put, device=device))
    return generators


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """Every process's generators."""
    states = {name: get() for name, (get, _) in _generators(device).items()}
    size = distributed.world_size()
    every = {name: distributed.gather(state[None], size) for name, state in states.items()}
    return {f"random/{name}/{rank}": state[rank] for name, state in every.items() for rank in range(size)}


def _set_random_states(tensors: dict[str, Tensor], device: torch.device) -> None:
    """This process's, if there was one of its number before."""
    for name, (_, put) in _generators(device).items():
        if (key := f"random/{name}/{distributed.rank()}") in tensors:
            put(tensors[key])


def remove_resumable(out: Path) -> None:
    """The numbered checkpoints, which are of no use once their run or round is finished."""
    checkpoint.remove(out, out.glob(f"{checkpoint.PREFIX}*"))


def freeze(teacher: Denoiser, options: LoopOptions) -> Denoiser:
    """A teacher that does not learn, sharded if that is asked for: copies are to be made before."""
    teacher.requires_grad_(False)
    if options.shard_teacher:
        distributed.shard(teacher.network)
    return teacher


@torch.no_grad()
def _load(network: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, parameter in network.state_dict().items():
        _filled(parameter, tensors[name])


@torch.no_grad()
def _filled(tensor: Tensor, value: Tensor) -> Tensor:
    """A tensor, sharded or not, with a value that all processes have."""
    return tensor.copy_(distributed.like(value.to(tensor.device), tensor))


def _for_the_first(tensor: Tensor) -> Tensor:
    """A tensor that the first process saves; of a sharded one, no other process keeps the whole."""
    if not distributed.is_sharded(tensor):
        return tensor
    whole = distributed.whole(tensor)
    return whole.cpu() if distributed.is_first() else tensor


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _log(updaters: list[Updater], options: LoopOptions, name: str, speed: float, bar: tqdm, log: Log) -> None:
    main = updaters[-1]
    images = main.update_count * options.batch_size
    row = {"run": name, "update": main.update_count, "images": images, "kimg": round(images / 1000, 3)}
    for updater in reversed(updaters):
        row |= updater.log()
    row |= {"images_per_second": round(speed, 1), "time": round(time.time(), 1)}
    row["memory_gb"] = round(_most_memory(main.device) / 1e9, 3)
    bar.set_postfix_str(f"loss {row['loss']:.4f}, {speed:.0f} images/s", refresh=False)
    log.append(row)
    _to_tensorboard(options.out, name, row)


def _most_memory(device: torch.device) -> int:
    """The most bytes that were in use so far: of a GPU, or else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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
    main: Updater, watch: Watch, best: dict | None, options: LoopOptions, name: str, writer: checkpoint.Writer, log: Log
) -> dict | None:  # fmt: skip
    """Log the model's scores; keep it if none was better. Returns the best scores of those that were kept."""
    update = main.update_count
    row = {"run": name, "update": update, "images": update * options.batch_size}
    row |= watch(main.averaged.eval(), _last_score(log, name))
    log.append(row)
    _to_tensorboard(options.out, name, row)
    if "fd" not in row or (best is not None and best["fd"] <= row["fd"]):
        return best
    model = main.model()
    kept = distributed.first(lambda: writer.save(options.out / "best", model) or writer.wait())
    return row if distributed.largest(torch.tensor(int(kept or 0))) else best


def _last_score(log: Log, name: str) -> dict | None:
    return next((row for row in reversed(log.rows()) if row["run"] == name), None)


class Log:
    """A file with a line of JSON a row. What a full drive does not take waits, and is written with a later row."""

    def __init__(self, path: Path):
        self.path, self.waiting, self.refused = path, b"", False

    def append(self, row: dict) -> None:
        if distributed.is_first():
            self.waiting += json.dumps(row).encode() + b"\n"
            self.write()

    def write(self) -> None:
        """Try to write what waits; warns once."""
        if not self.waiting:
            return
        try:
            with open(self.path, "ab", buffering=0) as file:
                while self.waiting:
                    self.waiting = self.waiting[file.write(self.waiting) :]
            self.refused = False
        except OSError as error:
            if not self.refused:
                checkpoint.warn(f"{self.path} cannot be written ({error.strerror}): its lines wait; training goes on")
            self.refused = True

    def rows(self) -> list[dict]:
        written = self.path.read_bytes() if self.path.is_file() else b""
        return [json.loads(line) for line in (written + self.waiting).splitlines()]


def save(
    updaters: list[Updater], batches: Batches, options: LoopOptions, name: str, best: dict | None,
    writer: checkpoint.Writer,
) -> None:  # fmt: skip
    main = updaters[-1]
    state = {"run": name, **main.counters(), "data": batches.state(), "best": best}
    tensors = _random_states(main.device)
    for updater in updaters:
        tensors |= updater.tensors()
    folder, model = options.out / f"{checkpoint.PREFIX}{main.update_count:07d}", main.model()
    distributed.first(lambda: writer.save(folder, model, state=state, state_tensors=tensors, keep=options.keep))


def _resume(updaters: list[Updater], batches: Batches, options: LoopOptions, name: str) -> dict | None:
    """Go on from the newest checkpoint of the run of this name, if there is one; returns the best scores so far."""
    state, tensors = checkpoint.newest_state(options.out) or ({"run": name, "update": 0}, {})
    distributed.wait()  # until all have read it, which the first may now remove
    if state["run"] != name:
        distributed.first(lambda: remove_resumable(options.out))
        state, tensors = {"update": 0}, {}
    distributed.first(lambda: _forget_after(options.out, name, state["update"]))
    if not tensors:
        return None
    for updater in updaters:
        updater.restore(tensors, state)
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
