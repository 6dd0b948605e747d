"""What a training iteration costs beyond its network calls: `python -m benchmarks.bench_loop`.

Updates of a teacher and, by themselves, the forward and backward pass and the optimizer's step that they consist of;
iterations of SiD and the network calls that they consist of; updates with a save before them, and without. They
alternate; prints ratios of medians. Fails where one is too large.
"""

import copy
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from fastdiff import checkpoint, data, memory
from fastdiff.denoiser import Denoiser, DenoiserConfig
from fastdiff.losses import regression
from fastdiff.run import Run
from fastdiff.unet import PRESETS
from train import loop, sid, teacher
from train.batches import ImageBatches
from train.iteration import Iteration
from train.updater import Updater

MOST = {"teacher": 1.03, "sid": 1.1, "save": 1.02}
TRIALS = 30
SAVE_EVERY = 1000  # updates
UPDATES_AFTER = 50  # a save, during which it is written
SAVES = 5
BATCH = 128


def sid_passes(teacher: Denoiser, device: torch.device):
    """The network calls of one iteration of SiD on one batch, and nothing else.

    The generator runs forward twice and backward once, the fake score forward and backward twice (once for its weights,
    once for its input), the teacher once each (for its input).
    """
    generator, fake = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
    frozen_fake = copy.deepcopy(teacher)
    z = torch.randn(BATCH, *teacher.image_shape, device=device).contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(z)
    angle = torch.linspace(0.1, 1.5, BATCH, device=device)
    label = torch.arange(BATCH, device=device) % teacher.num_classes

    def backward(model: Denoiser, *inputs: torch.Tensor) -> None:
        torch.autograd.grad(
            model.network_output(inputs[0] if inputs else z, angle, label, None),
            inputs or [p for p in model.parameters() if p.requires_grad],
            grad,
            allow_unused=True,
        )

    def passes() -> None:
        with torch.no_grad():
            generator.network_output(z, angle, label, None)
        backward(fake)
        backward(generator)
        for scorer in (teacher, frozen_fake):
            backward(scorer, z.detach().requires_grad_(True))

    return passes


def teacher_update(denoiser: Denoiser, device: torch.device):
    """(an update of the loop; the same network's passes and optimizer step alone)."""
    options = teacher.Options(out=Path("unused"), batch_size=BATCH, device=str(device), ema=0.999)
    loss = partial(regression.teacher, label_drop=0.1)
    updater = Updater(options, copy.deepcopy(denoiser), lambda model, batch: loss(model, batch))
    batches = ImageBatches(data.load("digits"), options, 0, device)
    bare = copy.deepcopy(denoiser).train()
    optimizer = torch.optim.Adam(bare.parameters(), lr=1e-3, fused=True)
    z = torch.randn(BATCH, *bare.image_shape, device=device).contiguous(memory_format=torch.channels_last)
    angle, label = torch.linspace(0.1, 1.5, BATCH, device=device), torch.arange(BATCH, device=device) % 10

    def alone() -> None:
        bare.network_output(z, angle, label, None).backward(z)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Iteration([updater], batches, options), alone


def sid_iteration(denoiser: Denoiser, device: torch.device):
    """(an iteration of SiD; its network calls alone)."""
    options = sid.Options(teacher=Path("unused"), out=Path("unused"), batch_size=BATCH, device=str(device))
    updaters, batches = sid.learning(copy.deepcopy(denoiser), options)
    return Iteration(updaters, batches, options), sid_passes(copy.deepcopy(denoiser).requires_grad_(False), device)


def ratio(whole, alone, device: torch.device) -> float:
    """Median time of one ÷ that of the other, alternating; on a CPU the processor's: no other program counts."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    times = {whole: [], alone: []}
    for trial in range(TRIALS + 3):
        for work in list(times) if trial % 2 else reversed(times):
            _wait(device)
            start = clock()
            work()
            _wait(device)
            times[work].append(clock() - start)
    return statistics.median(times[whole][3:]) / statistics.median(times[alone][3:])


def save_ratio(denoiser: Denoiser, device: torch.device) -> float:
    """Time of SAVE_EVERY updates of a teacher with one save ÷ without.

    The save is followed by updates while a thread writes it, so that what the thread takes from them counts too.
    """
    with tempfile.TemporaryDirectory() as folder, checkpoint.Writer() as writer:
        options = teacher.Options(out=Path(folder), batch_size=BATCH, device=str(device), ema=0.999)
        updater = Updater(options, copy.deepcopy(denoiser), partial(regression.teacher, label_drop=0.1))
        batches = ImageBatches(data.load("digits"), options, 0, device)
        iterate = Iteration([updater], batches, options)
        times = {True: [], False: []}
        for trial in range(2 * SAVES + 2):
            saving = trial % 2 == 0
            _wait(device)
            start = time.perf_counter()
            if saving:
                loop.save([updater], batches, Run(options.out), "teacher", None, writer)
            for _ in range(UPDATES_AFTER):
                iterate()
            writer.finish()
            _wait(device)
            times[saving].append(time.perf_counter() - start)
    plain, with_save = (statistics.median(times[saving][1:]) for saving in (False, True))
    return 1 + max(0.0, with_save - plain) / (plain / UPDATES_AFTER * SAVE_EVERY)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    torch.manual_seed(0)
    memory.keep_freed()  # as every command does on a CPU
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    denoiser = Denoiser(DenoiserConfig(PRESETS["digits"])).to(device, memory_format=torch.channels_last).eval()
    found = {
        "teacher": ratio(*teacher_update(denoiser, device), device),
        "sid": ratio(*sid_iteration(denoiser, device), device),
        "save": save_ratio(denoiser, device),
    }
    what = {
        "teacher": "an update as its passes and optimizer step alone",
        "sid": "an iteration as its network calls alone",
        "save": f"{SAVE_EVERY} updates with a save as without",
    }
    for name, value in found.items():
        print(f"{name}: {value:.4f} times as long {what[name]} (batch {BATCH}, {device}); limit {MOST[name]}")
    sys.exit(any(value > MOST[name] for name, value in found.items()))


if __name__ == "__main__":
    main()
