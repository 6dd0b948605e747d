"""How fast the kernels could be, predicted without a GPU: `python -m benchmarks.roofline [--gpu H100] [--json FILE]`.

A kernel's bytes are those of its tensors, each read or written once; an eager sequence's are those of every operation
that PyTorch dispatches, its inputs read and its outputs written (`--sequences` prints them). Bytes over bandwidth and
operations over throughput are floors: no launch takes time and no cache helps. A ratio of floors is a prediction, and
`benchmarks/gpu_session.sh` measures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from benchmarks import eager
from kernels.cases import CASES, Case

try:
    from kernels.fused.launch import INTERPRETED, Launch
    from kernels.inspect import inspect, kernel_name, launches
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"benchmarks.roofline: needs Triton to know the kernels: pip install triton ({error})", file=sys.stderr)
    sys.exit(2)


class GPU(NamedTuple):
    """Figures of the vendor's data sheet; integer throughput from lanes and clock."""

    target: str
    tb_per_s: float
    tensor_tflops: float
    """Dense bfloat16 on tensor cores."""
    float_tflops: float
    """float32, a multiply-add counted as two."""
    integer_tops: float
    """32-bit additions and multiplications (CUDA C++ Programming Guide: 64 a cycle on a multiprocessor)."""
    registers: int = 65536
    """32-bit ones of a multiprocessor, or of one SIMD unit on AMD."""
    shared_kb: int = 227
    warps: int = 64
    """That a multiprocessor holds at once."""
    programs: int = 32


GPUS = {
    "A100": GPU("sm_80", 2.0, 312, 19.5, 9.7, shared_kb=163),
    "H100": GPU("sm_90", 3.35, 990, 67, 16.7),
    "H200": GPU("sm_90", 4.8, 990, 67, 16.7),
    "B200": GPU("sm_100", 8.0, 2250, 75, 18.7),  # integer rate: as on H100, the sheet has none
    "RTX 4090": GPU("sm_89", 1.008, 165, 82.6, 20.6, shared_kb=99, warps=48, programs=24),
    "MI300X": GPU("gfx942", 5.3, 1307, 163, 40.8, registers=512 * 64 * 4, shared_kb=64, warps=32, programs=32),
}


def gpu_of(name: str) -> GPU | None:
    """The GPU that a driver calls `name`, such as "NVIDIA H100 80GB HBM3"."""
    return next((gpu for known, gpu in GPUS.items() if known in name), None)


class Work(NamedTuple):
    """What something moves and computes."""

    bytes: int = 0
    dots: float = 0.0
    """Floating-point operations in matrix products."""
    floats: float = 0.0
    """Other float32 operations, a multiply-add counted as two."""
    integers: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def memory_us(self, gpu: GPU) -> float:
        return self.bytes / gpu.tb_per_s * 1e-6

    def arithmetic_us(self, gpu: GPU, dtype: torch.dtype) -> float:
        dots = self.dots / (gpu.float_tflops if dtype == torch.float32 else gpu.tensor_tflops)
        return max(dots, self.floats / gpu.float_tflops, self.integers / gpu.integer_tops) * 1e-6

    def floor_us(self, gpu: GPU, dtype: torch.dtype) -> float:
        return max(self.memory_us(gpu), self.arithmetic_us(gpu, dtype))


# --- What our kernels do ---

PHILOX = 10 * (2 + 2 + 4 + 2)  # rounds of two high and two low products, four xors and two key steps: four normals
BOX_MULLER = 55  # float operations for two normals: logarithm, root, cosine and sine
PLACE = 15  # integer operations to find where the noise of an element of a channels-last image is counted

# float32 operations per element of the largest tensor, counted in the source; enough to see that memory is the limit.
FLOATS = {
    "affine_update.update": 14,
    "affine_update.update_backward": 14,
    "regression_loss.loss": 9,
    "regression_loss.scale": 2,
    "sid_loss.loss": 9,
    "sid_loss.gradient": 12,
    "group_norm_one_pass.one_pass": 20,
    "group_norm_split.stats": 6,
    "group_norm_split.apply": 12,
}
OTHER_FLOATS = 30  # of a kernel that is not listed: SiLU's derivative and the like
# Matrix products of tokens × tokens × head width in each attention kernel.
DOTS = {"forward": 2, "backward_one_block": 5, "backward_q": 3, "backward_kv": 4}
# Two kernels share the packed gradient: dQ is a third of it, dK and dV the rest.
PART_OF_GRADIENT = {"backward_q": 1 / 3, "backward_kv": 2 / 3}


def work_of_launches(seen: list[Launch], case: Case) -> Work:
    return sum((_work_of_launch(launch, case) for launch in seen), Work())


