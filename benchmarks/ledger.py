"""What one pass or update costs an H100, predicted: `python -m benchmarks.ledger --preset cifar10 --batch 256`.

A preset's U-Net runs in bf16 on tensors without data, and every kernel that PyTorch or `kernels` would launch on a GPU
is entered by kind: its bytes (each tensor read or written once), its floating-point operations, and the time that they
take at the rates an H100 showed. `--update RECIPE` enters a whole update: losses, teacher, gradients, optimizer, moving
average. What cuDNN, cuBLAS and PyTorch's reductions launch around their own kernels (layouts, sums of split products,
memory set to zero) is not known here: a profiler counted 12 % more launches forward and 24 % more with the backward
pass. That time is part of the rates.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from fastdiff import cast, data
from fastdiff.denoiser import Denoiser, DenoiserConfig, Guided
from fastdiff.losses import regression
from fastdiff.losses.batch import Batch
from fastdiff.unet import PRESETS, UNet
from train.batches import to_device
from train.options import LoopOptions
from train.stage1 import student_of
from train.updater import new_updater

try:
    from benchmarks.roofline import DOTS, FREE, memory_behind, tensors_in
    from kernels.fused.launch import Launch, listen
    from kernels.inspect import kernel_name
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"benchmarks.ledger: needs Triton to know the kernels: pip install triton ({error})", file=sys.stderr)
    sys.exit(2)

HALF = torch.bfloat16
META = torch.device("meta")
RECIPES = ("teacher", "stage1", "stage2")
GUIDANCE, STEPS = (0.0, 4.0), 8

# --- The rates of an H100 80GB HBM3 with PyTorch 2.11 and Triton 3.6, as measured ---

BANDWIDTH = 3.0e12  # bytes a second of a copy, read plus written
PRODUCTS = 693e12  # operations a second of a product of bf16 matrices of side 8192
SHORTEST = 3e-6  # seconds that the least kernel takes
OF_PRODUCTS = {  # shares of PRODUCTS; cuDNN's convolutions are ahead of that one product
    "convolution": 1.07,
    "convolution_backward": 1.19,
    "mm": 0.4,
    "addmm": 0.4,
    "addmm_": 0.4,
    "attention.forward": 0.45,
    "attention.backward_one_block": 0.3,
    "attention.backward_q": 0.3,
    "attention.backward_kv": 0.3,
}
OF_BANDWIDTH = {  # shares of BANDWIDTH, where it is not all
    "attention.forward": 0.7,
    "bias": 0.43,  # PyTorch's elementwise kernel, where an operand is strided or broadcast
    "strided": 0.43,
    "bias_backward": 0.24,
    "sum": 0.24,
    "_to_copy": 0.3,
    "cat": 0.78,
    "avg_pool2d": 0.14,
    "avg_pool2d_backward": 0.045,
    "upsample_nearest2d": 0.135,
    "upsample_nearest2d_backward": 0.21,
    "group_norm_one_pass.one_pass": 0.53,
    "group_norm_one_pass.one_pass_backward": 0.65,
    "group_norm_split.stats": 0.46,
    "group_norm_split.apply": 0.87,
    "group_norm_split.sums": 0.57,
    "group_norm_split.input_gradient": 0.80,
    "residual.add": 0.87,  # not measured: as kernels of the same tiles
    "residual.gradient": 0.57,
    "resample.down": 0.8,
    "resample.up": 0.8,
}
KINDS = {  # kind -> words, of which one is in the name of the operation or of our kernel; the first kind that has one
    "GroupNorm": ("group_norm",),
    "biases": ("bias", "sum", "residual.gradient", "residual.total"),
    "convolutions": ("convolution",),
    "matrix products": ("mm",),
    "attention": ("attention",),
    "casts": ("_to_copy", "_foreach_copy_"),
    "dropout": ("dropout",),
    "pooling, upsampling": ("pool", "sample"),
    "concatenation": ("cat",),
    "optimizer, average": ("_foreach", "_fused_adam"),
    "sums of images": ("strided", "add", "mul"),
    "the rest": ("",),
}
WITHOUT = ("convolutions", "matrix products", "attention")  # kinds whose bytes are not traffic that could be saved


@dataclass
class Entry:
    """What kernels of one kind launch, move, compute and take."""

    launches: int = 0
    bytes: int = 0
    operations: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Entry) -> Entry:
        return Entry(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


class Ledger(TorchDispatchMode):
    """Enters all that is launched within its block, by kind."""

    def __init__(self):
        super().__init__()
        self.entries = dict.fromkeys(KINDS, Entry())

    @property
    def total(self) -> Entry:
        return sum(self.entries.values(), Entry())

    @property
    def traffic(self) -> int:
        """Bytes of all but convolutions, products and attention."""
        return sum(entry.bytes for kind, entry in self.entries.items() if kind not in WITHOUT)

    def __enter__(self):
        self.listening = listen(self._launched)
        self.listening.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.listening.__exit__(*exception)

    def enter(self, name: str, moved: int, operations: float = 0.0, launches: int = 1) -> None:
        kind = next(kind for kind, words in KINDS.items() if any(word in name for word in words))
        seconds = max(
            launches * SHORTEST,
            moved / (BANDWIDTH * OF_BANDWIDTH.get(name, 1.0)),
            operations / (PRODUCTS * OF_PRODUCTS.get(name, 1.0)),
        )
        self.entries[kind] += Entry(launches, moved, operations, seconds)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace != "aten" or function.is_view:
            return out
        name = function.overloadpacket.__name__
        given, made = tensors_in(args, kwargs), tensors_in(out)
        moved = sum(map(memory_behind, given + made))
        if name == "convolution":
            x, weight, bias = args[:3]
            if x.is_contiguous(memory_format=torch.channels_last):  # as cuDNN has it; the meta device forgets
                out = out.contiguous(memory_format=torch.channels_last)
            self.enter(name, moved, 2 * out.numel() * prod(weight.shape[1:]))
            if bias is not None:  # an elementwise kernel of its own
                self.enter("bias", 2 * memory_behind(out))
        elif name == "convolution_backward":
            dy, _, weight, *_, (to_x, to_weight, to_bias) = args
            self.enter(name, moved, 2 * dy.numel() * prod(weight.shape[1:]) * (to_x + to_weight), to_x + to_weight)
            if to_bias:
                self.enter("bias_backward", memory_behind(dy))
        elif name in ("mm", "addmm", "addmm_", "bmm"):
            self.enter(name, moved, 2 * made[0].numel() * args[-1].shape[-2])
        elif name.startswith(("_foreach", "_fused")):
            self.enter(name, moved, launches=_launches_of_lists(args))
        elif name in ("avg_pool2d_backward", "native_dropout_backward"):  # of the image only its shape is needed
            self.enter(name, sum(map(memory_behind, [args[0], *made])))
        elif name in ("add", "add_", "mul") and len({t.stride() for t in given + made if t.ndim}) > 1:
            self.enter("strided", moved)
        elif name not in FREE:
            self.enter(name, moved)
        return out

    def _launched(self, launch: Launch) -> None:
        given = {id(value): value for value in launch.arguments.values() if isinstance(value, Tensor)}.values()
        self.enter(kernel_name(launch), sum(map(memory_behind, given)), _products(launch))


def _products(launch: Launch) -> float:
    """Operations of attention's matrix products."""
    module, _, name = kernel_name(launch).partition(".")
    if module != "attention":
        return 0.0
    batch, tokens, packed = launch.arguments["qkv"].shape
    return DOTS[name] * 2 * batch * tokens * tokens * packed / 3


