"""One forward pass of our U-Net on a CPU beside diffusers' UNet2DModel: `python -m benchmarks.bench_unet_peer`.

The CIFAR-10 preset with the same weights: diffusers in float32 with its defaults, ours in float32 and in bf16 autocast
as in a sampler's loop; and the bare convolutions and matrix products of that pass, which no U-Net can do without. All
alternate in one run; prints medians, and by PyTorch's profiler where the time goes. Fails where outputs differ.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from fastdiff.cast import cast_for_good
from fastdiff.precision import LARGEST_ERROR, autocast
from fastdiff.unet import PRESETS, UNet, UNetConfig
from tests.peers.test_peers import from_diffusers

AIM = 3.0  # times as fast as diffusers
LARGEST_DIFFERENCE = 1e-4  # of the two networks' float32 outputs, relative
KINDS = {  # words in the names of PyTorch's operations; the first that is found counts
    "convolutions": ("conv",),
    "matrix products": ("addmm", "aten::mm", "bmm", "linear"),
    "attention": ("scaled_dot_product", "softmax"),
    "GroupNorm": ("group_norm",),
    "SiLU": ("silu",),
    "sums, scale and shift": ("add", "aten::mul", "aten::div"),
    "copies, layouts, dtypes": ("cat", "copy", "clone", "contiguous", "_to"),
    "the rest": ("",),
}
TINY = replace(PRESETS["cifar10"], channels=32, image_size=(8, 8), attention_resolutions=(4,), head_width=16, groups=8)
PROFILED = 3  # calls
PRODUCT = 1024  # side of two matrices whose product tells what the machine can do
LARGE = "one large product"

Work = Callable[[], object]


def pair(config: UNetConfig) -> tuple[nn.Module, UNet]:
    """diffusers' network of a configuration and ours, with the same weights: random, none zero as in a new one."""
    from diffusers import UNet2DModel

    levels = len(config.channel_mult)
    attending = [config.height(level) in config.attention_resolutions for level in range(levels)]
    peer = UNet2DModel(
        sample_size=config.image_size,
        in_channels=config.image_channels,
        out_channels=config.image_channels,
        block_out_channels=tuple(config.channels * mult for mult in config.channel_mult),
        layers_per_block=config.blocks,
        attention_head_dim=config.head_width,
        num_class_embeds=config.num_classes + 1,
        norm_num_groups=config.groups,
        attn_norm_num_groups=config.groups,
        norm_eps=config.eps,
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
        down_block_types=["AttnDownBlock2D" if here else "ResnetDownsampleBlock2D" for here in attending],
        up_block_types=["AttnUpBlock2D" if here else "ResnetUpsampleBlock2D" for here in reversed(attending)],
    ).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) / math.sqrt(parameter[0].numel()))
    ours = UNet(config).eval()
    ours.load_state_dict(from_diffusers(peer.state_dict(), levels, config.blocks, sine_first=False))
    return peer, ours


class Products(TorchFunctionMode):
    """Writes down convolutions and matrix products, each as (function, tensors, settings), and their operations."""

    def __init__(self):
        super().__init__()
        self.calls, self.operations = {"convolutions": [], "matrix products": []}, Counter()

    def _add(self, kind: str, times: int, function, *tensors: Tensor, **settings) -> None:
        self.calls[kind].append((function, tensors, settings))
        self.operations[kind] += 2 * times

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is F.conv2d:
            settings = dict(zip(("stride", "padding"), args[3:], strict=False))
            self._add("convolutions", out.numel() * args[1][0].numel(), function, *args[:3], **settings)
        elif function is F.linear:
            self._add("matrix products", out.numel() * args[0].shape[-1], function, *args)
        elif function is F.scaled_dot_product_attention:
            q = args[0].flatten(0, 1)
            p = torch.rand(len(q), q.shape[1], q.shape[1])
            self._add("matrix products", p.numel() * q.shape[2], torch.bmm, q, q.transpose(1, 2))
            self._add("matrix products", p.numel() * q.shape[2], torch.bmm, p, q)
        return out


def alone(calls: list[tuple], dtype: torch.dtype) -> Work:
    """All of them, one after the other, on tensors that have the dtype already."""
    ready = [(function, [t.detach().to(dtype) for t in tensors], settings) for function, tensors, settings in calls]

    def work() -> None:
        for function, tensors, settings in ready:
            function(*tensors, **settings)

    return work


