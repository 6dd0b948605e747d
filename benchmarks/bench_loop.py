"""What a training iteration costs beyond its network calls: `python -m benchmarks.bench_loop`.

Updates of a teacher and, by themselves, the forward and backward pass and the optimizer's step that they consist of;
iterations of SiD and the network calls that they consist of. They alternate; prints ratios of medians. Fails where one
is too large.
"""

import copy
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

from fastdiff import data, distill
from fastdiff.denoiser import Denoiser, DenoiserConfig
from fastdiff.unet import PRESETS
from train import loop, sid, teacher

MOST = {"teacher": 1.03, "sid": 1.1}
TRIALS = 30
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
        torch.autograd.grad(model.network_output(inputs[0] if inputs else z, angle, label, None), inputs or [
            p for p in model.parameters() if p.requires_grad
        ], grad, allow_unused=True)  # fmt: skip

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
    loss = partial(distill.teacher, label_drop=0.1)
    updater = loop.Updater(options, copy.deepcopy(denoiser), lambda model, batch: loss(model, batch))
    batches = loop.ImageBatches(data.load("digits"), options, 0, device)
    bare = copy.deepcopy(denoiser).train()
    optimizer = torch.optim.Adam(bare.parameters(), lr=1e-3, fused=True)
    z = torch.randn(BATCH, *bare.image_shape, device=device).contiguous(memory_format=torch.channels_last)
    angle, label = torch.linspace(0.1, 1.5, BATCH, device=device), torch.arange(BATCH, device=device) % 10

    def alone() -> None:
        bare.network_output(z, angle, label, None).backward(z)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return lambda: loop.update_alone(updater, [updater], next(batches)), alone


def sid_iteration(denoiser: Denoiser, device: torch.device):
    """(an iteration of SiD; its network calls alone)."""
    options = sid.Options(teacher=Path("unused"), out=Path("unused"), batch_size=BATCH, device=str(device))
    updaters, batches = sid.learning(copy.deepcopy(denoiser), options)

    def iteration() -> None:
        for updater in updaters:
            loop.update_alone(updater, updaters, next(batches))

    return iteration, sid_passes(copy.deepcopy(denoiser).requires_grad_(False), device)


def ratio(whole, alone, device: torch.device) -> float:
    """Median time of one ÷ that of the other, alternating."""
    times = {whole: [], alone: []}
    for trial in range(TRIALS + 3):
        for work in list(times) if trial % 2 else reversed(times):
            _wait(device)
            start = time.perf_counter()
            work()
            _wait(device)
            times[work].append(time.perf_counter() - start)
    return statistics.median(times[whole][3:]) / statistics.median(times[alone][3:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    denoiser = Denoiser(DenoiserConfig(PRESETS["digits"])).to(device, memory_format=torch.channels_last).eval()
    found = {
        "teacher": ratio(*teacher_update(denoiser, device), device),
        "sid": ratio(*sid_iteration(denoiser, device), device),
    }
    what = {"teacher": "its passes and optimizer step", "sid": "its network calls"}
    for name, value in found.items():
        print(f"{name}: {value:.3f} times as long as {what[name]} alone (batch {BATCH}, {device}); limit {MOST[name]}")
    sys.exit(any(value > MOST[name] for name, value in found.items()))


if __name__ == "__main__":
    main()
