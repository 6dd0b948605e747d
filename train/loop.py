"""The one training loop: updates, logs, scores, checkpoints, pictures, resume. It knows no loss."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff import checkpoint, data, distributed, figures, files
from fastdiff.denoiser import Denoiser
from fastdiff.errors import UserError
from fastdiff.generate import Sampling, generate
from fastdiff.run import Log, Run
from fastdiff.vae import Vae, decoder
from train import generators
from train.batches import Batches, ImageBatches, run_seed
from train.interruption import Interruption
from train.iteration import Iteration
from train.options import LoopOptions
from train.updater import Loss, Updater, new_updater

Watch = Callable[[Denoiser, dict | None], dict]  # the model in eval mode, and its last scores -> its scores


def fit(denoiser: Denoiser, loss: Loss, dataset: data.Dataset, options: LoopOptions, *, name: str) -> Denoiser:
    """Train `denoiser` on a data set, in place, and return the model to use: the moving average where there is one.

    name: of this run within its folder, for logs, pictures and resuming; a new name starts at update 0.
    Raises UserError when the loss is not finite.
    """
    updater = new_updater(options, denoiser, loss)
    return run([updater], ImageBatches(dataset, options, run_seed(options.seed, name), updater.device), options, name)


def run(
    updaters: list[Updater], batches: Batches, options: LoopOptions, name: str, *, watch: Watch | None = None
) -> Denoiser:
    """Update each network in turn, each on a batch of its own, and return the last one's model in eval mode.

    The last network is the one that is saved and sampled; the others serve it and hold no gradients while it learns.
    watch: scores the model whenever it is saved; what it returns is written to scores.jsonl, and the model with the
    lowest "fd" is kept as `best`. Resumes where a run of this name was interrupted. Raises UserError.
    """
    # Initialize
    main, folder = updaters[-1], Run(options.out)
    generators.seed(run_seed(options.seed, f"{name}/{distributed.rank()}"))

    # Resume
    best = _resume(updaters, batches, folder, name)
    if options.compile:
        for updater in updaters:
            updater.denoiser.network.compile()
    iterate = Iteration(updaters, batches, options)
    speed = _Speed(main.update_count)
    decoding = {} if options.vae is None else {"vae": Vae(options.vae, main.device)}

    with Interruption() as interruption, checkpoint.Writer() as writer, _bar(main, name) as bar:
        while main.update_count < options.updates:
            # Train
            iterate()
            bar.update()

            # Maintenance
            n = main.update_count
            last = n == options.updates
            saving = last or n % options.save_every == 0
            logging = last or n % options.log_every == 0
            stopping = interruption.asked(n)  # once: a signal may come while this update is logged
            if logging or saving or stopping:  # these wait for the device; nothing else does
                for updater in updaters:
                    updater.check_finite()
            if logging:
                _log(updaters, folder, name, speed.since_last(n) * options.batch_size, bar)
            if saving or stopping:
                with speed.paused():
                    if saving and watch is not None:
                        best = _score(main, watch, best, folder, name, writer)
                    save(updaters, batches, folder, name, best, writer)
                    if saving:
                        preview(main.averaged, folder.picture(name, n), options.seed, **decoding)
            if stopping:
                break
        folder.close()
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


def _bar(main: Updater, name: str) -> tqdm:
    """Closed before an error is printed."""
    return tqdm(
        total=main.options.updates,
        initial=main.update_count,
        desc=name,
        unit="update",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 20,
        disable=not distributed.is_first(),
    )


class _Speed:
    """Updates a second between two logs, without what saving took."""

    def __init__(self, update: int):
        self.update, self.time = update, time.perf_counter()

    def since_last(self, update: int) -> float:
        updates, seconds = update - self.update, time.perf_counter() - self.time
        self.__init__(update)
        return updates / seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.time += time.perf_counter() - start


# --- What is written ---


def _log(updaters: list[Updater], folder: Run, name: str, images_per_second: float, bar: tqdm) -> None:
    main = updaters[-1]
    images = main.update_count * main.options.batch_size
    row = {"run": name, "update": main.update_count, "images": images, "kimg": round(images / 1000, 3)}
    for updater in reversed(updaters):
        row |= updater.log()
    row |= {"images_per_second": round(images_per_second, 1), "time": round(time.time(), 1)}
    row["memory_gb"] = round(_most_memory(main.device) / 1e9, 3)
    bar.set_postfix_str(f"loss {row['loss']:.4f}, {images_per_second:.0f} images/s", refresh=False)
    _append(folder.metrics, row, folder)


def _append(log: Log, row: dict, folder: Run) -> None:
    """To the log, and its numbers to TensorBoard for those who have it installed."""
    log.append(row)
    writer = folder.tensorboard if distributed.is_first() else None
    if writer is not None:
        for key, value in row.items():
            if isinstance(value, float):
                writer.add_scalar(f"{row['run']}/{key}", value, row["images"])
        writer.flush()


def _most_memory(device: torch.device) -> int:
    """The most bytes that were in use so far: of a GPU, or else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _score(
    main: Updater, watch: Watch, best: dict | None, folder: Run, name: str, writer: checkpoint.Writer
) -> dict | None:
    """Log the model's scores; keep it if none was better. Returns the best scores of those that were kept."""
    update = main.update_count
    row = {"run": name, "update": update, "images": update * main.options.batch_size}
    row |= watch(main.averaged.eval(), folder.scores.last(name))
    _append(folder.scores, row, folder)
    if "fd" not in row or (best is not None and best["fd"] <= row["fd"]):
        return best
    model = main.model()
    kept = distributed.first(lambda: writer.save(folder.best, model) or writer.wait())
    return row if distributed.largest(torch.tensor(int(kept or 0))) else best