def _work_of_launch(launch: Launch, case: Case) -> Work:
    tensors = {id(value): value for value in launch.arguments.values() if isinstance(value, Tensor)}.values()
    moved, elements = sum(map(memory_behind, tensors)), max(tensor.numel() for tensor in tensors)
    module, _, name = kernel_name(launch).partition(".")
    if module == "attention":
        tokens, packed = case.shape
        if name in PART_OF_GRADIENT:
            moved -= round((1 - PART_OF_GRADIENT[name]) * memory_behind(launch.arguments["grad_qkv"]))
        return Work(moved, DOTS[name] * 2 * case.batch * tokens * tokens * packed / 3)
    floats = FLOATS.get(f"{module}.{name}", OTHER_FLOATS) * elements
    if launch.arguments.get("sample_ids") is None:
        return Work(moved, floats=floats)
    channels, block, tile = (launch.arguments.get(name) for name in ("CHANNELS", "BLOCK", "TILE"))
    if channels and tile is None:  # one Philox for each element
        return Work(moved, floats=floats + BOX_MULLER * elements, integers=(PHILOX + PLACE) * elements)
    made = elements * block / (tile or block)  # where a tile is not all of a block, some are made in vain
    place = PLACE * made if channels else 0
    return Work(moved, floats=floats + BOX_MULLER / 2 * made, integers=PHILOX / 4 * made + place)


def memory_behind(tensor: Tensor) -> int:
    """Of memory behind a tensor: a broadcast dimension counts once."""
    strided = zip(tensor.shape, tensor.stride(), strict=True)
    return prod(size for size, stride in strided if stride) * tensor.element_size()


# --- What eager PyTorch does ---

# CUDA kernels that go over their inputs more than once: statistics first, then the result.
PASSES = {"native_group_norm": 2, "native_group_norm_backward": 2}
FREE = {"empty_like", "new_empty", "empty", "_unsafe_view", "detach"}


