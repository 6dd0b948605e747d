"""What updates, U-Nets and samplers take on a GPU: `python -m benchmarks.gpu_time --out results`.

Three times apart: the device's, the sum of its kernels'; the host's, until a call returns; and the wall's, until its
result is there. Each case is measured in a process of its own, the most important first, until --minutes are over; a
first round in many processes fills the compilers' caches. Rows go to DIR/times.jsonl; the table comes last.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import kernels
from benchmarks import eager
from benchmarks.measuring import gpu_name
from fastdiff import data
from fastdiff.denoiser import Denoiser, DenoiserConfig, Guided
from fastdiff.generate import Sampling, generate
from fastdiff.losses import regression
from fastdiff.unet import PRESETS, UNet, UNetConfig
from train import sid, stage1, stage2, teacher
from train.batches import ImageBatches
from train.iteration import Iteration
from train.updater import Updater

GUIDANCE = (0.0, 4.0)
TRIALS, WARM_UP, PROFILED = 15, 4, 3
SIDE_BY_SIDE = 4  # processes that warm up; more might not fit the GPU
WARM_SECONDS, CASE_SECONDS = 150, 90
TINY = replace(
    PRESETS["cifar10"],
    channels=16,
    channel_mult=(1, 1),
    blocks=1,
    image_size=(8, 8),
    attention_resolutions=(4,),
    head_width=16,
    groups=8,
)
RECIPES = {"teacher": teacher, "stage1": stage1, "stage2": stage2, "sid": sid}
CONTENDERS = (  # and whether torch.compile comes over them
    ("ours", False),
    ("PyTorch's operations", False),
    ("PyTorch's operations", True),
    ("diffusers", False),
    ("diffusers", True),
)
Work = Callable[[], object]
Make = Callable[[str, bool], Work]  # (device, whether it is a trial) -> what is timed


# --- Cases: what is timed, by name ---


def update(name: str, preset: str, precision: str, graph: str, batch: int, device: str, tiny: bool) -> Work:
    """An update of a recipe, as its preset has it, on random images."""
    config, batch = (TINY, 2) if tiny else (PRESETS[preset], batch)
    numbers = np.arange(4 * batch)
    shape = (len(numbers), config.image_channels, *config.image_size)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    classes = tuple(map(str, range(config.num_classes)))
    dataset = data.Dataset(images, numbers % config.num_classes, classes, "random", "train")
    model = Denoiser(DenoiserConfig(config)).to(device, memory_format=torch.channels_last)
    recipe = RECIPES[name]
    common = {"out": Path("unused"), "batch_size": batch, "precision": precision, "graph": graph, "device": device}
    options = recipe.Options(
        **(recipe.PRESETS[preset] | ({} if name == "teacher" else {"teacher": Path("unused")}) | common)
    )
    if name == "sid":
        return Iteration(*sid.learning(model, options), options)
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    student, first = (stage1.student_of(model, GUIDANCE) for _ in range(2))
    first.requires_grad_(False).eval()
    learner, loss = {
        "teacher": (model, regression.teacher),
        "stage1": (student, partial(_stage1, Guided(frozen))),
        "stage2": (
            student,
            lambda model, batch: regression.stage2(model, first, batch, steps=4, guidance_range=GUIDANCE),
        ),
    }[name]
    updater = Updater(options, learner, loss)
    return Iteration([updater], ImageBatches(dataset, options, 0, updater.device), options)


def _stage1(frozen: Guided, student: Denoiser, batch) -> Tensor:
    return regression.stage1(student, frozen, batch, guidance_range=GUIDANCE)


def network(contender: str, preset: str, backward: bool, compiled: bool, batch: int, device: str, tiny: bool) -> Work:
    """A U-Net's pass in bf16, channels-last: ours, ours of PyTorch's operations, or diffusers' of the same weights."""
    config, batch = (TINY, 2) if tiny else (PRESETS[preset], batch)
    net, call = (_diffusers if contender == "diffusers" else _ours)(config)
    net.to(device, memory_format=torch.channels_last).train(backward)
    z = torch.randn(batch, config.image_channels, *config.image_size, device=device)
    z = z.contiguous(memory_format=torch.channels_last)
    when, label = torch.rand(batch, device=device), torch.arange(batch, device=device) % config.num_classes
    run = torch.compile(call, dynamic=False, backend="eager" if tiny else "inductor") if compiled else call

    def work() -> None:
        with _operations(contender), torch.autocast(device, torch.bfloat16), torch.set_grad_enabled(backward):
            out = run(z, when, label)
        if backward:
            torch.autograd.grad(out, list(net.parameters()), torch.ones_like(out), allow_unused=True)

    return work


@contextmanager
def _operations(contender: str):
    """PyTorch's operations in our U-Net in place of ours, where that is the contender."""
    if contender != "PyTorch's operations":
        yield
        return
    ours = {"group_norm": eager.group_norm, "residual_norm": eager.residual_norm, "attention": eager.sdpa}
    with mock.patch.multiple(kernels, **ours):
        yield


def _ours(config: UNetConfig):
    net = UNet(config)
    return net, net


def _diffusers(config: UNetConfig):
    from benchmarks.bench_unet_peer import pair

    peer, _ = pair(config)
    return peer, lambda z, when, label: peer(z, 1000 * when, class_labels=label).sample


def sampling(steps: int, graph: str, batch: int, device: str, tiny: bool) -> Work:
    """A batch of a student's images."""
    config, batch = (TINY, 2) if tiny else (PRESETS["cifar10"], batch)
    config = replace(config, guidance_input=True)
    student = Denoiser(DenoiserConfig(config, kind="stage2", guidance_range=GUIDANCE)).to(device).eval()
    wanted = Sampling(guidance=1.0, steps=steps, batch_size=batch, precision="bf16", graph=graph)
    return partial(next, generate(student, 10_000 * batch, wanted))


