"""The numbers that networks compute with: float32, or bfloat16 by autocast; and the check that chooses between them."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Literal, get_args

import torch
from torch import Tensor, nn

import kernels
from fastdiff import distributed
from fastdiff.cast import as_autocast
from fastdiff.denoiser import OURS, Denoiser

Choice = Literal["fp32", "bf16"]
Precision = Literal["fp32", "bf16", "auto"]
CHOICES = get_args(Choice)
LEAST_GAIN = 1.05  # how many times as fast bf16 must be, lest noise decide
LARGEST_ERROR = 2e-2  # ‖bf16 − fp32‖ / ‖fp32‖ of the network's output
ENOUGH = 0.1  # seconds; a call of that length can be timed, with however few images
TRIALS, SECONDS = 9, (1.0, 10.0)  # so many calls of each are timed, more or fewer to last that long


def autocast(precision: str, device: torch.device, *models: nn.Module) -> ExitStack:
    """Where networks are called: bf16 is an autocast; weights, losses and sampler states stay float32.

    models: `Denoiser` or `Guided`, whose weights are cast once for all calls within, and must not change meanwhile.
    Networks of one's own, which may do more with them than autocast, and compiled ones cast at each call.

    Raises ValueError for anything but fp32 and bf16; what auto comes to is for `choose` to say first.
    """
    if precision not in CHOICES:
        raise ValueError(f"precision must be {' or '.join(CHOICES)} here, got {precision!r}")
    with ExitStack() as stack:
        if precision == "bf16":
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            for model in models:
                if model.config.network in OURS and not any(part._compiled_call_impl for part in model.modules()):
                    stack.enter_context(as_autocast(model, device))
        return stack.pop_all()


def choose(precision: Precision, *models: nn.Module, batch_size: int, backward: bool = False) -> Choice:
    """fp32 or bf16, as asked for; for auto, what `check` finds for all of the models: `Denoiser` or `Guided`.

    batch_size: images in one call of the run; backward: whether it trains. All processes get the first one's answer.
    """
    if precision != "auto":
        return precision
    checks = (check(model, batch_size, backward=backward) for model in models)
    return agreed(lambda: "bf16" if all(found == "bf16" for found in checks) else "fp32")


def agreed(decide: Callable[[], Choice]) -> Choice:
    """The precision that the first process decides for, in all of them."""
    index = torch.tensor(CHOICES.index(distributed.first(decide) or CHOICES[0]))
    distributed.share([index])
    return CHOICES[int(index)]


def check(model: nn.Module, batch_size: int, *, backward: bool = False) -> Choice:
    """bf16 if it is LEAST_GAIN times as fast as fp32 and within LARGEST_ERROR of it, else fp32. Prints both figures."""
    gain, error = compare(model, batch_size, backward=backward)
    chosen = "bf16" if gain >= LEAST_GAIN and error <= LARGEST_ERROR else "fp32"
    print(
        f"precision {chosen}: here bf16 is {gain:.2f} times as fast as fp32 (asked for: {LEAST_GAIN:g}), and its "
        f"relative error {error:.1e} (at most {LARGEST_ERROR:g})",
        flush=True,
    )
    return chosen


def compare(model: nn.Module, batch_size: int, *, backward: bool = False) -> tuple[float, float]:
    """(time in fp32 ÷ time in bf16, relative error of bf16) of the network's calls, forward and maybe backward.

    Measured on a copy without dropout, and on noise of its own: no weight, gradient, mode or generator is changed.
    Calls alternate; their median times count. With as few images as can be timed, at most batch_size.
    """
    denoiser = copy.deepcopy(getattr(model, "denoiser", model)).eval().requires_grad_(backward)
    parameters = list(denoiser.parameters())
    learned, device = [p for p in parameters if p.requires_grad], parameters[0].device

    def run(precision: str, inputs: tuple[Tensor | None, ...]) -> Tensor:
        with torch.set_grad_enabled(backward):
            with autocast(precision, device):
                out = denoiser.network_output(*inputs)
            if backward:
                torch.autograd.grad(out, learned, torch.ones_like(out), allow_unused=True)
        return out.detach()

    def seconds(precision: str, inputs: tuple[Tensor | None, ...]) -> float:
        start = time.perf_counter()
        run(precision, inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    rows, inputs = 1, _inputs(denoiser, 1)
    if not run("fp32", inputs).any():
        _fill_zeros(parameters)
    while rows < batch_size and seconds("fp32", inputs) < ENOUGH:
        rows = min(2 * rows, batch_size)
        inputs = _inputs(denoiser, rows)
    exact, rounded = (run(precision, inputs) for precision in CHOICES)  # warms up, too
    times: dict[str, list[float]] = {precision: [] for precision in CHOICES}
    start = time.perf_counter()
    for trial in itertools.count(1):
        for precision in CHOICES if trial % 2 else reversed(CHOICES):
            times[precision].append(seconds(precision, inputs))
        if time.perf_counter() - start > SECONDS[trial < TRIALS]:
            break
    fp32, bf16 = (statistics.median(times[precision]) for precision in CHOICES)
    return fp32 / bf16, float((rounded - exact).norm() / exact.norm())


def _inputs(denoiser: Denoiser, rows: int) -> tuple[Tensor | None, ...]:
    """Noise at angles all over the schedule, each class in turn, and the largest w that is known."""
    device, limits = next(denoiser.parameters()).device, denoiser.config.guidance_range
    ids = torch.arange(rows, device=device)
    z = kernels.randn((rows, *denoiser.image_shape), seed=0, sample_ids=ids, step=0, device=device)
    label = ids % denoiser.num_classes if denoiser.num_classes else None
    w = None if limits is None else torch.full((rows,), limits[1], device=device)
    return z.contiguous(memory_format=torch.channels_last), denoiser.schedule.angle((ids + 0.5) / rows), label, w


@torch.no_grad()
def _fill_zeros(parameters: list[Tensor]) -> None:
    """Give the matrices that are zero in a new network, whose output has no relative error, PyTorch's usual start."""
    generator = torch.Generator(parameters[0].device).manual_seed(0)
    for weight in parameters:
        if weight.ndim > 1 and not weight.any():
            bound = 1 / math.sqrt(weight[0].numel())
            weight.uniform_(-bound, bound, generator=generator)