def preview(
    denoiser: Denoiser, path: Path, seed: int, *, vae: Vae | None = None, columns: int = 10, steps: int = 32
) -> None:
    """A grid of samples, one row a class (up to ten, evenly chosen), one column a noise; w = 1 or the nearest known.

    Of latents, as a VAE decodes them, or none.
    """
    if denoiser.config.kind == "encoder":
        return  # it makes noise of images
    if denoiser.config.latents is not None and vae is None:
        return
    training = denoiser.training
    classes, (low, high) = denoiser.num_classes, denoiser.config.guidance_range or (0.0, 1.0)
    rows = min(classes or 4, 10)
    num = rows * columns
    labels = torch.arange(rows).repeat_interleave(columns) * (classes // rows) if classes else num
    sampling = Sampling(
        guidance=min(max(1.0, low), high) if classes else 0.0,
        steps=denoiser.config.steps or steps,
        seed=seed,
        batch_size=num,
    )
    images = generate(denoiser.eval(), labels, sampling, noise_ids=torch.arange(columns).repeat(rows))
    images = decoder(vae)(torch.cat(list(images)))
    if distributed.is_first():
        try:
            figures.save_grid(images, path, columns=columns)
        except UserError as error:
            files.warn(f"{error}; training goes on")
    denoiser.train(training)


# --- What a run goes on from ---


def save(
    updaters: list[Updater], batches: Batches, folder: Run, name: str, best: dict | None, writer: checkpoint.Writer
) -> None:
    main = updaters[-1]
    state = {"run": name, **main.counters(), "data": batches.state(), "best": best}
    tensors: dict[str, Tensor] = generators.states(main.device)
    for updater in updaters:
        tensors |= updater.tensors()
    place, model = folder.checkpoint(main.update_count), main.model()
    keep = main.options.keep
    distributed.first(lambda: writer.save(place, model, state=state, state_tensors=tensors, keep=keep))


def _resume(updaters: list[Updater], batches: Batches, folder: Run, name: str) -> dict | None:
    """Go on from the newest checkpoint of the round of this name, if there is one; returns the best scores so far."""
    state, tensors = folder.newest_state(name)
    if not tensors:
        return None
    for updater in updaters:
        updater.restore(tensors, state)
    generators.restore(tensors, updaters[-1].device)
    batches.restore(state["data"])
    return state.get("best")
