"""Compile every kernel for GPUs that are not here, and read what the compiler made of it: `python -m kernels.inspect`.

Kernels are launched on tensors without data, at the shapes of the published U-Nets (`kernels.cases`), and each
specialization seen is compiled for each target. Exits with 1 where a kernel spills, outgrows shared memory, reads or
writes images in narrow pieces, leaves tensor cores unused, or computes in float64.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import kernels

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"kernels.inspect: needs Triton to compile the kernels: pip install triton ({error})", file=sys.stderr)
    sys.exit(2)

from .cases import CASES, Case
from .fused.launch import INTERPRETED, Launch, listen

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {  # KB that one program may have
    "sm_80": 163,
    "sm_86": 99,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_120": 99,
    "gfx90a": 64,
    "gfx942": 64,
}
TMEM_LIMIT = 512  # columns of Blackwell's tensor memory
WIDE_ON = ("sm_80", "sm_90", "sm_100")  # the targets on which 128-bit accesses are asserted
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


# --- Compiling ---


def launches(case: Case) -> tuple[list[Launch], list[Launch]]:
    """What a case launches forward, and backward, in order; nothing where it runs on the reference."""
    forward: list[Launch] = []
    backward: list[Launch] = []
    arguments = case.arguments("meta")
    with kernels.use("triton"):
        with listen(forward.append):
            out = case.forward(arguments)
        if case.gradients:
            with listen(backward.append):
                case.backward(arguments, out, torch.empty_like(out[0]))
    return forward, backward


class Specialization(NamedTuple):
    """What the compiler is told of one launch."""

    signature: dict[str, str]
    constants: dict[tuple[int], object]
    attributes: dict[tuple[int], list]
    options: dict[str, int]


def specialization(launch: Launch) -> Specialization:
    """As Triton's own launcher specializes: by types, constexprs, values of 1 and divisibility by 16."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments.get(parameter.name, parameter.default)
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = 1
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    options = {"num_warps": launch.num_warps}
    if launch.num_stages is not None:
        options["num_stages"] = launch.num_stages
    return Specialization(signature, constants, attributes, options)


def compile_launch(launch: Launch, target: str):
    """The compiled kernel, specialized as a launch would be."""
    signature, constants, attributes, options = specialization(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


# --- Reading what came out ---


def resources(compiled, target: str) -> dict[str, object]:
    """Registers, spills, stack, shared memory and global access widths (bits: how many) of a compiled kernel."""
    found: dict[str, object] = {
        "shared_kb": round(compiled.metadata.shared / 1024, 1),
        "threads": compiled.metadata.num_warps * compiled.metadata.warp_size,
        "tmem": getattr(compiled.metadata, "tmem_size", None) or 0,
        "half_dot": "tt.dot" in compiled.asm["ttir"] and bool(re.search(r"ptr<b?f16>", compiled.asm["ttir"])),
    }
    return found | (_nvidia if target.startswith("sm") else _amd)(compiled)


def _nvidia(compiled) -> dict[str, object]:
    text, usage = compiled.asm["ptx"], _cuobjdump(compiled.asm["cubin"])
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    names = [name for name, kind in compiled.src.signature.items() if kind != "constexpr"]
    accesses = _ptx_accesses(text, names, {name for name, kind in compiled.src.signature.items() if kind[0] == "*"})
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "spills": (stack + local) // 4,  # ptxas spills to the stack, and these kernels put nothing else there
        "accesses": accesses,
        "loads": _total(kind["load"] for kind in accesses.values()),
        "stores": _total(kind["store"] for kind in accesses.values()),
        "f64": ".f64" in text,
        "trap": "trap;" in text,
        "mma": bool(re.search(r"\b(wgmma|mma|tcgen05)\.", text)),
    }


def _amd(compiled) -> dict[str, object]:
    text = compiled.asm["amdgcn"]
    registers, spills, stack = (
        int(re.search(rf"\.{name}:\s+(\d+)", text)[1])
        for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    return {
        "registers": registers,
        "stack": stack,
        "local": 0,
        "spills": spills,
        "loads": _amd_widths(text, "load"),
        "stores": _amd_widths(text, "store"),
        "f64": "_f64" in text,
        "trap": "s_trap" in text,
        "mma": "v_mfma" in text,
    }


def _amd_widths(text: str, what: str) -> dict[int, int]:
    bits = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "ushort": 16, "byte": 8, "ubyte": 8}
    found = re.findall(rf"\b(?:global|buffer|flat)_{what}_([a-z]+?(?:x\d)?)\b", text)
    return _total({bits[width]: 1} for width in found if width in bits)


def _total(counts: Iterable[dict[int, int]]) -> dict[int, int]:
    total: Counter[int] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items(), reverse=True))