def _launches_of_lists(args: tuple) -> int:
    """Of an operation on lists of tensors: a launch has room for so many tensors, and for 320 chunks of 65536."""
    lists = [arg for arg in args if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor)]
    room = {1: 110, 2: 64, 3: 48, 4: 36}.get(len(lists), 30)
    launches = tensors = chunks = 0  # of those that wait for the next launch
    for tensor in lists[0]:
        full, chunks = divmod(chunks - (-tensor.numel() // 65536), 320)
        launches, tensors = launches + full, (0 if full else tensors) + bool(chunks)
        if tensors == room:
            launches, tensors, chunks = launches + 1, 0, 0
    return launches + bool(tensors)


class LikeCUDA(TorchFunctionMode):
    """What PyTorch does on CUDA alone: autocast to bf16, each weight once."""

    def __init__(self):
        super().__init__()
        self.weights: dict[int, Tensor] = {}
        self.on = mock.patch.object(cast, "autocast_dtype", lambda device: HALF)

    def __enter__(self):
        self.on.start()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.on.stop()

    def _cast(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dtype == HALF:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(HALF)
        if id(tensor) not in self.weights:
            self.weights[id(tensor)] = tensor.to(HALF)
        return self.weights[id(tensor)]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.conv2d, F.linear):
            return function(*map(self._cast, args[:3]), *args[3:], **(kwargs or {}))
        return function(*args, **(kwargs or {}))


@contextmanager
def _optimizers_like_cuda() -> Iterator[None]:
    """On the meta device PyTorch's optimizers would go tensor by tensor."""
    with ExitStack() as stack:
        for module in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
            for kind in ("fused", "foreach"):
                stack.enter_context(mock.patch(f"{module}._get_{kind}_kernels_supported_devices", lambda: ["meta"]))
        yield


# --- What is entered ---


def passes(preset: str, batch: int) -> dict[str, Ledger]:
    """One call of a preset's U-Net, without gradients, and one with its backward pass."""
    with META:
        network = UNet(PRESETS[preset]).eval()
    config = network.config
    shape = (batch, config.image_channels, *config.image_size)
    z = torch.empty(shape, device=META).contiguous(memory_format=torch.channels_last)
    time, label = torch.empty(batch, device=META), torch.empty(batch, dtype=torch.int64, device=META)
    forward, both = Ledger(), Ledger()
    with kernels.use("triton"):
        with torch.no_grad(), forward, LikeCUDA():
            network(z, time, label)
        with both, LikeCUDA():
            out = network(z, time, label)
            out.backward(torch.empty_like(out))
    return {"forward": forward, "forward and backward": both}


def update(preset: str, recipe: str, batch: int) -> dict[str, Ledger]:
    """One update of a recipe, as its preset has it."""
    with META:
        made = Denoiser(DenoiserConfig(PRESETS[preset]))
        first, second = (student_of(made, GUIDANCE) for _ in range(2))
    rounds = {"steps": STEPS, "guidance_range": GUIDANCE}
    model, frozen, loss = {
        "teacher": (made, first, regression.teacher),
        "stage1": (first, made, partial(_stage1, Guided(made))),
        "stage2": (second, first, lambda model, batch: regression.stage2(model, first, batch, **rounds)),
    }[recipe]
    frozen.requires_grad_(False).eval()
    ledger = Ledger()
    with kernels.use("triton"), _optimizers_like_cuda():
        options = LoopOptions(out=Path("unused"), batch_size=batch, ema=0.999, dropout=None if model is made else 0.0)
        updater = new_updater(options, model, loss)
        updater.optimizer.param_groups[0].update(fused=True, lr=options.lr)  # meta's has no learning rate on the device
        images = torch.empty(batch, *made.image_shape, dtype=torch.uint8)
        ids = torch.arange(batch)
        drawn = to_device(data.Batch(images, ids, ids), made.num_classes, 1, META)
        with LikeCUDA():
            updater.update(drawn)  # the first one makes the optimizer's state
        with ledger, LikeCUDA():
            updater.update(drawn)
    return {f"{recipe} update": ledger}


def _stage1(teacher: Guided, student: Denoiser, batch: Batch) -> Tensor:
    return regression.stage1(student, teacher, batch, guidance_range=GUIDANCE)


# --- The command ---


def table(title: str, ledger: Ledger) -> str:
    lines = [f"{title:24} launches       GB   TFLOP       ms"]
    rows = [*ledger.entries.items(), ("all", ledger.total)]
    for kind, entry in rows:
        if entry.launches:
            lines.append(
                f"{kind:24} {entry.launches:8} {entry.bytes / 1e9:8.2f} {entry.operations / 1e12:7.2f} "
                f"{1e3 * entry.seconds:8.2f}"
            )
    lines.append(f"{'but for ' + ', '.join(WITHOUT):42} {ledger.traffic / 1e9:8.2f} GB")
    return "\n".join(lines)


def report(ledgers: dict[str, Ledger]) -> dict:
    """The content of --json."""
    return {
        title: {kind: vars(entry) for kind, entry in [*ledger.entries.items(), ("all", ledger.total)]}
        for title, ledger in ledgers.items()
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    parser = _Parser(prog="benchmarks.ledger", description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="cifar10", help=f"U-Net: {', '.join(PRESETS)}")
    parser.add_argument("--batch", type=int, default=256, help="images")
    parser.add_argument("--update", choices=RECIPES, help=f"a whole update: {', '.join(RECIPES)}")
    parser.add_argument("--json", type=Path, help="write the ledger to this file")
    options = parser.parse_args(arguments)
    if options.batch < 1:
        parser.error(f"--batch must be positive, got {options.batch}")
    make: Callable[[], dict[str, Ledger]] = partial(passes, options.preset, options.batch)
    if options.update:
        make = partial(update, options.preset, options.update, options.batch)
    found = make()
    print(f"PREDICTION for an H100: {options.preset}, {options.batch} images, bf16\n")
    print("\n\n".join(table(title, ledger) for title, ledger in found.items()))
    if options.json:
        options.json.write_text(json.dumps({"prediction": True} | report(found), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
