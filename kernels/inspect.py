"""Compile every kernel for GPUs that are not here, and read what the compiler made of it: `python -m kernels.inspect`.

Kernels are launched on tensors without data, at the shapes of the published U-Nets (`CASES`), and each specialization
seen is compiled for each target. Exits with 1 where a kernel spills, outgrows shared memory, reads or writes images
in narrow pieces, leaves tensor cores unused, or computes in float64.
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
from functools import partial
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
    "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx90a": 64, "gfx942": 64,
}  # fmt: skip
TMEM_LIMIT = 512  # columns of Blackwell's tensor memory
WIDE_ON = ("sm_80", "sm_90", "sm_100")  # the targets on which 128-bit accesses are asserted
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


# --- The cases: what is compiled here, and timed in benchmarks/ ---


class Case(NamedTuple):
    """One call of a public operation as the U-Nets, samplers and losses make it."""

    name: str
    op: str
    """The function of `kernels`."""
    batch: int
    shape: tuple[int, ...]
    """Of one sample of the image, or of packed qkv."""
    dtype: torch.dtype
    """Of what the network computes; noisy images and coefficients are float32."""
    make: Callable[[int, str], dict]
    """(batch, device) -> keyword arguments of the operation, with random values."""
    gradients: tuple[str, ...] = ()
    """The arguments that are differentiated; none: the case runs under no_grad."""

    def arguments(self, device: str, batch: int | None = None) -> dict:
        arguments = self.make(self.batch if batch is None else batch, device)
        for name in self.gradients:
            arguments[name].requires_grad_()
        return arguments

    def forward(self, arguments: dict, function: Callable | None = None) -> Tensor:
        """The first result of `function`: the operation itself, or another with the same arguments."""
        with torch.set_grad_enabled(bool(self.gradients)):
            out = (function or getattr(kernels, self.op))(**arguments)
        return out[0] if isinstance(out, tuple) else out

    def backward(self, arguments: dict, out: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        wanted = [arguments[name] for name in self.gradients]
        return torch.autograd.grad(out, wanted, gradient, retain_graph=True)


IMAGES = {"cifar10": (256, (3, 32, 32)), "imagenet64": (64, (3, 64, 64))}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _cases() -> list[Case]:
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        for preset, (batch, shape) in IMAGES.items():
            cases += _image_cases(preset, batch, shape, dtype)
        cases += _group_norm_cases(dtype) + _attention_cases(dtype)
    return cases


def _image_cases(preset: str, batch: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Case]:
    def case(name, op, make, *gradients, **options) -> Case:
        made = partial(make, shape, dtype, **options)
        return Case(f"{name} {preset} {SHORT[dtype]}", op, batch, shape, dtype, made, gradients)

    step = {"guided": True, "clip": 1.0}
    cases = [
        case("guided_step", "guided_step", _guided_step),
        case("update", "affine_update", _update, guided=True),
        case("update+clip", "affine_update", _update, **step),
        case("update+clip+noise", "affine_update", _update, noise=True, **step),
        case("loss teacher", "affine_regression_loss", _loss, "prediction", target=torch.float32),
        case("loss stage1", "affine_regression_loss", _loss, "prediction", target=dtype),
        case("sid", "sid_generator_loss", _sid, "teacher_x", "fake_x", "generated_x"),
        case("add_noise", "add_noise", _add_noise),
        case("randn", "randn", _randn),
    ]
    if preset == "cifar10":
        nchw = {"layout": torch.contiguous_format}
        cases += [
            case("update train", "affine_update", _update, "z", "a", "b", guided=True),
            case("update+clip train", "affine_update", _update, "z", "a", "b", **step),
            case("update student", "affine_update", _update),
            case("update+percentile", "affine_update", _update, guided=True, clip="percentile"),
            case("update+clip nchw", "affine_update", _update, **step, **nchw),
            case("update+clip+noise nchw", "affine_update", _update, noise=True, **step, **nchw),
            case("add_noise nchw", "add_noise", _add_noise, **nchw),
            case("loss one term", "affine_regression_loss", _loss, "prediction", target=torch.float32, terms=1),
            case("loss value", "affine_regression_loss", _loss, target=torch.float32),
        ]
    return cases


GROUP_NORMS = {  # preset -> (batch, [(channels, height, whether scale and shift, SiLU)]), 32 groups each
    "cifar10": (256, [
        (256, 32, True, True), (256, 16, True, True), (256, 8, True, True), (256, 16, False, False),
        (512, 32, False, True), (512, 16, False, True), (512, 8, False, True),
    ]),
    "imagenet64": (64, [
        (192, 64, True, True), (384, 32, True, True), (576, 16, True, True), (768, 8, True, True),
        (192, 64, False, True), (384, 64, False, True), (576, 64, False, True), (384, 32, False, False),
        (768, 32, False, True), (960, 32, False, True), (1152, 16, False, True), (1344, 8, False, True),
        (1536, 8, False, True),
    ]),
}  # fmt: skip
ATTENTIONS = [  # (where, batch, tokens, heads, head width)
    ("cifar10", 256, 64, 4, 64), ("cifar10", 256, 256, 4, 64), ("imagenet64", 64, 64, 12, 64),
    ("imagenet64", 64, 256, 9, 64), ("imagenet64", 64, 1024, 6, 64), ("narrow", 64, 256, 8, 32),
    ("wide", 64, 256, 2, 128), ("ddpm++", 64, 256, 1, 256),
]  # fmt: skip


def _group_norm_cases(dtype: torch.dtype) -> list[Case]:
    cases = []
    for preset, (batch, norms) in GROUP_NORMS.items():
        for channels, height, modulated, silu in norms:
            if dtype == torch.float32 and preset == "imagenet64" and not modulated:
                continue  # one more form of each kernel, and nothing new in any
            make = partial(_group_norm, (channels, height, height), dtype, modulated, silu)
            what = f"norm{'+modulation' * modulated}{'+silu' * silu} {channels}@{height}"
            gradients = ("x", "weight", "bias", *(("scale", "shift") if modulated else ()))
            of_case = (batch, (channels, height, height), dtype, make)
            cases.append(Case(f"{what} {preset} {SHORT[dtype]}", "group_norm", *of_case, gradients))
            if modulated:
                cases.append(Case(f"{what} sample {preset} {SHORT[dtype]}", "group_norm", *of_case))
    return cases


def _attention_cases(dtype: torch.dtype) -> list[Case]:
    cases = []
    for where, batch, tokens, heads, width in ATTENTIONS:
        shape = (tokens, 3 * heads * width)
        name = f"attention {tokens}x{heads}x{width} {where} {SHORT[dtype]}"
        make = partial(_attention, shape, dtype, heads)
        cases.append(Case(name, "attention", batch, shape, dtype, make, ("qkv",)))
    return cases


def _image(batch, shape, dtype, device, layout=torch.channels_last) -> Tensor:
    return torch.randn(batch, *shape, device=device).to(dtype).contiguous(memory_format=layout)


def _coefficients(batch, device, *names) -> dict[str, Tensor]:
    return {name: torch.rand(batch, device=device) for name in names}


def _stream(batch, device) -> dict:
    return {"seed": 1, "sample_ids": torch.arange(batch, device=device), "step": 0}


def _update(shape, dtype, batch, device, *, guided=False, clip=None, noise=False, layout=torch.channels_last) -> dict:
    image = partial(_image, batch, shape, device=device, layout=layout)
    arguments = {"z": image(torch.float32), "a": image(dtype)} | _coefficients(batch, device, "coef_z", "coef_a")
    if guided:
        arguments |= {"b": image(dtype)} | _coefficients(batch, device, "coef_b")
    if clip is not None:
        limit = torch.full((batch,), 1.5, device=device) if clip == "percentile" else clip
        arguments["clip"] = kernels.Clip(limit, **_coefficients(batch, device, "coef_z", "coef_x"))
    if noise:
        arguments |= _coefficients(batch, device, "coef_noise") | _stream(batch, device)
    return arguments


def _guided_step(shape, dtype, batch, device) -> dict:
    image = partial(_image, batch, shape, device=device)
    numbers = _coefficients(batch, device, "guidance", "angle_from", "angle_to")
    return {"z": image(torch.float32), "v_cond": image(dtype), "v_uncond": image(dtype)} | numbers


def _loss(shape, dtype, batch, device, *, target, terms=2) -> dict:
    image = partial(_image, batch, shape, device=device)
    arguments = {"prediction": image(dtype), "z": image(torch.float32), "a": image(target), "b": None, "coef_b": None}
    arguments |= _coefficients(batch, device, "coef_z", "coef_a", "weight")
    if terms == 2:
        arguments |= {"b": image(target)} | _coefficients(batch, device, "coef_b")
    return arguments


def _sid(shape, dtype, batch, device) -> dict:
    names = ("teacher_x", "fake_x", "generated_x")
    return {name: _image(batch, shape, dtype, device) for name in names} | {"alpha": 1.0}


def _add_noise(shape, dtype, batch, device, *, layout=torch.channels_last) -> dict:
    x = _image(batch, shape, torch.float32, device, layout)
    return {"x": x, "angle": torch.rand(batch, device=device)} | _stream(batch, device)


def _randn(shape, dtype, batch, device) -> dict:
    return {"shape": (batch, *shape), "device": device} | _stream(batch, device)


def _group_norm(shape, dtype, modulated, silu, batch, device) -> dict:
    channels = shape[0]
    arguments = {"x": _image(batch, shape, dtype, device), "num_groups": 32, "silu": silu}
    arguments |= {name: torch.rand(channels, device=device) for name in ("weight", "bias")}
    if modulated:
        arguments |= {name: torch.randn(batch, channels, device=device).to(dtype) for name in ("scale", "shift")}
    return arguments


def _attention(shape, dtype, heads, batch, device) -> dict:
    return {"qkv": torch.randn(batch, *shape, device=device).to(dtype), "num_heads": heads}


CASES = _cases()


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
                case.backward(arguments, out, torch.empty_like(out))
    return forward, backward


# --- Compiling ---


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
            target, *sources = re.findall(r"%\w+", operands) or [None]
            if instruction.startswith("ld.param"):
                name = names[int(index[1])] if (index := re.search(r"_param_(\d+)", operands)) else None
                origin.setdefault(target, set()).update({name} & pointers)
            elif target and target.startswith("%rd") and not instruction.startswith(("ld", "st", "atom")):
                origin.setdefault(target, set()).update(*(origin.get(source, ()) for source in sources))
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
    """The table of docs/kernels.md: one row per kernel and dtype, over all forms that the cases need."""
    lines = [
        "# What the compiler made of the kernels",
        "",
        f"Written by `python -m kernels.inspect --markdown docs/kernels.md` with Triton {triton.__version__}.",
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
