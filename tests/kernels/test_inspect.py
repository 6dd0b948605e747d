"""Every kernel compiled for GPUs that are not here keeps its limits, and each limit can be broken."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from fastdiff.unet import PRESETS, UNet
from kernels.cases import ATTENTIONS, CASES, GROUP_NORMS, RESIDUAL_NORMS, Case

inspect = pytest.importorskip("kernels.inspect", reason="needs Triton", exc_type=ImportError)
if inspect.INTERPRETED:
    pytest.skip("kernels cannot be compiled while TRITON_INTERPRET is set", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from kernels.fused.launch import launch  # noqa: E402

REPOSITORY = Path(__file__).parents[2]
MAIN_TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


@pytest.fixture(scope="module")
def forms():
    """Every compiled form of every kernel that the cases need, not compiled yet."""
    return inspect.builds(CASES)


@pytest.mark.parametrize("target", MAIN_TARGETS)
def test_each_kernel_keeps_its_limits(forms, target):
    one_of_each = {build.kernel: build for build in forms if build.cases[0].endswith("bf16")}
    assert len(one_of_each) > 5
    for build in one_of_each.values():
        build.compile(target)
        found = build.found[target]
        assert not found["broken"], f"{build.kernel} {build.cases[0]}: {found['broken']}"
        assert found["registers"] > 0 and (found["loads"] or found["stores"])


def test_no_case_runs_on_the_reference(forms):
    assert not inspect.idle_cases(CASES, forms)


def test_case_names_are_unique():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("preset", ["cifar10", "imagenet64"])
def test_cases_cover_the_unets(preset, monkeypatch):
    plain, residual, tokens = set(), set(), set()

    def norm(x, *_, **__):
        plain.add((x.shape[1], x.shape[2]))
        return torch.empty_like(x)

    def residual_norm(x, h, skip, *_, silu, **__):
        more = 0 if skip is None else skip.shape[1]
        residual.add((x.shape[1], more, x.shape[2], silu))
        y = torch.empty(len(x), x.shape[1] + more, *x.shape[2:])
        return y, torch.empty_like(x), torch.empty_like(x if skip is None else skip)

    def attention(qkv, heads):
        tokens.add((qkv.shape[1], heads, qkv.shape[2] // (3 * heads)))
        return qkv.chunk(3, dim=2)[0]

    for function in (norm, residual_norm, attention):
        monkeypatch.setattr(kernels, {"norm": "group_norm"}.get(function.__name__, function.__name__), function)
    with torch.device("meta"):
        unet = UNet(PRESETS[preset])
        size = PRESETS[preset].image_size
        unet(torch.empty(2, 3, *size), torch.empty(2), torch.empty(2, dtype=torch.int64))
    assert plain == set(GROUP_NORMS[preset]) and residual == set(RESIDUAL_NORMS[preset])
    assert tokens <= {each[2:] for each in ATTENTIONS}


def test_wide_accesses_are_found_by_argument(forms):
    build = next(build for build in forms if build.cases[0] == "update+clip cifar10 bf16")
    assert build.images == {"out", "z", "a", "b"}
    build.compile("sm_90")
    found = build.found["sm_90"]["accesses"]
    assert found["z"] == {"load": {128: 2}, "store": {}} and found["a"] == {"load": {128: 1}, "store": {}}
    assert found["out"] == {"load": {}, "store": {128: 2}}
    assert set(found["coefs"]["load"]) == {32}


# Kernels that break one limit each


@triton.jit
def _double(out, x):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(out + at, (tl.load(x + at).to(tl.float64) * 1.1).to(tl.float32))


@triton.jit
def _spilling(out, x):
    at = tl.arange(0, 32768)
    v = tl.load(x + at)
    tl.store(out + at, v - tl.max(v, axis=0))


@triton.jit
def _strided(out, x):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(out + at, tl.load(x + 3 * at))


@triton.jit
def _trapping(out, x):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    v = tl.load(x + at)
    tl.store(out + at, tl.inline_asm_elementwise("trap; mov.b32 $0, $1;", "=r,r", [v], tl.float32, False, 1))


@triton.jit
def _fine(out, x):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(out + at, tl.load(x + at) * 2)


BAD = {
    "double": (_double, 4, "sm_90", "float64"),
    "spilling": (_spilling, 1, "sm_90", "spilled"),
    "spilling on AMD": (_spilling, 1, "gfx942", "spilled"),
    "strided": (_strided, 4, "sm_90", "loads of 32 bits of x"),
    "trapping": (_trapping, 4, "sm_90", "trap"),
}


def case_of(monkeypatch, kernel, num_warps: int = 4):
    """The one case, of a kernel that is no operation of ours."""

    def operation(x):
        out = torch.empty_like(x)
        if kernel is not None:
            launch(kernel, (16,), out=out, x=x, num_warps=num_warps)
        return out

    monkeypatch.setattr(kernels, "deliberate", operation, raising=False)
    made = lambda batch, device: {"x": torch.empty(batch, 1024, device=device)}  # noqa: E731
    case = Case("deliberate", "deliberate", 48, (1024,), torch.float32, made)
    monkeypatch.setattr(inspect, "CASES", [case])


@pytest.mark.parametrize("name", BAD)
def test_each_limit_can_break(name, monkeypatch, capsys):
    kernel, num_warps, target, words = BAD[name]
    case_of(monkeypatch, kernel, num_warps)
    assert inspect.main(["--target", target]) == 1
    out = capsys.readouterr().out
    broken = [line for line in out.splitlines() if "BROKEN" in line]
    assert len(broken) == 1 and words in broken[0]
    assert "1 of 1 break a limit" in out


def test_limits_kept_exit_with_0(monkeypatch, capsys, tmp_path):
    case_of(monkeypatch, _fine)
    table, everything = tmp_path / "table.md", tmp_path / "all.json"
    arguments = ["--target", *MAIN_TARGETS, "--markdown", str(table), "--json", str(everything)]
    assert inspect.main(arguments) == 0
    assert "All 4 keep every limit" in capsys.readouterr().out
    assert "| test_inspect.fine |" in table.read_text() and triton.__version__ in table.read_text()
    assert '"registers"' in everything.read_text()


def test_case_without_a_kernel_exits_with_1(monkeypatch, capsys):
    case_of(monkeypatch, None)
    assert inspect.main(["--target", "sm_90"]) == 1
    assert "launch no kernel: deliberate" in capsys.readouterr().out


GOOD = {"registers": 40, "spills": 0, "stack": 0, "local": 0, "shared_kb": 40.0, "tmem": 0, "accesses": {}}
GOOD |= {"f64": False, "trap": False, "half_dot": True, "mma": True}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"shared_kb": 99.5}, "shared memory"),
        ({"tmem": 513}, "tensor memory"),
        ({"mma": False}, "tensor cores"),
        ({"stack": 8}, "stack"),
        ({"local": 8}, "local"),
    ],
)
def test_limits_of_numbers(change, words):
    assert inspect.broken_limits(GOOD, "sm_86") == []
    (broken,) = inspect.broken_limits(GOOD | change, "sm_86")
    assert words in broken


def test_narrow_asynchronous_copies_are_seen():
    ptx = """
        ld.param.b64 %rd1, [k_param_0];
        mad.wide.s32 %rd2, %r1, 4, %rd1;
        cp.async.cg.shared.global [ %r5 + 0 ], [ %rd2 + 0 ], 0x10, 0x10;
        @%p1 cp.async.ca.shared.global [ %r5 + 0 ], [ %rd2 + 16 ], 0x4;
    """
    assert inspect._ptx_accesses(ptx, ["x"], {"x"}) == {"x": {"load": {128: 1, 32: 1}, "store": {}}}


def test_accesses_of_one_of_two_images_are_of_both():
    ptx = """
        mov.b64 %rd1, k_param_0;
        mov.b64 %rd2, k_param_1;
        selp.b64 %rd3, %rd1, %rd2, %p1;
        ld.param.b64 %rd4, [%rd3];
        st.global.v2.b32 [ %rd4 + 0 ], { %r1, %r2 };
    """
    stored = {"load": {}, "store": {64: 1}}
    assert inspect._ptx_accesses(ptx, ["x", "skip"], {"x", "skip"}) == {"x": stored, "skip": stored}


WITHOUT_TRITON = """
import runpy, sys
sys.modules["triton"] = None
sys.argv[0] = "kernels.inspect"
runpy.run_module("kernels.inspect", run_name="__main__")
"""


@pytest.mark.parametrize("arguments", [["--target", "sm_70"], ["--case", "no such case"]])
def test_usage_errors_are_one_sentence(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        inspect.main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and len(error.splitlines()) == 1 and arguments[1] in error


@pytest.mark.parametrize(
    ("start", "environment", "words"),
    [
        (["-m", "kernels.inspect"], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET"),
        (["-c", WITHOUT_TRITON], {}, "needs Triton"),
    ],
)
def test_where_nothing_can_be_compiled(start, environment, words):
    env = os.environ | environment
    ended = subprocess.run([sys.executable, *start], cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == "" and len(ended.stderr.splitlines()) == 1 and words in ended.stderr