def contenders(config: UNetConfig, batch: int) -> tuple[dict[str, Work], dict[str, Work], Counter]:
    """(the networks' calls; what they consist of; floating-point operations of that). All run under bf16 autocast."""
    peer, ours = pair(config)
    z, times = torch.randn(batch, config.image_channels, *config.image_size), torch.rand(batch)
    label = torch.arange(batch) % (config.num_classes + 1)

    half = copy.deepcopy(ours)
    cast_for_good(half, torch.bfloat16)  # once, as a sampler does for all its calls

    def call(network: UNet) -> Tensor:
        return network(z, times, label)

    def theirs() -> Tensor:
        return peer(z, 1000 * times, class_labels=label).sample

    networks = {
        "diffusers, fp32": in_fp32(theirs),
        "ours, fp32": in_fp32(partial(call, ours)),
        "ours, bf16": partial(call, half),
    }
    with Products() as seen:
        networks["ours, fp32"]()
    calls, operations = seen.calls, seen.operations
    side = torch.randn(PRODUCT, PRODUCT)
    calls[LARGE], operations[LARGE] = [(torch.mm, (side, side), {})], 2 * PRODUCT**3
    parts = {
        f"{kind}, {name}": in_fp32(alone(calls[kind], dtype))
        for kind in calls
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    return networks, parts, operations


def in_fp32(work: Work) -> Work:
    def run() -> object:
        with torch.autocast("cpu", enabled=False):
            return work()

    return run


def timed(works: dict[str, Work], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each in every round, in alternating order; of the processor where there is one thread."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in works}
    for i in range(-1, rounds):
        for name in list(works) if i % 2 else reversed(works):
            start = clock()
            works[name]()
            if i >= 0:  # the round before warms up
                taken[name].append(1e3 * (clock() - start))
    return taken


def shares(work: Work) -> dict[str, float]:
    """The part of the time that each of KINDS has."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(PROFILED):
            work()
    spent = Counter()
    for event in found.key_averages():
        kind = next(kind for kind, words in KINDS.items() if any(word in event.key for word in words))
        spent[kind] += event.self_cpu_time_total
    return {kind: spent[kind] / spent.total() for kind in KINDS}


def differences(networks: dict[str, Work]) -> dict[str, float]:
    """‖output − diffusers'‖ / ‖diffusers'‖. Raises AssertionError where it is too large."""
    expected = networks["diffusers, fp32"]()
    found = {name: float((work() - expected).norm() / expected.norm()) for name, work in networks.items()}
    assert found["ours, fp32"] < LARGEST_DIFFERENCE and found["ours, bf16"] < LARGEST_ERROR, found
    return found


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---", *["---:"] * (len(heads) - 1)], *rows])


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="a small network, to see that all works")
    options = parser.parse_args(arguments)
    batch = options.batch_size
    torch.manual_seed(0)
    config = TINY if options.tiny else PRESETS["cifar10"]
    with autocast("bf16", torch.device("cpu")):
        networks, parts, operations = contenders(config, batch)
        errors = differences(networks)
        every = timed(networks | parts, options.rounds)
        spent = {name: shares(work) for name, work in networks.items()}
    ms = {name: statistics.median(taken) for name, taken in every.items()}

    def gain(*names: str) -> float:
        """How many times as fast as diffusers these are together."""
        rounds = zip(every["diffusers, fp32"], *(every[name] for name in names), strict=True)
        return statistics.median(theirs / sum(ours) for theirs, *ours in rounds)

    rows = [[name, f"{ms[name]:.0f}", f"{gain(name):.2f}", f"{errors[name]:.1e}", ""] for name in networks]
    for name in parts:
        speed = operations[name.partition(",")[0]] / ms[name] / 1e6
        is_part = not name.startswith(LARGE)
        rows.append([name, f"{ms[name]:.0f}", f"{gain(name):.2f}" if is_part else "", "", f"{speed:.0f}"])
    where = [[kind, *(f"{ms[name] * spent[name][kind]:.0f}" for name in networks)] for kind in KINDS]
    threads = torch.get_num_threads()
    clock = "processor" if threads == 1 else "wall-clock"
    print(f"PyTorch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads, batch {batch}")
    print(f"medians of {options.rounds} rounds, {clock} time\n")
    print(table(["", "ms", "times as fast as diffusers", "difference from it", "GFLOP/s"], rows), "\n")
    print(table(["ms by kind", *networks], where), "\n")
    print(
        f"ours in bf16 is {gain('ours, bf16'):.2f} times as fast as diffusers in fp32 (aim {AIM:g}); its convolutions "
        f"and matrix products alone would be {gain('convolutions, bf16', 'matrix products, bf16'):.2f} times as fast"
    )


if __name__ == "__main__":
    main()