def cases() -> dict[str, dict[str, Make]]:
    """Contenders by case, the most important first. What records graphs comes last: a failed one spoils the process."""
    ways = {"eager": "off", "graphs": "auto"}
    found: dict[str, dict[str, Make]] = {}
    for preset, batch, precision in (("cifar10", 128, "bf16"), ("digits", 64, "fp32")):
        for recipe in RECIPES:
            found[f"update, {preset}, {batch} images, {recipe}"] = {
                way: partial(update, recipe, preset, precision, graph, batch) for way, graph in ways.items()
            }
    for preset, batch in (("cifar10", 256), ("imagenet64", 64)):
        for direction in ("forward", "forward and backward"):
            with_backward = direction != "forward"
            found[f"U-Net, {preset}, {batch} images, {direction}"] = {
                f"{name}, compiled" if compiled else name: partial(
                    network, name, preset, with_backward, compiled, batch
                )
                for name, compiled in CONTENDERS
            }
    for batch in (1, 16, 256):
        for steps in (1, 4):
            found[f"sampling, {batch} images, {steps} steps"] = {
                way: partial(sampling, steps, graph, batch) for way, graph in ways.items()
            }
    return found


# --- Times ---


def measure(work: Work, device: str, trials: int) -> dict[str, float | None]:
    """Medians in ms: device, host, wall. The device's is known on a GPU alone."""
    for _ in range(WARM_UP):
        work()
    host, wall = [], []
    for _ in range(trials):
        _wait(device)
        start = time.perf_counter()
        work()
        host.append(time.perf_counter() - start)
        _wait(device)
        wall.append(time.perf_counter() - start)
    return {
        "device_ms": _device_ms(work) if device == "cuda" else None,
        "host_ms": 1e3 * statistics.median(host),
        "wall_ms": 1e3 * statistics.median(wall),
    }


def _device_ms(work: Work) -> float:
    """The sum of a call's kernels, of which PyTorch's profiler tells."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(PROFILED):
            work()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in found.key_averages()) / PROFILED / 1e3


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --- The command ---


def measure_here(case: str, tiny: bool, warm: bool = False) -> Iterator[dict]:
    """Measure the contenders of a case one after the other, a row each; or only run them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for contender, make in cases()[case].items():
        torch.manual_seed(0)
        row: dict[str, object] = {"case": case, "contender": contender}
        row |= {"gpu": gpu_name(device), "torch": torch.__version__}
        try:
            with kernels.use("reference" if tiny else None):
                work = make(device, tiny)
                if warm:
                    for _ in range(2):
                        work()
                    _wait(device)
                else:
                    row |= measure(work, device, 1 if tiny else TRIALS)
        except Exception as error:  # the others are measured all the same
            row["failed"] = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
        yield row


def measure_apart(case: str, seconds: float, *flags: str) -> list[dict]:
    """The rows of a case from a process of its own, as many as it has made in time."""
    command = [sys.executable, "-m", "benchmarks.gpu_time", "--case", case, *flags]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        out, why = ended.stdout, (ended.stderr.strip().splitlines() or [""])[-1][:100] if ended.returncode else ""
    except subprocess.TimeoutExpired as error:
        out, why = (error.stdout or b"").decode(), f"stopped after {seconds:.0f} s"
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return rows + ([{"case": case, "contender": "the rest", "failed": why}] if why else [])


def table(rows: list[dict]) -> str:
    """A line a contender."""
    lines, case = [f"{'ms, medians':40} {'device':>9} {'host':>9} {'wall':>9}"], None
    for row in rows:
        if row["case"] != case:
            lines.append(case := row["case"])
        numbers = [row.get(key) for key in ("device_ms", "host_ms", "wall_ms")]
        shown = row.get("failed") or " ".join(f"{'-' if n is None else f'{n:.2f}':>9}" for n in numbers)
        lines.append(f"  {row['contender']:38} {shown}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of times.jsonl")
    parser.add_argument("--minutes", type=float, default=6.0, help="time for everything")
    parser.add_argument("--only", default="", help="only the cases whose name begins so")
    parser.add_argument("--case", help="measure this one alone, in this process")
    parser.add_argument("--warm", action="store_true", help="with --case: run it, and measure nothing")
    parser.add_argument(
        "--tiny", action="store_true", help="a trial in this process: smallest networks, once, without a GPU too"
    )
    options = parser.parse_args(arguments)
    if options.case is not None:
        for row in measure_here(options.case, options.tiny, options.warm):
            print(json.dumps(row), flush=True)
        return 0
    names = [name for name in cases() if name.startswith(options.only)]
    if not names or not (options.tiny or torch.cuda.is_available()):
        why = "PyTorch sees no GPU here; --tiny tries the cases without one" if names else f"no case {options.only!r}"
        print(f"gpu_time: {why}", file=sys.stderr)
        return 2
    end = time.monotonic() + 60 * options.minutes

    def left(most: float) -> float:
        return max(1.0, min(most, end - time.monotonic()))

    if not options.tiny:
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            list(pool.map(lambda name: measure_apart(name, left(WARM_SECONDS), "--warm"), names))
    rows: list[dict] = []
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "times.jsonl").open("a") as file:
        for name in names:
            if time.monotonic() < end:
                found = list(measure_here(name, True)) if options.tiny else measure_apart(name, left(CASE_SECONDS))
            else:
                found = [{"case": name, "contender": "all", "failed": "no time was left"}]
            rows += found
            file.writelines(json.dumps(row) + "\n" for row in found)
            file.flush()
    print(table(rows))
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