def _ptx_accesses(text: str, names: list[str], pointers: set[str]) -> dict[str, dict[str, dict[int, int]]]:
    """argument -> "load" and "store" -> {bits: how many}, by following each pointer argument to its accesses."""
    lines = re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]+)\s+([^;]*);", text, re.MULTILINE)
    origin: dict[str, set[str]] = {}
    before = -1
    while before != (before := sum(map(len, origin.values()))):  # again while it grows: loops carry pointers backward
        for instruction, operands in lines:
            target, *sources = re.findall(r"%\w+", operands) or [""]
            if target.startswith("%rd") and (instruction.startswith("ld.param") or instruction[:2] not in ("ld", "st")):
                given = {names[int(index)] for index in re.findall(r"_param_(\d+)", operands)} & pointers
                origin.setdefault(target, set()).update(given, *(origin.get(source, ()) for source in sources))
    found = {name: {"load": Counter(), "store": Counter()} for name in names if name in pointers}
    for instruction, operands in lines:
        if access := _access(instruction, operands):
            kind, bits, address = access
            for name in origin.get(address, ()):
                found[name][kind][bits] += 1
    return {name: {kind: dict(counts) for kind, counts in kinds.items()} for name, kinds in found.items()}


def _access(instruction: str, operands: str) -> tuple[str, int, str] | None:
    """("load" or "store", bits, address register) of a PTX instruction that touches global memory."""
    addresses = re.findall(r"\[\s*(%\w+)", operands)
    if match := re.match(r"(ld|st)\.global.*?(?:\.v(\d))?\.[bfsu](\d+)$", instruction):
        return {"ld": "load", "st": "store"}[match[1]], int(match[2] or 1) * int(match[3]), addresses[0]
    if instruction.startswith("cp.async.c") and ".global" in instruction:  # [shared], [global], bytes
        return "load", 8 * int(re.search(r"\],\s*(0x[\da-f]+|\d+)", operands.split("[", 2)[2])[1], 0), addresses[1]
    return None