class Recorder(TorchDispatchMode):
    """Writes down (operation, work) of all PyTorch operations that touch memory; ours are known by their launches."""

    def __init__(self):
        super().__init__()
        self.sequence: list[tuple[str, Work]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and name not in FREE and function.namespace == "aten":
            self.sequence.append((name, _work_of_operation(name, tensors_in(args, kwargs), tensors_in(out))))
        return out


def _work_of_operation(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> Work:
    written, elements = sum(map(memory_behind, outputs)), outputs[0].numel()
    if name.startswith("randn"):  # Philox as well, one for four
        return Work(written, floats=BOX_MULLER / 2 * elements, integers=PHILOX / 4 * elements)
    dots = 2 * elements * inputs[0].shape[-1] if name == "bmm" else 0
    return Work(PASSES.get(name, 1) * sum(map(memory_behind, inputs)) + written, dots)


def tensors_in(*trees) -> list[Tensor]:
    return list({id(leaf): leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)}.values())


def sequences(case: Case, function: Callable | None = None) -> tuple[list[tuple[str, Work]], ...]:
    """The PyTorch operations of one way to compute a case, forward and backward."""
    arguments = case.arguments("meta")
    with Recorder() as forward:
        out = case.forward(arguments, function)
    if not case.gradients:
        return forward.sequence, []
    gradient = torch.empty_like(out[0])
    with Recorder() as backward:
        case.backward(arguments, out, gradient)
    return forward.sequence, backward.sequence


# --- The prediction ---


@dataclass
class Row:
    """One direction of one case."""

    case: Case
    direction: str
    kernels: int
    """What ours starts: its kernels, and small PyTorch operations around them."""
    work: Work
    large: set[str]
    """Names of the kernels that move a tenth of the bytes or more."""
    sequence: list[tuple[str, Work]]

    @property
    def name(self) -> str:
        return f"{self.case.name} {self.direction}"

    @property
    def eager(self) -> Work:
        return sum((work for _, work in self.sequence), Work())

    def ratio(self, gpu: GPU) -> float:
        """How many times longer the floor of the eager sequence is."""
        dtype = self.case.dtype
        each = sum(work.floor_us(gpu, dtype) for _, work in self.sequence)  # operations do not overlap
        return each / self.work.floor_us(gpu, dtype)


def rows(cases: list[Case]) -> list[Row]:
    """Of the cases that launch kernels: a row for each direction."""
    found = []
    for case in cases:
        with kernels.use("triton"):
            around = sequences(case)
        eagerly = sequences(case, eager.FUNCTIONS[case.op])
        for direction, *each in zip(("forward", "backward"), launches(case), around, eagerly, strict=True):
            seen, others, sequence = each
            if seen:
                work = sum((work for _, work in others), work_of_launches(seen, case))
                large = {kernel_name(each) for each in seen if 10 * _work_of_launch(each, case).bytes >= work.bytes}
                found.append(Row(case, direction, len(seen) + len(others), work, large, sequence))
    return found


def resident_warps(found: dict, gpu: GPU) -> int:
    """Warps of a kernel of these `kernels.inspect.resources` that a multiprocessor holds at once."""
    lanes = 64 if gpu.target.startswith("gfx") else 32
    warps = found["threads"] // lanes
    by_registers = gpu.registers // (-(-found["registers"] // 8) * 8 * found["threads"])
    by_shared = int(gpu.shared_kb // (found["shared_kb"] + 1)) if found["shared_kb"] else gpu.programs
    return warps * min(gpu.programs, by_registers, by_shared, gpu.warps // warps)


def occupancy(found: list[Row], gpus: dict[str, GPU]) -> dict[str, dict[str, float]]:
    """GPU -> row -> the share of its warps that the most demanding of the row's large kernels leaves it."""
    cases = {row.case.name: row.case for row in found}.values()
    made = inspect(cases, sorted({gpu.target for gpu in gpus.values()}))
    of_row = {
        row.name: [build for build in made if row.case.name in build.cases and build.kernel in row.large]
        for row in found
    }
    return {
        name: {
            row: min(resident_warps(build.found[gpu.target], gpu) for build in of_row[row]) / gpu.warps
            for row in of_row
        }
        for name, gpu in gpus.items()
    }


HEADER = f"{'':60} kernels {'MB':>7} {'memory':>7} {'arith.':>7} warps   ops {'MB':>7} {'floor':>7} ratio"


def table(found: list[Row], name: str, gpu: GPU, warps: dict[str, float] | None = None) -> str:
    """The prediction for one GPU."""
    sheet = f"{gpu.tb_per_s:g} TB/s, {gpu.tensor_tflops:g} TFLOP/s bf16, {gpu.float_tflops:g} fp32"
    lines = [f"PREDICTION for {name} ({sheet}): floors in µs, ours | eager PyTorch", HEADER]
    for row in found:
        memory, arithmetic = row.work.memory_us(gpu), row.work.arithmetic_us(gpu, row.case.dtype)
        share = f"{warps[row.name]:5.0%}" if warps else "    -"
        lines.append(
            f"{row.name:60} {row.kernels:7} {row.work.bytes / 1e6:7.1f} {memory:7.1f} {arithmetic:7.1f} {share}  "
            f"{len(row.sequence):4} {row.eager.bytes / 1e6:7.1f} {row.eager.memory_us(gpu):7.1f} {row.ratio(gpu):4.1f}×"
            f"{'  arithmetic-bound' if arithmetic > memory else ''}"
        )
    return "\n".join(lines)


def report(found: list[Row], gpus: dict[str, GPU], warps: dict[str, dict[str, float]] | None) -> list[dict]:
    """The content of --json."""
    return [
        {
            "prediction": True,
            "gpu": name,
            "case": row.case.name,
            "direction": row.direction,
            "kernels": row.kernels,
            "bytes": row.work.bytes,
            "memory_us": row.work.memory_us(gpu),
            "arithmetic_us": row.work.arithmetic_us(gpu, row.case.dtype),
            "resident_warps": warps and warps[name][row.name],
            "eager_operations": [[operation, work.bytes] for operation, work in row.sequence],
            "eager_bytes": row.eager.bytes,
            "ratio": row.ratio(gpu),
        }
        for name, gpu in gpus.items()
        for row in found
    ]


def written_out(found: list[Row]) -> str:
    """Every eager operation with its bytes per element of the case's image."""
    lines = ["What eager PyTorch does, in bytes moved per element of the image:"]
    for row in found:
        elements = row.case.batch * prod(row.case.shape)
        each = [f"{name} {work.bytes / elements:.1f}" for name, work in row.sequence if work.bytes >= elements / 10]
        lines.append(f"{row.name} ({row.work.bytes / elements:.1f} ours): {', '.join(each)}")
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    parser = _Parser(prog="benchmarks.roofline", description=__doc__.split("\n\n")[0])
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=list(GPUS), metavar="GPU", help=", ".join(GPUS))
    parser.add_argument("--case", default="bf16", help="only cases whose name contains this (default: bf16)")
    parser.add_argument("--no-occupancy", action="store_true", help="do not compile the kernels")
    parser.add_argument("--sequences", action="store_true", help="print the eager operations with their bytes")
    parser.add_argument("--json", type=Path, help="write the prediction to this file")
    options = parser.parse_args(arguments)
    if not (found := rows([case for case in CASES if options.case in case.name])):
        parser.error(f"no case that runs kernels has {options.case!r} in its name")
    if INTERPRETED and not options.no_occupancy:
        parser.error("occupancy needs compiled kernels: unset TRITON_INTERPRET, or add --no-occupancy")
    gpus = {name: GPUS[name] for name in options.gpu}
    warps = None if options.no_occupancy else occupancy(found, gpus)
    if options.sequences:
        print(written_out(found), end="\n\n")
    for name, gpu in gpus.items():
        print(table(found, name, gpu, warps and warps[name]), end="\n\n")
    print(
        "Floors are predicted from bytes, operations and data sheets, not measured; launches take time on top.\n"
        "torch.compile may fuse what eager PyTorch does not, and SDPA has about the floors of our attention."
    )
    if options.json:
        options.json.write_text(json.dumps(report(found, gpus, warps), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