def _cuobjdump(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout


# --- The limits ---


def broken_limits(found: dict, target: str, images: Iterable[str] = ()) -> list[str]:
    """What is wrong with a kernel of these `resources`, in words; images: its arguments of an image's size."""
    broken = []
    if found["spills"] or found["stack"] or found["local"]:
        broken.append(f"{found['spills']} registers spilled, {found['stack']} bytes of stack, {found['local']} local")
    if found["shared_kb"] > SHARED_LIMIT[target]:
        broken.append(f"{found['shared_kb']} KB of shared memory, where {SHARED_LIMIT[target]} KB is the limit")
    if found["tmem"] > TMEM_LIMIT:
        broken.append(f"{found['tmem']} columns of tensor memory, where {TMEM_LIMIT} is the limit")
    if found["f64"]:
        broken.append("float64 arithmetic")
    if found["trap"]:
        broken.append("a trap instruction")
    if found["half_dot"] and not found["mma"]:
        broken.append("a dot product of half-precision tensors without tensor cores")
    if target in WIDE_ON:
        for name in images:
            for kind, widths in found["accesses"].get(name, {}).items():
                if narrow := sorted(bits for bits in widths if bits < 128):
                    broken.append(f"{kind}s of {narrow[0]} bits of {name}, where 128 are wanted")
    return broken


def kernel_name(launch: Launch) -> str:
    """Such as "group_norm.apply": file and function."""
    module = launch.kernel.__module__.rpartition(".")[2]
    return f"{module}.{launch.kernel.__name__.strip('_').removesuffix('_kernel')}"


@dataclass
class Build:
    """One specialization of one kernel, and what was found in it for each target."""

    launch: Launch
    images: set[str] = field(default_factory=set)
    cases: list[str] = field(default_factory=list)
    found: dict[str, dict] = field(default_factory=dict)

    @property
    def kernel(self) -> str:
        return kernel_name(self.launch)

    @property
    def constants(self) -> str:
        """The constexprs by name, without those arguments that are merely absent."""
        values = {p.name: self.launch.arguments.get(p.name, p.default) for p in self.launch.kernel.params}
        constants = [f"{name}={value}" for name, value in values.items() if name.isupper()]
        return " ".join([*constants, f"warps={self.launch.num_warps}"])

    def compile(self, target: str) -> None:
        self.found[target] = found = resources(compile_launch(self.launch, target), target)
        found["broken"] = broken_limits(found, target, sorted(self.images))


def builds(cases: Iterable[Case]) -> list[Build]:
    """The unique specializations of all kernels that the cases launch."""
    unique: dict[str, Build] = {}
    for case in cases:
        forward, backward = launches(case)
        seen = [*forward, *backward]
        tensors = [value for launch in seen for value in launch.arguments.values() if isinstance(value, Tensor)]
        largest = max((tensor.numel() for tensor in tensors), default=0)
        for launch in seen:
            key = f"{launch.kernel.__module__}.{launch.kernel.__name__} {specialization(launch)}"
            build = unique.setdefault(key, Build(launch))
            # All but coefficients, statistics and log-sum-exps, which are far smaller
            build.images |= {
                name
                for name, value in launch.arguments.items()
                if isinstance(value, Tensor) and 8 * value.numel() >= largest
            }
            if case.name not in build.cases:
                build.cases.append(case.name)
    return list(unique.values())


def idle_cases(cases: Iterable[Case], made: list[Build]) -> list[str]:
    """The cases that launch no kernel, because they run on the reference."""
    busy = {name for build in made for name in build.cases}
    return [case.name for case in cases if case.name not in busy]


def inspect(cases: Iterable[Case], targets: list[str], progress: Callable[[int, int], None] = lambda *_: None):
    """Compile the kernels of all cases for all targets: a list of `Build`."""
    made = builds(cases)
    jobs = [(build, target) for build in made for target in targets]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # compilers work outside of Python's lock
        for done, _ in enumerate(pool.map(lambda job: job[0].compile(job[1]), jobs), 1):
            progress(done, len(jobs))
    for build in made:  # in the order asked for, not that of finishing
        build.found = {target: build.found[target] for target in targets}
    return made


# --- The command ---


def table(made: list[Build]) -> str:
    """One line per kernel, specialization and target."""
    lines = [f"{'target':7} {'regs':>4} {'spills':>6} {'stack':>5} {'KB':>6} {'mma':3} loads and stores, bits×count"]
    for build in made:
        more = f" and {len(build.cases) - 1} more" if len(build.cases) > 1 else ""
        lines.append(f"\n{build.kernel}: {build.cases[0]}{more}\n  {build.constants}")
        for target, found in build.found.items():
            widths = "  ".join(f"{kind} {_widths(found[kind])}" for kind in ("loads", "stores"))
            lines.append(
                f"{target:7} {found['registers']:4} {found['spills']:6} {found['stack']:5} {found['shared_kb']:6} "
                f"{'yes' if found['mma'] else '-':3} {widths}"
            )
            lines += [f"{'':7} BROKEN: {what}" for what in found["broken"]]
    return "\n".join(lines)


def _widths(counts: dict[int, int]) -> str:
    return " ".join(f"{bits}×{count}" for bits, count in counts.items()) or "-"


def markdown(made: list[Build], targets: list[str]) -> str:
    """The table of docs/results/kernels.md: one row per kernel and dtype, over all forms that the cases need."""
    lines = [
        "# What the compiler made of the kernels",
        "",
        f"Written by `python -m kernels.inspect --markdown docs/results/kernels.md` with Triton {triton.__version__}.",
        "",
        "A row is a kernel in all the forms that the shapes of the published U-Nets need, in one dtype of the network.",
        "Columns are the most registers per thread of any form (of 255 on NVIDIA, 512 on AMD), the most shared memory,",
        f"and the case with most registers on any target. Compiled, not run. {_verdict(made)}",
        "",
        "| kernel | dtype | forms | " + " | ".join(targets) + " | shared KB | most registers in |",
        "|---|---|---:|" + "---:|" * (len(targets) + 1) + "---|",
    ]
    groups: dict[tuple[str, str], list[Build]] = {}
    for build in made:
        groups.setdefault((build.kernel, build.cases[0].rpartition(" ")[2]), []).append(build)
    for (kernel, dtype), forms in sorted(groups.items()):
        cells = [_most_registers(forms, target) for target in targets]
        shared = max(found["shared_kb"] for build in forms for found in build.found.values())
        worst = max(forms, key=lambda build: max(found["registers"] for found in build.found.values()))
        case = worst.cases[0].removesuffix(f" {dtype}")
        lines.append(f"| {kernel} | {dtype} | {len(forms)} | {' | '.join(cells)} | {shared:g} | {case} |")
    return "\n".join(lines) + "\n"


def _most_registers(forms: list[Build], target: str) -> str:
    found = [build.found[target] for build in forms]
    return f"{max(each['registers'] for each in found)}{' **broken**' if any(each['broken'] for each in found) else ''}"


def _verdict(made: list[Build]) -> str:
    count = sum(len(build.found) for build in made)
    broken = sum(bool(found["broken"]) for build in made for found in build.found.values())
    if not broken:
        return f"All {count} keep every limit."
    return f"{broken} of {count} break a limit (the command says which)."


def report(made: list[Build]) -> list[dict]:
    """The content of --json."""
    return [
        {"kernel": build.kernel, "cases": build.cases, "constants": build.constants, "images": sorted(build.images)}
        | {"targets": build.found}
        for build in made
    ]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """0: every limit kept; 1: one broken, or a case without a kernel."""
    parser = _Parser(prog="kernels.inspect", description=__doc__.split("\n\n")[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write everything that was found to this file")
    parser.add_argument("--markdown", type=Path, help="write the table of registers to this file")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("kernels cannot be compiled while TRITON_INTERPRET is set: unset it and start again")
    if not (cases := [case for case in CASES if options.case in case.name]):
        parser.error(f"no case's name contains {options.case!r}")
    made = inspect(cases, options.target, _progress)
    print(table(made))
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "kernels": report(made)}, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(made, options.target))
    print(f"\n{_verdict(made)}")
    if idle := idle_cases(cases, made):
        print(f"{len(idle)} cases launch no kernel: {', '.join(idle)}")
    return int(bool(idle) or any(found["broken"] for build in made for found in build.found.values()))


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rcompiled {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
